"""The loop: numbers read while the next step runs, intervals, hooks, and another train_step."""

import csv
import json
import threading
import time

import pytest
import torch

from pdn.checkpoint import manager
from pdn.checkpoint.format import committed_steps
from pdn.checkpoint.manager import Checkpointer
from pdn.data import open_data
from pdn.errors import NumericError
from pdn.inference.load import load_trained
from pdn.logging.loggers import Silent
from pdn.logging.trace import read_trace
from pdn.runs import faults
from pdn.training.fit import fit
from pdn.training.hooks import HOOKS, Hook
from pdn.training.step import agree_on_finite
from pdn.training.trainer import Trainer
from tests.small_runs import losses, metrics, run_config, train

TIMES = ("tokens_per_second", "step_seconds", "data_seconds", "checkpoint", "pace/")
SPIKE = "trainer.spike_threshold=1", "checkpoint.every=8", "trainer.steps=24", "optim.lr=1e-3"


class Late(Trainer):
    """Reads the numbers of a step when the next is under way, as on a GPU."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lag = 1


def story(directory) -> tuple[list, str]:
    """Return what a run left, without durations: its metrics in order of step, and its ledger."""
    found = [
        {key: value for key, value in record.items() if not key.startswith(TIMES)}
        for record in metrics(directory)
    ]
    ledger = (directory / "run" / "ledger.jsonl").read_text()
    return sorted(found, key=lambda record: (record["step"], "loss" not in record)), ledger


@pytest.fixture
def fault(monkeypatch):
    """Set the faults of the next run."""

    def set_fault(text: str) -> None:
        faults._struck.clear()
        monkeypatch.setenv("PDN_FAULT", text)

    yield set_fault
    faults._struck.clear()


def test_reading_late_leaves_the_same_run(tmp_path, fault):
    validating = "eval=validation", "eval.every=6", "data.validation_fraction=0.2"
    validating += ("eval.max_samples=16",)
    words = *validating, "checkpoint.every=7", "trainer.log_every=2"
    for name, trainer_cls in (("now", Trainer), ("late", Late)):
        fault("nan@5:0,nan@6:0,nan@12:0")
        train(tmp_path / name, "pgdn_tiny", *words, trainer_cls=trainer_cls)
    assert story(tmp_path / "late") == story(tmp_path / "now")
    now, late = (load_trained(tmp_path / name / "run").model for name in ("now", "late"))
    assert all(map(torch.equal, now.parameters(), late.parameters()))
    skipped = [r["step"] for r in metrics(tmp_path / "late") if r.get("skipped")]
    assert skipped == [6, 12]  # 5 is not logged


def test_a_run_that_reads_late_continues_bit_by_bit(tmp_path):
    whole = losses(train(tmp_path / "whole", "pgdn_tiny"))
    for stop in ("trainer.stop_at=7", "trainer.stop_at=20"):
        train(tmp_path / "parts", "pgdn_tiny", stop, trainer_cls=Late)
    assert losses(metrics(tmp_path / "parts")) == whole


@pytest.mark.parametrize("trainer_cls", [Trainer, Late])
def test_the_third_non_finite_step_ends_the_run_and_is_no_step_of_it(tmp_path, fault, trainer_cls):
    fault("nan@4-9:0")
    with pytest.raises(NumericError, match="step 6, samples 40 to 47: the 3rd step in a row"):
        train(tmp_path, "pgdn_tiny", trainer_cls=trainer_cls)
    ledger = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    assert json.loads(ledger[-1])["step"] == 5
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 5


def test_a_spike_that_is_noticed_late_skips_the_data_up_to_it_and_no_more(
    tmp_path, fault, monkeypatch
):
    write = Checkpointer._write_shards
    shown: list[tuple[int, dict]] = []
    stood: list[int] = []

    class Curves(Silent):
        def log(self, step, values):
            shown.append((step, values))

        def rewind(self, step):
            stood.append(step)
            shown[:] = [(at, values) for at, values in shown if at <= step]

    monkeypatch.setattr("pdn.training.trainer.open_logger", lambda *a, **k: Curves())

    def slowly(self, *arguments):  # so that the spike comes while a checkpoint is being written
        time.sleep(0.5)
        return write(self, *arguments)

    for name, trainer_cls in (("now", Trainer), ("late", Late)):
        fault("spike@19:0")
        train(tmp_path / name, "pgdn_tiny", *SPIKE, trainer_cls=trainer_cls)
        monkeypatch.setattr(Checkpointer, "_write_shards", slowly)
    assert story(tmp_path / "late") == story(tmp_path / "now")
    assert stood == [0, 16] * 2  # what loggers are told: where each launch began, and went back to
    curve = [values["loss"] for _, values in shown if "loss" in values]
    assert curve == losses(metrics(tmp_path / "late")) and len(curve) == 24
    skipped = [
        line for line in map(json.loads, story(tmp_path / "late")[1].splitlines())
        if "skipped_first" in line
    ]  # fmt: skip
    assert skipped == [{"step": 16, "skipped_first": 128, "skipped_end": 152}]


def test_whether_a_step_is_finite_is_told_without_asking_the_host(tmp_path):
    world = type("Alone", (), {"sum": staticmethod(lambda x: x)})()
    bad, good = torch.tensor(torch.nan), torch.tensor(1.0)
    for loss, norm, expected in ((good, good, 0.0), (bad, good, 1.0), (good, bad, 1.0)):
        _, found = agree_on_finite(torch.stack([good, loss]), norm, world)
        assert isinstance(found, torch.Tensor) and float(found) == expected


def test_a_trainer_may_have_hooks_and_a_step_of_its_own(tmp_path):
    seen = []

    class Count(Hook):
        def after_result(self, result) -> None:
            seen.append((result.step, result.loss))

        def due(self, step: int, last: bool) -> bool:
            return step % 8 == 0

        def run(self, step: int) -> None:
            seen.append(step)

    class Mine(Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.hooks.append(Count(self))

        def train_step(self, batch):
            return super().train_step(batch)._replace(loss=torch.tensor(2.5))

    records = train(tmp_path, "pgdn_tiny", trainer_cls=Mine)
    assert losses(records) == [2.5] * 20
    assert [found for found in seen if isinstance(found, int)] == [8, 16]
    assert [found for found in seen if isinstance(found, tuple)] == [(i, 2.5) for i in range(1, 21)]


def test_steps_are_profiled_by_part_if_asked(tmp_path, capsys):
    words = "trainer.profile={steps: [3, 3]}", "trainer.stop_at=4", "model.num_layers=1"
    train(tmp_path, "pgdn_tiny", *words)
    folder = tmp_path / "run" / "profile-3-3"
    assert any("aten::" in event.get("name", "") for event in read_trace(folder / "trace.json.gz"))
    with open(folder / "parts.csv", newline="") as file:
        parts = {row["part"]: float(row["share"]) for row in csv.DictReader(file)}
    assert {"mixer", "MLP", "embedding and head", "optimiser", "idle"} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(1, abs=0.01)
    said = capsys.readouterr().out
    assert "check: the parts add up to 100" in said and "no snapshot of the memory" in said


@pytest.mark.gpu
def test_a_compiled_run_on_a_gpu_is_profiled_by_part(tmp_path):
    words = "trainer.profile={steps: [6, 8]}", "trainer.stop_at=9", "trainer.device=cuda"
    fit(run_config(tmp_path, "pgdn_tiny", *words), open_data=open_data)
    folder = tmp_path / "run" / "profile-6-8"
    with open(folder / "parts.csv", newline="") as file:
        parts = {row["part"]: float(row["ms"]) for row in csv.DictReader(file)}
    assert all(parts[name] > 0 for name in ("mixer", "MLP", "embedding and head", "optimiser"))
    busy = sum(parts.values()) - parts["idle"]
    assert parts["norms and residuals"] < 0.3 * busy
    assert (folder / "memory.pickle").stat().st_size > 0


def test_the_hooks_stand_in_an_order_that_keeps_bad_steps_out_of_the_ledger():
    names = [hook.__name__ for hook in HOOKS]
    assert names.index("StopAtNonFinite") < names.index("KeepLedger") < names.index("Log")
    assert names.index("RewindAtSpikes") < names.index("KeepLedger")
    assert names.index("CheckDivergence") < names.index("Save") < names.index("Evaluate")


def test_intervals_may_be_tokens_and_seconds(tmp_path):
    words = "trainer.log_every={tokens:1000}", "checkpoint.every={seconds:1e-9}"
    records = train(tmp_path, "pgdn_tiny", *words, "trainer.stop_at=6", "checkpoint.keep_last=99")
    # 8 sequences of 48 tokens a step: beyond 1,000 at step 3, beyond 2,000 at step 6
    assert [record["step"] for record in records if "loss" in record] == [3, 6]
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 6


def test_a_save_that_is_due_while_one_is_written_is_left_out_if_the_run_says_so(
    tmp_path, monkeypatch
):
    """Save at 2 and hold the writing back: 4 and 6 are left out, 8 is free again, 10 the last."""
    may_write, real = threading.Event(), manager.dcp.save

    def held_back(*args, **kwargs):
        may_write.wait(60)
        return real(*args, **kwargs)

    class Release(Hook):
        def due(self, step: int, last: bool) -> bool:
            return step == 6

        def run(self, step: int) -> None:
            may_write.set()
            self.trainer.checkpointer._pending.done.wait(60)

    class Patient(Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.hooks.append(Release(self))

    monkeypatch.setattr(manager.dcp, "save", held_back)
    words = "trainer.steps=10", "checkpoint.every=2", "checkpoint.keep_last=9"
    train(tmp_path, "pgdn_tiny", *words, "checkpoint.when_busy=skip", trainer_cls=Patient)
    assert committed_steps(tmp_path / "run" / "checkpoints") == [2, 8, 10]
    left_out = [r["step"] for r in metrics(tmp_path) if r.get("checkpoint/skipped")]
    assert left_out == [4, 6]
