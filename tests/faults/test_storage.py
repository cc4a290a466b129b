"""Full disks, damaged checkpoints and data, directories that vanish, clocks that jump."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pdn.checkpoint.format import step_directory, verify
from pdn.errors import PdnError, StorageError
from pdn.hub.load import load_run
from tests.checkpoint.test_damage import DAMAGES, FORGERIES
from tests.faults import rig
from tests.faults.conftest import amount
from tests.faults.test_kills import wait_for_progress

SEED = 47


@pytest.fixture
def mounted(tmp_path):
    """Return ``mounted(name, size, *options)``, which mounts a tmpfs or skips if not allowed."""
    paths = []

    def mount(name: str, size: str, *options: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        command = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            ",".join((f"size={size}", *options)),
            "tmpfs",
            str(path),
        ]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount a tmpfs here")
        paths.append(path)
        return path

    yield mount
    for path in paths:
        subprocess.run(["umount", "-l", path], check=True)


# When the disk fills, what stops the run, and how many bytes are left: too few to launch,
# for a save, for its last files, for a log line.
FULL = (("", 3 << 20), ("stop@9:*", 3 << 20), ("stop-save@12:0", 0), ("stop@9:*", 0))


@amount(2, 12)
def test_a_full_disk_ends_the_run_with_74_and_keeps_its_checkpoints(
    mounted, tmp_path, base, reference, table, trials
):
    with table(
        "6",
        "disk full: at the launch, before a save, during it, while logging",
        "74, free space named, no draft, equal bits",
    ) as row:
        for trial in range(trials):
            disk, output = mounted(str(trial), "24m"), tmp_path / "output"
            words = rig.overrides(disk, base)
            world_size = 1 + trial // 4 % 2
            first = rig.launch(output, world_size, [*words, "trainer.stop_at=8"])
            assert first.wait() == [0] * world_size, first.text()
            fault, left = FULL[trial % 4]
            if not fault:
                fill(disk / "filler", left)
            second = rig.launch(output, world_size, words, fault)
            if fault:
                second.wait_until_stopped()
                fill(disk / "filler", left)
                second.kill(signal.SIGCONT)
            assert second.wait() == [74] * world_size or trial % 4 == 3, second.text()
            assert (
                second.codes[0] == 74 and "pdn[E-" in second.text() and "free" in second.text()
            ), second.text()
            assert rig.verified_steps(disk) == [4, 8]
            assert not list((disk / "run" / "checkpoints").glob("*.tmp"))
            (disk / "filler").unlink()
            third = rig.launch(output, world_size, words)
            assert third.wait() == [0] * world_size, third.text()
            assert rig.record(disk) == reference(world_size)
            row.trials += 1


def fill(file: Path, left: int) -> None:
    """Make the file so large that its disk has ``left`` bytes.

    It has fewer if somebody else writes there.
    """
    with contextlib.suppress(OSError), open(file, "wb") as stream:
        stream.write(bytes(max(0, shutil.disk_usage(file.parent).free - left)))


@amount(48, 648)
def test_damaged_checkpoints_are_refused_and_the_run_resumes_before_them(
    tmp_path, base, reference, table, trials
):
    with table(
        "7–9",
        "bit flips, truncation, zeroed pages, missing, stale, swapped, appended files",
        "all detected",
        SEED,
    ) as row:
        rng, whole = random.Random(SEED), tmp_path / "whole"
        words = rig.overrides(whole, base, "checkpoint.asynchronous=false")
        killed = rig.launch(whole, 2, words, "kill@15:*")
        killed.wait()
        checkpoints = whole / "run" / "checkpoints"
        # what `stale` copies from
        shutil.copytree(step_directory(checkpoints, 8), tmp_path / "spare" / "step-00000002")
        for trial in range(trials):
            copy = tmp_path / "spare" / "step-00000012"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(step_directory(checkpoints, 12), copy)
            what = DAMAGES[trial % len(DAMAGES)](copy, rng)
            with pytest.raises(StorageError):
                verify(copy)
                pytest.fail(f"not detected: {what}")
            row.trials += 1
        relaunched = 1 if trials < 100 else 8
        for trial in range(relaunched):
            home = tmp_path / str(trial)
            shutil.copytree(whole, home)
            newest = step_directory(home / "run" / "checkpoints", 12)
            shutil.copytree(
                step_directory(home / "run" / "checkpoints", 4), newest.parent / "step-00000002"
            )
            DAMAGES[trial](newest, rng)
            shutil.rmtree(newest.parent / "step-00000002")
            again = rig.launch(home, 2, rig.overrides(home, base))
            assert again.wait() == [0, 0], again.text()
            message = again.text()
            assert (
                "pdn[E-CKPT-" in message and "; resuming step-8. To pin: resume=step:8" in message
            )
            assert message.count("pdn[E-") == 1
            assert rig.record(home) == reference(2)
        row.note = (
            f"and {relaunched} damaged runs of two ranks fell back to the checkpoint before, equal "
            "bits"
        )


@amount(1, 6)
def test_damaged_data_is_named_before_or_while_it_is_trained_on(tmp_path, base, table, trials):
    with table(
        "11",
        "token shard bit-flipped, truncated or deleted between two launches",
        "65, the shard named",
        SEED + 1,
    ) as row:
        rng = random.Random(SEED + 1)
        for trial in range(trials):
            home = tmp_path / str(trial)
            shutil.copytree(base / "corpus", home / "corpus")
            words = rig.overrides(home, home)
            world_size = 1 + trial % 2
            first = rig.launch(home, world_size, [*words, "trainer.stop_at=8"])
            assert first.wait() == [0] * world_size, first.text()
            shard = max(
                (home / "cache").rglob("*"),
                key=lambda file: file.stat().st_size if file.suffix == ".bin" else 0,
            )
            damage(shard, trial % 3, rng)
            second = rig.launch(home, world_size, words)
            assert second.wait() == [65] * world_size, second.text()
            assert "pdn[E-" in second.text() and shard.name in second.text(), second.text()
            row.trials += 1


def damage(file: Path, kind: int, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if kind == 0:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif kind == 1:
        file.write_bytes(data[: rng.randrange(len(data))])
    else:
        file.unlink()


@amount(1, 4)
def test_an_output_directory_that_cannot_be_written_is_refused_before_the_model_is_built(
    mounted, tmp_path, base, table, trials
):
    with table(
        "20",
        "output directory read-only, behind a file, in /proc; removed in mid-run",
        "74 within 10 s",
    ) as row:
        for trial in range(trials):
            if trial == 0:
                (tmp_path / "file").write_text("")
                home, where = tmp_path / "file" / "runs", "ENOTDIR"
            elif trial == 1:
                home, where = mounted("read-only", "1m", "ro"), "EROFS"
            elif trial == 2:
                home, where = tmp_path / "removed", "ENOENT"
            else:
                home, where = Path("/proc/runs"), "no directory can be made here (ENOENT)"
            words = rig.overrides(
                home, base, "trainer.steps=100000" if trial == 2 else "trainer.steps=24"
            )
            began = time.monotonic()
            started = rig.launch(tmp_path / f"out-{trial}", 2, words)
            if trial == 2:
                wait_for_progress(home, started, 2)
                shutil.rmtree(home / "run")
                began = time.monotonic()
            codes = started.wait(grace_s=2)
            assert 74 in codes and set(codes) <= {74, -signal.SIGKILL, -signal.SIGTERM, 75, 70}, (
                started.text()
            )
            assert time.monotonic() - began < 10
            assert where in started.text(), started.text()
            assert trial == 2 or "parameters" not in started.text()
            row.trials += 1


@amount(1, 4)
def test_the_newest_checkpoint_is_the_one_of_the_highest_step_whatever_the_clock_said(
    tmp_path, base, reference, table, trials
):
    with table(
        "22", "clock jumps: modification times reversed", "newest by step, equal bits"
    ) as row:
        for trial in range(trials):
            home = tmp_path / str(trial)
            words = rig.overrides(home, base, "checkpoint.asynchronous=false")
            rig.launch(home, 1, words, f"kill@{13 + trial}:0").wait()
            checkpoints = home / "run" / "checkpoints"
            for age, step in enumerate(rig.verified_steps(home)):
                for file in (
                    *step_directory(checkpoints, step).iterdir(),
                    step_directory(checkpoints, step),
                ):
                    os.utime(file, (10**9 - age * 10**6, 10**9 - age * 10**6))
            again = rig.launch(home, 1, words)
            assert again.wait() == [0]
            assert "continuing from step 12" in again.text()
            assert rig.record(home) == reference(1)
            row.trials += 1


PAYLOADS = [name for name in FORGERIES if "chunk" not in name and "byte entry" not in name]


@amount(None, len(PAYLOADS))
def test_nothing_in_a_forged_checkpoint_runs(tmp_path, base, table, trials):
    with table(
        "31",
        "checkpoint with a payload or a path out of it, hashes valid: resumed, imported, evaluated",
        "0 run",
    ) as row:
        rig.launch(
            tmp_path / "whole", 1, rig.overrides(tmp_path / "whole", base, "trainer.stop_at=4")
        ).wait()
        for number, name in enumerate(PAYLOADS):
            home, sentinel = tmp_path / str(number), tmp_path / f"sentinel of {name}"
            shutil.copytree(tmp_path / "whole", home)
            FORGERIES[name](step_directory(home / "run" / "checkpoints", 4), sentinel)
            resumed = rig.launch(home, 1, rig.overrides(home, base))
            assert resumed.wait()[0] in (74, 78), resumed.text()
            assert resumed.text().count("pdn[E-CKPT-") == 1 and "Traceback" not in resumed.text(), (
                resumed.text()
            )
            if not name.startswith("random states"):  # which are for resuming only
                imported = rig.launch(
                    home, 1, rig.overrides(home, base, "name=new", f"init_from={home / 'run'}")
                )
                assert imported.wait()[0] in (74, 78), imported.text()
                with pytest.raises(PdnError, match="E-CKPT-"):
                    load_run(home / "run")
            assert not sentinel.exists(), name
            row.trials += 1
