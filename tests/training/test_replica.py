"""A run with a replica in object storage: it comes back in an empty directory, bit by bit."""

import json
import logging
import os
from pathlib import Path

import pytest

from pdn.checkpoint import replica
from pdn.checkpoint.fetch import fetch
from pdn.checkpoint.format import (
    Manifest,
    committed_steps,
    file_record,
    step_directory,
    verify,
    write_commit,
)
from pdn.errors import ConfigError, LockedError, StorageError
from pdn.store import commits
from pdn.store.s3 import Bucket
from tests.small_runs import losses, metrics, run_config, train

URL = "s3://pdn-tests/runs"
WORDS = (f"replica={URL}", "trainer.steps=6", "checkpoint.every=2", "schedule.warmup_steps=2")


def launch(home: Path, *words: str) -> list[dict]:
    return train(home, "pgdn_tiny", *WORDS, *words)


def held(directory: Path) -> list[int]:
    return committed_steps(directory / "run" / "checkpoints")


@pytest.fixture
def half(s3, tmp_path, monkeypatch) -> Path:
    """Train the first four of six steps in one directory, with a replica."""
    monkeypatch.setattr(replica, "PAUSE_S", 0.01)
    push = replica.RunReplica.push

    def after_the_one_before(self, step: int) -> None:  # which would be passed over
        with self._changed:
            assert self._changed.wait_for(lambda: self._waiting is None, 60)
        push(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica.RunReplica, "push", after_the_one_before)
        launch(tmp_path / "first", "trainer.stop_at=4")
    return tmp_path


def test_a_run_goes_on_elsewhere_and_comes_back_as_if_it_had_never_moved(half, s3, caplog):
    whole = launch(half / "whole", "replica=null")
    launch(half / "second")
    assert held(half / "second") == [4, 6]
    assert verify(half / "second" / "run" / "checkpoints" / "step-00000006").step == 6
    assert losses(metrics(half / "second")) == losses(whole)
    ledgers = [(half / name / "run" / "ledger.jsonl").read_text() for name in ("whole", "second")]
    assert ledgers[0] == ledgers[1]
    with caplog.at_level(logging.WARNING, "pdn.checkpoint.replica"):
        launch(half / "first")  # the machine that had it before
    assert "the run went on elsewhere; what was here is in" in caplog.text
    assert (half / "first" / "run" / "before-restart-1" / "ledger.jsonl").exists()
    assert (half / "first" / "run" / "ledger.jsonl").read_text() == ledgers[0]
    for key in s3.keys():  # noqa: SIM118 (no dict)
        assert b"canary-of-the-tests" not in s3.get(key), key


def test_logs_go_up_in_segments_and_old_checkpoints_go(half):
    bucket = Bucket(f"{URL}/run")
    commit = commits.newest(bucket)
    launch(half / "first")
    later = commits.newest(bucket)
    assert sorted(commit.trees) == ["step-00000002", "step-00000004"]
    assert sorted(later.trees) == ["step-00000004", "step-00000006"]
    assert later.trees["step-00000004"] == commit.trees["step-00000004"]  # put once
    first, *_ = later.lines["ledger.jsonl"]
    assert len(later.lines["ledger.jsonl"]) > 1 and first == commit.lines["ledger.jsonl"][0]
    for segments, name in ((later.lines[name], name) for name in ("ledger.jsonl", "metrics.jsonl")):
        whole = b"".join(bucket.get(entry["object"]) for entry in segments)
        local = (half / "first" / "run" / name).read_bytes()
        assert local.startswith(whole) and whole.count(b"\n") >= 6
    dropped = commit.objects() - later.objects()
    launch(half / "first")  # a commit later, nothing refers to them
    assert dropped and not dropped & set(bucket.names("objects/"))


def save(run: Path, step: int, absent: str = "") -> Path:
    """Write a checkpoint of two small files, of which one may be absent; return its directory."""
    checkpoint = step_directory(run / "checkpoints", step)
    checkpoint.mkdir(parents=True)
    for name in ("index.json", "side.json"):
        (checkpoint / name).write_text(f"{name} of {step}")
    records = {file.name: file_record(file) for file in checkpoint.iterdir()}
    tensors = {"model.weight": ["float32", [1]]}
    write_commit(checkpoint, Manifest(step, 1, records, tensors, torch="2"))
    if absent:
        (checkpoint / absent).unlink()
    return checkpoint


@pytest.fixture
def uploading(s3, tmp_path, monkeypatch):
    """Hold the replica of a run with checkpoints of steps 2 and 4, which nobody trains."""
    monkeypatch.setattr(replica, "PAUSE_S", 0.01)
    run = tmp_path / "run"
    save(run, 2)
    held = replica.RunReplica(f"{URL}/run", run, resume="auto", keep_last=2, keep_every=None)
    try:
        held.finish(2, timeout_s=60)
        save(run, 4)
        held.finish(4, timeout_s=60)
        yield held
    finally:
        held.close()


def test_a_commit_that_landed_with_its_answer_lost_is_gone_on_from(uploading, s3):
    bucket, run = Bucket(f"{URL}/run"), uploading.directory
    began = commits.newest(bucket)
    lost = s3.rule(
        lambda method, path: method == "PUT" and f"commits/{began.number + 1:08d}" in path,
        status="400 Bad Request",  # which no client repeats
        code="Lost",
        times=1,
        lands=True,
    )
    with lost as rule:
        for line in ("one\n", "two\n"):
            with open(run / "run.log", "a") as stream:
                stream.write(line)
            uploading.finish(4, timeout_s=60)
    later = commits.newest(bucket)
    assert (rule.count, later.number, later.fence) == (1, began.number + 3, began.fence)
    log = b"".join(bucket.get(entry["object"]) for entry in later.lines["run.log"])
    assert log == (run / "run.log").read_bytes() and log.endswith(b"one\ntwo\n")


@pytest.mark.slow
def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_taken(half, s3, caplog):
    commit = commits.newest(Bucket(f"{URL}/run"))
    entry = commit.trees["step-00000004"]["__0_0.distcp"]
    key = f"runs/run/{entry['object']}"
    s3.put(key, s3.get(key)[:-100])
    with caplog.at_level(logging.WARNING, "pdn.checkpoint.fetch"):
        launch(half / "second")
    assert "E-S3-SIZE" in caplog.text and "taking the checkpoint before step 4" in caplog.text
    assert losses(metrics(half / "second")) == losses(launch(half / "whole", "replica=null"))
    with pytest.raises(StorageError, match="E-S3-SIZE"):  # pinned: nothing else will do
        launch(half / "third", "name=run", "resume=step:4")


@pytest.mark.slow
def test_credentials_that_expire_stop_the_replica_and_not_the_training(half, s3):
    expired = s3.rule(lambda method, path: method in ("PUT", "POST") and "/objects/" in path,
                      status="403 Forbidden", code="ExpiredToken")  # fmt: skip
    with expired, pytest.raises(StorageError, match=r"E-REPLICA-BEHIND.*holds step 4, expected 6"):
        launch(half / "first")
    assert held(half / "first") == [4, 6]
    status = json.loads((half / "first" / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 74)
    launch(half / "first")  # nothing left to train, and credentials again
    assert "step-00000006" in commits.newest(Bucket(f"{URL}/run")).trees


@pytest.mark.slow
def test_another_run_in_the_replica_or_in_the_directory_is_refused(half, monkeypatch):
    launch(half / "other", "replica=null", "trainer.stop_at=2")
    with pytest.raises(ConfigError, match="E-REPLICA-OTHER"):
        launch(half / "other")
    with pytest.raises(ConfigError, match=r"E-RUN-CONFIG-CHANGED.*optim\.lr"):
        launch(half / "third", "optim.lr=0.123")


@pytest.mark.slow
def test_a_launch_whose_replica_was_taken_over_ends_at_its_next_checkpoint(half, monkeypatch):
    """The other launch begins when this one pushes its checkpoint of step 6."""
    real = replica.RunReplica._upload

    def overtaken(self, snapshot):
        if snapshot.step == 6:
            base = commits.newest(self._bucket)
            commits.publish(self._bucket, commits.Commit(base.number + 1, base.fence + 1, "f" * 32))
        real(self, snapshot)

    monkeypatch.setattr(replica.RunReplica, "_upload", overtaken)
    with pytest.raises(LockedError, match="E-REPLICA-FENCED"):
        launch(half / "first")
    assert commits.newest(Bucket(f"{URL}/run")).owner == "f" * 32


@pytest.mark.parametrize("url", ["gs://bucket/runs", "hdfs://host/runs", "runs/copy"])
def test_any_other_place_is_refused_by_name(url, tmp_path):
    with pytest.raises(ConfigError, match="s3://bucket/prefix") as caught:
        run_config(tmp_path, "pgdn_tiny", f"replica={url}")
    assert url in str(caught.value)


def test_a_replica_is_fetched_without_a_lease_and_what_is_no_run_is_refused(half):
    to = half / "fetched" / "run"
    assert fetch(f"{URL}/run", to) == 4
    assert verify(to / "checkpoints" / "step-00000004").step == 4
    assert (to / "config.yaml").read_bytes() == (half / "first/run/config.yaml").read_bytes()
    assert fetch(f"{URL}/run", half / "older", 2) == 2
    with pytest.raises(ConfigError, match=r"E-CKPT-ABSENT.*expected one of 4, 2"):
        fetch(f"{URL}/run", half / "third", 3)
    with pytest.raises(ConfigError, match="E-REPLICA-OTHER"):
        fetch(f"{URL}/run", to)
    with pytest.raises(ConfigError, match="E-REPLICA-ABSENT"):
        fetch(URL, half / "none")
    assert Bucket(f"{URL}/run").get("lease.json").count(b'"fence": 1,') == 1


@pytest.mark.parametrize(
    ("status", "code", "found"),
    [("400 Bad Request", "Odd", "S3-IO"), ("403 Forbidden", "AccessDenied", "S3-AUTH")],
)
def test_a_store_that_fails_is_no_reason_to_take_an_older_checkpoint(
    uploading, s3, tmp_path, status, code, found
):
    tree = commits.newest(Bucket(f"{URL}/run")).trees["step-00000004"]
    place = tree["index.json"]["object"]
    failing = s3.rule(lambda method, path: method == "GET" and place in path,
                      status=status, code=code)  # fmt: skip
    with failing, pytest.raises(StorageError, match=f"E-{found}"):
        fetch(f"{URL}/run", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_an_upload_that_fails_as_nobody_foresaw_is_told_and_tried_again(
    uploading, monkeypatch, caplog
):
    def fail(self, snapshot):
        raise RuntimeError("unforeseen")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, replica.__name__):
        patch.setattr(replica.RunReplica, "_upload", fail)
        with pytest.raises(StorageError, match=r"E-REPLICA-BEHIND.*unforeseen"):
            uploading.finish(4, timeout_s=60)
    assert "RuntimeError: unforeseen" in caplog.text
    uploading.finish(4, timeout_s=60)


def test_a_checkpoint_that_lacks_a_file_is_refused_and_leaves_nothing_open(tmp_path, monkeypatch):
    checkpoint = save(tmp_path, 3, absent="side.json")
    opened, real = [], os.open
    monkeypatch.setattr(
        replica.os, "open", lambda *args, **more: opened.append(str(args[0])) or real(*args, **more)
    )
    with pytest.raises(StorageError, match=r"E-IO.*step-00000003/side\.json"):
        replica._Snapshot.of(tmp_path, 3)
    assert str(checkpoint / "index.json") in opened
    left = [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]
    assert not any(name.startswith(str(checkpoint.resolve())) for name in left)
