"""Reading text: the same documents from every format, a fixed order, exact cursors.

Every bad file is named.
"""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pdn.data.documents import discover, standard_library
from pdn.data.hub import Hub
from pdn.errors import DataError
from tests.data.corpus import documents

TEXTS = documents(700, seed=3, longest=20)


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)).encode()


def write(directory: Path, name: str, texts: list[str]) -> Path:
    path = directory / name
    if name.endswith(".parquet"):
        pq.write_table(
            pa.table({"text": texts, "id": list(range(len(texts)))}), path, row_group_size=100
        )
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl(texts)))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(jsonl(texts)))
    else:
        path.write_bytes(jsonl(texts))
    return path


def read(source, cursor=None) -> list[str]:
    return [t for batch in source.batches(cursor) for t in batch.texts]


def refusal(path: Path, field: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        read(discover(str(path), field))
    assert caught.value.exit_code == 65 and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_documents(tmp_path, name):
    assert read(discover(str(write(tmp_path, name, TEXTS)), "text")) == TEXTS


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "b.jsonl.gz", TEXTS[100:200])
    write(tmp_path, "a.parquet", TEXTS[:100])
    (tmp_path / "sub" / "c.txt").write_text("the last")
    (tmp_path / "notes.md").write_text("left out")
    assert read(discover(str(tmp_path), "text")) == [*TEXTS[:200], "the last"]


def test_a_long_text_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("pdn.data.records.LONGEST_TEXT", 300)
    whole = (
        "".join(f"line {i} of the file, with an é\n" for i in range(60)) + "x" * 700 + "\nthe end"
    )
    (tmp_path / "a.txt").write_text(whole)
    parts = read(discover(str(tmp_path), "text"))
    assert "".join(parts) == whole and len(parts) > 6
    assert all(len(p.encode()) <= 300 for p in parts)
    assert all(p.endswith("\n") for p in parts[:-1] if "x" not in p)
    raw = whole.encode()
    at = raw.rindex(b"the end")
    (tmp_path / "a.txt").write_bytes(raw[:at] + b"\xff" + raw[at + 1 :])
    assert f"byte {at}: 0xff" in refusal(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_reading_goes_on_from_every_cursor(tmp_path, name):
    write(tmp_path, name, TEXTS[:400])
    write(tmp_path, "b.jsonl", ["", *TEXTS[400:]])
    source = discover(str(tmp_path), "text")
    batches = list(source.batches(None))
    assert len(batches) > 2 and batches[1].texts[0] in TEXTS
    for k, batch in enumerate(batches):
        assert read(source, batch.cursor) == [t for b in batches[k:] for t in b.texts]


def test_a_hub_dataset_goes_on_from_every_cursor(tmp_path):
    """Run `datasets` itself, on local files: the cursor is its iterator's state."""
    import datasets

    for i in range(3):
        write(tmp_path, f"{i}.parquet", TEXTS[i * 200 : i * 200 + 200])

    def load():
        return datasets.load_dataset(
            "parquet", data_files=f"{tmp_path}/*.parquet", split="train", streaming=True
        )

    source = Hub(load, "some/set", "abc", "train", "text")
    batches = list(source.batches(None))
    assert [t for b in batches for t in b.texts] == TEXTS[:600] and len(batches) == 3
    for k, batch in enumerate(batches):
        assert read(source, json.loads(json.dumps(batch.cursor))) == [
            t for b in batches[k:] for t in b.texts
        ]


def test_of_a_python_only_its_own_library_is_looked_at(tmp_path, monkeypatch):
    for name in ("b/a.py", "a.py", "b.py", "site-packages/torch/c.py", "b/test/d.py", "b/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    seen, scandir = [], os.scandir
    monkeypatch.setattr("os.scandir", lambda path: seen.append(Path(path).name) or scandir(path))
    found = [f.relative_to(tmp_path).as_posix() for f in standard_library(1000).files]
    assert found == ["a.py", "b.py", "b/a.py"]
    assert "b" in seen and not {"site-packages", "torch", "test"} & set(seen)


def test_the_standard_library_is_text_on_every_machine():
    source = standard_library(2_000_000)
    assert 1_000_000 < source.identity()["bytes"] <= 2_000_000
    assert not any("test" in f.parts for f in source.files)


def test_missing_and_empty_inputs_are_refused(tmp_path):
    assert "E-DATA-MISSING" in refusal(tmp_path / "none")
    assert "E-DATA-EMPTY" in refusal(tmp_path)
    (tmp_path / "a.jsonl").touch()
    assert "empty (0 bytes)" in refusal(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("x")
    assert "E-DATA-FORMAT" in refusal(tmp_path / "a.csv")


def test_wrong_compression_is_refused(tmp_path):
    plain = tmp_path / "a.jsonl.gz"
    plain.write_bytes(jsonl(TEXTS[:3]))
    assert "offset 0" in refusal(plain) and "expected 1f8b" in refusal(plain)
    hidden = tmp_path / "b.jsonl"
    hidden.write_bytes(gzip.compress(jsonl(TEXTS[:3])))
    assert "compressed (1f8b" in refusal(hidden)
    zst = tmp_path / "c.jsonl.zst"
    zst.write_bytes(gzip.compress(jsonl(TEXTS[:3])))
    assert "expected 28b52ffd" in refusal(zst)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_truncated_file_is_refused(tmp_path, name):
    path = write(tmp_path, name, TEXTS)
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged after" in refusal(path) or "not a readable parquet file" in refusal(path)


def test_several_compressed_frames_are_one_file(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(
        zstandard.compress(jsonl(TEXTS[:300])) + zstandard.compress(jsonl(TEXTS[300:]))
    )
    assert read(discover(str(path), "text")) == TEXTS


def test_a_missing_field_names_the_found_ones(tmp_path):
    assert "no column 'content'; found ['text', 'id']" in refusal(
        write(tmp_path, "a.parquet", TEXTS[:3]), "content"
    )
    assert "line 1: no field 'content'; found ['id', 'text']" in refusal(
        write(tmp_path, "a.jsonl", TEXTS[:3]), "content"
    )
    assert "'id' is int, expected a string" in refusal(write(tmp_path, "b.jsonl", TEXTS[:3]), "id")


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS[:2]) + b"{broken\n")
    assert "line 3: not JSON" in refusal(path)
    path.write_bytes(jsonl(TEXTS[:1]) + b'{"text": "\xff"}\n')
    assert "line 2, byte 10: 0xff, expected UTF-8" in refusal(path)
    path.write_bytes(b"[1, 2]\n")
    assert "line 1: no field 'text'; found list" in refusal(path)


def replaced(path: Path, content: bytes) -> None:
    (path.parent / "new").write_bytes(content)
    os.replace(path.parent / "new", path)


CHANGES = {
    "appended to": lambda path: path.write_bytes(path.read_bytes() + jsonl(["one more"])),
    "rewritten": lambda path: path.write_bytes(jsonl(TEXTS[::-1])),
    "replaced": lambda path: replaced(path, jsonl(TEXTS[::-1])),
    "cut": lambda path: os.truncate(path, 20_000),
    "cut within a row": lambda path: os.truncate(path, path.stat().st_size - 5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change):
    path = write(tmp_path, "a.jsonl", TEXTS)
    batches = discover(str(path), "text").batches(None)
    next(batches)
    change(path)
    with pytest.raises(DataError, match=rf"E-DATA-CHANGED\] {path}: changed while it was read"):
        list(batches)


@pytest.mark.parametrize("when", ["listed", "found", "sampled"])
def test_a_file_that_is_gone_since_it_was_found_is_refused(tmp_path, when, monkeypatch):
    kept, gone = write(tmp_path, "a.jsonl", TEXTS), write(tmp_path, "b.jsonl", TEXTS)
    if when == "listed":  # between two looks of the walk
        lists = os.walk
        monkeypatch.setattr(os, "walk", lambda *a, **k: [*lists(*a, **k), gone.unlink()][:-1])
        find = lambda: discover(str(tmp_path), "text")  # noqa: E731
    else:
        source = discover(str(tmp_path), "text")
        gone.unlink()
        find = lambda: source.only([gone] if when == "found" else [kept, gone])  # noqa: E731
    with pytest.raises(DataError, match=rf"E-DATA-CHANGED\] {gone}: gone since it was found"):
        find()


def test_a_file_that_changed_after_it_was_found_is_refused(tmp_path):
    path = write(tmp_path, "a.parquet", TEXTS)
    source = discover(str(path), "text")
    write(tmp_path, "a.parquet", TEXTS[:-1])
    with pytest.raises(DataError, match=r"E-DATA-CHANGED"):
        read(source)
