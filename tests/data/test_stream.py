"""Streaming: what is trained on never depends on when it was tokenised, evicted or retried.

Nor does it depend on kills.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pdn.data import holdout, open_data
from pdn.data.documents import discover, standard_library
from pdn.data.ledger import EMPTY, roll
from pdn.data.retry import Retrying
from pdn.data.shards import read_manifest
from pdn.data.stream_prepare import resolve
from pdn.data.stream_worker import Reader, Worker, require_same_source
from pdn.data.tokenizer import train
from pdn.errors import DataError, DataStorageError
from tests.children import PYTHON_PATH, command_of, is_running
from tests.data.corpus import LOADING, STREAM, Memory, documents, parse, tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def least(monkeypatch):
    """Let a few short documents do for a validation set; tests of its size say otherwise."""
    monkeypatch.setattr(holdout, "WINDOWS", 1)


@pytest.fixture
def corpus(tmp_path) -> Path:
    directory = tmp_path / "corpus"
    directory.mkdir()
    (tmp_path / "tokenizer.json").write_bytes(tokenizer().content)
    for part in range(3):
        rows = documents(100, seed=20 + part)
        (directory / f"{part}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in rows)
        )
    return directory


def open_stream(corpus: Path, cache: Path, *, batch: int = 4, seed: int = 0, recorded=None, **keys):
    config = parse(
        cache,
        **{
            **STREAM,
            "path": str(corpus),
            "tokenizer": str(corpus.parent / "tokenizer.json"),
            **keys,
        },
    )
    return open_data(config, global_batch_size=batch, seed=seed, recorded=recorded)


def held_out_by(data) -> SimpleNamespace:
    """Return the documents and samples of the validation set."""
    held = data._validation
    return SimpleNamespace(
        documents=held.manifests[0].documents,
        samples=len(held.places(data.seq_len, None, spread=False)),
    )


def read_all(data, start: int = 0, stop: int | None = None):
    """Read all steps until `stop` or the end of the epochs."""
    found = []
    try:
        for batch, _ in data.steps(start, micro_batch_size=4, stop_sample=stop):
            found.append(batch["tokens"].flatten(0, 1))
    except DataError as error:
        if error.code != "DATA-EPOCHS":
            raise
    return torch.cat(found)


def evicted(data) -> int:
    source = data._sources[0]
    return sum(
        not (source.directory / f"{s.name}.bin").exists()
        for s in read_manifest(source.directory).shards
    )


def test_a_stream_gives_each_token_once_and_again_the_same(corpus, tmp_path):
    first = open_stream(corpus, tmp_path / "a", max_epochs=1.0)
    rows = read_all(first)
    total = first._sources[0].manifest.tokens
    assert len(rows) == (total - 1) // 16 // 4 * 4 and len(rows) > 400
    shards = first._sources[0].directory
    first.close()
    stream = torch.cat(
        [
            torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint16)
            for p in sorted(shards.glob("*.bin"))
        ]
    )
    windows = {tuple(stream[i : i + 16].tolist()) for i in range(0, len(stream) - 16, 16)}
    assert {tuple(r) for r in rows.tolist()} <= windows and len(
        set(map(tuple, rows.tolist()))
    ) > 0.98 * len(rows)
    again = open_stream(corpus, tmp_path / "b", max_epochs=1.0)
    assert torch.equal(read_all(again), rows)
    again.close()


def test_any_state_goes_on_alike_with_a_new_cache(corpus, tmp_path):
    whole = open_stream(corpus, tmp_path / "a", max_epochs=2.0)
    rows = read_all(whole)
    epoch = whole._sources[0].count(16)
    assert not torch.equal(rows[:40], rows[epoch : epoch + 40]) and set(
        map(tuple, rows[:40].tolist())
    ) <= set(map(tuple, rows[epoch:].tolist()))
    whole.close()
    for k, cache in ((20, "a"), (200, "b"), (500, "a"), (len(rows) - 40, "c")):
        data = open_stream(corpus, tmp_path / cache, max_epochs=2.0)
        assert torch.equal(read_all(data, start=k), rows[k:]), k
        data.close()


def test_samples_stay_within_their_block(corpus, tmp_path):
    data = open_stream(corpus, tmp_path, max_epochs=1.0)
    read_all(data)
    source = data._sources[0]
    bounds = source._block_bounds(16)
    stream = torch.cat(
        [
            torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint16)
            for p in sorted(source.directory.glob("*.bin"))
        ]
    )
    for b in range(2):
        rows = data.windows(range_of(bounds, b))[:, :16].tolist()
        assert sorted(rows) == sorted(
            stream[w * 16 : w * 16 + 16].tolist() for w in range_of(bounds, b)
        )
        assert rows != [stream[w * 16 : w * 16 + 16].tolist() for w in range_of(bounds, b)]
    data.close()


def range_of(bounds, block):
    import numpy as np

    return np.arange(bounds[block], bounds[block + 1])


def test_validation_documents_never_train(corpus, tmp_path):
    data = open_stream(corpus, tmp_path, max_epochs=1.0, validation_documents=7)
    rows = read_all(data)
    assert data._validation.manifests[0].documents == 7
    built = tokenizer().build()
    text = built.decode(rows.flatten().tolist())
    assert "20-3 " not in text and data._sources[0].manifest.documents == 293
    data.close()


def test_short_documents_give_a_validation_set_of_as_many_samples_as_one_must_have(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(holdout, "WINDOWS", 64)
    keys = {"seq_len": 8, "validation_documents": 2}
    with contextlib.closing(open_stream(corpus, tmp_path / "cache", **keys)) as data:
        held, recorded = held_out_by(data), dict(data.fingerprint)
    assert held.samples >= 64
    assert recorded["data.split"] == f"{held.documents} documents" and held.documents < 60
    # A run that was begun before there was a floor keeps its two documents.
    old = {key: value for key, value in recorded.items() if key != "data.split"}
    for before, count in ((recorded, held.documents), (old, 2)):
        again = open_stream(corpus, tmp_path / "cache", recorded=before, **keys)
        with contextlib.closing(again) as data:
            assert held_out_by(data).documents == count


def test_a_stream_that_ends_soon_gives_at_most_half_to_validation(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(holdout, "WINDOWS", 64)
    for file in list(corpus.iterdir())[1:]:
        file.unlink()
    with contextlib.closing(
        open_stream(corpus, tmp_path / "cache", validation_documents=2, seq_len=40)
    ) as data:
        documents_held = int(data.fingerprint["data.split"].split()[0])
    assert 2 < documents_held <= 60


def test_evicted_shards_come_back_exactly(corpus, tmp_path):
    """Give room for four blocks, so that shards go.

    They are written again for an older state and for the next epoch.
    """
    free = open_stream(corpus, tmp_path / "free", max_epochs=1.2)
    rows = read_all(free)
    free.close()
    capped = open_stream(corpus, tmp_path / "capped", max_epochs=1.2, max_cache_bytes=16 * 2 * 512)
    assert torch.equal(read_all(capped), rows)
    assert evicted(capped) > 5
    capped.close()
    older = open_stream(corpus, tmp_path / "capped", max_epochs=1.2, max_cache_bytes=16 * 2 * 512)
    assert torch.equal(read_all(older, start=40, stop=140), rows[40:140])
    older.close()


def test_what_is_needed_last_is_evicted_first():
    def order(complete: bool, *alive: Reader) -> list[int]:
        worker = SimpleNamespace(manifest=SimpleNamespace(shards=range(10), complete=complete))
        return Worker._removable(worker, list(range(9)), list(alive))

    assert order(False, Reader(4, 7), Reader(5, 8)) == [0, 1, 2, 3]
    assert order(True, Reader(4, 7)) == [3, 2, 1, 0, 8, 7]
    assert order(True, Reader(14, 17), Reader(8, 10)) == [7, 3, 2, 1, 0]


def test_a_source_that_changed_is_refused_when_a_shard_is_written_again(corpus, tmp_path):
    data = open_stream(corpus, tmp_path, max_epochs=1.0)
    read_all(data)
    root = data._sources[0]._root
    data.close()
    (root / "train" / "shard-00001.bin").unlink()
    file = corpus / "0.jsonl"
    status = file.stat()
    file.write_text(file.read_text().replace("tide", "tied"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    data = open_stream(corpus, tmp_path, max_epochs=1.0)
    with pytest.raises(DataError, match=r"E-STREAM-CHANGED.*shard-00001"):
        read_all(data)
    data.close()


def test_a_tokeniser_that_finds_other_files_than_its_reader_says_so(corpus, tmp_path):
    config = parse(
        tmp_path, **STREAM | {"path": str(corpus)}, tokenizer=str(tmp_path / "tokenizer.json")
    )
    before = resolve(config, tmp_path, print)
    require_same_source(before, before.root)
    (corpus / "3.jsonl").write_text(json.dumps({"text": "more"}))
    with pytest.raises(DataError, match=rf"E-STREAM-CHANGED\] corpus: .*{before.root}"):
        require_same_source(resolve(config, tmp_path, print), before.root)


def test_a_changed_source_or_block_size_changes_the_fingerprint(corpus, tmp_path):
    base = open_stream(corpus, tmp_path)
    block = open_stream(corpus, tmp_path, block_shards=4)
    (corpus / "3.jsonl").write_text(json.dumps({"text": "more"}))
    more = open_stream(corpus, tmp_path)
    assert {k for k in base.fingerprint if base.fingerprint[k] != block.fingerprint[k]} == {
        "data.block_shards"
    }
    assert "data.revision" in {
        k for k in base.fingerprint if base.fingerprint[k] != more.fingerprint[k]
    }
    for data in (base, block, more):
        data.close()


def test_the_tokeniser_ends_with_its_reader(corpus, tmp_path):
    data = open_stream(corpus, tmp_path)
    pid = data._sources[0]._tokeniser.pid
    data.close()
    assert not Path(f"/proc/{pid}").exists()


def test_a_bad_document_stops_the_run_with_its_place(corpus, tmp_path):
    (corpus / "1.jsonl").write_text('{"text": "fine"}\n{broken\n')
    with pytest.raises(DataError, match=r"E-DATA-JSON\].*1\.jsonl: line 2") as caught:
        read_all(open_stream(corpus, tmp_path, max_epochs=1.0, validation_documents=0))
    assert caught.value.exit_code == 65


def program(corpus: Path, cache: Path, log: str = "log", **keys) -> list[str]:
    """Return the command of a reader that appends a line per step to <cache>/<log>.

    It starts where the log ends; run it until it is through.
    """
    code = (
        "import json, sys; from pathlib import Path; from pydantic import TypeAdapter; from "
        "pdn.data "
        "import open_data;"
        "from pdn.data.config import DataConfig; from pdn.errors import DataError\n"
        "config = TypeAdapter(DataConfig).validate_python(json.loads(sys.argv[1])); log = "
        "Path(sys.argv[2])\n"
        "lines = log.read_bytes().split(b'\\n')[:-1] if log.exists() else []\n"
        "log.write_bytes(b''.join(line + b'\\n' for line in lines))\n"
        "start = json.loads(lines[-1])['next'] if lines else 0\n"
        "data = open_data(config, global_batch_size=8, seed=0)\n"
        "with open(log, 'a', buffering=1) as f:\n"
        "    try:\n"
        "        for batch, state in data.steps(start, micro_batch_size=8, stop_sample=None):\n"
        "            f.write(json.dumps({'next': state, 'digests': "
        "batch['sample_digests'].flatten().tolist()}) + '\\n')\n"
        "    except DataError as error:\n"
        "        if error.code != 'DATA-EPOCHS': raise\n"
        "data.close(); Path(sys.argv[2] + '.done').touch()"
    )
    values = {
        **LOADING,
        **STREAM,
        "path": str(corpus),
        "cache_dir": str(cache),
        "max_epochs": 1.0,
        "validation_documents": 40,  # as many as its least size needs
        **keys,
    }
    return [sys.executable, "-c", code, json.dumps(values), str(cache / log)]


def ledger(log: Path) -> tuple[int, str]:
    """Return steps and rolling hash of a log; each step must begin where the one before ended."""
    steps, value = [json.loads(line) for line in log.read_text().splitlines()], EMPTY
    for number, step in enumerate(steps, 1):
        assert step["next"] == 8 * number
        value = roll(value, step["digests"])
    return len(steps), value


def test_processes_of_a_node_share_one_tokeniser(corpus, tmp_path):
    env = {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    keys = {"tokenizer": str(corpus.parent / "tokenizer.json")}
    children = [
        subprocess.Popen(program(corpus, tmp_path, log, **keys), env=env) for log in ("a", "b")
    ]
    assert [c.wait(timeout=120) for c in children] == [0, 0]
    assert ledger(tmp_path / "a") == ledger(tmp_path / "b")
    (root,) = tmp_path.glob("stream-*")
    read_manifest(root / "train")
    assert (root / "tokeniser.log").read_text() == ""


def kill_at_random(
    corpus: Path, tmp_path: Path, kills: int, seed: int, most: int, **keys
) -> tuple[int, int]:
    """Kill the reader and the tokeniser in turn after up to `most` more shards and steps.

    What all readers together have read must be what one undisturbed reader reads. Returns how often
    each was hit at work.
    """
    rng, (whole, broken) = random.Random(seed), (tmp_path / "whole", tmp_path / "broken")
    env = {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    for cache in (whole, broken):
        cache.mkdir()
    subprocess.run(program(corpus, whole, **keys), env=env, check=True, timeout=300)
    hits, child, deadline = [0, 0], None, time.monotonic() + 30 * kills + 120
    while not (broken / "log.done").exists():
        assert time.monotonic() < deadline
        if child is None or child.poll() is not None:
            assert child is None or child.returncode in (0, -signal.SIGKILL)
            child = subprocess.Popen(program(corpus, broken, **keys), env=env)
        worker = tokeniser_of(child.pid) if sum(hits) < kills else None
        if worker is None:
            time.sleep(0.002)
            continue
        enough = progress(broken) + rng.randint(0, most)
        while (
            tokeniser_of(child.pid) == worker
            and progress(broken) < enough
            and not (broken / "log.done").exists()
        ):
            time.sleep(0.002)
        victim = sum(hits) % 2
        with contextlib.suppress(ProcessLookupError):
            os.kill((child.pid, worker)[victim], signal.SIGKILL)
            hits[victim] += 1
        if victim == 0:
            child.wait()
        else:
            while is_running(worker):
                time.sleep(0.01)
    child.wait()
    assert ledger(broken / "log") == ledger(whole / "log")
    return hits[0], hits[1]


def progress(cache: Path) -> int:
    """Count shards written and steps read so far."""
    steps = (cache / "log").read_bytes().count(b"\n") if (cache / "log").exists() else 0
    return steps + len(list(cache.glob("stream-*/train/*.bin")))


def tokeniser_of(parent: int) -> int | None:
    """Return the process id of the tokeniser that `parent` started, if it runs."""
    with contextlib.suppress(OSError):  # it ends while it is looked at
        for thread in Path(f"/proc/{parent}/task").iterdir():
            for pid in (thread / "children").read_text().split():
                if b"data.stream_worker" in command_of(int(pid)):
                    return int(pid)
    return None


def test_kills_of_reader_and_tokeniser_lose_and_repeat_nothing(corpus, tmp_path):
    keys = {"tokenizer": str(corpus.parent / "tokenizer.json")}
    # a quick machine may be through
    assert sum(kill_at_random(corpus, tmp_path, 2, seed=3, most=20, **keys)) >= 1


@pytest.mark.slow
def test_twenty_kills_while_streaming_lose_and_repeat_nothing(tmp_path):
    """Run on the sources of the standard library, some megabytes of text."""
    texts = [text for batch in standard_library(1 << 24).batches(None) for text in batch.texts]
    (tmp_path / "tokenizer.json").write_bytes(train(texts[::4], 8192).content)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    keys = {
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "seq_len": 512,
        "isolation_min_tokens": 16,
    }
    keys |= {"shard_tokens": 32768, "processes": 2}
    assert kill_at_random(tmp_path / "text.jsonl", tmp_path, 20, seed=7, most=16, **keys) == (
        10,
        10,
    )


class Flaky(Memory):
    """Fails, or hangs, before each of the given batches, once each."""

    def __init__(self, texts, faults):
        super().__init__(texts)
        self.faults = dict(faults)

    def batches(self, cursor):
        for batch in super().batches(cursor):
            fault = self.faults.pop(batch.cursor["at"], None)
            if fault == "hang":
                time.sleep(30)
            if fault:
                raise fault
            yield batch


def retry(source, **keys):
    said: list[str] = []
    keys = {"retry_seconds": 5.0, "stall_seconds": 0.3, "first_pause": 0.01, **keys}
    return Retrying(source, tell=said.append, **keys), said


def test_a_flaky_source_loses_and_repeats_nothing():
    texts = documents(60)
    faults = {
        0: OSError("503"),
        9: ConnectionError("reset"),
        12: "hang",
        30: TimeoutError("slow"),
        57: OSError("503"),
    }
    source, said = retry(Flaky(texts, faults))
    assert [t for b in source.batches(None) for t in b.texts] == texts and len(said) == 5
    source, _ = retry(Flaky(texts, {12: OSError("503")}))
    assert [t for b in source.batches({"at": 9}) for t in b.texts] == texts[9:]


def test_a_dead_source_is_given_up_in_time():
    class Dead(Memory):
        def batches(self, cursor):
            raise ConnectionError("no route")
            yield

    source, said = retry(Dead([]), retry_seconds=0.3)
    began = time.monotonic()
    with pytest.raises(DataStorageError, match=r"E-SOURCE-FAILED.*no route") as caught:
        list(source.batches(None))
    assert time.monotonic() - began < 60 and caught.value.exit_code == 74 and len(said) > 2


def test_damaged_data_are_not_retried(tmp_path):
    (tmp_path / "a.jsonl").write_text("{broken\n")
    source, said = retry(discover(str(tmp_path), "text"))
    with pytest.raises(DataError, match="E-DATA-JSON"):
        list(source.batches(None))
    assert said == []


def test_a_stream_without_a_pinned_revision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="revision is null"):
        parse(tmp_path, **{**STREAM, "dataset": "some/set", "tokenizer": "t.json"})
    with pytest.raises(ValueError, match="give path"):
        parse(tmp_path, **{**STREAM, "tokenizer": "t.json"})
    with pytest.raises(ValueError, match="must hold four blocks"):
        parse(tmp_path, **{**STREAM, "path": "x", "tokenizer": "t.json", "max_cache_bytes": 1000})
