"""Shards and text on a real S3 server: the same data as local ones, or a message that helps."""

import functools
import json
import shutil

import pytest
from pydantic import TypeAdapter

from pdn.data import open_data, remote
from pdn.data.config import DataConfig
from pdn.errors import ConfigError, DataError, StorageError
from pdn.store.s3 import Bucket
from pdn.wording import silent
from tests.data.corpus import LOADING, STREAM, TEXT, documents, make_shards, open_shards, tokenizer

URL = "s3://pdn-tests/corpora/tides"
KEY = "corpora/tides"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Return the train directory of three shards."""
    return make_shards(tmp_path_factory.mktemp("shards"), documents(12), shard_tokens=300)


@pytest.fixture(scope="module")
def buckets():
    """Give one client for each address: making one takes half a second."""
    return functools.cache(Bucket)


@pytest.fixture(autouse=True)
def _few_clients(buckets, monkeypatch):
    monkeypatch.setattr(remote, "Bucket", buckets)


@pytest.fixture
def stored(s3, shards, monkeypatch):
    """Put the shards there; a refused request is tried again at once."""
    monkeypatch.setattr(remote, "PAUSES", (0.0,))
    for file in shards.iterdir():
        s3.put(f"{KEY}/{file.name}", file.read_bytes())
    return s3


def read(data) -> list:
    steps = data.steps(0, micro_batch_size=4, stop_sample=None)
    found = [next(steps)[0]["sample_digests"].tolist() for _ in range(3)]
    data.close()
    return found


def asked(s3, what: str = "shard-") -> list[str]:
    """Have the requests for objects of this name noted from here on."""
    seen: list[str] = []

    def note(method: str, path: str) -> bool:
        if method == "GET" and what in path and "list-type" not in path:
            seen.append(path)
        return False

    s3.rules.append(type("Note", (), {"count": 0, "times": 1, "matches": staticmethod(note)})())
    return seen


def refused(kind, cache, url: str = URL) -> str:
    with pytest.raises(kind) as caught:
        open_shards(url, cache)
    return f"{caught.value.exit_code} {caught.value}"


def test_shards_in_a_bucket_are_the_local_ones_and_are_copied_once(stored, shards, tmp_path):
    assert read(open_shards(URL, tmp_path)) == read(open_shards(shards, tmp_path / "local"))
    again = asked(stored)
    assert len(read(open_shards(f"{URL}/", tmp_path))) == 3 and again == []


def test_named_validation_sets_may_be_text_or_shards_in_a_bucket(stored, shards, tmp_path):
    other = make_shards(tmp_path / "other", documents(8, seed=3))
    for file in other.iterdir():
        stored.put(f"corpora/other/{file.name}", file.read_bytes())
    stored.put("corpora/text/a.txt", b"tide and lamp, quite another text, river and stone")
    places = {"s": "s3://pdn-tests/corpora/other", "t": "s3://pdn-tests/corpora/text"}
    sets = {name: {"path": place, "text_field": "text"} for name, place in places.items()}
    data = open_shards(shards, tmp_path / "cache", validation_sets=sets)
    assert {*data.validation_sets} == {"s", "t"}
    data.close()


def test_a_copy_that_was_damaged_is_brought_again(stored, tmp_path):
    first = read(open_shards(URL, tmp_path))
    file = next(tmp_path.glob("s3/*/tides/shard-00001.bin"))
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    again = asked(stored)
    assert read(open_shards(URL, tmp_path)) == first
    assert len(again) == 1 and "shard-00001.bin" in again[0] and file.read_bytes() == content


def test_objects_that_are_not_what_the_manifest_tells_are_refused(stored, tmp_path):
    key = f"{KEY}/shard-00002.bin"
    whole = stored.get(key)
    for content, code in (
        (whole[:-2], "S3-SIZE"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "S3-HASH"),
        (None, "S3-MISSING"),
    ):
        if content is None:
            stored.client.delete_object(Bucket="pdn-tests", Key=key)
        else:
            stored.put(key, content)
        said = refused(DataError, tmp_path)
        assert f"65 pdn[E-{code}] {URL}/shard-00002.bin" in said and "restore the object" in said
    stored.put(key, whole)
    manifest = json.loads(stored.get(f"{KEY}/manifest.json"))
    stored.put(f"{KEY}/manifest.json", json.dumps(manifest | {"eos_id": 3}).encode())
    assert f"E-SHARD-MANIFEST] {URL}/manifest.json: its checksum" in refused(DataError, tmp_path)


def test_a_wrong_address_is_told_what_is_there(stored, tmp_path):
    above = refused(DataError, tmp_path, "s3://pdn-tests/corpora")
    assert (
        "65 pdn[E-SHARD-MANIFEST] s3://pdn-tests/corpora/manifest.json: missing; found tides/"
        in above
    )
    assert "found no object below it" in refused(DataError, tmp_path, "s3://pdn-tests/corpora/tide")
    assert "78 pdn[E-S3-BUCKET]" in refused(ConfigError, tmp_path, "s3://no-such-bucket/x")


@pytest.mark.slow  # the client's own pauses
def test_a_busy_store_is_asked_again_and_a_wrong_key_is_said(stored, tmp_path):
    with stored.rule(lambda method, path: "shard-" in path, status="503 Slow Down", code="SlowDown",
                     times=7):  # fmt: skip
        assert len(read(open_shards(URL, tmp_path))) == 3
    with stored.rule(lambda *_: True, status="403 Forbidden", code="InvalidAccessKeyId"):
        assert "74 pdn[E-S3-AUTH]" in refused(StorageError, tmp_path / "other")


def test_credentials_that_end_in_the_middle_are_said_and_nothing_is_copied_twice(stored, tmp_path):
    last = "shard-00002.idx"  # of the objects in order, so that others were copied before
    with stored.rule(lambda method, path: last in path and method == "GET",
                     status="403 Forbidden", code="ExpiredToken"):  # fmt: skip
        said = refused(StorageError, tmp_path)
    assert f"74 pdn[E-S3-AUTH] {URL}/{last}" in said and "renew them" in said
    there = {path.name for path in tmp_path.glob("s3/*/tides/shard-*")}
    again = asked(stored)
    assert len(read(open_shards(URL, tmp_path))) == 3
    assert there and not any(name in path for name in there for path in again) and again


def open_kind(cache, **keys):
    """Open data of any kind."""
    keys = {**LOADING, "cache_dir": str(cache), **keys}
    config = TypeAdapter(DataConfig).validate_python(keys)
    return open_data(config, global_batch_size=4, seed=0)


@pytest.mark.parametrize("kind", ["text", pytest.param("stream", marks=pytest.mark.slow)])
def test_text_in_a_bucket_is_the_same_for_every_node(kind, s3, tmp_path):
    local = tmp_path / "tides"
    texts = documents(90)
    for name, part in (("a.jsonl", texts[:40]), ("b/c.jsonl", texts[40:])):
        content = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        s3.put(f"{KEY}/{name}", content)
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(content)
    for name in (".hidden.txt", "about.md", "empty/"):
        s3.put(f"{KEY}/{name}", b"x" if name[-1] != "/" else b"")
    s3.put(f"{KEY}-2/z.jsonl", b'{"text": "another corpus"}\n')
    (tmp_path / "tokenizer.json").write_bytes(tokenizer().content)
    keys = {"tokenizer": str(tmp_path / "tokenizer.json")}
    keys = {**(TEXT if kind == "text" else STREAM), **keys}
    homes = [tmp_path / node for node in ("here", "first", "second")]
    places = zip(homes, (str(local), URL, URL))
    opened = [open_kind(home, **{**keys, "path": place}) for home, place in places]
    assert opened[1].fingerprint == opened[2].fingerprint
    windows = [read(data) for data in opened]
    assert windows[0] == windows[1] == windows[2]
    copy = next(homes[1].glob("s3/*/tides"))
    assert sorted(p.name for p in copy.rglob("*.*")) == ["a.jsonl", "c.jsonl"]


def test_one_object_may_be_the_text(s3, tmp_path):
    s3.put(f"{KEY}/a.jsonl", b'{"text": "tide"}\n')
    file = remote.text_copy(f"{URL}/a.jsonl", tmp_path, silent)
    (listed,) = remote.Bucket(f"{URL}/a.jsonl").entries()
    assert file.stat().st_mtime == listed.modified  # which is part of a corpus's fingerprint
    assert file.name == "a.jsonl" and file.read_bytes() == b'{"text": "tide"}\n'
    with pytest.raises(DataError, match=r"E-DATA-MISSING.*found no object below it; expected text"):
        remote.text_copy("s3://pdn-tests/nowhere", tmp_path, silent)


def test_an_object_that_changes_while_it_is_copied_is_not_taken(s3, tmp_path, monkeypatch):
    s3.put(f"{KEY}/a.txt", b"tide")
    bucket = Bucket(URL)
    (listed,) = bucket.entries()
    s3.put(f"{KEY}/a.txt", b"ebbs")
    with pytest.raises(StorageError, match=r"E-S3-CHANGED\].*a.txt: replaced since it was listed"):
        bucket.download_listed(listed, tmp_path / "a.txt")
    (listed,) = bucket.entries()
    monkeypatch.setattr(bucket._fs, "cat_file", lambda *_, **__: b"ebbt")
    with pytest.raises(StorageError, match=r"E-S3-HASH\].*a.txt: md5"):
        bucket.download_listed(listed, tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_hold_the_copy_is_said_before_anything_is_copied(
    stored, tmp_path, monkeypatch
):
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: free)
    again = asked(stored)
    assert "74 pdn[E-DATA-SPACE]" in refused(DataError, tmp_path) and again == []
