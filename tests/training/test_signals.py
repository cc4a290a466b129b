"""Signals, agreement between ranks, and the watchdog, with real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from pdn.distributed.collectives import any_rank, gather_or_raise
from pdn.distributed.watchdog import Watchdog
from pdn.errors import DataError, PdnError, StorageError
from pdn.training.signals import Interrupted, StopRequest
from tests.children import PYTHON_PATH, is_running
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stop():
    request = StopRequest()
    yield request
    request.restore()


@pytest.mark.parametrize("number", ["TERM", "INT", "HUP", "USR1", "USR2", "XCPU"])
def test_a_stop_signal_is_remembered_and_repeating_it_changes_nothing(stop, number):
    assert not stop.stop_requested and not stop.agreed()
    for name in (number, number, "TERM"):
        os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
    assert stop.stop_requested and stop.agreed()
    assert stop.name == f"SIG{number}"


def test_a_later_interrupt_ends_the_process_at_once(stop, monkeypatch):
    os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr("pdn.training.signals._ECHO_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_wait_that_may_be_given_up_is_given_up(stop):
    began = time.monotonic()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted), stop.interruptible():
        time.sleep(30)
    with pytest.raises(Interrupted), stop.interruptible():  # of a signal that came before, too
        pytest.fail("went on")
    os.kill(os.getpid(), signal.SIGTERM)  # outside, a signal waits for the step boundary
    assert time.monotonic() - began < 10 and stop.name == "SIGTERM"


def test_all_ranks_stop_at_the_same_step_when_one_was_told(tmp_path):
    def work(rank: int):
        request = StopRequest()
        for step in range(100):
            if rank == 1 and step == 7:
                os.kill(os.getpid(), signal.SIGUSR1)
            if request.agreed():
                return step

    assert run_ranks(3, work, tmp_path) == [7, 7, 7]


def test_what_fails_on_one_rank_is_raised_on_all_with_its_class_and_message(tmp_path):
    def work(rank: int):
        def fail():
            if rank == 1:
                raise DataError("SHARD", "shard 7 is empty")
            return rank

        def crash():
            if rank == 1:
                raise ZeroDivisionError("oops")

        found = [gather_or_raise(lambda: rank * 10)]
        for job in (fail, crash):
            try:
                gather_or_raise(job)
            except (PdnError, DataError, ZeroDivisionError) as error:
                found.append(f"{type(error).__name__} {getattr(error, 'exit_code', None)} {error}")
        return [*found, any_rank(rank == 2), any_rank(False)]

    shard, crash = (
        "DataError 65 pdn[E-SHARD] shard 7 is empty",
        "PdnError 70 pdn[E-INTERNAL] rank 1: ZeroDivisionError: oops",
    )
    expected = [[0, 10, 20], shard, crash, True, False]
    own = [[0, 10, 20], shard, "ZeroDivisionError None oops", True, False]
    assert run_ranks(3, work, tmp_path) == [expected, own, expected]


def test_together_in_one_process_returns_or_raises_what_happened():
    assert gather_or_raise(lambda: 5) == [5]
    with pytest.raises(StorageError):
        gather_or_raise(lambda: (_ for _ in ()).throw(StorageError("IO", "x")))


def test_a_rank_dies_with_its_launcher(tmp_path):
    rank = (
        "import time; from pdn.runs.launcher import die_with_launcher; print(die_with_launcher(), "
        "flush=True); time.sleep(60)"
    )
    launcher = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); "
        "print(p.pid, flush=True); p.wait()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, rank],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "x"},
    )
    said = {process.stdout.readline().strip(), process.stdout.readline().strip()}
    said.remove("True")
    pid = int(said.pop())
    assert is_running(pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)


ORPHAN = """
import os, sys, time
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.01)
os.environ["TORCHELASTIC_RUN_ID"] = "x"
print("adopted by", os.getppid(), flush=True)
import pdn.cli.process
print("went on", flush=True)
"""
ADOPTER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER, which execve keeps
parent = '''
import os, subprocess, sys
subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())])
'''
subprocess.Popen([sys.executable, "-c", parent, sys.argv[1]])
os.execvp("sleep", ["sleep", "20"])
"""


@pytest.mark.parametrize("adopter", ["init", "a subreaper"])
def test_a_rank_whose_launcher_died_before_it_began_ends_at_once(adopter):
    code = ADOPTER
    if adopter == "init":
        code = code.replace("ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)", "pass")
    process = subprocess.Popen(
        [sys.executable, "-c", code, ORPHAN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": PYTHON_PATH},
    )
    try:
        adopted = process.stdout.readline().split()
        assert adopted[:2] == ["adopted", "by"]
        assert (int(adopted[2]) == process.pid) == (adopter == "a subreaper")
        assert "its launcher is gone" in process.stderr.readline()
        process.kill()
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()


def test_without_a_launcher_a_process_may_outlive_its_parent(monkeypatch):
    from pdn.runs.launcher import die_with_launcher

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not die_with_launcher()


def stalling(timeout_s: float, stall) -> tuple[int, str]:
    """Exit code and standard error of a process that beats twice and then runs ``stall``."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 2)
        watchdog = Watchdog(timeout_s, on_stall=lambda error: os.write(write, b"recorded\n"))
        watchdog.beat(1)
        watchdog.beat(2, "save")
        stall(watchdog)
        os._exit(0)
    os.close(write)
    text = b""
    while piece := os.read(read, 1 << 16):
        text += piece
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text.decode()


def test_a_process_without_progress_ends_with_70_and_says_where_it_hangs():
    started = time.monotonic()
    code, text = stalling(0.4, lambda watchdog: time.sleep(30))
    assert code == 70 and time.monotonic() - started < 29
    assert "pdn[E-STALL] rank 0: no step for" in text and "after step 2 (save), limit 0.4 s" in text
    assert "in stalling" in text and "recorded" in text


def test_progress_and_closing_keep_the_watchdog_quiet():
    def go_on(watchdog):
        for step in range(3, 9):
            time.sleep(0.15)
            watchdog.beat(step)
        for _ in range(5):
            time.sleep(0.15)
            watchdog.alive()
        watchdog.close()
        time.sleep(3.5)

    assert stalling(3.0, go_on) == (0, "")


def test_a_watchdog_waits_for_the_first_beat():
    pid = os.fork()
    if pid == 0:
        Watchdog(0.2)
        time.sleep(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("stopped", "slow rank 1: its process does not run"),
        ("late", "slow rank 1: at step 3 (data), others at step 4 (train)"),
    ],
)
def test_the_watchdog_names_the_slow_rank(tmp_path, how, expected):
    def work(rank: int):
        stderr = os.open(tmp_path / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(stderr, 2)
        watchdog = Watchdog(4.0 if rank != 1 else 60.0)
        for step in range(4):
            watchdog.beat(step, "data" if rank == 1 else "train")
            dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP) if how == "stopped" else time.sleep(30)
            return
        watchdog.beat(4)
        dist.barrier()

    with pytest.raises(AssertionError, match=r"exit codes|still running"):
        run_ranks(3, work, tmp_path, enough=2)
    texts = [(tmp_path / f"stderr-{rank}").read_text() for rank in (0, 2)]
    assert any(expected in text for text in texts), texts
