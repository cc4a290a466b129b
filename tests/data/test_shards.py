"""Shards: written whole or not at all; read only if they are exactly what the manifest says."""

import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from pdn.data.shards import HEADER, dtype_for, read_manifest, sealed
from pdn.data.sources import ResidentSource
from pdn.errors import DataError
from tests.data.corpus import documents, make_shards, open_shards, tokenizer


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    """Copy the shards, to be damaged."""
    return shutil.copytree(shards, tmp_path / "copy")


def write_manifest(directory: Path, **changes) -> None:
    """Put a changed manifest with a correct checksum there, as a wrong writer would."""
    (directory / "manifest.json").write_bytes(
        sealed({**read_manifest(directory).model_dump(), **changes})
    )


def refusal(directory: Path, cache: Path, **keys) -> str:
    """Return the message with which opening, or reading two epochs, is refused."""
    with pytest.raises(DataError) as caught:
        data = open_shards(directory, cache, **keys)
        for _ in data.steps(0, micro_batch_size=2, stop_sample=1000):
            pass
    assert caught.value.exit_code == 65
    return str(caught.value)


def first(directory: Path, suffix: str = ".bin") -> Path:
    return directory / f"shard-00001{suffix}"


def test_what_is_written_is_read(shards):
    manifest = read_manifest(shards)
    tokens = np.concatenate([np.fromfile(shards / f"{s.name}.bin", "<u2") for s in manifest.shards])
    built = tokenizer().build()
    expected = [i for text in documents(120) for i in [*built.ids(text), tokenizer().eos_id]]
    assert tokens.tolist() == expected and manifest.documents == 120 and len(manifest.shards) > 3
    for shard in manifest.shards:
        assert (
            hashlib.sha256((shards / f"{shard.name}.bin").read_bytes()).hexdigest() == shard.sha256
        )


def test_ids_from_65536_on_take_four_bytes():
    assert (dtype_for(1 << 16), dtype_for((1 << 16) + 1)) == ("uint16", "uint32")


def test_a_missing_directory_or_manifest_is_named(shards, cache, tmp_path):
    assert "the directory is missing" in refusal(tmp_path / "nowhere", cache)
    assert "no manifest.json" in refusal(shards.parent, cache)


def test_a_missing_shard_is_named(copy, cache):
    first(copy).unlink()
    assert f"E-SHARD-MISSING] {first(copy)}" in refusal(copy, cache)


def test_an_empty_shard_is_refused(copy, cache):
    first(copy).write_bytes(b"")
    message = refusal(copy, cache)
    assert "E-SHARD-SIZE" in message and "empty, expected" in message and "byte 0;" in message


def test_an_odd_byte_count_is_refused(copy, cache):
    size = first(copy).stat().st_size
    with open(first(copy), "ab") as f:
        f.write(b"x")
    message = refusal(copy, cache)
    assert (
        f"{size + 1} bytes, not a whole number of tokens, expected {size} bytes" in message
        and f"at byte {size};" in message
    )


def test_a_truncated_index_is_refused(copy, cache):
    path = first(copy, ".idx")
    os.truncate(path, path.stat().st_size - 8)
    assert "E-SHARD-SIZE" in refusal(copy, cache)


def test_an_index_of_other_documents_is_refused(copy, cache):
    shutil.copy(copy / "shard-00000.idx", first(copy, ".idx"))
    assert str(first(copy, ".idx")) in refusal(copy, cache)


def test_a_changed_byte_is_found_by_its_hash(copy, cache):
    raw = bytearray(first(copy).read_bytes())
    raw[10] ^= 1
    first(copy).write_bytes(raw)
    message = refusal(copy, cache)
    assert (
        f"E-SHARD-HASH] {first(copy)}: SHA-256" in message
        and "expected" in message
        and "restore" in message
    )


def test_an_id_outside_the_vocabulary_is_named_with_its_offset(copy, cache):
    raw = np.fromfile(first(copy), "<u2")
    raw[7] = 60000
    raw.tofile(first(copy))
    shard = (
        read_manifest(copy)
        .shards[1]
        .model_copy(update={"sha256": hashlib.sha256(raw.tobytes()).hexdigest()})
    )
    write_manifest(
        copy,
        shards=[
            s.model_dump() if s.name != shard.name else shard.model_dump()
            for s in read_manifest(copy).shards
        ],
    )
    message = refusal(copy, cache)
    assert (
        f"{first(copy)}: id 60000 at token 7 (byte 14), expected ids below vocab_size 300"
        in message
    )


def test_two_byte_tokens_of_a_large_vocabulary_are_refused(copy, cache):
    write_manifest(copy, vocab_size=70000)
    assert "dtype uint16 holds ids below 65,536, but vocab_size is 70,000" in refusal(copy, cache)


def test_data_shorter_than_a_sample_are_refused(shards, cache):
    tokens = read_manifest(shards).tokens
    message = refusal(shards, cache, seq_len=tokens)
    assert (
        f"{tokens} tokens, shorter than one sample of {tokens} + 1" in message
        and "seq_len" in message
    )


def test_fewer_samples_than_ranks_are_refused(shards, cache):
    tokens = read_manifest(shards).tokens
    message = refusal(shards, cache, seq_len=tokens // 3, world=8, batch=8)
    assert (
        f"3 samples of {tokens // 3} tokens, fewer than the 8 ranks" in message
        or "2 samples" in message
    )


def test_an_unreadable_shard_is_refused(copy, cache, monkeypatch):
    denied = str(first(copy))
    allowed = os.access
    # tests may run as root
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path) != denied and allowed(path, mode)
    )
    assert f"E-SHARD-UNREADABLE] {denied}: permission denied" in refusal(copy, cache)


def test_an_unfinished_preparation_is_refused(copy, cache):
    write_manifest(copy, complete=False)
    assert "was not finished" in refusal(copy, cache)


def test_another_version_is_refused(copy, cache):
    write_manifest(copy, version=2)
    assert "format version 2, this program reads 1" in refusal(copy, cache)


def test_another_tokenizer_in_the_directory_is_refused(copy, cache):
    (copy / "tokenizer.json").write_text("{}")
    assert "E-TOKENIZER-DATA" in refusal(copy, cache)
    (copy / "tokenizer.json").unlink()
    assert "E-TOKENIZER-MISSING" in refusal(copy, cache)


@pytest.mark.parametrize(
    "name", ["../shard-00001", "/etc/passwd", "shard-00001/../../x", "shard-1", "shard-00001\n"]
)
def test_names_that_could_leave_the_directory_are_refused(copy, cache, name):
    shards = [s.model_dump() for s in read_manifest(copy).shards]
    write_manifest(copy, shards=[{**shards[0], "name": name}, *shards[1:]])
    assert "E-SHARD-PATH" in refusal(copy, cache)


def test_a_link_out_of_the_directory_is_refused(copy, cache, tmp_path):
    first(copy).rename(tmp_path / "outside.bin")
    first(copy).symlink_to(tmp_path / "outside.bin")
    assert "E-SHARD-PATH" in refusal(copy, cache)


def test_validating_on_the_training_set_is_refused(shards, copy, cache):
    assert "E-DATA-OVERLAP" in refusal(shards, cache, validation=str(shards))
    assert "holds shards of the training set" in refusal(shards, cache, validation=str(copy))


def test_one_shared_document_is_found(shards, cache, tmp_path):
    held_out = make_shards(tmp_path, [*documents(20, seed=7), documents(120)[77]])
    message = refusal(shards, cache, validation=str(held_out))
    assert (
        "E-DATA-OVERLAP" in message
        and "document" in message
        and "(and 0 more of this shard)" in message
    )


def test_two_tokenizers_in_one_mixture_are_refused(shards, copy, cache):
    from tests.data.corpus import mixture, open_mixture

    other = json.dumps({**json.loads(tokenizer().content), "padding": None})
    (copy / "tokenizer.json").write_text(other)
    write_manifest(
        copy, tokenizer={"name": "other", "sha256": hashlib.sha256(other.encode()).hexdigest()}
    )
    with pytest.raises(DataError, match=r"TOKENIZER-DATA.*s1 was tokenised with other"):
        open_mixture(cache, mixture(shards, copy, weights=[1, 1]), batch=4)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda path: os.truncate(path, 100), "E-SHARD-SIZE"),
        (lambda path: path.unlink(), "E-SHARD-MISSING"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), "E-SHARD-CHANGED"),
        (lambda path: os.replace(shutil.copy(path, f"{path}.new"), path), "E-SHARD-CHANGED"),
    ],
    ids=["truncated", "deleted", "flipped", "replaced"],
)
def test_a_shard_damaged_while_training_stops_the_run(copy, cache, monkeypatch, damage, code):
    monkeypatch.setattr("pdn.data.reader.RECHECK_SECONDS", 0.0)
    data = open_shards(copy, cache)
    steps = data.steps(0, micro_batch_size=2, stop_sample=4000)
    for _ in range(100):
        next(steps)
    damage(first(copy))
    with pytest.raises(DataError, match=rf"{code}\] {first(copy)}"):
        for _ in steps:
            pass


def changed(path: Path) -> None:
    """Give a shard other tokens of the vocabulary, as many as before."""
    path.write_bytes(np.fromfile(path, "<u2")[::-1].tobytes())


def test_a_shard_that_changes_before_its_first_use_is_not_read(copy, cache):
    data = open_shards(copy, cache)
    changed(first(copy))
    with pytest.raises(DataError, match=rf"E-SHARD-CHANGED\] {first(copy)}"):
        for _ in data.steps(0, micro_batch_size=2, stop_sample=4000):
            pass


@pytest.mark.parametrize("open_files", [16, 1])
def test_a_shard_that_changed_between_two_looks_is_known_to_have_been_read(
    copy, cache, monkeypatch, open_files
):
    monkeypatch.setattr("pdn.data.reader.RECHECK_SECONDS", 1e9)
    data = open_shards(copy, cache)
    data._sources[0]._reader._limit = open_files
    steps = data.steps(0, micro_batch_size=2, stop_sample=4000)
    for _ in range(100):
        next(steps)
    data.check_unchanged()
    next(steps)
    for shard in copy.glob("*.bin"):
        changed(shard)
    with pytest.raises(DataError, match=rf"E-SHARD-CHANGED\] {copy}"):
        data.check_unchanged()


def test_a_validation_shard_that_changed_is_known_to_have_been_read(
    shards, cache, tmp_path, monkeypatch
):
    monkeypatch.setattr("pdn.data.reader.RECHECK_SECONDS", 1e9)
    held_out = make_shards(tmp_path / "held", documents(20, seed=7))
    data = open_shards(shards, cache, validation=str(held_out))
    list(data.validation(batch_size=2, max_samples=8))
    changed(held_out / "shard-00000.bin")
    with pytest.raises(DataError, match=rf"E-SHARD-CHANGED\] {held_out}"):
        data.check_unchanged()


def test_large_data_are_verified_in_the_background_and_only_once(copy, cache, monkeypatch):
    monkeypatch.setattr("pdn.data.verify.AT_ONCE_BYTES", -1)
    raw = bytearray(first(copy).read_bytes())
    good = bytes(raw)
    raw[10] ^= 1
    first(copy).write_bytes(raw)
    data = open_shards(copy, cache)
    with pytest.raises(DataError, match="E-SHARD-HASH"):
        for _ in data.steps(0, micro_batch_size=2, stop_sample=400_000):
            time.sleep(0.001)
    data.close()
    first(copy).write_bytes(good)
    data = open_shards(copy, cache)
    data._checks._thread.join()
    data._checks.raise_if_failed()
    read = []
    monkeypatch.setattr(
        "pdn.data.verify.Verification._check_hash", lambda self, path, expected: read.append(path)
    )
    open_shards(copy, cache)._checks._thread.join()
    assert read == []
    os.utime(first(copy))
    open_shards(copy, cache)._checks._thread.join()
    assert {p.name for p in read} == {"shard-00001.bin", "shard-00001.idx"}


def mutate(raw: bytes, rng: random.Random, length: int) -> bytes:
    """Flip, insert, delete, repeat or cut within the first `length` bytes."""
    raw, at = bytearray(raw), rng.randrange(length)
    kind = rng.choice(["flip", "byte", "insert", "delete", "truncate", "repeat"])
    if kind == "flip":
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        raw[at] = (raw[at] + rng.randrange(1, 256)) % 256
    elif kind == "insert":
        raw[at:at] = bytes([rng.randrange(256)])
    elif kind == "delete":
        del raw[at]
    elif kind == "truncate":
        del raw[at:]
    else:
        raw[at:at] = raw[at : at + rng.randrange(1, 30)]
    return bytes(raw)


def fuzz(copy: Path, trials: int, seed: int) -> int:
    """Damage the manifest or an index's header at random.

    Returns how often opening refuses with its name.
    """
    refused, slowest = 0, 0.0
    for trial in range(trials):
        rng = random.Random(seed + trial)
        path = copy / "manifest.json" if trial % 2 else first(copy, ".idx")
        good = path.read_bytes()
        bad = mutate(good, rng, len(good) if trial % 2 else HEADER.size)
        assert bad != good
        path.write_bytes(bad)
        began = time.monotonic()
        try:
            # without the hashes, which of large data are known only later
            ResidentSource("data", copy, seed=0)
        except DataError as error:
            refused += str(path) in str(error)
            slowest = max(slowest, time.monotonic() - began)
        path.write_bytes(good)
    assert slowest < 10  # seconds, also on a busy machine
    return refused


def test_mutated_headers_and_manifests_are_refused(copy):
    assert fuzz(copy, 100, seed=0) == 100


@pytest.mark.slow
def test_500_mutated_headers_and_manifests_are_refused(copy):
    assert fuzz(copy, 500, seed=1000) == 500


def test_a_linked_or_piped_index_is_refused_like_a_linked_shard(copy, cache):
    index = first(copy, ".idx")
    index.rename(copy / "elsewhere")
    index.symlink_to(copy / "elsewhere")
    assert "E-SHARD-PATH" in refusal(copy, cache)
    index.unlink()
    os.mkfifo(index)
    assert "E-SHARD-PATH" in refusal(copy, cache)
