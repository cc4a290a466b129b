"""A validation set that exists.

Of few documents, of one file, and for runs from before the rule.
"""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pdn.data import open_data
from pdn.data.documents import Files
from pdn.data.encoders import text_hashes
from pdn.data.holdout import MOST, WINDOWS
from pdn.data.prepare import Plan, hashes_of
from pdn.data.shards import read_manifest
from pdn.data.stream_prepare import Prepared, require_rest
from pdn.errors import DataError
from tests.data.corpus import (
    STREAM,
    TEXT,
    WORDS,
    documents,
    make_shards,
    open_shards,
    parse,
    tokenizer,
)

SEQ_LEN = 16


@pytest.fixture
def tokenizer_file(tmp_path) -> str:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer().content)
    return str(tmp_path / "tokenizer.json")


def corpus(path: Path, texts: list[str]) -> Path:
    path.mkdir()
    (path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def open_text(path: Path, cache: Path, tokenizer_file: str, recorded=None, said=None, **keys):
    keys = {"path": str(path), "tokenizer": tokenizer_file, "validation_fraction": 0.02, **keys}
    return open_data(
        parse(cache, **{**TEXT, **keys}),
        global_batch_size=4,
        seed=0,
        recorded=recorded,
        progress=None if said is None else said.append,
    )


def tokens(data) -> tuple[int, int]:
    return data._sources[0].manifest.tokens, data._validation.tokens


@pytest.mark.parametrize("count", [1, 2, 60])
def test_few_documents_give_the_least_number_of_samples(tmp_path, tokenizer_file, count):
    # One text, such as a play in one file, or two, or sixty articles.
    words = " ".join(documents(300, seed=1, longest=40)).split()
    size = len(words) // count
    texts = [" ".join(words[i * size : (i + 1) * size]) for i in range(count)]
    data = open_text(corpus(tmp_path / "c", texts), tmp_path / "cache", tokenizer_file)
    train, held = tokens(data)
    whole = sum(len(ids) + 1 for ids in tokenizer().build().encode(texts))
    assert train + held in (whole, whole + 1)  # both parts of a document that is cut have an end
    assert WINDOWS * SEQ_LEN < held < WINDOWS * SEQ_LEN + 2
    assert len(data._validation.places(SEQ_LEN, None, spread=False)) >= WINDOWS
    train_hashes, held_hashes = (
        set(hashes_of(d).tolist())
        for d in (data._sources[0].directory, data._validation.directories[0])
    )
    assert not train_hashes & held_hashes


def with_hash(text: str, low: float, high: float) -> str:
    """Return a text whose hash is between these shares of all hashes."""
    for number in range(10_000):
        changed = f"{number} {text}"
        if low <= text_hashes([changed])[0] / 2.0**64 < high:
            return changed
    raise AssertionError


def test_a_large_document_does_not_go_to_validation_whole(tmp_path, tokenizer_file):
    large = with_hash(" ".join(documents(300, seed=1)), 0, 0.02)
    small = with_hash(" ".join(documents(20, seed=2)), 0.1, 1)
    said: list[str] = []
    path = corpus(tmp_path / "c", [large, small])
    train, held = tokens(open_text(path, tmp_path / "cache", tokenizer_file, said=said))
    assert WINDOWS * SEQ_LEN < held < 0.1 * train
    assert any("holding out" in line for line in said)


def test_a_preparation_that_would_hold_out_most_of_the_text_says_so(
    tmp_path, tokenizer_file, capsys
):
    from data.prepare import main

    large = with_hash(" ".join(documents(300, seed=1)), 0, 0.02)
    small = with_hash(" ".join(documents(20, seed=2)), 0.1, 1)
    path, out = corpus(tmp_path / "c", [large, small]), tmp_path / "out"
    words = f"--path {path} --tokenizer {tokenizer_file} --out {out} --processes 1".split()
    assert main([*words, "--validation-fraction", "0.02"]) == 65
    assert "E-VALIDATION-SHARE" in capsys.readouterr().err


def test_the_held_out_end_of_a_text_follows_on_what_trains(tmp_path, tokenizer_file):
    text = " ".join(documents(300, seed=1))
    data = open_text(corpus(tmp_path / "c", [text]), tmp_path / "cache", tokenizer_file)
    built, reader = tokenizer().build(), data._sources[0]._reader
    start = reader.read(np.array([0]), reader.tokens)[0].tolist()
    end_reader = data._validation._readers[0]
    end = end_reader.read(np.array([0]), end_reader.tokens)[0].tolist()
    assert built.decode(start[:-1] + end[:-1]) == text and start[-1] == end[-1] == data.eos_id


def test_of_a_tiny_text_half_trains(tmp_path, tokenizer_file):
    texts = documents(8, seed=2, longest=80)
    said: list[str] = []
    path = corpus(tmp_path / "c", texts)
    data = open_text(path, tmp_path / "cache", tokenizer_file, said=said)
    train, held = tokens(data)
    assert abs(held - MOST * (train + held)) <= 2
    assert any("fewer than 64" in line for line in said)


def test_where_the_share_by_hash_suffices_nothing_changes(tmp_path, tokenizer_file):
    path = corpus(tmp_path / "c", documents(300))
    data = open_text(path, tmp_path / "cache", tokenizer_file, validation_fraction=0.1)
    assert "data.split" not in data.fingerprint
    old = open_text(path, tmp_path / "cache", tokenizer_file, {}, validation_fraction=0.1)
    assert old.fingerprint == data.fingerprint


def test_a_run_keeps_the_rule_that_it_was_begun_with(tmp_path, tokenizer_file):
    path = corpus(tmp_path / "c", documents(120))
    new = open_text(path, tmp_path / "cache", tokenizer_file)
    old = open_text(path, tmp_path / "cache", tokenizer_file, recorded={"data.content": "…"})
    assert "data.split" in new.fingerprint and "data.split" not in old.fingerprint
    assert old.fingerprint["data.content"] != new.fingerprint["data.content"]
    assert tokens(old)[1] < WINDOWS * SEQ_LEN
    again = open_text(path, tmp_path / "cache", tokenizer_file, recorded=new.fingerprint)
    longer = open_text(
        path, tmp_path / "cache", tokenizer_file, recorded=new.fingerprint, seq_len=32
    )
    assert again.fingerprint == new.fingerprint
    assert longer.fingerprint["data.content"] == new.fingerprint["data.content"]


def test_no_validation_set_has_to_be_asked_for(tmp_path, tokenizer_file, shards):
    path = corpus(tmp_path / "c", documents(120))
    data = open_text(path, tmp_path / "cache", tokenizer_file, validation="none")
    assert data._validation is None and "no validation set" in data.describe()
    assert data._sources[0].manifest.documents == 120
    assert open_shards(shards, tmp_path / "cache", validation="none")._validation is None


@pytest.mark.parametrize("texts", [["", " "], [""], ["", ""]])
def test_a_corpus_without_text_is_named_by_what_was_given(tmp_path, tokenizer_file, texts):
    path = corpus(tmp_path / "novels", texts)
    with pytest.raises(DataError, match=r"holds no tokens of novels: 1 file.*data\.text_field"):
        open_text(path, tmp_path / "cache", tokenizer_file)


def test_a_stream_that_is_validated_on_whole_has_nothing_left_to_train_on(tmp_path, tokenizer_file):
    path = str(corpus(tmp_path / "c", documents(9)))
    keys = {**STREAM, "path": path, "validation": path, "tokenizer": tokenizer_file}
    with pytest.raises(DataError, match=r"E-DATA-EMPTY.*no tokens are left.*data\.validation"):
        open_data(parse(tmp_path / "cache", **keys), global_batch_size=4, seed=0)


def test_an_empty_validation_set_is_refused_unless_the_run_has_begun(tmp_path, shards):
    held = make_shards(tmp_path / "held", [])
    with pytest.raises(DataError, match=r"E-VALIDATION-EMPTY.*data\.validation=none"):
        open_shards(shards, tmp_path / "cache", validation=str(held))


def long(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def test_a_stream_does_not_validate_on_most_of_its_text(tmp_path, tokenizer_file):
    path = corpus(tmp_path / "c", [long(300, seed) for seed in range(12)])
    keys = {**STREAM, "path": str(path), "tokenizer": tokenizer_file, "validation_documents": 10}
    with pytest.raises(DataError, match=r"E-VALIDATION-SHARE.* 6,\d* of all 7,\d* tokens.*=2, "):
        open_data(parse(tmp_path / "cache", **keys), global_batch_size=4, seed=0)


@pytest.mark.parametrize(
    ("held", "rest", "said"),
    [
        (documents(20), 0, "the first 20 documents .*: give data.validation_documents=10, "),
        ([long(5000, 0)], 500, "the first 1 document .* half: give data.validation with"),
        # Of few short ones more are taken, up to the long one: a smaller number would not help.
        ([*documents(3), long(5000, 0)], 500, "half: give data.validation with"),
    ],
    ids=["all", "one long document", "up to a long document"],
)
def test_how_many_documents_a_stream_may_hold_out_is_said(tmp_path, held, rest, said):
    shards = make_shards(tmp_path, held)
    source = Files(tmp_path, [], "text", "c")
    prepared = Prepared(tmp_path, source, tokenizer(), Plan(1), shards)
    with pytest.raises(DataError, match=said):
        require_rest(prepared, rest, SEQ_LEN)
    require_rest(prepared, read_manifest(shards).tokens, SEQ_LEN)


@pytest.mark.parametrize("count", [120, 300])
def test_a_validation_set_deleted_from_the_cache_is_made_again(tmp_path, tokenizer_file, count):
    path = corpus(tmp_path / "c", documents(count))
    first = open_text(path, tmp_path / "cache", tokenizer_file, validation_fraction=0.1)
    shutil.rmtree(first._validation.directories[0])
    trained = first._sources[0].directory / "shard-00000.bin"
    before = trained.stat()
    second = open_text(path, tmp_path / "cache", tokenizer_file, validation_fraction=0.1)
    assert second._validation.manifests[0].content == first._validation.manifests[0].content
    assert trained.stat() == before


def test_a_prepared_cache_may_be_read_only(tmp_path, tokenizer_file):
    path = corpus(tmp_path / "c", documents(120))
    cache = tmp_path / "cache"
    first = open_text(path, cache, tokenizer_file)
    subprocess.run(["chmod", "-R", "a-w", cache], check=True)
    try:
        if os.access(cache, os.W_OK):
            # root may write everywhere, so make it impossible another way
            for root in cache.iterdir():
                if (root / "lock").exists():
                    (root / "lock").unlink()
                    (root / "lock").mkdir()
            shutil.rmtree(cache / "verified")
            (cache / "verified").touch()
        assert open_text(path, cache, tokenizer_file).fingerprint == first.fingerprint
    finally:
        subprocess.run(["chmod", "-R", "u+w", cache], check=True)


def test_what_was_left_out_stands_in_the_description(tmp_path, tokenizer_file):
    path = corpus(tmp_path / "c", documents(120))
    (path / ".ipynb_checkpoints").mkdir()
    (path / ".ipynb_checkpoints" / "a-checkpoint.jsonl").write_text('{"text": "copy"}')
    (path / "notes.pdf").write_text("x")
    data = open_text(path, tmp_path / "cache", tokenizer_file)
    assert "c: 1 file, " in data.describe()
    assert "left out: 1 *.pdf, 1 hidden" in data.describe()
    assert read_manifest(data._sources[0].directory).documents < 120
