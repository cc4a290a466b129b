"""A rank that is gone is named by those that miss it, and torch's traceback is not shown."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pdn.distributed import peers
from pdn.distributed.peers import PeerError, explain, is_broken_exchange, tell_peers
from pdn.errors import StorageError
from tests.ranks import run_ranks
from tests.small_runs import train_on_ranks


@pytest.fixture
def patient(monkeypatch):
    """Wait for the notice of others for as long as a busy machine may take."""
    monkeypatch.setattr(peers, "SURVEY_S", 50.0)


def what_is_said(ranks: int, directory: Path, end: Callable[[], None]) -> list[str]:
    """Return how each of so many ranks explains that the last one ended by ``end``."""
    files = [directory / str(rank) for rank in range(ranks - 1)]

    def work(rank: int):
        dist.barrier()
        if rank == ranks - 1:
            end()
        with pytest.raises(RuntimeError) as caught:
            dist.recv(torch.zeros(1), src=ranks - 1)
        assert is_broken_exchange(caught.value)
        files[rank].write_text(str(explain(caught.value)))
        os._exit(PeerError.exit_code)  # with exchanges broken there is no way to leave the group

    run_ranks(ranks, work, directory)
    return [file.read_text() for file in files]


def test_all_that_are_left_name_the_one_that_was_killed(tmp_path, patient):
    said = what_is_said(3, tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL))
    for rank, text in enumerate(said):
        assert text.startswith(f"pdn[E-PEER] rank {rank}: rank 2 is gone, without a word: killed")
        assert text.endswith("Launch again: the run continues from its last checkpoint")


def test_a_rank_that_is_stuck_and_has_a_pulse_is_not_taken_for_the_one_that_is_gone(monkeypatch):
    class Store(dict):
        set, beats = dict.__setitem__, 0

        def check(self, keys):
            return all(key in self for key in keys)

        def get(self, key):
            self.beats += 1
            return (f"{self.beats} 9 8 train" if key == "pdn/pulse/0" else self[key]).encode()

    monkeypatch.setattr(peers, "SURVEY_S", 0.0)
    monkeypatch.setattr(peers.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(peers.dist, "get_world_size", lambda: 3)
    store = Store({"pdn/pulse/0": "", "pdn/pulse/2": "7 8 5 data"})
    assert peers._survey(store).startswith("rank 2 is gone, last seen at step 5 (data), without")
    store["pdn/pulse/2"] = "7 0 -1 start"
    assert peers._survey(store).startswith("rank 2 is gone, last seen before its first step, with")
    store["pdn/ended/0"] = store["pdn/ended/2"] = ""
    assert "all of them are there; see the network" in peers._survey(store)


def test_the_reason_of_a_rank_that_failed_by_itself_is_told_by_the_others(tmp_path, patient):
    def fail():
        tell_peers("OutOfMemoryError: 3 GiB more than there are")
        os._exit(70)

    [text] = what_is_said(2, tmp_path, fail)
    assert "rank 0: rank 1 has failed: OutOfMemoryError: 3 GiB more than there are;" in text


def test_a_store_that_does_not_answer_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(peers, "is_distributed", lambda: True)
    monkeypatch.setattr(peers.dist, "get_rank", lambda: 1)

    def gone():
        raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(peers, "own_store", gone)
    tell_peers("no one hears it")
    assert "rank 1: the ranks' store does not answer: rank 0, the" in str(explain(ValueError()))


def test_what_broke_an_exchange_is_found_below_other_errors_and_nothing_else_is_taken_for_it():
    gloo = RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    try:
        try:
            raise gloo
        except RuntimeError as error:
            raise OSError("cannot write") from error
    except OSError as error:
        assert is_broken_exchange(error)
    wrapped = type("CheckpointException", (BaseException,), {"failures": {0: (gloo, None)}})()
    assert is_broken_exchange(wrapped)
    remote = dist.DistBackendError("ncclRemoteError: A call failed possibly due to a network error")
    assert is_broken_exchange(remote)
    answered = StorageError("PORT", "in use")
    answered.__cause__ = gloo
    for other in (
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("[enforce fail at gloo/allreduce.cc:12] lengths differ"),
        ValueError("gloo/transport/tcp is no backend"),
        answered,
        None,
    ):
        assert not is_broken_exchange(other)


def test_a_run_that_loses_a_rank_says_so_in_one_message_and_keeps_the_traceback_in_its_log(
    tmp_path, monkeypatch, capfd
):
    """Lose it while both write a checkpoint, too: that is no fault of the disk."""
    monkeypatch.setenv("PDN_FAULT", "kill-save@2:1")
    words = "trainer.steps=9", "schedule.warmup_steps=1", "checkpoint.every=2", "parallel=fsdp"
    train_on_ranks(2, tmp_path, "pgdn_tiny", *words, start="fork", codes=[PeerError.exit_code, -9])
    status = (tmp_path / "run" / "status.json").read_text()
    assert '"reason": "pdn[E-PEER] rank 0: rank 1 is gone' in status
    log = (tmp_path / "run" / "run.log").read_text()
    assert "Connection" in log and "Traceback" in log and "pdn[E-PEER] rank 0" in log
    shown = capfd.readouterr()
    assert "CKPT-WRITE" not in shown.out + shown.err
