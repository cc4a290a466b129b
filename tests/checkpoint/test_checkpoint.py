"""A checkpoint restores every bit, under any world size, or says why not."""

import math
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pdn.checkpoint import manager as checkpoint_module
from pdn.checkpoint.format import committed_steps, step_directory, verify
from pdn.checkpoint.read import load_weights
from pdn.checkpoint.state import model_tensors
from pdn.errors import NumericError, StorageError
from tests.checkpoint.small import (
    TinyModel,
    all_tensors,
    assert_same,
    build,
    checkpointer,
    refusal,
    saved,
    sharded,
    train,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# ------------------------------------------------------------------ exactness


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_continues_after_restoring_as_if_never_interrupted(tmp_path, asynchronous):
    model, optimizer = build()
    train(model, optimizer, range(0, 4))
    saver = checkpointer(tmp_path, asynchronous=asynchronous)
    side = {
        "next_sample": 16,
        "lr": 0.1,
        "tiny": 5e-324,
        "nested": {"hash": "ab", "list": [1, 2.5, None]},
    }
    saver.save(4, model, optimizer, side)
    saver.wait()
    straight = train(model, optimizer, range(4, 8))

    fresh, fresh_optimizer = build(seed=1)
    assert checkpointer(tmp_path).restore(fresh, fresh_optimizer) == (4, side)
    assert train(fresh, fresh_optimizer, range(4, 8)) == straight
    assert_same(all_tensors(fresh, fresh_optimizer), all_tensors(model, optimizer))


def test_hyperparameters_are_recorded_by_parameter_name_and_flags_of_the_machine_are_not(tmp_path):
    model, optimizer = build()
    optimizer.param_groups[0].update(lr=1.5e-4, betas=(0.8, 0.99), foreach=True)
    saver = checkpointer(tmp_path)
    saver.save(1, model, optimizer, {})
    saved = saver.find("step:1").hyperparameters
    assert saved.keys() == {name for name, _ in model.named_parameters()}
    assert all(
        values == {"lr": 1.5e-4, "betas": [0.8, 0.99], "eps": 1e-8, "weight_decay": 0.01}
        for values in saved.values()
    )


def test_restoring_with_gradients_present_still_restores_the_optimizer(tmp_path):
    *_, states = saved(tmp_path)
    model, optimizer = build(seed=1)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    checkpointer(tmp_path).restore(model, optimizer)
    assert_same(all_tensors(model, optimizer), states[3])


def test_a_checkpoint_of_step_0_restores_an_optimizer_that_took_no_step(tmp_path):
    model, optimizer = build()
    checkpointer(tmp_path).save(0, model, optimizer, {})
    straight = train(model, optimizer, range(3))
    fresh, fresh_optimizer = build(seed=1)
    train(fresh, fresh_optimizer, range(2))
    assert checkpointer(tmp_path).restore(fresh, fresh_optimizer) == (0, {})
    assert not fresh_optimizer.state
    assert train(fresh, fresh_optimizer, range(3)) == straight


def test_several_optimizers_share_a_model(tmp_path):
    def build_two(seed):
        torch.manual_seed(seed)
        model = TinyModel()
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
        others = [
            p for name, p in model.named_parameters() if not (p.ndim == 2 and "blocks" in name)
        ]
        return model, [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.01)]

    def train_two(model, optimizers, steps):
        both = type("Both", (), {})()
        both.step = lambda: [o.step() for o in optimizers]
        both.zero_grad = lambda: [o.zero_grad() for o in optimizers]
        return train(model, both, steps)

    model, optimizers = build_two(0)
    train_two(model, optimizers, range(3))
    checkpointer(tmp_path).save(3, model, optimizers, {})
    straight = train_two(model, optimizers, range(3, 6))
    fresh, fresh_optimizers = build_two(1)
    checkpointer(tmp_path).restore(fresh, fresh_optimizers)
    assert train_two(fresh, fresh_optimizers, range(3, 6)) == straight


def test_an_asynchronous_save_holds_the_values_of_its_moment_while_training_goes_on(
    tmp_path, monkeypatch
):
    model, optimizer = build()
    train(model, optimizer, range(3))
    checkpointer(tmp_path / "sync").save(3, model, optimizer, {"a": 1})
    may_write, real = threading.Event(), checkpoint_module.dcp.save
    monkeypatch.setattr(
        checkpoint_module.dcp,
        "save",
        lambda *args, **kwargs: (may_write.wait(30), real(*args, **kwargs)),
    )
    saver = checkpointer(tmp_path / "async", asynchronous=True)
    assert saver.save(3, model, optimizer, {"a": 1}) == []
    train(model, optimizer, range(3, 6))
    assert saver.poll() == []
    assert committed_steps(tmp_path / "async") == []
    may_write.set()
    assert saver.wait() == [3]
    for name in ("__0_0.distcp", "side.json", "index.json"):
        sync, other = (step_directory(tmp_path / kind, 3) / name for kind in ("sync", "async"))
        assert sync.read_bytes() == other.read_bytes(), name


def test_a_second_asynchronous_save_finishes_the_first(tmp_path):
    model, optimizer = build()
    saver = checkpointer(tmp_path, asynchronous=True)
    train(model, optimizer, range(1))
    saver.save(1, model, optimizer, {})
    train(model, optimizer, range(1, 2))
    assert saver.save(2, model, optimizer, {}) == [1]
    assert saver.wait() == [2]
    assert saver.wait() == []
    assert verify(step_directory(tmp_path, 1)).step == 1


# ------------------------------------------------------------------ world sizes and parallelism


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: t.double().sum().item().hex() + "/" + (t.double() ** 2).sum().item().hex()
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("kind", ["fsdp", "ddp", "replicas"])
def test_one_to_two_to_one_processes_keeps_every_tensor(tmp_path, kind):
    model, optimizer = build(dropout=0.0)
    train(model, optimizer, range(3))
    checkpointer(tmp_path / "one").save(3, model, optimizer, {"next_sample": 12})
    before = digest(all_tensors(model, optimizer))

    def on_two(rank: int):
        model, optimizer = sharded(kind, 2, seed=5)
        restored = checkpointer(tmp_path / "one").restore(model, optimizer)
        found = digest(all_tensors(model, optimizer))
        saver = checkpointer(tmp_path / "two", asynchronous=True)
        saver.save(restored[0], model, optimizer, restored[1])
        train(model, optimizer, range(3, 4), rank, 2)
        return [restored, found, saver.wait()]

    for restored, found, committed in run_ranks(2, on_two, tmp_path):
        assert restored == [3, {"next_sample": 12}]
        assert found == before
        assert committed == [3]
    assert verify(step_directory(tmp_path / "two", 3)).world_size == 2
    again, again_optimizer = build(seed=7, dropout=0.0)
    assert checkpointer(tmp_path / "two").restore(again, again_optimizer) == (
        3,
        {"next_sample": 12},
    )
    assert_same(all_tensors(again, again_optimizer), all_tensors(model, optimizer))
    weights, _ = build(seed=8, dropout=0.0)
    assert load_weights(tmp_path / "two", weights) == (3, {"next_sample": 12})
    assert_same(model_tensors(weights), model_tensors(model))


def test_two_ranks_get_their_own_random_states_back_and_three_start_afresh(tmp_path, caplog):
    def save(rank: int):
        model, optimizer = sharded("fsdp", 2, seed=0)
        torch.manual_seed(100 + rank)
        checkpointer(tmp_path).save(0, model, optimizer, {})
        return torch.rand(2).tolist()

    def load(rank: int):
        model, optimizer = sharded("fsdp", dist.get_world_size(), seed=1)
        torch.manual_seed(9)
        checkpointer(tmp_path).restore(model, optimizer)
        return torch.rand(2).tolist()

    expected = run_ranks(2, save, tmp_path)
    assert expected[0] != expected[1]
    assert run_ranks(2, load, tmp_path) == expected
    torch.manual_seed(9)
    assert run_ranks(3, load, tmp_path) == [torch.rand(2).tolist()] * 3


def test_a_save_right_after_an_evaluation_stores_the_shards_though_fsdp_left_parameters_gathered(
    tmp_path,
):
    def work(rank: int):
        model, optimizer = sharded("fsdp", 2, seed=0)
        model.set_reshard_after_forward(False)
        train(model, optimizer, range(2), rank, 2)
        before = digest(all_tensors(model, optimizer))
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.long))
        checkpointer(tmp_path).save(2, model, optimizer, {})
        model, optimizer = sharded("fsdp", 2, seed=1)
        checkpointer(tmp_path).restore(model, optimizer)
        return digest(all_tensors(model, optimizer)) == before

    assert run_ranks(2, work, tmp_path) == [True, True]


def test_a_failure_on_one_rank_is_the_same_error_on_all(tmp_path):
    def save(rank: int):
        model, optimizer = sharded("plain", 2, seed=0)
        saver = checkpointer(tmp_path, asynchronous=True)
        if rank == 1:
            next(model.parameters()).data[0, 0] = math.inf
        saver.save(1, model, optimizer, {})
        try:
            saver.wait()
        except NumericError as error:
            return str(error)

    first, second = run_ranks(2, save, tmp_path)
    assert first == second
    assert "embed.weight on rank 1 is not finite" in first
    assert list(tmp_path.glob("step-*")) == []


# ------------------------------------------------------------------ which checkpoint


def test_an_empty_directory_restores_nothing(tmp_path):
    assert checkpointer(tmp_path).restore(*build()) is None


def test_names_that_only_resemble_a_checkpoint_are_none(tmp_path):
    saved(tmp_path, (1,))
    for name in (
        "step-00000009-backup",
        "xstep-00000009",
        "step-9",
        "step-000000009",
        "step-00000009.old",
        "step-0000000٣",
    ):
        shutil.copytree(step_directory(tmp_path, 1), tmp_path / name)
    assert committed_steps(tmp_path) == [1]
    assert checkpointer(tmp_path).restore(*build())[0] == 1


def test_drafts_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    for name in (
        "step-00000004.tmp",
        "step-00000003.old.tmp",
        "step-00000004.tmp.mine",
        "notes.tmp",
    ):
        (tmp_path / name).mkdir()
    checkpointer(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "notes.tmp",
        "step-00000004.tmp.mine",
    ]


@pytest.mark.parametrize("name", ["step-00000002", "step-00000004.tmp", "step-00000002.old.tmp"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_what_bears_a_checkpoints_name_and_is_none_gives_way(kind, name, tmp_path):
    os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).write_text("")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits at a pipe"))
    signal.alarm(60)
    try:
        saved(tmp_path, (1, 2))
    finally:
        signal.alarm(0)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("length,steps", [(0, [1]), (30, [1]), (65, [1, 2])])
def test_a_draft_gets_its_name_if_its_marker_is_all_there(length, steps, tmp_path):
    saved(tmp_path, (1, 2))
    draft = step_directory(tmp_path, 2).rename(tmp_path / "step-00000002.0123abcd.tmp")
    os.truncate(draft / "COMMITTED", length)
    assert checkpointer(tmp_path).restore(*build())[0] == steps[-1]
    assert committed_steps(tmp_path) == steps
    assert not list(tmp_path.glob("*.tmp"))


def test_a_pinned_step_is_restored_and_the_abandoned_future_goes_with_the_next_save(tmp_path):
    *_, states = saved(tmp_path, (1, 2, 3))
    model, optimizer = build(seed=1)
    resumed = checkpointer(tmp_path)
    assert resumed.restore(model, optimizer, "step:1")[0] == 1
    assert_same(all_tensors(model, optimizer), states[1])
    assert committed_steps(tmp_path) == [1, 2, 3]
    train(model, optimizer, range(1, 2))
    resumed.save(2, model, optimizer, {"branch": "b"})
    assert committed_steps(tmp_path) == [1, 2]
    assert checkpointer(tmp_path).restore(*build())[1] == {"branch": "b"}


def test_retention_keeps_the_last_ones_and_every_nth(tmp_path):
    saved(tmp_path, tuple(range(1, 10)), keep_last=2, keep_every=4)
    assert committed_steps(tmp_path) == [4, 8, 9]


def linked_elsewhere(path: Path, step: int) -> Path:
    """Move a checkpoint to another place and leave a link; the place."""
    target, place = step_directory(path, step), path.parent / "other-disk"
    place.mkdir(exist_ok=True)
    shutil.move(target, place / target.name)
    target.symlink_to(place / target.name)
    return place / target.name


def test_a_linked_checkpoint_is_read_and_never_deleted_through_its_link(tmp_path, caplog):
    path = tmp_path / "checkpoints"
    *_, states = saved(path, (1, 2))
    elsewhere = linked_elsewhere(path, 1)
    model, optimizer = build(seed=1)
    resumed = checkpointer(path, keep_last=1)
    assert resumed.restore(model, optimizer, "step:1")[0] == 1
    assert_same(all_tensors(model, optimizer), states[1])
    for step in (3, 4):
        resumed.save(step, model, optimizer, {})
    assert committed_steps(path) == [1, 4]
    assert verify(elsewhere).step == 1
    assert caplog.text.count("step-1: is a link to") == 1


def test_a_linked_checkpoint_of_an_abandoned_future_loses_its_name_and_nothing_else(
    tmp_path, caplog
):
    path = tmp_path / "checkpoints"
    saved(path, (1, 2, 3))
    places = [linked_elsewhere(path, 2), linked_elsewhere(path, 3)]
    model, optimizer = build(seed=1)
    resumed = checkpointer(path)
    assert resumed.restore(model, optimizer, "step:1")[0] == 1
    resumed.save(2, model, optimizer, {"branch": "b"})
    assert committed_steps(path) == [1, 2]
    assert checkpointer(path).restore(*build())[1] == {"branch": "b"}
    assert [verify(place).step for place in places] == [2, 3]
    assert "the link is now step-00000003.superseded" in caplog.text


def test_a_link_to_a_checkpoint_of_another_step_is_refused(tmp_path):
    saved(tmp_path, (1, 2))
    shutil.rmtree(step_directory(tmp_path, 1))
    step_directory(tmp_path, 1).symlink_to(step_directory(tmp_path, 2))
    assert "is of step 2, expected 1" in refusal(
        lambda: checkpointer(tmp_path).restore(*build(), "step:1")
    )


def test_nothing_is_pruned_before_the_new_checkpoint_is_committed(tmp_path, monkeypatch):
    model, optimizer, _ = saved(tmp_path, (1,), keep_last=1)
    rename = os.rename

    def fail_to_publish(source, target):
        if target == step_directory(tmp_path, 2):
            raise OSError(5, "I/O error", str(tmp_path))
        rename(source, target)

    monkeypatch.setattr(checkpoint_module.os, "rename", fail_to_publish)
    with pytest.raises(StorageError, match="EIO"):
        checkpointer(tmp_path, keep_last=1).save(2, model, optimizer, {})
    assert committed_steps(tmp_path) == [1]
    assert verify(step_directory(tmp_path, 1)).step == 1
    assert not list(tmp_path.glob("*.tmp"))
