"""A checkpoint that is copied while the model goes on holds the bits of the moment of its save."""

import json
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from pdn.checkpoint.format import committed_steps, step_directory
from pdn.checkpoint.manager import Checkpointer
from pdn.checkpoint.memory import HostMemory
from pdn.checkpoint.snapshot import Snapshot
from pdn.errors import PdnError, Preempted
from pdn.optim.adamw import LocalAdamW
from pdn.optim.container import OptimizerContainer
from pdn.optim.muon import ShardedMuon
from pdn.runs import faults
from tests.checkpoint.small import checkpointer
from tests.small_runs import train, train_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
DEADLINE_S = 60


@pytest.fixture
def copied_late(monkeypatch):
    """Have nothing copied until somebody waits for it: an update, or the end of the save."""
    copy, release, wait = Snapshot._copy, Snapshot.release, Checkpointer.wait

    def of(snapshot) -> threading.Event:
        return vars(snapshot).setdefault("asked", threading.Event())

    def copy_late(self, *what):
        assert of(self).wait(DEADLINE_S)
        copy(self, *what)

    def note_release(self):
        of(self).set()
        release(self)

    def note_wait(self):
        if self._pending is not None and self._pending.copy is not None:
            of(self._pending.copy).set()
        return wait(self)

    monkeypatch.setattr(Snapshot, "_copy", copy_late)
    monkeypatch.setattr(Snapshot, "release", note_release)
    monkeypatch.setattr(Checkpointer, "wait", note_wait)


def contents(run: Path) -> dict[int, tuple]:
    """Return the hash of every shard of every checkpoint of a run, and what lies beside them."""
    found = {}
    for step in committed_steps(run / "checkpoints"):
        path = step_directory(run / "checkpoints", step)
        manifest = json.loads((path / "manifest.json").read_text())
        hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        found[step] = hashes, (path / "side.json").read_text()
    return found


EVERY_STEP = (
    "trainer.steps=4", "schedule.warmup_steps=2", "checkpoint.every=1", "checkpoint.keep_last=9",
    "optim=muon", "optim.ema=0.9", "eval=validation", "eval.every=2", "eval.max_samples=8",
)  # fmt: skip


def small_container() -> tuple[nn.Sequential, OptimizerContainer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7))
    muon = dict(params=[model[1].weight], peak_lr=0.1)
    others = [p for p in model.parameters() if p is not model[1].weight]
    return model, OptimizerContainer(
        model,
        [
            ShardedMuon([muon], ns_dtype=torch.float32, lr=0.1),
            LocalAdamW([dict(params=others, peak_lr=0.1)], lr=0.1, fused=False),
        ],
        ema=0.9,
    )


def step(model, optimizer) -> None:
    nn.functional.cross_entropy(model(torch.arange(7)), torch.arange(7)).backward()
    optimizer.set_lr_fraction(1.0)
    optimizer.step(torch.zeros(()), torch.ones(()))
    optimizer.zero_grad()


def test_an_update_waits_for_the_copy_and_forward_and_backward_do_not(tmp_path, copied_late):
    model, optimizer = small_container()
    step(model, optimizer)
    checkpointer(tmp_path / "sync").save(1, model, optimizer, {})
    saver = checkpointer(tmp_path / "async", asynchronous=True)
    saver.save(1, model, optimizer, {})
    snapshot = saver._pending.copy
    nn.functional.cross_entropy(model(torch.arange(7)), torch.arange(7)).backward()
    assert not snapshot._host_copied.is_set()
    optimizer.step(torch.zeros(()), torch.ones(()))
    assert snapshot._host_copied.is_set()
    assert saver.wait() == [1]
    shards = [
        (step_directory(tmp_path / kind, 1) / "__0_0.distcp").read_bytes()
        for kind in ("sync", "async")
    ]
    assert shards[0] == shards[1]


@pytest.mark.parametrize("what", ["weight", "moment", "average"])
def test_a_change_that_nobody_announced_is_an_error_and_nothing_is_saved(
    tmp_path, copied_late, what
):
    model, optimizer = small_container()
    step(model, optimizer)
    saver = checkpointer(tmp_path, asynchronous=True)
    saver.save(1, model, optimizer, {})
    changed = {
        "weight": model[1].weight,
        "moment": optimizer.optimizers[-1].state[model[0].weight]["exp_avg"],
        "average": optimizer.average.tensors()["1.weight"],
    }[what]
    with torch.no_grad():
        changed.mul_(2)
    with pytest.raises(PdnError, match=r"CKPT-CHANGED.*Checkpointer\.before_change"):
        saver.wait()
    assert committed_steps(tmp_path) == []


def test_an_optimiser_that_cannot_wait_is_copied_before_the_save_returns(tmp_path):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    saver = checkpointer(tmp_path, asynchronous=True)
    saver.save(0, model, optimizer, {})
    snapshot = saver._pending.copy
    assert snapshot._host_copied.is_set() and snapshot._released
    saver.wait()


@pytest.fixture(scope="module")
def waited_for(tmp_path_factory):
    """Return the checkpoints of a run that writes each before it goes on."""
    directory = tmp_path_factory.mktemp("waits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PDN_FAULT", "nan@2:0")
        train(directory, "pgdn_tiny", *EVERY_STEP, "checkpoint.asynchronous=false")
    return contents(directory / "run")


@pytest.fixture
def strikes(monkeypatch):
    """Return a function that sets faults, which strike anew."""
    monkeypatch.setattr(faults, "_struck", set())
    return lambda text: monkeypatch.setenv("PDN_FAULT", text)


def test_checkpoints_copied_at_the_last_moment_equal_those_of_a_run_that_waits(
    tmp_path, waited_for, copied_late, strikes
):
    """Muon, an average that validation swaps in, a step that is skipped, a save at every step."""
    strikes("nan@2:0")
    train(tmp_path, "pgdn_tiny", *EVERY_STEP)
    assert list(waited_for) == [1, 2, 3, 4]
    assert contents(tmp_path / "run") == waited_for


def test_a_stop_right_after_a_save_waits_for_the_copy_that_no_update_asks_for(
    tmp_path, waited_for, copied_late, strikes
):
    strikes("nan@2:0,term-data@4:0")
    with pytest.raises(Preempted, match="saved step 3"):
        train(tmp_path, "pgdn_tiny", *EVERY_STEP)
    stopped = contents(tmp_path / "run")
    assert list(stopped) == [1, 2, 3]
    assert stopped == {step: waited_for[step] for step in stopped}


def test_an_injected_change_right_after_a_save_waits_for_the_copy(
    tmp_path, waited_for, copied_late, strikes
):
    strikes("nan@2:0,spike@4:0")
    train(tmp_path, "pgdn_tiny", *EVERY_STEP)
    found = contents(tmp_path / "run")
    assert found.keys() == waited_for.keys() and found[3] == waited_for[3]
    assert found[4] != waited_for[4]


def test_two_sharded_ranks_copy_at_the_last_moment_what_they_would_have_copied_at_once(
    tmp_path, copied_late, strikes
):
    strikes("nan@2:1")
    for name, asynchronous in (("waits", "false"), ("goes-on", "true")):
        words = *EVERY_STEP, f"checkpoint.asynchronous={asynchronous}", "parallel=fsdp"
        train_on_ranks(2, tmp_path / name, "pgdn_tiny", *words, start="fork")
    found = contents(tmp_path / "goes-on" / "run")
    assert list(found) == [1, 2, 3, 4]
    assert found == contents(tmp_path / "waits" / "run")


def test_states_that_a_run_carries_are_copied_before_the_next_step_writes_into_them(
    tmp_path, copied_late
):
    words = "data.carry_windows=3", "data.seq_len=16", "trainer.steps=3", "schedule.warmup_steps=1"
    words += "checkpoint.every=1", "checkpoint.keep_last=9"
    for name, asynchronous in (("waits", "false"), ("goes-on", "true")):
        train(tmp_path / name, "pgdn_tiny", *words, f"checkpoint.asynchronous={asynchronous}")
    found = contents(tmp_path / "goes-on" / "run")
    assert len(found) == 3 and found == contents(tmp_path / "waits" / "run")


@pytest.mark.gpu
def test_a_stream_copies_the_values_from_before_the_update_and_the_host_waits_for_none_of_it():
    weights = torch.ones(1 << 26, device="cuda")
    snapshot = Snapshot({"weights": weights}, HostMemory(), 2)
    snapshot.release()
    weights.zero_()
    snapshot.complete()
    assert (snapshot.values["weights"] == 1).all()
    assert (weights == 0).all()
