"""A run whose replica lies in object storage: kills, damage, throttling, two writers, credentials.

The S3 server is moto over HTTP on loopback. "Another machine" is another output directory.
"""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from pdn.checkpoint import replica
from pdn.store import lease
from pdn.store import s3 as store
from tests.faults import rig
from tests.faults.conftest import amount
from tests.faults.test_kills import wait_for_progress

URL = "s3://pdn-tests/runs"
SEED = 49


@pytest.fixture
def bucket(s3, monkeypatch):
    """Give the server; the ranks, which are forked, upload in small parts and wait shortly."""
    monkeypatch.setattr(store, "PART_BYTES", 8192)
    monkeypatch.setattr(lease, "SECONDS", 1.5)
    monkeypatch.setattr(replica, "PAUSE_S", 0.05)
    return s3


def words(home: Path, base: Path, *more: str) -> list[str]:
    return rig.overrides(home, base, f"replica={URL}", *more)


def is_upload(method: str, path: str) -> bool:
    return method == "PUT" and "/objects/" in path


def finish_elsewhere(home: Path, base: Path, world_size: int, reference) -> rig.Launch:
    """Continue in an empty directory, to the end, and compare with the run left alone."""
    again = rig.launch(home, world_size, words(home, base))
    assert again.wait() == [0] * world_size, again.text()
    assert rig.record(home) == reference(world_size)
    rig.assert_alive_none(again.pids)
    return again


@amount(None, 16)
def test_a_run_that_loses_its_machine_goes_on_from_the_replica(
    tmp_path, base, reference, bucket, table, trials
):
    with table(
        "35",
        "SIGKILL of all ranks in the middle of an upload, or at a random moment; the local "
        "directory is lost, the run goes on in an empty one",
        "from a committed state, equal bits, no unfinished upload left",
        SEED,
    ) as row:
        rng, repeated = random.Random(SEED), []
        for trial in range(trials):
            bucket.empty()
            world_size, home = 1 + trial % 2, tmp_path / str(trial)
            first = home / "first"
            if trial % 4 < 2:  # held at one of the uploads, of several checkpoints and their parts
                wanted, seen = rng.randrange(1, 60), []
                held = bucket.rule(
                    lambda m, p, wanted=wanted, seen=seen: (
                        is_upload(m, p) and (seen.append(p) or len(seen) >= wanted)
                    )
                )
                with held as rule:
                    started = rig.launch(first, world_size, words(first, base))
                    assert rule.seen.wait(rig.HANGS_S), started.text()
                    started.kill()
                    started.wait()
            else:
                started = rig.launch(first, world_size, words(first, base))
                wait_for_progress(first, started, rng.randrange(0, 16))
                time.sleep(rng.random() * 0.3)  # the moment is meant to be any
                started.kill()
                started.wait()
            computed = rig.computed_step(first)
            shutil.rmtree(first)
            again = finish_elsewhere(home / "second", base, world_size, reference)
            repeated.append(max(0, computed - again.resumed_step()))
            assert bucket.uploads() == []
            row.trials += 1
        row.note = f"{sum(repeated)} steps computed again, at most {max(repeated)} of {rig.STEPS}"


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "emptied": lambda data: b"",
    "missing": lambda data: None,
}


@amount(None, 12)
def test_a_damaged_object_is_never_restored(tmp_path, base, reference, bucket, table, trials):
    with table(
        "35.1",
        "object of the replica's newest checkpoint truncated, flipped, emptied, missing",
        "the object named, the checkpoint before taken, equal bits",
        SEED + 1,
    ) as row:
        rng = random.Random(SEED + 1)
        for trial in range(trials):
            bucket.empty()
            kind, home = list(DAMAGES)[trial % len(DAMAGES)], tmp_path / str(trial)
            first = home / "first"
            for step in (8, 12):  # what is still waiting for its upload would be passed over
                more = words(first, base, f"trainer.stop_at={step}")
                stopped = rig.launch(first, 1, more)
                assert stopped.wait() == [0], stopped.text()
            names = "__0_0.distcp", "side.json", "index.json", "rng-0.pt", "manifest.json"
            name = rng.choice(names)
            *_, key = sorted(k for k in bucket.keys("runs/run/objects/") if k.endswith(name))
            damaged = DAMAGES[kind](bucket.get(key))
            if damaged is None:
                bucket.client.delete_object(Bucket="pdn-tests", Key=key)
            else:
                bucket.put(key, damaged)
            again = finish_elsewhere(home / "second", base, 1, reference)
            assert again.resumed_step() == 8
            assert "pdn[E-S3-" in again.text() and key.removeprefix("runs/run/") in again.text()
            row.trials += 1


@amount(None, 4)
def test_a_store_that_throttles_delays_the_replica_only(
    tmp_path, base, reference, bucket, table, trials
):
    with table(
        "35.2",
        "the store answers 503 SlowDown to one in four requests",
        "equal bits, the replica complete at the end",
        SEED + 2,
    ) as row:
        for trial in range(trials):
            bucket.empty()
            rng, home = random.Random(SEED + 2 + trial), tmp_path / str(trial)
            busy = bucket.rule(
                lambda method, path, rng=rng: rng.random() < 0.25,
                status="503 Slow Down",
                code="SlowDown",
            )
            with busy as rule:
                finish_elsewhere(home / "first", base, 1 + trial % 2, reference)
            assert rule.count > 10
            copy = rig.launch(home / "second", 1 + trial % 2, words(home / "second", base))
            assert copy.wait() == [0] * (1 + trial % 2), copy.text()
            assert copy.resumed_step() == rig.STEPS
            row.trials += 1
            row.note = f"{rule.count} requests refused in the last trial"


@amount(None, 4)
def test_credentials_that_expire_do_not_stop_training(
    tmp_path, base, reference, bucket, table, trials
):
    with table(
        "35.3",
        "credentials expire in mid-run and are renewed after its end",
        "trained to the end, 74 with the step that the replica holds; whole after a launch",
    ) as row:
        for trial in range(trials):
            bucket.empty()
            home, uploads = tmp_path / str(trial), []
            expired = bucket.rule(
                lambda method, path, uploads=uploads: (
                    "/objects/" in path
                    and method in ("PUT", "POST")
                    and (uploads.append(path) or len(uploads) > 30)
                ),
                status="403 Forbidden",
                code="ExpiredToken",
            )
            with expired:
                ended = rig.launch(home, 1, words(home, base))
                assert ended.wait() == [74], ended.text()
            assert ended.text().count("pdn[E-REPLICA-BEHIND]") == 1
            assert "ExpiredToken" in ended.text() or "on demand" in ended.text()
            assert rig.record(home) == reference(1)
            copied = rig.launch(home, 1, words(home, base))
            assert copied.wait() == [0], copied.text()
            assert rig.status(home)["state"] == "finished"
            other = rig.launch(home / "other", 1, words(home / "other", base))
            assert other.wait() == [0] and other.resumed_step() == rig.STEPS
            assert rig.record(home / "other") == reference(1)
            row.trials += 1


@amount(None, 6)
def test_of_two_machines_one_writes(tmp_path, base, reference, bucket, table, trials, monkeypatch):
    with table(
        "35.4",
        "a launch on a second machine while the first one trains; the first stopped by SIGSTOP "
        "until the second has taken over, then continued",
        "73, the holder named; after a silence the second goes on, equal bits, the first ends with "
        "73 and has published nothing",
    ) as row:
        for trial in range(trials):
            bucket.empty()
            home = tmp_path / str(trial)
            first, second = home / "first", home / "second"
            # The first waits, alive, and renews every second what would last a minute.
            monkeypatch.setattr(lease, "SECONDS", 60.0)
            monkeypatch.setattr(lease, "RENEWALS", 60)
            with bucket.rule(is_upload) as hold:
                started = rig.launch(first, 1, words(first, base))
                assert hold.seen.wait(rig.HANGS_S), started.text()
                refused = rig.launch(second, 1, words(second, base))
                assert refused.wait() == [73], refused.text()
                assert f"PID {started.pids[0]} on" in refused.text()
                started.kill(signal.SIGSTOP)
                started.wait_until_stopped()
            monkeypatch.setattr(lease, "SECONDS", 1.5)
            finish_elsewhere(second, base, 1, reference)
            started.kill(signal.SIGCONT)
            assert started.wait() == [73], started.text()
            assert "pdn[E-REPLICA-" in started.text()
            third = rig.launch(home / "third", 1, words(home / "third", base))
            assert third.wait() == [0] and third.resumed_step() == rig.STEPS, third.text()
            assert rig.record(home / "third") == reference(1)
            row.trials += 1
