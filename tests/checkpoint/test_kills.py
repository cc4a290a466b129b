"""Kills at any moment of a save, and disks that are full: a verified checkpoint stays."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from pdn.checkpoint.format import committed_steps, read_manifest, step_directory, verify
from pdn.errors import StorageError
from tests.checkpoint.small import (
    all_tensors,
    assert_same,
    build,
    checkpointer,
    saved,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SEED = 20260


def fork(work) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def save_for_ever(path: Path, asynchronous: bool) -> None:
    torch.set_num_threads(1)
    model, optimizer = build()
    saver = checkpointer(path, keep_last=2, asynchronous=asynchronous)
    for step in range(1, 10_000):
        train(model, optimizer, range(step - 1, step))
        saver.save(step, model, optimizer, {"step": step})
        saver.poll()


def stop_in_a_save(child: int, path: Path, deadline: float) -> None:
    """Stop a process at moments of its own until one lies in a save: a draft is there."""
    while time.monotonic() < deadline:
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        if list(path.glob("*.tmp")):
            return
        os.kill(child, signal.SIGCONT)
        time.sleep(0.002)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_kill_at_any_moment_of_saving_and_pruning_leaves_a_verified_checkpoint(
    tmp_path, asynchronous
):
    rng, drafts = random.Random(SEED), 0
    for trial in range(20):
        path = tmp_path / str(trial)
        child = fork(lambda path=path: save_for_ever(path, asynchronous))
        try:
            deadline = time.monotonic() + 30
            while not committed_steps(path) and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.08)
            if trial % 2:  # in a save, however short a part of the time that is
                stop_in_a_save(child, path, deadline)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        drafts += len(list(path.glob("*.tmp")))
        steps = committed_steps(path)
        assert steps
        for step in steps:
            assert verify(step_directory(path, step)).step == step
        # A draft that is complete but for its name gets its name.
        markers = [draft / "COMMITTED" for draft in path.glob("step-*.????????.tmp")]
        newest = steps[-1] + len(
            [marker for marker in markers if marker.exists() and marker.stat().st_size == 65]
        )
        model, optimizer = build(seed=1)
        assert checkpointer(path).restore(model, optimizer) == (newest, {"step": newest})
        straight, straight_optimizer = build()
        train(straight, straight_optimizer, range(newest))
        assert_same(all_tensors(model, optimizer), all_tensors(straight, straight_optimizer))
        assert not list(path.glob("*.tmp"))
    assert drafts >= 10, "the kills never hit a save"


def test_a_kill_between_the_renames_of_a_replacement_leaves_the_new_checkpoint(
    tmp_path, monkeypatch
):
    model, optimizer, states = saved(tmp_path, (1,))

    def replace():
        monkeypatch.setenv("PDN_FAULT", "kill-replace@1:0")
        checkpointer(tmp_path).save(1, model, optimizer, {"position": 99})

    assert os.waitpid(fork(replace), 0)[1] == signal.SIGKILL
    assert committed_steps(tmp_path) == []
    other, other_optimizer = build(seed=1)
    assert checkpointer(tmp_path).restore(other, other_optimizer) == (1, {"position": 99})
    assert_same(all_tensors(other, other_optimizer), states[1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_a_full_disk_fails_the_save_with_74_and_keeps_what_was_there(tmp_path):
    # A limit on the file size stops a write half way exactly as a full disk does (EFBIG for
    # ENOSPC), for any user.
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        model, optimizer, _ = saved(tmp_path, (1,))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            checkpointer(tmp_path).save(2, model, optimizer, {})
        except StorageError as error:
            os.write(report_write, f"{error.exit_code} {error}".encode())
            os._exit(0)

    report_read, report_write = os.pipe()
    child = fork(work)
    os.close(report_write)
    message = os.read(report_read, 4000).decode()
    os.waitpid(child, 0)
    assert message.startswith("74 pdn[E-"), message
    assert "step-2 on rank 0 needs" in message and "free" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    assert verify(step_directory(tmp_path, 1)).step == 1


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 1 MiB; skip without the right to mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path]).returncode
    ):
        pytest.skip("cannot mount a tmpfs here")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_too_little_space_is_refused_before_anything_is_written(small_disk, monkeypatch):
    with monkeypatch.context() as patch:
        skip_preflight(patch)
        model, optimizer, _ = saved(small_disk, (1,))
    with pytest.raises(StorageError, match=r"step-2 needs 4\.21 MB, free .* (kB|MB)") as caught:
        checkpointer(small_disk).save(2, model, optimizer, {})
    assert caught.value.exit_code == 74
    assert [entry.name for entry in small_disk.iterdir()] == ["step-00000001"]


def test_a_disk_that_fills_during_the_save_leaves_the_last_checkpoint_and_no_draft(
    small_disk, monkeypatch
):
    skip_preflight(monkeypatch)
    model, optimizer, _ = saved(small_disk, (1,))
    free = shutil.disk_usage(small_disk).free
    for left in (0, 4096, 16384, 32768):
        (small_disk / "filler").write_bytes(bytes(max(0, free - left)))
        with pytest.raises(StorageError) as caught:
            checkpointer(small_disk).save(2, model, optimizer, {})
        assert "step-2 on rank 0 needs" in str(caught.value) or "DISK-FULL" in str(caught.value)
        assert sorted(entry.name for entry in small_disk.iterdir()) == ["filler", "step-00000001"]
        assert verify(step_directory(small_disk, 1)).step == 1
        (small_disk / "filler").unlink()
    checkpointer(small_disk).save(2, model, optimizer, {})
    assert committed_steps(small_disk) == [1, 2]


def skip_preflight(monkeypatch) -> None:
    monkeypatch.setattr("pdn.checkpoint.manager.require_free_space", lambda *args: None)


def test_an_error_of_the_storage_names_its_errno(tmp_path, monkeypatch):
    model, optimizer, _ = saved(tmp_path, (1,))

    def fail(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "x"))

    monkeypatch.setattr("pdn.checkpoint.format.write_synced", fail)
    with pytest.raises(StorageError, match=r"Read-only file system \(EROFS\)"):
        checkpointer(tmp_path).save(2, model, optimizer, {})
    assert read_manifest(step_directory(tmp_path, 1)).step == 1
