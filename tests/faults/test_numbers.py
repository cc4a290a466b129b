"""Non-finite gradients and replicas that differ."""

import math
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pdn.checkpoint.format import step_directory, verify
from pdn.checkpoint.shards import ShardReader
from tests.faults import rig
from tests.faults.conftest import amount

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def non_finite_tensors(home) -> int:
    """Count non-finite tensors over all checkpoints of a run."""
    found = 0
    for step in rig.verified_steps(home):
        path = step_directory(home / "run" / "checkpoints", step)
        manifest = verify(path)
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (dtype, shape) in manifest.tensors.items()
        }
        dcp.load(tensors, storage_reader=ShardReader(path, manifest), no_dist=True)
        found += sum(not torch.isfinite(tensor).all() for tensor in tensors.values())
    return found


@amount(1, 8)
def test_a_non_finite_gradient_on_one_rank_is_skipped_by_all_together(
    tmp_path, base, table, trials
):
    with table(
        "14",
        "NaN in the gradient of one rank, at a step of a save too",
        "that step skipped on all, nothing non-finite saved",
    ) as row:
        for trial in range(trials):
            home, step, kind = tmp_path / str(trial), 5 + trial, ("fsdp", "ddp")[trial % 2]
            words = rig.overrides(home, base, f"parallel={kind}")
            started = rig.launch(home, 2, words, f"nan@{step}:{trial % 2}")
            assert started.wait() == [0, 0], started.text()
            records = [
                record for record in rig.read_lines(home, "metrics.jsonl") if "loss" in record
            ]
            assert [record["step"] for record in records if record["skipped"]] == [step]
            assert all(math.isfinite(float(record["loss"])) for record in records)
            assert f"samples {rig.BATCH * (step - 1)} to {rig.BATCH * step - 1}" in started.text()
            assert non_finite_tensors(home) == 0
            rig.assert_ledger_complete(home)
            row.trials += 1


@amount(1, 4)
def test_the_third_non_finite_step_in_a_row_stops_the_run(tmp_path, base, table, trials):
    with table(
        "14.1", "NaN three steps in a row on one rank", "70 on all ranks, nothing non-finite saved"
    ) as row:
        for trial in range(trials):
            home, step = tmp_path / str(trial), 5 + 2 * trial
            started = rig.launch(home, 2, rig.overrides(home, base), f"nan@{step}-{step + 2}:1")
            assert started.wait() == [70, 70], started.text()
            assert started.text().count("pdn[E-NONFINITE]") == 1
            assert (
                rig.status(home)["exit_code"] == 70 and "E-NONFINITE" in rig.status(home)["reason"]
            )
            assert non_finite_tensors(home) == 0
            row.trials += 1


@amount(1, 4)
def test_a_run_does_not_finish_on_a_step_without_a_finite_loss(tmp_path, base, table, trials):
    with table(
        "14.2",
        "NaN at the last one or two steps; then launched again",
        "70 both times, failed in status.json, the steps named, nothing non-finite saved",
    ) as row:
        for trial in range(trials):
            home, words = tmp_path / str(trial), rig.overrides(tmp_path / str(trial), base)
            first = rig.STEPS - trial % 2
            for fault in (f"nan@{first}-{rig.STEPS}:0", ""):
                started = rig.launch(home, 1 + trial // 2, words, fault)
                assert set(started.wait()) == {70}, started.text()
                assert f"the last {1 + trial % 2} step(s)" in started.text()
                told = {key: rig.status(home)[key] for key in ("state", "step", "checkpoint")}
                assert told == {"state": "failed", "step": rig.STEPS, "checkpoint": rig.STEPS}
            assert non_finite_tensors(home) == 0
            row.trials += 1


@amount(1, 4)
def test_a_replica_that_differs_is_named_within_the_check_interval(tmp_path, base, table, trials):
    with table(
        "23",
        "a parameter of one replica of four changed by 0.1 %",
        "70 within the interval, the rank named",
    ) as row:
        for trial in range(trials):
            home, parallel = (
                tmp_path / str(trial),
                (["parallel=ddp"], ["parallel=hsdp", "parallel.replicate=2"])[trial % 2],
            )
            words = rig.overrides(
                home,
                base,
                *parallel,
                "trainer.micro_batch_size=1",
                "trainer.divergence_check_every=4",
            )
            started = rig.launch(home, 4, words, "perturb@5:2")
            assert started.wait() == [70] * 4, started.text()
            assert rig.computed_step(home) == 8
            named = "rank 2 holds" if trial % 2 == 0 else "rank 0 or 2 holds"
            assert f"pdn[E-DIVERGED] step 8: {named}" in started.text()
            assert max(rig.verified_steps(home)) == 4
            row.trials += 1


def assert_rewound(started: rig.Launch, home: Path) -> None:
    """Assert that a run with a spike at step 19 goes on from 16, without the data between."""
    assert set(started.wait()) == {0}, started.text()
    assert (
        "step 19: loss" in started.text()
        and "rewound to step 16, samples 64 to 75 are skipped" in started.text()
    )
    ledger = rig.read_lines(home, "ledger.jsonl")
    assert [line for line in ledger if "first" not in line] == [
        {"step": 16, "skipped_first": 64, "skipped_end": 76}
    ]
    places = [(line["step"], line["first"]) for line in ledger if "first" in line]
    assert places == [
        (s, rig.BATCH * (s - 1 if s <= 16 else s + 2)) for s in range(1, rig.STEPS + 1)
    ]


@amount(2, 6)
def test_a_loss_spike_rewinds_to_the_last_checkpoint_and_skips_its_data(
    tmp_path, base, table, trials
):
    with table(
        "28",
        "loss spike at step 19 with trainer.spike_threshold=1, then SIGKILL, also between the "
        "renames of the rewound checkpoint",
        "rewound to 16, its data skipped, equal bits",
    ) as row:
        for trial in range(trials):
            world_size, whole, killed = (
                (2, 1, 2)[trial // 2],
                tmp_path / f"whole-{trial // 2}",  # of two trials, whose runs differ in the kill
                tmp_path / f"killed-{trial}",
            )
            options = [
                "trainer.spike_threshold=1",
                "checkpoint.every=8",
                f"checkpoint.asynchronous={str(trial < 2).lower()}",
            ]
            if trial % 2 == 0:
                words = rig.overrides(whole, base, *options)
                assert_rewound(rig.launch(whole, world_size, words, "spike@19:0"), whole)
            words = rig.overrides(killed, base, *options)
            if trial % 2 == 0:
                victim = rig.launch(killed, world_size, words, "spike@19:0")
                while not any(
                    "skipped_end" in line for line in rig.read_lines(killed, "ledger.jsonl")[:-1]
                ):
                    assert not victim.poll(), victim.text()
                    time.sleep(0.002)
                victim.kill()
            else:
                victim = rig.launch(killed, world_size, words, "spike@19:0,kill-replace@16:0")
            assert -signal.SIGKILL in victim.wait(), victim.text()
            again = rig.launch(killed, world_size, words)
            assert again.wait() == [0] * world_size, again.text()
            assert rig.record(killed) == rig.record(whole)
            row.trials += 1


def test_spikes_stop_the_run_when_there_is_nothing_to_rewind_to(tmp_path, base):
    words = rig.overrides(tmp_path, base, "trainer.spike_threshold=1", "checkpoint.every=100")
    started = rig.launch(tmp_path, 1, words, "spike@19:0")
    assert started.wait() == [70], started.text()
    assert (
        "pdn[E-SPIKE] step 19: loss" in started.text()
        and "no checkpoint to rewind to" in started.text()
    )
