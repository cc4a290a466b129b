"""Runs whose sequences lie on several ranks are those of one, which may continue them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import PYTHON_PATH
from tests.small_runs import losses, metrics, shared_cache, train, train_on_ranks

ROOT = Path(__file__).parents[2]
SPLIT = "parallel.context=2"
VALIDATED = "eval=validation", "eval.every=3", "eval.max_samples=8"


def ledger(directory: Path) -> str:
    return (directory / "run" / "ledger.jsonl").read_text()


def validation(records: list[dict]) -> dict[int, dict]:
    """Return what was validated, by step, but for the perplexity, which magnifies the loss."""
    return {
        record["step"]: {
            key: value
            for key, value in record.items()
            if key.startswith("validation/") and key != "validation/perplexity"
        }
        for record in records
        if "validation/loss" in record
    }


def assert_equal_runs(one: list[dict], other: list[dict]) -> None:
    assert losses(other) == pytest.approx(losses(one), rel=0, abs=1e-5)
    expected, found = validation(one), validation(other)
    # every launch validates after its last step too, and the other run may have had more launches
    assert expected and expected.keys() <= found.keys()
    for step, a in expected.items():
        b = found[step]
        assert a["validation/tokens"] == b["validation/tokens"]
        assert b == pytest.approx(a, rel=1e-5)


def test_a_run_of_split_sequences_is_that_of_one_rank_and_one_rank_continues_it(tmp_path):
    options = "data.document_isolation=true", *VALIDATED
    one = train(tmp_path / "one", "pgdn_tiny", *options, "trainer.stop_at=5")
    train_on_ranks(2, tmp_path / "two", "pgdn_tiny", *options, SPLIT, "trainer.stop_at=3")
    two = train(tmp_path / "two", "pgdn_tiny", *options, "trainer.stop_at=5")
    assert_equal_runs(one, two)
    assert ledger(tmp_path / "one") == ledger(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "ranks", "options"),
    [
        ("pgdn_tiny", 4, ["parallel=hsdp"]),
        ("pgdn_tiny", 4, ["parallel=fsdp", "optim=muon"]),
        ("pkda_tiny", 4, ["parallel=ddp", "parallel.activation_checkpointing=full"]),
        ("hybrid_tiny", 2, ["data.document_isolation=true"]),
        ("mamba2_tiny", 2, ["trainer.micro_batch_size=2"]),
    ],
)
def test_split_sequences_on_any_layout_of_the_ranks_left(preset, ranks, options, tmp_path):
    stop = *VALIDATED, "trainer.stop_at=8", "trainer.micro_batch_size=1"
    shared = [word for word in options if not word.startswith("parallel")]
    one = train(tmp_path / "one", preset, *stop, *shared)
    whole = train_on_ranks(ranks, tmp_path / "whole", preset, *stop, *options, SPLIT)
    assert_equal_runs(one, whole)
    assert ledger(tmp_path / "one") == ledger(tmp_path / "whole")
    train_on_ranks(ranks, tmp_path / "parts", preset, *stop, *options, SPLIT, "trainer.stop_at=4")
    parts = train_on_ranks(ranks, tmp_path / "parts", preset, *stop, *options, SPLIT)
    assert losses(parts) == losses(whole)


@pytest.mark.slow
def test_the_training_command_splits_sequences_under_torchrun(tmp_path):
    def launch(name: str, processes: int, *words: str) -> list[dict]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "train.py", "model=pgdn_tiny"]
        command += [f"output_dir={tmp_path / name}", "name=run", "data.max_bytes=300000"]
        command += ["data.vocab_size=320", f"data.cache_dir={shared_cache()}", "logger=none"]
        command += ["data.seq_len=256", "trainer.global_batch_size=2", "trainer.steps=20"]
        command += ["trainer.micro_batch_size=1", "schedule.warmup_steps=2", *VALIDATED]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHON_PATH}
        subprocess.run([*command, *words], cwd=ROOT, env=environment, check=True, timeout=600)
        return metrics(tmp_path / name)

    one = launch("one", 1, "trainer.stop_at=6")
    launch("two", 2, SPLIT, "trainer.stop_at=2")
    launch("two", 2, SPLIT, "trainer.stop_at=4")
    two = launch("two", 1, "trainer.stop_at=6")
    assert_equal_runs(one, two)
    assert ledger(tmp_path / "one") == ledger(tmp_path / "two")
