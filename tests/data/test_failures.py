"""What a second try can mend, and what it finds again.

The one is retried, the other named at once.
"""

import errno
import os
import sys
import time
from types import SimpleNamespace

import httpx
import pyarrow as pa
import pytest
from huggingface_hub import get_session

from pdn.data import locate
from pdn.data.corpora import corpus
from pdn.data.documents import Batch
from pdn.data.failures import is_passing
from pdn.data.hub import explained
from pdn.data.locate import _noted
from pdn.data.retry import Retrying
from pdn.data.tokenizer import _unreachable
from pdn.errors import DataError, DataStorageError

REQUEST = httpx.Request("GET", "http://hub")


def status(code: int) -> Exception:
    return httpx.HTTPStatusError(
        str(code), request=REQUEST, response=httpx.Response(code, request=REQUEST)
    )


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


PASSING = {
    "reset": ConnectionResetError(),
    "timeout": TimeoutError("slow"),
    "input/output error": OSError(errno.EIO, "bad disk"),
    "503": status(503),
    "429": status(429),
    "cut off": httpx.RemoteProtocolError("peer closed"),
    "wrapped": caused(ValueError("cannot load"), ConnectionError("no route")),
    "ours": DataStorageError("DATA-IO", "x"),
}
LASTING = {
    "bytes": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    "type": TypeError("Couldn't cast array of type struct<a: int64> to null"),
    "arrow": pa.ArrowInvalid("bad thrift"),
    "gone": FileNotFoundError(errno.ENOENT, "gone", "part-3.parquet"),
    "403": status(403),
    "404": status(404),
    "memory": MemoryError(),
    "tokenizer": Exception("WordLevel error: Missing [UNK] token"),
    "ours": DataError("DATA-JSON", "x"),
}


@pytest.mark.parametrize("name", PASSING)
def test_trouble_on_the_way_passes(name):
    assert is_passing(PASSING[name])


def test_a_hub_that_is_busy_or_not_asked_is_not_said_to_be_out_of_reach(monkeypatch):
    missing = "Couldn't find any data file at /here/a/b. LocalEntryNotFoundError: An error happened"
    busy = caused(FileNotFoundError(missing), caused(OSError("not cached"), status(429)))
    said = explained(busy, "a/b", None, "train").args[0]
    assert "a/b: the hub answers HTTP 429 (Too Many Requests): it is busy, try again" in said
    assert "/here" not in said and "cannot be reached" not in said
    away = caused(FileNotFoundError(missing), OSError(errno.ENETUNREACH, "no route"))
    said = explained(away, "a/b", None, "train").args[0]
    assert "a/b: the hub cannot be reached (OSError: [Errno 101] no route)" in said
    off = OSError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    said = explained(off, "a/b", None, "train").args[0]
    assert "the hub is not asked, as HF_DATASETS_OFFLINE is set" in said
    assert "unset HF_DATASETS_OFFLINE, or train on" in said and "network" not in said
    for error, words in ((status(503), "answers HTTP 503"), (ConnectionError("x"), "be reached")):
        assert words in _unreachable("a/b", error).args[0]


def test_trouble_of_the_http_library_that_the_hubs_client_uses_passes():
    library = sys.modules[type(get_session()).__module__.split(".")[0]]
    assert is_passing(library.RemoteProtocolError("peer closed"))


@pytest.mark.parametrize("name", LASTING)
def test_bad_data_do_not_pass(name):
    assert not is_passing(LASTING[name])


class Failing:
    def __init__(self, error: Exception):
        self.error = error

    def identity(self) -> dict:
        return {"name": "corpus"}

    def batches(self, cursor):
        yield Batch({"at": 0}, ["text"], None)
        raise self.error


@pytest.mark.parametrize("name", LASTING)
def test_bad_data_stop_a_stream_at_once_with_exit_code_65(name):
    said: list[str] = []
    source = Retrying(Failing(LASTING[name]), retry_seconds=60, stall_seconds=60, tell=said.append)
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(source.batches(None))
    assert caught.value.exit_code == 65 and said == [] and time.monotonic() - began < 50
    if name == "gone":
        assert "part-3.parquet" in str(caught.value)


@pytest.mark.parametrize(
    "note", [b'["other", "abc"]', b'["own", 3]', b'["own"]', b"[" * 5000, b"{}", b"\xff", None]
)
def test_a_damaged_note_of_where_a_corpus_is_had_is_not_believed(note, tmp_path):
    file = tmp_path / "located.json"
    os.mkfifo(file) if note is None else file.write_bytes(note)
    assert _noted(file, {"own"}) is None
    file.unlink()
    file.write_bytes(b'["own", "abc"]')
    assert _noted(file, {"own"}) == ("own", "abc")


@pytest.mark.parametrize(("seconds", "tries"), [(0.1, 2), (locate.SILENCE, 1)])
def test_a_hub_that_stays_silent_is_not_waited_for_twice(seconds, tries, monkeypatch):
    clock, asked, said = [0.0], [], []

    def silent(dataset, revision):
        clock[0] += seconds
        asked.append(dataset)
        raise httpx.ReadTimeout("timed out")

    monkeypatch.setattr(locate, "_commit", silent)
    monkeypatch.setattr(locate, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=int))
    found = corpus("slimpajama")
    config = SimpleNamespace(
        **{name: getattr(found, name) for name in ("dataset", "revision", "split", "text_field")},
        corpus="slimpajama",
        dataset_config=None,
    )
    with pytest.raises(DataStorageError, match=r"none of 2 places .*; or train on what needs"):
        locate.first_available(config, said.append)
    assert asked == [place.dataset for place in found.places for _ in range(tries)]
    (line,) = said  # the last place is in the error alone
    assert line.startswith(f"{found.dataset}: the hub cannot be reached (ReadTimeout")
    assert line.endswith(f"; now {found.mirrors[0].dataset}") and line.count(found.dataset) == 1
