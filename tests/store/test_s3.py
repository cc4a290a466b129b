"""Objects, the lease and the commits of a place in a bucket, on a real server."""

import hashlib
import os
import threading
from dataclasses import replace

import pytest

from pdn.errors import ConfigError, LockedError, StorageError
from pdn.store import commits, lease
from pdn.store import s3 as store
from pdn.store.commits import Commit
from pdn.store.lease import Lease
from pdn.store.s3 import Bucket

URL = "s3://pdn-tests/some/run"


@pytest.fixture(scope="module")
def client() -> Bucket:
    return Bucket(URL)  # its client takes a while to be made


@pytest.fixture
def bucket(s3, client) -> Bucket:
    return client


@pytest.fixture
def take(bucket):
    """Take leases whose holders stop renewing at the end, as if killed."""
    taken = []

    def take(owner: str) -> Lease:
        taken.append(Lease(bucket, owner * 32))
        return taken[-1]

    yield take
    for held in taken:
        held._ended.set()
        held._thread.join()


@pytest.fixture
def data(monkeypatch) -> bytes:
    """Give 2.5 parts, of the smallest size that S3 takes."""
    monkeypatch.setattr(store, "PART_BYTES", 5 << 20)
    return os.urandom(12 << 20)


def upload(bucket: Bucket, name: str, path, data: bytes) -> str:
    path.write_bytes(data)
    with open(path, "rb") as stream:
        return bucket.upload(name, stream.fileno(), len(data))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("gs://bucket/runs", "the scheme gs"),
        ("az://bucket/runs", "the scheme az"),
        ("https://bucket/runs", "the scheme https"),
        ("s3://bucket", "expected s3://bucket/prefix"),
        ("s3://bucket/a/../b", "expected s3://bucket/prefix"),
        ("runs", "expected s3://bucket/prefix"),
    ],
)
def test_an_address_that_is_no_place_in_a_bucket_is_refused_by_name(url, found):
    with pytest.raises(ConfigError, match="E-S3-URL") as caught:
        Bucket(url)
    assert url in str(caught.value) and found in str(caught.value)


def test_a_conditional_put_changes_nothing_where_its_condition_fails(bucket):
    first = bucket.put("a", b"1", absent=True)
    assert first is not None and bucket.head("a") == (1, first)
    assert bucket.put("a", b"2", absent=True) is None
    assert bucket.put("a", b"2", replacing='"another"') is None
    assert bucket.get("a") == b"1"
    assert bucket.put("a", b"3", replacing=first) not in (None, first)
    assert bucket.get("a") == b"3" and bucket.get("b") is None and bucket.head("b") is None


def test_a_file_of_several_parts_comes_back_and_is_compared_on_the_way(bucket, s3, tmp_path, data):
    digest = upload(bucket, "objects/x", tmp_path / "file", data)
    assert digest == hashlib.sha256(data).hexdigest()
    bucket.download("objects/x", tmp_path / "back", len(data), digest)
    assert (tmp_path / "back").read_bytes() == data
    flipped = data[:7_000_000] + bytes([data[7_000_000] ^ 1]) + data[7_000_001:]
    for damaged, code in ((data[:-1], "S3-SIZE"), (flipped, "S3-HASH"), (None, "S3-MISSING")):
        if damaged is None:
            s3.client.delete_object(Bucket="pdn-tests", Key="some/run/objects/x")
        else:
            s3.put("some/run/objects/x", damaged)
        with pytest.raises(StorageError, match=f"E-{code}") as caught:
            bucket.download("objects/x", tmp_path / "again", len(data), digest)
        assert caught.value.exit_code == 74
        assert not (tmp_path / "again").exists()


def test_an_upload_that_fails_in_the_middle_publishes_nothing_and_is_aborted(
    bucket, s3, tmp_path, data
):
    second = s3.rule(lambda method, path: "partNumber=2" in path, status="403 Forbidden",
                     code="AccessDenied")  # fmt: skip
    with second, pytest.raises(StorageError, match="E-S3-AUTH"):
        upload(bucket, "objects/x", tmp_path / "file", data)
    assert s3.keys() == [] and s3.uploads() == []


def test_uploads_that_a_killed_writer_left_are_aborted(bucket, s3):
    for key in ("some/run/objects/x", "some/other/objects/x"):
        s3.client.create_multipart_upload(Bucket="pdn-tests", Key=key)
    assert bucket.abort_uploads() == 1
    assert s3.uploads() == ["some/other/objects/x"]


def test_a_throttled_request_is_repeated(bucket, s3):
    with s3.rule(lambda method, path: method == "PUT", status="503 Slow Down", code="SlowDown",
                 times=2) as rule:  # fmt: skip
        assert bucket.put("a", b"1", absent=True) is not None
    assert rule.count == 2 and bucket.get("a") == b"1"


def test_a_bucket_that_does_not_exist_is_named(s3):
    with pytest.raises(ConfigError, match=r"E-S3-BUCKET.*no-such-bucket"):
        Bucket("s3://no-such-bucket/x").put("a", b"")


# ------------------------------------------------------------------ the lease


def test_a_lease_is_given_to_one_launch_and_released_to_the_next(take):
    first = take("a")
    assert first.fence == 1
    first.release()
    second = take("b")
    assert second.fence == 2
    second.release()


def test_a_lease_that_is_renewed_is_refused_and_one_that_is_not_is_taken(take, monkeypatch):
    """The holder's thread is asked for each renewal, so that no timing decides."""
    monkeypatch.setattr(lease, "SECONDS", 3600.0)
    first = take("a")
    waiting, renewed = threading.Event(), threading.Event()

    def renew_meanwhile(seconds: float) -> None:
        waiting.set()
        first._put(replace(first._holder, beat=first._holder.beat + 1))
        renewed.set()

    monkeypatch.setattr(lease.time, "sleep", renew_meanwhile)
    with pytest.raises(LockedError, match=r"E-REPLICA-LOCKED.*in use by PID") as caught:
        take("b")
    assert caught.value.exit_code == 73 and waiting.is_set() and renewed.is_set()
    monkeypatch.setattr(lease, "SECONDS", 0.0)  # it was watched for long enough
    second = take("b")
    monkeypatch.setattr(lease, "SECONDS", 3600.0)
    assert second.fence == 2
    first._put(replace(first._holder, beat=99))
    with pytest.raises(LockedError, match="E-REPLICA-LOCKED"):
        first.require()
    first.release()  # leaves the lease of the second alone
    second.release()
    assert take("c").fence == 3


def test_the_directory_that_held_a_lease_takes_it_back_at_once(take, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 3600.0)
    take("a")  # killed: never released
    assert take("a").fence == 2


# ------------------------------------------------------------------ commits


def test_the_newest_commit_is_found_without_a_listing(bucket, monkeypatch):
    monkeypatch.setattr(Bucket, "names", lambda *_: pytest.fail("listed"))
    assert commits.newest(bucket) is None
    for number in range(1, 10):
        commits.publish(bucket, Commit(number, 1, "a"))
        assert commits.newest(bucket).number == number


def test_a_writer_that_lost_its_lease_cannot_commit(bucket):
    commits.publish(bucket, Commit(1, 1, "a"))
    commits.publish(bucket, Commit(2, 2, "b"))  # the next holder begins
    with pytest.raises(LockedError, match=r"E-REPLICA-FENCED.*holder of lease 2, .* has lease 1"):
        commits.publish(bucket, Commit(2, 1, "a"))
    assert commits.newest(bucket).owner == "b"


def test_a_commit_whose_answer_was_lost_counts_once(bucket):
    commits.publish(bucket, Commit(1, 1, "a"))
    commits.publish(bucket, Commit(1, 1, "a"))  # as the client repeats it
    assert commits.newest(bucket).number == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "renumbered", "outside"])
def test_a_damaged_commit_is_refused(bucket, s3, damage):
    entry = {"object": "objects/00000001-ab/000001-x", "bytes": 1, "sha256": "0" * 64}
    commits.publish(bucket, Commit(1, 1, "a", files={"config.yaml": entry}))
    key = "some/run/commits/00000001.json"
    content = s3.get(key)
    if damage == "cut":
        s3.put(key, content[:-9])
    elif damage == "flipped":
        s3.put(key, content.replace(b'"fence": 1', b'"fence": 2'))
    else:
        number = 2 if damage == "renumbered" else 1
        place = "objects/../../other/x" if damage == "outside" else entry["object"]
        forged = Commit(number, 1, "a", files={"config.yaml": entry | {"object": place}})
        s3.put(key, commits._encode(forged))
    with pytest.raises(StorageError, match="E-REPLICA-"):
        commits.newest(bucket)
