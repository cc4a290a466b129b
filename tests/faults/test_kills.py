"""SIGKILL at any moment: nothing is corrupt, skipped or repeated.

The losses stay equal bit by bit.
"""

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.children import command_of, is_running
from tests.faults import rig
from tests.faults.conftest import amount
from tests.ranks import free_port

ROOT = Path(__file__).parent.parent.parent
SEED = 41


def kill_and_relaunch(
    directory: Path,
    base: Path,
    reference,
    world_size: int,
    rng: random.Random,
    kills: int,
    row,
    whom,
) -> int:
    """Run with ``kills`` random kills in all, each run to its end.

    Returns the steps computed more than once.
    """
    done, run, repeated = 0, 0, 0
    while done < kills:
        run += 1
        home = directory / f"w{world_size}-{run}"
        words = rig.overrides(home, base, f"checkpoint.asynchronous={str(run % 2 == 0).lower()}")
        while True:
            saved_before = rig.verified_steps(home)
            started = rig.launch(home, world_size, words)
            # Wait for the first step of this launch, then for a random moment within a few saves.
            wait_for_progress(home, started, max(saved_before, default=0))
            victim_at = time.monotonic() + rng.random() * 1.5
            while time.monotonic() < victim_at and len(started.poll()) < world_size:
                time.sleep(0.002)
            if done < kills and len(started.poll()) == 0:
                whom(started, rng)
                # A kill does not count if the run ended by itself at that very moment.
                if any(code == -signal.SIGKILL for code in started.wait()):
                    done += 1
                    row.trials += 1
            else:
                assert started.wait() == [0] * world_size, started.text()
            rig.assert_alive_none(started.pids)
            steps = rig.verified_steps(home)
            assert not saved_before or max(steps) >= max(saved_before)
            repeated += max(0, rig.computed_step(home) - max(steps, default=0))
            assert rig.computed_step(home) - max(steps, default=0) <= 2 * rig.EVERY
            if all(code == 0 for code in started.codes.values()):
                break
        assert rig.record(home) == reference(world_size)
        rig.assert_ledger_complete(home)
    return repeated


def wait_for_progress(home: Path, started: rig.Launch, step: int) -> None:
    while rig.computed_step(home) <= step and not started.poll():
        assert time.monotonic() < started.started + rig.HANGS_S, started.text()
        time.sleep(0.005)


def seconds_to_running(home: Path, started: rig.Launch, began: float) -> float:
    """Return seconds from the launch to the end of restoring, as ``status.json`` dates it."""
    while not started.poll():
        file = home / "run" / "status.json"
        if (
            file.exists()
            and rig.status(home)["state"] == "running"
            and rig.status(home)["time"] > began
        ):
            return rig.status(home)["time"] - began
        time.sleep(0.005)
    return time.time() - began


def kill_all(started: rig.Launch, rng: random.Random) -> None:
    started.kill(signal.SIGKILL)


def kill_one(started: rig.Launch, rng: random.Random) -> None:
    started.kill(signal.SIGKILL, rng.randrange(len(started.pids)))


@amount(2, 52)
def test_a_run_killed_at_random_moments_equals_the_uninterrupted_one(
    tmp_path, base, reference, table, trials
):
    with table(
        "1",
        "SIGKILL of all ranks at a random moment",
        "0 corrupt, 0 skipped, 0 repeated, equal bits",
        SEED,
    ) as row:
        rng = random.Random(SEED)
        repeated = kill_and_relaunch(tmp_path, base, reference, 1, rng, trials // 2, row, kill_all)
        repeated += kill_and_relaunch(
            tmp_path, base, reference, 2, rng, trials - trials // 2, row, kill_all
        )
        row.note = f"{repeated} steps computed again"


@amount(None, 20)
def test_a_killed_rank_ends_the_launch_and_the_run_continues(
    tmp_path, base, reference, table, trials
):
    with table("2", "SIGKILL of one rank of two", "as 1, no process left", SEED + 1) as row:
        repeated = kill_and_relaunch(
            tmp_path, base, reference, 2, random.Random(SEED + 1), trials, row, kill_one
        )
        row.note = f"{repeated} steps computed again"


@amount(None, 10)
def test_workers_die_with_a_killed_torchrun(tmp_path, base, table, trials):
    with table("3", "SIGKILL of torchrun", "its workers gone within 10 s, the lock free") as row:
        slowest = 0.0
        for trial in range(trials):
            home = tmp_path / str(trial)
            words = rig.overrides(home, base, "trainer.steps=100000")
            torchrun = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
            ]
            home.mkdir()
            with open(home / "output", "w") as output:
                process = subprocess.Popen(
                    [*torchrun, "train.py", *words], cwd=ROOT, stdout=output, stderr=output
                )
            try:
                while rig.computed_step(home) < 1:
                    assert process.poll() is None, (home / "output").read_text()
                    time.sleep(0.05)
                workers = children(process.pid)
                assert len(workers) >= 2
            finally:
                process.kill()
                process.wait()
            started = time.monotonic()
            while any(is_running(pid) for pid in workers) and time.monotonic() < started + 10:
                time.sleep(0.02)
            rig.assert_alive_none(workers)
            slowest = max(slowest, time.monotonic() - started)
            row.trials += 1
        row.note = f"slowest {slowest:.1f} s"


@amount(None, 60)
def test_a_launcher_killed_in_its_first_seconds_leaves_no_rank_for_the_next_launch(
    tmp_path, base, table, trials
):
    """Use one port and two configurations for both launches.

    What is left of the first one would tell the second its learning rate.
    """
    with table(
        "3.1",
        "SIGKILL of torchrun after 0 to 8 s, then another configuration at its port",
        "0 ranks left after 10 s, 0 runs of mixed configurations",
        SEED + 3,
    ) as row:
        rng, slowest = random.Random(SEED + 3), 0.0
        # Every other launch is killed within seconds of the moment when its ranks begin.
        seconds = [rng.uniform(0, 8 if trial % 2 else 2) for trial in range(trials)]
        with ThreadPoolExecutor(min(trials, 2)) as pool:  # they wait more than they compute
            for ended in pool.map(
                lambda trial: kill_and_replace(tmp_path, base, trial, seconds[trial]), range(trials)
            ):
                slowest = max(slowest, ended)
                row.trials += 1
        row.note = f"slowest end {slowest:.1f} s"


def kill_and_replace(tmp_path: Path, base: Path, trial: int, after_s: float) -> float:
    """Kill a launcher, and run another configuration at its port to the end.

    Returns the seconds that the last rank of the first launch survived.
    """
    port, homes = free_port(), [tmp_path / f"{trial}-{name}" for name in "ab"]
    first, second = (
        torchrun_at(port, home, base, f"trainer.steps={steps}", f"optim.lr={lr}")
        for home, steps, lr in zip(homes, (100000, 4), (0.007, 0.001), strict=True)
    )
    doomed = first()
    while trial % 2 == 0 and not children(doomed.pid):
        time.sleep(0.01)
    time.sleep(after_s)
    doomed.kill()
    doomed.wait()
    killed = time.monotonic()
    following = second()
    while (left := processes_of(homes[0])) and time.monotonic() < killed + 10:
        time.sleep(0.05)
    assert not left, left
    ended = time.monotonic() - killed
    assert following.wait(rig.HANGS_S) == 0, (homes[1] / "output").read_text()
    rates = [line["lr"] for line in rig.read_lines(homes[1], "metrics.jsonl") if "lr" in line]
    assert len(rates) == 4 and max(rates) == 0.001
    return ended


def torchrun_at(port: int, home: Path, base: Path, *more: str):
    """Return a function that starts ``train.py`` on two ranks at a fixed port.

    Its output goes to a file in ``home``.
    """
    home.mkdir()
    launcher = f"-m torch.distributed.run --nproc-per-node 2 --master-port {port}".split()
    command = [sys.executable, *launcher, "train.py", *rig.overrides(home, base, *more)]

    def start() -> subprocess.Popen:
        with open(home / "output", "w") as output:
            return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)

    return start


def processes_of(home: Path) -> list[int]:
    """Return the processes whose command line names ``home``."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if str(home).encode() in command_of(pid) and is_running(pid)]


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if parent == pid:
                found.append(int(entry.name))
    return found


@amount(2, 20)
def test_a_kill_while_saving_or_pruning_leaves_a_verified_checkpoint(
    tmp_path, base, reference, table, trials
):
    with table(
        "10",
        "SIGKILL while a checkpoint is written or an old one pruned",
        "a verified checkpoint always, equal bits",
    ) as row:
        for trial in range(trials):
            home, step = tmp_path / str(trial), rig.EVERY * (2 + trial // 2 % 4)
            place = ("save", "prune")[trial % 2]
            words = rig.overrides(home, base, "checkpoint.keep_last=1")
            killed = rig.launch(home, 1, words, f"kill-{place}@{step}:0")
            assert killed.wait() == [-signal.SIGKILL]
            leftovers = list((home / "run" / "checkpoints").glob("*.tmp"))
            assert leftovers
            assert max(rig.verified_steps(home)) == (step if place == "prune" else step - rig.EVERY)
            again = rig.launch(home, 1, words)
            assert again.wait() == [0], again.text()
            assert rig.record(home) == reference(1)
            assert not list((home / "run" / "checkpoints").glob("*.tmp"))
            row.trials += 1


# of a run: a fault in 50 steps and a checkpoint in 4, as one in 2 hours and one in 10 minutes
SOAK_STEPS, SOAK_FAULTS = 400, 8
ACTIONS = (
    "kill@{}:0",
    "kill@{}:1",
    "term@{}:0",
    "term@{}:1",
    "raise@{}:1",
    "kill-save@{}:1",
    "kill-save@{}:0",
    "kill-prune@{}:0",
)


@amount(None, 40)
def test_a_soak_of_mixed_faults_keeps_nine_tenths_of_the_steps(
    tmp_path, base, reference, table, trials
):
    with table(
        "24",
        "soak: kills, stops, crashes, in and out of saves, on either rank of two; a checkpoint in "
        "4 steps, a fault in about 50",
        "equal bits, ≥ 90 % of the computed steps kept",
        SEED + 2,
    ) as row:
        rng, computed, restart, runs = random.Random(SEED + 2), 0, [], trials // SOAK_FAULTS
        length = f"trainer.steps={SOAK_STEPS}"
        for run in range(runs):
            home = tmp_path / str(run)
            words = rig.overrides(home, base, length)
            for fault in [*range(SOAK_FAULTS), None]:
                began, at = (
                    time.time(),
                    max(rig.verified_steps(home), default=0)
                    + rng.randint(1, 2 * SOAK_STEPS // SOAK_FAULTS),
                )
                action = None if fault is None else rng.choice(ACTIONS)
                if action is not None and "-" in action:  # strikes in a save
                    at += -at % rig.EVERY
                at = min(at, SOAK_STEPS - 2 * rig.EVERY)
                started = rig.launch(home, 2, words, "" if action is None else action.format(at))
                restart.append(seconds_to_running(home, started, began))
                codes = started.wait()
                rig.assert_alive_none(started.pids)
                computed += rig.computed_step(home) - started.resumed_step()
                if fault is None:
                    assert codes == [0, 0], started.text()
                elif any(codes):  # not if it was due at a step that the run had passed
                    row.trials += 1
            assert rig.record(home, SOAK_STEPS) == reference(2, length, length=SOAK_STEPS)
            rig.assert_ledger_complete(home, SOAK_STEPS)
        kept = 100 * runs * SOAK_STEPS / computed
        row.note = (
            f"{kept:.1f} % of {computed} computed steps kept, with a fault every "
            f"{computed / row.trials:.0f}; "
            f"restart {sorted(restart)[len(restart) // 2]:.1f} s"
        )
        assert row.trials >= 0.9 * trials and kept >= 90, row.note
