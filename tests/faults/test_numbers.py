"""Non-finite gradients and replicas that differ."""

import math

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pdn.checkpoint import verify
from pdn.checkpoint_format import ShardReader, step_directory
from tests.faults import rig
from tests.faults.conftest import amount

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def non_finite_tensors(home) -> int:
    """Non-finite tensors over all checkpoints of a run."""
    found = 0
    for step in rig.verified_steps(home):
        path = step_directory(home / "run" / "checkpoints", step)
        manifest = verify(path)
        tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in manifest.tensors.items()}
        dcp.load(tensors, storage_reader=ShardReader(path, manifest), no_dist=True)
        found += sum(not torch.isfinite(tensor).all() for tensor in tensors.values())
    return found


@amount(1, 8)
def test_a_non_finite_gradient_on_one_rank_is_skipped_by_all_together(tmp_path, base, table, trials):
    with table(
        "14", "NaN in the gradient of one rank, at a step of a save too", "that step skipped on all, nothing non-finite saved"
    ) as row:
        for trial in range(trials):
            home, step, kind = tmp_path / str(trial), 5 + trial, ("fsdp", "ddp")[trial % 2]
            words = rig.overrides(home, base, f"parallel={kind}")
            started = rig.launch(home, 2, words, f"nan@{step}:{trial % 2}")
            assert started.wait() == [0, 0], started.text()
            records = rig.read_lines(home, "metrics.jsonl")
            assert [record["step"] for record in records if record["skipped"]] == [step]
            assert all(math.isfinite(float(record["loss"])) for record in records)
            assert f"samples {rig.BATCH * (step - 1)} to {rig.BATCH * step - 1}" in started.text()
            assert non_finite_tensors(home) == 0
            rig.assert_ledger_complete(home)
            row.trials += 1


@amount(1, 4)
def test_the_third_non_finite_step_in_a_row_stops_the_run(tmp_path, base, table, trials):
    with table("14.1", "NaN three steps in a row on one rank", "70 on all ranks, nothing non-finite saved") as row:
        for trial in range(trials):
            home, step = tmp_path / str(trial), 5 + 2 * trial
            started = rig.launch(home, 2, rig.overrides(home, base), f"nan@{step}-{step + 2}:1")
            assert started.wait() == [70, 70], started.text()
            assert started.text().count("pdn[E-NONFINITE]") == 1
            assert rig.status(home)["exit_code"] == 70 and "E-NONFINITE" in rig.status(home)["reason"]
            assert non_finite_tensors(home) == 0
            row.trials += 1


@amount(1, 4)
def test_a_replica_that_differs_is_named_within_the_check_interval(tmp_path, base, table, trials):
    with table("23", "a parameter of one replica of four changed by 0.1 %", "70 within the interval, the rank named") as row:
        for trial in range(trials):
            home, parallel = tmp_path / str(trial), (["parallel=ddp"], ["parallel=hsdp", "parallel.replicas=2"])[trial % 2]
            words = rig.overrides(home, base, *parallel, "trainer.micro_batch_size=1", "trainer.divergence_check_every=4")
            started = rig.launch(home, 4, words, "perturb@5:2")
            assert started.wait() == [70] * 4, started.text()
            assert rig.computed_step(home) == 8
            named = "rank 2 holds" if trial % 2 == 0 else "rank 0 or 2 holds"
            assert f"pdn[E-DIVERGED] step 8: {named}" in started.text()
            assert max(rig.verified_steps(home)) == 4
            row.trials += 1
