"""Which files of a directory are a corpus, and what is said about the rest."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pdn.data import open_data
from pdn.data.documents import discover
from pdn.data.text import corpora
from pdn.errors import DataError
from tests.data.corpus import TEXT, documents, parse, tokenizer

TEXTS = documents(30)


def jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def read(path: Path) -> list[str]:
    return [t for b in discover(str(path), "text").batches(None) for t in b.texts]


def test_links_are_followed_and_a_file_is_read_once(tmp_path):
    jsonl(tmp_path / "corpus" / "part-0" / "a.jsonl", TEXTS[:10])
    jsonl(tmp_path / "disk" / "b.jsonl", TEXTS[10:20])
    (tmp_path / "corpus" / "part-1").symlink_to(tmp_path / "disk")
    (tmp_path / "corpus" / "part-2").symlink_to(tmp_path / "corpus")  # in a circle
    (tmp_path / "corpus" / "part-0" / "0.jsonl").symlink_to(tmp_path / "disk" / "b.jsonl")
    found = discover(str(tmp_path / "corpus"), "text")
    assert read(tmp_path / "corpus") in (TEXTS[:20], [*TEXTS[10:20], *TEXTS[:10]])
    assert found.left_out == {"linked again": 2} and "2 linked again" in found.describe()


@pytest.mark.parametrize("name", [".ipynb_checkpoints/a.jsonl", "._a.jsonl", "__MACOSX/a.jsonl"])
def test_hidden_files_are_left_out_and_counted(tmp_path, name):
    jsonl(tmp_path / "a.jsonl", TEXTS)
    jsonl(tmp_path / name, TEXTS)
    assert read(tmp_path) == TEXTS
    assert discover(str(tmp_path), "text").describe().endswith("left out: 1 hidden")


def test_files_of_other_kinds_are_counted_by_kind(tmp_path):
    jsonl(tmp_path / "a.jsonl", TEXTS)
    for name in ("b.pdf", "c.pdf", "README"):
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "d.txt")
    assert discover(str(tmp_path), "text").left_out == {
        "*.pdf": 2,
        "without a suffix": 1,
        "not a regular file": 1,
    }


@pytest.mark.parametrize("name", ["test/a.jsonl", "Validation/a.jsonl", "dev-0.jsonl"])
def test_files_named_as_another_split_train_but_not_without_a_word(tmp_path, name):
    jsonl(tmp_path / "train" / "a.jsonl", TEXTS)
    jsonl(tmp_path / "testament.jsonl", TEXTS)
    assert "another split" not in discover(str(tmp_path), "text").describe()
    jsonl(tmp_path / name, TEXTS)
    said = discover(str(tmp_path), "text").describe()
    assert f"among them 1 file named as another split, such as {name}: give the path" in said
    assert "another split" not in discover(str((tmp_path / name).parent), "text").describe() or (
        name.startswith("dev")
    )


def test_files_that_are_validated_on_by_their_names_are_counted(tmp_path):
    jsonl(tmp_path / "c" / "a.jsonl", TEXTS)
    jsonl(tmp_path / "c" / "valid.jsonl", TEXTS)
    config = parse(tmp_path, **{**TEXT, "path": str(tmp_path / "c")})
    train, held = corpora(config)
    assert len(train.files) == len(held.files) == 1
    assert train.describe().endswith("left out: 1 valid*, validated on")


def test_a_link_that_leads_nowhere_is_no_missing_part(tmp_path):
    jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "part-1").symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match=r"part-1: a link that leads nowhere \(.*unmounted\)"):
        discover(str(tmp_path), "text")
    with pytest.raises(DataError, match=r"part-1: a link that leads nowhere \(.*unmounted\)"):
        discover(str(tmp_path / "part-1"), "text")


def test_a_path_with_wildcards_is_told_to_be_a_directory(tmp_path):
    jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match="give the directory, a path has no wildcards"):
        discover(str(tmp_path / "*.jsonl"), "text")


def test_a_pipe_is_no_corpus(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="not a regular file"):
        discover(str(tmp_path / "a.txt"), "text")


def test_a_name_that_is_no_utf8_is_read_and_printed(tmp_path):
    path = os.fsencode(tmp_path) + b"/R\xc9.jsonl"
    with open(path, "w") as f:
        f.write('{"text": "tide"}\n{"body": 1}\n')
    source = discover(str(tmp_path), "text")
    assert source.identity()["files"] == 1
    with pytest.raises(DataError, match=r"R\\xc9\.jsonl: line 2"):
        list(source.batches(None))


def test_a_plain_corpus_keeps_its_identity(tmp_path):
    jsonl(tmp_path / "a.jsonl", TEXTS)
    os.utime(tmp_path / "a.jsonl", ns=(10**18, 10**18))
    assert discover(str(tmp_path), "text").identity()["listing"] == (
        "f0228d735a2f2e78c628b1cb3a585622f25b014f981ca8e3c20d00d72a4ac6c2"
    )


def test_a_link_that_leads_above_the_corpus_reads_nothing_beside_it(tmp_path):
    jsonl(tmp_path / "corpus" / "a.jsonl", TEXTS)
    jsonl(tmp_path / "letters.jsonl", ["what is beside the corpus"])
    (tmp_path / "corpus" / "up").symlink_to("..")
    assert read(tmp_path / "corpus") == TEXTS
    assert discover(str(tmp_path / "corpus"), "text").left_out == {"linked again": 1}


def test_a_file_with_two_hard_links_is_read_once(tmp_path):
    jsonl(tmp_path / "a.jsonl", TEXTS)
    os.link(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert read(tmp_path) == TEXTS
    assert discover(str(tmp_path), "text").left_out == {"linked again": 1}


@pytest.mark.parametrize("name", ["A.JSONL", "a.Jsonl.GZ", "a.TXT", "A.PARQUET"])
def test_a_suffix_counts_in_capital_letters_too(tmp_path, name):
    text = "The tide comes in."
    row = json.dumps({"text": text}).encode()
    if name.endswith("PARQUET"):
        pq.write_table(pa.table({"text": [text]}), tmp_path / name)
    else:
        content = text.encode() if name.endswith("TXT") else row
        (tmp_path / name).write_bytes(gzip.compress(content) if "GZ" in name else content)
    assert read(tmp_path) == read(tmp_path / name) == [text]


@pytest.mark.parametrize("name", [b"a\nb\x1b[2J", b"\xff\xfe", "é".encode() * 120])
def test_any_name_of_a_directory_is_prepared_and_said_in_one_line(tmp_path, name):
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    jsonl(directory / "a.jsonl", TEXTS)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer().content)
    keys = {"path": str(directory), "tokenizer": str(tmp_path / "tokenizer.json")}
    config, said = parse(tmp_path / "cache", **{**TEXT, **keys}), []
    data = open_data(config, global_batch_size=1, seed=0, progress=said.append)
    said += data.describe().splitlines()
    assert sum(map(len, read(directory))) == sum(map(len, TEXTS)) and len(said) > 2
    assert all(line.isprintable() and line.encode() for line in said)


def test_a_link_in_a_circle_is_no_missing_part(tmp_path):
    (tmp_path / "a.txt").symlink_to("a.txt")
    with pytest.raises(DataError, match=r"a\.txt: a link that leads nowhere \(a\.txt\)"):
        discover(str(tmp_path), "text")


def test_one_file_is_not_one_files(tmp_path):
    jsonl(tmp_path / "a.jsonl", TEXTS)
    assert discover(str(tmp_path), "text").describe().startswith(f"{tmp_path.name}: 1 file, ")
