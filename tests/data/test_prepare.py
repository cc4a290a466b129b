"""Tokenisation: the same shards from one process or several, and after any kill."""

import contextlib
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from pdn.data import open_data
from pdn.data.config import DataConfig
from pdn.data.encoders import Encoders
from pdn.data.prepare import Plan, Tokenisation, _Split, hashes_of
from pdn.data.shards import ShardWriter, read_index, read_manifest
from pdn.data.text import prepare_text
from pdn.errors import DataError, DataStorageError
from pdn.wording import silent
from tests.children import PYTHON_PATH
from tests.data.corpus import LOADING, TEXT, Memory, documents, make_shards, parse, tokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "data" / "prepare.py"


def differing(a: Path, b: Path) -> list[str]:
    """Return names of files that only one of two directories has, or that differ."""
    names = {p.name for p in a.iterdir()} | {p.name for p in b.iterdir()}
    return sorted(names - set(filecmp.cmpfiles(a, b, names, shallow=False)[0]))


def command(source: Path, out: Path, *more: str, shard_tokens: int = 3000) -> list[str]:
    options = [
        "--path",
        str(source),
        "--out",
        str(out),
        "--shard-tokens",
        str(shard_tokens),
        "--validation-fraction",
        "0.1",
    ]
    return [
        sys.executable,
        str(SCRIPT),
        *options,
        "--tokenizer",
        str(source.parent / "tokenizer.json"),
        *more,
    ]


def run(arguments: list[str], **keys) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=120, **keys)


@pytest.fixture
def corpus(tmp_path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer().content)
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(3000, seed=4)))
    return path


def test_several_processes_write_the_same_shards_as_one(tmp_path):
    for processes in (1, 3):
        for _ in Tokenisation(
            Memory(documents(200)), tmp_path / str(processes), tokenizer(), Plan(500), processes
        ).run():
            pass
    assert differing(tmp_path / "1" / "train", tmp_path / "3" / "train") == []


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_stopped_tokenisation_goes_on_after_the_last_whole_shard(tmp_path, stop):
    plan = Plan(500, validation_fraction=0.2)
    for _ in Tokenisation(Memory(documents(100)), tmp_path / "whole", tokenizer(), plan, 1).run():
        pass
    attempts = 0
    while True:
        steps = Tokenisation(Memory(documents(100)), tmp_path / "parts", tokenizer(), plan, 1).run()
        if not any(True for _, _ in zip(range(stop), steps)):
            break
        steps.close()
        attempts += 1
    assert attempts > 1
    for split in ("train", "validation"):
        assert differing(tmp_path / "whole" / split, tmp_path / "parts" / split) == []


def test_a_stop_between_the_commits_of_the_two_splits_is_undone(tmp_path, monkeypatch):
    plan = Plan(500, validation_fraction=0.3)
    for _ in Tokenisation(Memory(documents(100)), tmp_path / "whole", tokenizer(), plan, 1).run():
        pass
    commit = _Split.commit

    def stop_before_train(split, part, complete, cursor):
        if cursor is not None and part == 2:
            raise KeyboardInterrupt
        commit(split, part, complete, cursor)

    monkeypatch.setattr(_Split, "commit", stop_before_train)
    with pytest.raises(KeyboardInterrupt):
        list(Tokenisation(Memory(documents(100)), tmp_path / "parts", tokenizer(), plan, 1).run())
    assert any(s.part == 2 for s in read_manifest(tmp_path / "parts" / "validation").shards)
    monkeypatch.setattr(_Split, "commit", commit)
    list(Tokenisation(Memory(documents(100)), tmp_path / "parts", tokenizer(), plan, 1).run())
    for split in ("train", "validation"):
        assert differing(tmp_path / "whole" / split, tmp_path / "parts" / split) == []


def kill_and_go_on(corpus: Path, kills: int, seed: int, shard_tokens: int = 3000) -> int:
    """Kill the preparation a few files after each start, at a random moment.

    Returns the number of kills that hit it at work.
    """
    rng, out, hits = random.Random(seed), corpus.parent / "killed", 0
    env = {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    for _ in range(kills):
        child = subprocess.Popen(
            command(corpus, out, shard_tokens=shard_tokens),
            env=env,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        enough = len(list(out.rglob("*.bin*"))) + rng.randint(1, 4)
        while child.poll() is None and len(list(out.rglob("*.bin*"))) < enough:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        hits += child.poll() is None
        child.kill()
        child.wait()
    for directory in (out, corpus.parent / "whole"):
        assert run(command(corpus, directory, shard_tokens=shard_tokens)).returncode == 0
    for split in ("train", "validation"):
        assert differing(corpus.parent / "whole" / split, out / split) == []
    return hits


def crash_points(scenario: str, directory: Path, number: int, second_kills: int) -> dict:
    arguments = [
        "-m",
        "tests.data.crash_points",
        scenario,
        str(directory),
        str(number),
        str(second_kills),
    ]
    env = {
        **os.environ,
        "PYTHONPATH": PYTHON_PATH,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    result = subprocess.run(
        [sys.executable, *arguments],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("scenario", "number"), [("split", 14), pytest.param("stream", 24, marks=pytest.mark.slow)]
)
def test_a_kill_before_any_file_operation_changes_nothing(tmp_path, scenario, number):
    found = crash_points(scenario, tmp_path, number, 0)
    assert found["points"] > 60 and found["differing"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["split", "validation", "trained", "text", "stream"])
def test_three_kills_before_file_operations_change_nothing(tmp_path, scenario):
    found = crash_points(scenario, tmp_path, 60, 2)
    assert found["points"] > 95 and found["differing"] == {}


def test_killed_preparations_end_in_the_same_bytes(corpus):
    assert kill_and_go_on(corpus, 3, seed=0) >= 1


@pytest.mark.slow
def test_twenty_kills_end_in_the_same_bytes(corpus):
    corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(60_000, seed=4)))
    assert kill_and_go_on(corpus, 20, seed=1, shard_tokens=30_000) == 20


def test_a_killed_worker_is_started_anew_and_nothing_is_lost():
    encoders = Encoders(tokenizer(), 2)
    texts, done = documents(300), 0
    for encoded in encoders.run(Memory(texts).batches(None)):
        if done in (30, 150):
            os.kill(encoders._workers[0].pid, signal.SIGKILL)
        expected = [
            i
            for ids in tokenizer().build().encode(encoded.batch.texts)
            for i in [*ids, tokenizer().eos_id]
        ]
        assert encoded.tokens.tolist() == expected
        done += len(encoded.batch.texts)
    encoders.close()
    assert done == 300


def test_a_worker_that_always_dies_is_reported(monkeypatch):
    monkeypatch.setattr(
        "pdn.data.encoders._ask", lambda worker, texts: (_ for _ in ()).throw(EOFError())
    )
    encoders = Encoders(tokenizer(), 2)
    with pytest.raises(DataStorageError, match="TOKENISER-DIED"):
        list(encoders.run(Memory(documents(10)).batches(None)))
    encoders.close()


def test_a_full_disk_is_reported_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pdn.data.shards.os.fsync", full)
    with pytest.raises(DataStorageError, match=r"E-DATA-IO.*No space left"):
        make_shards(tmp_path, documents(50))
    assert [p.name for p in (tmp_path / "train").iterdir() if "tmp" in p.name] == []


def test_a_disk_that_is_full_when_the_buffer_is_written_is_reported(tmp_path):
    writer = ShardWriter(tmp_path, "shard-00000", "uint16")
    writer._file.close()
    writer._file = open("/dev/full", "wb")  # noqa: SIM115
    writer.append(np.arange(9), 0)
    with pytest.raises(DataStorageError, match=r"E-DATA-IO.*No space left"):
        writer.seal(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", [str.upper, lambda text: ""], ids=["other text", "no text"])
def test_a_shard_of_a_source_that_changed_never_has_its_name(tmp_path, monkeypatch, changed):
    texts = documents(60)
    shard = make_shards(tmp_path, texts, shard_tokens=500) / "shard-00001.bin"
    shard.unlink()
    again = [changed(text) for text in texts]
    work = Tokenisation(Memory(again), tmp_path, tokenizer(), Plan(500), 1)
    named, real = [], os.replace
    monkeypatch.setattr(
        "pdn.data.shards.os.replace", lambda old, new: named.append(Path(new)) or real(old, new)
    )
    with pytest.raises(DataError, match=r"E-STREAM-CHANGED.*shard-00001"):
        work.rebuild(1)
    assert shard not in named and not list(shard.parent.glob(".*tmp"))


def test_the_split_goes_by_text_so_that_copies_stay_together(tmp_path):
    texts = documents(200)
    train = make_shards(tmp_path, texts + texts, validation_fraction=0.3)
    held, kept = hashes_of(train.parent / "validation"), hashes_of(train)
    assert len(np.intersect1d(held, kept)) == 0 and len(held) + len(kept) == 200
    assert 35 < len(held) < 85


def test_excluded_documents_never_train(tmp_path):
    texts = documents(100)
    held = make_shards(tmp_path / "held", texts[10:20])
    train = make_shards(tmp_path / "rest", texts, exclude=hashes_of(held))
    assert (
        len(np.intersect1d(hashes_of(train), hashes_of(held))) == 0
        and read_manifest(train).documents == 90
    )


def test_the_index_holds_the_ends_of_the_documents(shards):
    manifest = read_manifest(shards)
    for entry in manifest.shards:
        tokens = np.fromfile(shards / f"{entry.name}.bin", "<u2")
        ends, _ = read_index(shards, entry, manifest.dtype)
        assert (np.flatnonzero(tokens == manifest.eos_id) + 1).tolist() == ends.tolist()


def test_other_text_or_tokenizer_in_the_output_is_refused(tmp_path):
    make_shards(tmp_path, documents(20))
    with pytest.raises(
        DataError,
        match=r"PREPARE-OTHER.*another source: documents was 20, now 21; give another output",
    ):
        make_shards(tmp_path, documents(21))
    with pytest.raises(
        DataError, match=r"another source: plan.shard_tokens was 700, now 701; give"
    ):
        make_shards(tmp_path, documents(20), shard_tokens=701)


def test_lone_surrogates_are_replaced_not_fatal(tmp_path):
    train = make_shards(tmp_path, ["good", "bad \ud800 half", "good too"])
    assert read_manifest(train).documents == 3


def test_the_dry_run_counts_and_writes_nothing(corpus):
    result = run(command(corpus, corpus.parent / "dry", "--dry-run"))
    assert (
        result.returncode == 0
        and "3,000 documents" in result.stdout
        and not (corpus.parent / "dry").exists()
    )


def test_the_script_reports_bad_input_in_one_line(corpus):
    result = run(command(corpus.parent / "none.jsonl", corpus.parent / "out"))
    assert (
        result.returncode == 65
        and result.stderr.startswith("pdn[E-DATA-MISSING]")
        and "Traceback" not in result.stderr
    )


def test_text_that_gives_nothing_to_train_on_is_refused(corpus):
    corpus.write_text('{"text": ""}\n')
    result = run(command(corpus, corpus.parent / "out"))
    assert result.returncode == 65 and result.stderr.splitlines()[-1].startswith(
        "pdn[E-DATA-EMPTY] text.jsonl: no document"
    )


def test_a_tokenizer_that_was_left_before_the_first_shard_is_trained_anew(corpus):
    out = corpus.parent / "out"
    (out / "train").mkdir(parents=True)
    (out / "train" / "tokenizer.json").write_bytes(tokenizer().content)
    options = ["--path", str(corpus), "--out", str(out), "--vocab-size", "320"]
    assert run([sys.executable, str(SCRIPT), *options]).returncode == 0
    assert read_manifest(out / "train").vocab_size == 320


def text_config(cache: Path, path: Path, **keys):
    return parse(cache, **{**TEXT, **LOADING, "path": str(path), **keys})


def test_text_is_tokenised_once_and_shared(tmp_path, cache):
    directory = tmp_path / "books"
    directory.mkdir()
    for i, text in enumerate(documents(80, seed=6)):
        (directory / f"{i:02d}.txt").write_text(text)
    lines: list[str] = []
    config = text_config(cache, directory)
    first = open_data(config, global_batch_size=4, seed=0, progress=lines.append)
    assert any("training a tokenizer" in line for line in lines) and first.vocab_size == 300
    lines.clear()
    second = open_data(config, global_batch_size=4, seed=0, progress=lines.append)
    assert lines == [] and second.fingerprint == first.fingerprint
    assert first._validation is not None and first._sources[0].manifest.documents > 50


def test_files_named_valid_are_held_out(tmp_path, cache):
    texts = documents(60, seed=8)
    (tmp_path / "part.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "valid.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts[:5])
    )
    data = open_data(text_config(cache, tmp_path), global_batch_size=4, seed=0)
    assert (data._sources[0].manifest.documents, data._validation.manifests[0].documents) == (55, 5)


def test_who_has_waited_for_the_lock_makes_nothing_again(corpus, cache, monkeypatch):
    """The other process reads what it made by then: its validation files must stay in place."""
    config = TypeAdapter(DataConfig).validate_python(
        {**LOADING, **TEXT, "path": str(corpus), "cache_dir": str(cache / "late")}
    )
    made = prepare_text(config, cache / "first", silent).train.parent
    root, waited = cache / "late" / made.name, {}

    @contextlib.contextmanager
    def another_had_it(path, waiting):
        shutil.copytree(made, root)
        waited.update({file: file.stat().st_ino for file in root.rglob("*")})
        yield

    monkeypatch.setattr("pdn.data.text.lock", another_had_it)
    found = prepare_text(config, cache / "late", silent)
    assert found.train == root / "train" and found.validation == root / "validation" and waited
    assert {file: file.stat().st_ino for file in root.rglob("*")} == waited


def test_processes_of_a_node_tokenise_once(corpus, cache):
    program = (
        "import sys, json; from pathlib import Path; from pydantic import TypeAdapter; from "
        "pdn.data.config import DataConfig;"
        "from pdn.data.shards import read_manifest; from pdn.data.text import prepare_text; said = "
        "[];"
        "config = TypeAdapter(DataConfig).validate_python(json.loads(sys.argv[1]));"
        "train = prepare_text(config, Path(config.cache_dir), said.append).train;"
        "print(any('training a tokenizer' in s for s in said), read_manifest(train).content)"
    )
    config = json.dumps({**LOADING, **TEXT, "path": str(corpus), "cache_dir": str(cache / "node")})
    env = {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, config], env=env, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = sorted(p.communicate(timeout=60)[0].split() for p in both)
    assert [s[0] for s in said] == ["False", "True"] and said[0][1] == said[1][1]
