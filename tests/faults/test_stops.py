"""Polite stops, hangs, and two launches of one run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from pdn.distributed.fsdp import World
from pdn.training import trainer
from tests.children import PYTHON_PATH
from tests.faults import rig
from tests.faults.conftest import amount
from tests.faults.test_kills import wait_for_progress

ROOT = Path(__file__).parent.parent.parent
SEED = 43
EVAL = (
    "eval=validation",
    "eval.every=3",
    "eval.batch_size=2",
    "eval.max_samples=8",
    "eval.at_start=false",
)


@amount(3, 24)
def test_a_polite_stop_saves_at_the_step_boundary_and_loses_no_step(
    tmp_path, base, reference, table, trials
):
    places = ("step", "save", "eval", "data", "backward")
    with table(
        "4",
        "SIGTERM or SIGUSR1 in compute, save, evaluation, data wait; also twice",
        "75, zero steps lost, equal bits",
        SEED,
    ) as row:
        rng, slowest = random.Random(SEED), 0.0
        for trial in range(trials):
            world_size, place, rank = (
                1 + trial % 2,
                places[trial % len(places)],
                rng.randrange(1 + trial % 2),
            )
            step = {"save": rig.EVERY * rng.randint(1, 4), "eval": 3 * rng.randint(1, 6)}.get(
                place, rng.randint(1, 18)
            )
            fault = f"term-{place}@{step}:{rank}"
            if trial % 4 == 3:
                fault += f",term-{place}@{step + 1}:{rank},term-{place}@{step}:0"
            home = tmp_path / str(trial)
            words = rig.overrides(home, base, *EVAL)
            stopped = rig.launch(home, world_size, words, fault)
            assert stopped.wait() == [75] * world_size, stopped.text()
            status = rig.status(home)
            assert (status["state"], status["exit_code"], status["step"]) == (
                "preempted",
                75,
                rig.computed_step(home),
            )
            assert max(rig.verified_steps(home)) == rig.computed_step(home) <= step + rig.EVERY
            rig.assert_alive_none(stopped.pids)
            again = rig.launch(home, world_size, words)
            assert again.wait() == [0] * world_size, again.text()
            assert rig.record(home) == reference(world_size)
            row.trials += 1
        # Stop while the data hang: they are then waited for no longer.
        home = tmp_path / "hanging"
        words = rig.overrides(home, base)
        started = rig.launch(home, 2, words, "hang-data@6:1")
        wait_for_progress(home, started, 4)
        started.kill(signal.SIGTERM)
        assert started.wait() == [75, 75], started.text()
        assert rig.verified_steps(home) == [4, 5]
        assert rig.launch(home, 2, words).wait() == [0, 0]
        assert rig.record(home) == reference(2)
        # From outside, and how long it takes.
        home = tmp_path / "outside"
        words = rig.overrides(home, base)
        started = rig.launch(home, 2, words)
        wait_for_progress(home, started, 2)
        asked = time.monotonic()
        started.kill(signal.SIGUSR1, 1)
        assert started.wait() == [75, 75]
        slowest = time.monotonic() - asked
        row.note = f"{slowest:.1f} s from a signal to the exit"


@amount(2, 8)
def test_a_run_whose_output_nobody_reads_any_more_trains_to_its_end(
    tmp_path, base, reference, table, trials
):
    with table(
        "4.2",
        "the reader of the output goes away; the disk under it is full; on one and two ranks",
        "trained to the end, the loss of the output in status.json, run.log whole, equal bits",
    ) as row:
        for trial in range(trials):
            home, world_size = tmp_path / str(trial), 1 + trial // 2 % 2
            home.mkdir()
            full = Path("/dev/full").open("w") if trial % 2 else None  # noqa: SIM115
            launcher = (
                f"-m torch.distributed.run --standalone --nproc-per-node {world_size}".split()
            )
            command = [sys.executable, *(launcher if world_size > 1 else ()), "train.py"]
            process = subprocess.Popen(
                [*command, *rig.overrides(home, base)],
                stdout=full or subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"},
            )
            if full is None:
                process.stdout.readline()
                process.stdout.close()
            assert process.wait(rig.HANGS_S) == 0
            status = rig.status(home)
            assert (status["state"], status["exit_code"]) == ("finished", 0)
            reason = "No space left on device" if full else "Broken pipe"
            assert (
                f"standard output: {reason}; what the run prints is in run.log" in status["output"]
            )
            log = (home / "run" / "run.log").read_text()
            assert f"step {rig.STEPS}/{rig.STEPS}" in log and "finished at step" in log
            assert rig.record(home) == reference(world_size)
            row.trials += 1


@amount(1, 6)
def test_a_run_whose_terminal_is_closed_saves_and_continues(
    tmp_path, base, reference, table, trials
):
    with table(
        "4.3", "SIGHUP to all ranks, or to one", "75, zero steps lost, equal bits", SEED + 1
    ) as row:
        rng = random.Random(SEED + 1)
        for trial in range(trials):
            home, words = tmp_path / str(trial), rig.overrides(tmp_path / str(trial), base)
            started = rig.launch(home, 2, words)
            wait_for_progress(home, started, rng.randint(1, 12))
            started.kill(signal.SIGHUP, *((trial // 2 % 2,) if trial % 2 else ()))
            assert started.wait() == [75, 75], started.text()
            assert max(rig.verified_steps(home)) == rig.computed_step(home)
            again = rig.launch(home, 2, words)
            assert again.wait() == [0, 0], again.text()
            assert rig.record(home) == reference(2)
            row.trials += 1


@amount(None, 3)
def test_a_stop_sent_to_torchrun_reaches_the_run(tmp_path, base, reference, table, trials):
    with table(
        "4.1", "SIGTERM to torchrun", "status.json says 75, zero steps lost, equal bits"
    ) as row:
        for trial in range(trials):
            home = tmp_path / str(trial)
            words = rig.overrides(home, base)
            torchrun = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                "train.py",
            ]
            home.mkdir()
            with open(home / "output", "a") as output:
                process = subprocess.Popen(
                    [*torchrun, *words], stdout=output, stderr=output, cwd=ROOT
                )
                while rig.computed_step(home) < 2:
                    assert process.poll() is None, (home / "output").read_text()
                    time.sleep(0.02)
                process.send_signal(signal.SIGTERM)
                process.wait(60)
                status = rig.status(home)
                assert (status["state"], status["exit_code"]) == ("preempted", 75), (
                    home / "output"
                ).read_text()
                assert max(rig.verified_steps(home)) == rig.computed_step(home)
                again = subprocess.run(
                    [*torchrun, *words], stdout=output, stderr=output, cwd=ROOT, check=False
                )
            assert again.returncode == 0, (home / "output").read_text()
            assert rig.record(home) == reference(2)
            row.trials += 1


@amount(1, 4)
def test_a_rank_that_stops_running_is_named_and_the_launch_ends(
    tmp_path, base, table, trials, monkeypatch
):
    timeout = 3.0 if rig.DEVICE == "cpu" else 20.0  # a first step on a GPU loads kernels
    if trials == 1:  # no checkpoint ends while a rank of it is stopped, however long one waits
        monkeypatch.setattr(trainer, "STALL_WRITE_S", 1.0)
    with table(
        "5",
        "SIGSTOP of one rank; a rank hanging in its data",
        "ends within timeout + 35 s, the rank named",
    ) as row:
        slowest = 0.0
        for trial in range(trials):
            home, rank = tmp_path / str(trial), 1 - trial // 2
            words = rig.overrides(home, base, f"trainer.stall_timeout={timeout}")
            fault = (f"stop@6:{rank}", f"hang-data@6:{rank}")[trial % 2]
            started = rig.launch(home, 2, words, fault)
            wait_for_progress(home, started, 4)
            began = time.monotonic()
            codes = started.wait(grace_s=2)
            slowest = max(slowest, time.monotonic() - began)
            assert codes[1 - rank] == 70, started.text()
            assert slowest < timeout + 35
            text = started.text()
            assert "pdn[E-STALL]" in text
            assert f"slow rank {rank}:" in text or (rank == 0 and "suspect rank 0" in text), text
            if rank == 1:
                assert (
                    rig.status(home)["exit_code"] == 70
                    and "slow rank 1" in rig.status(home)["reason"]
                )
            rig.assert_alive_none(started.pids)
            row.trials += 1
        row.note = f"timeout {timeout:g} s, slowest {slowest:.1f} s"


@amount(2, 20)
def test_of_two_launches_of_one_run_one_wins_and_the_other_says_who_did(
    tmp_path, base, table, trials
):
    with table(
        "21",
        "two launches in one directory at the same time",
        "one trains, the other exits 73 and names it",
    ) as row:
        for trial in range(trials):
            home = tmp_path / str(trial)
            words = rig.overrides(home, base, "trainer.steps=100000")
            one, other = rig.launch(home / "a", 1, words), rig.launch(home / "b", 1, words)
            try:
                while not (one.poll() or other.poll()):
                    time.sleep(0.005)
                loser, winner = (one, other) if one.codes else (other, one)
                assert loser.codes == {0: 73}, loser.text()
                assert (
                    f"already in use by PID {winner.pids[0]} on {os.uname().nodename}"
                    in loser.text()
                )
                wait_for_progress(home, winner, 1)
                assert winner.poll() == {}
            finally:
                one.kill()
                other.kill()
                one.wait()
                other.wait()
            row.trials += 1


@amount(1, 6)
def test_a_loader_that_fails_on_one_rank_ends_all_ranks_at_once(
    tmp_path, base, reference, table, trials
):
    with table(
        "12",
        "the loader of one rank fails in mid-run",
        "all ranks end together, the rank named, equal bits after",
    ) as row:
        for trial in range(trials):
            home, rank, step = tmp_path / str(trial), trial % 2, 6 + trial
            words = rig.overrides(home, base)
            failed = rig.launch(home, 2, words, f"raise-data@{step}:{rank}")
            assert failed.wait() == [70, 70], failed.text()
            assert (
                f"pdn[E-INTERNAL] rank {rank}: RuntimeError: injected at data" in failed.text()
                or rank == 0
            )
            assert rig.computed_step(home) == step - 1
            again = rig.launch(home, 2, words)
            assert again.wait() == [0, 0], again.text()
            assert rig.record(home) == reference(2)
            row.trials += 1


def test_a_rank_that_fails_alone_does_not_wait_for_the_others_to_leave_the_group(
    tmp_path, base, monkeypatch
):
    left = tmp_path / "left"
    # NCCL's waits while a peer is in a collective
    monkeypatch.setattr(World, "close", lambda self: left.touch())
    started = rig.launch(tmp_path, 2, rig.overrides(tmp_path, base), "raise@6:1")
    assert started.wait()[1] == 70, started.text()
    assert "RuntimeError: injected at step" in started.text() and not left.exists()
    assert rig.launch(tmp_path, 2, rig.overrides(tmp_path, base)).wait() == [0, 0] and left.exists()


@amount(1, 2)
def test_a_stop_while_the_data_are_opened_is_heard_at_once(tmp_path, base, trials, monkeypatch):
    def slowly(*args, **options):
        (tmp_path / "opening").touch()
        time.sleep(rig.HANGS_S)

    monkeypatch.setattr(rig, "open_data", slowly)
    for world_size in range(1, trials + 1):
        home = tmp_path / str(world_size)
        started = rig.launch(home, world_size, rig.overrides(home, base))
        while not (tmp_path / "opening").exists():
            time.sleep(0.01)
        started.kill(signal.SIGINT)
        assert started.wait() == [75] * world_size, started.text()
        assert "stopped while the data were opened, no step is lost" in started.text()
        assert (rig.status(home)["state"], rig.status(home)["exit_code"]) == ("preempted", 75)
        (tmp_path / "opening").unlink()


@amount(1, 6)
def test_an_evaluation_that_was_killed_is_made_by_the_next_launch_and_none_twice(
    tmp_path, base, table, trials
):
    with table(
        "29",
        "SIGKILL in an evaluation: at the start, in mid-run, after the last step",
        "each made once, equal bits",
    ) as row:
        words = rig.overrides(tmp_path / "whole", base, *EVAL, "eval.at_start=true")
        assert rig.launch(tmp_path / "whole", 2, words).wait() == [0, 0]
        expected = rig.validations(tmp_path / "whole")
        assert [step for step, _ in expected] == [0, *range(3, rig.STEPS + 1, 3)]
        for trial in range(trials):
            home, step = tmp_path / str(trial), (rig.STEPS, 3, 12, 15, 0, 24)[trial]
            words = rig.overrides(home, base, *EVAL, "eval.at_start=true")
            killed = rig.launch(home, 2, words, f"kill-eval@{step}:{trial % 2}")
            assert -signal.SIGKILL in killed.wait(), killed.text()
            again = rig.launch(home, 2, words)
            assert again.wait() == [0, 0], again.text()
            assert rig.validations(home) == expected
            assert rig.record(home) == rig.record(tmp_path / "whole")
            assert rig.status(home)["state"] == "finished"
            row.trials += 1
