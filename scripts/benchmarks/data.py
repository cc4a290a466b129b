"""Speed of the data pipeline.

Tokenising against `tokenizers` alone, reading a permuted split, resuming at 10^12 tokens. Rates are
given per second of wall clock and, as other work on the machine disturbs that, per second of CPU of
all processes involved. `--peers` adds `datasets` and, where they are installed, litdata and
mosaicml-streaming.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from benchmarks._measure import markdown

from pdn.data.codec import parse
from pdn.data.documents import discover, standard_library
from pdn.data.prepare import Plan, Tokenisation
from pdn.data.shards import Manifest, ShardEntry, index_header
from pdn.data.sources import ResidentSource
from pdn.data.tokenizer import TokenizerFile, load, train

LENGTH = 2048
REPEATS = 3
SHARD = 1 << 27
LOADING = {
    "seq_len": LENGTH,
    "validation_sets": None,
    "document_isolation": False,
    "isolation_min_tokens": 16,
    "max_epochs": 100.0,
    "workers": 0,
    "prefetch_steps": 4,
    "timeout_seconds": 240.0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", help="text to tokenise (default: Python's standard library)")
    parser.add_argument(
        "--tokenizer",
        help="tokenizer.json (default: a byte-level BPE of 32,000 entries trained on the text)",
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="tokenising processes (default: 2)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=200_000_000,
        help="tokens of the split that is read (default: 2e8)",
    )
    parser.add_argument(
        "--skip",
        nargs="*",
        default=[],
        choices=["tokenise", "read", "resume"],
        help="parts to leave out",
    )
    parser.add_argument("--peers", action="store_true", help="also measure other libraries")
    parser.add_argument(
        "--scratch", type=Path, help="directory for temporary files (default: the system's)"
    )


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def timed(work: Callable[[], int]) -> tuple[float, float]:
    """Return the tokens per second of wall clock and of CPU of `work`.

    `work` returns a number of tokens.
    """
    wall, cpu = time.perf_counter(), cpu_seconds()
    tokens = work()
    return tokens / (time.perf_counter() - wall), tokens / (cpu_seconds() - cpu)


def medians(runs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


# ---------------------------------------------------------------- tokenising


def encode_alone(content: bytes, texts: list[str], fast: bool, ready, answer) -> None:
    """Encode with `tokenizers` and nothing else; answer with tokens and CPU seconds.

    Args:
        content: of the tokenizer.json.
        texts: to be encoded.
        fast: encode without offsets.
        ready: barrier of the processes' common start.
        answer: queue for the result.
    """
    tokenizer = parse(content, "alone")
    encode = tokenizer.encode_batch_fast if fast else tokenizer.encode_batch
    ready.wait()
    began, tokens = time.process_time(), 0
    for start in range(0, len(texts), 256):
        tokens += sum(
            len(e.ids) + 1 for e in encode(texts[start : start + 256], add_special_tokens=False)
        )
    answer.put((tokens, time.process_time() - began))


def alone(
    tokenizer: TokenizerFile, texts: list[str], processes: int, fast: bool
) -> tuple[float, float]:
    """Return the rates of `processes` that hold their share of the texts and start together.

    Each encodes on one thread, as ours do.

    Args:
        tokenizer: that they use.
        texts: of all of them together.
        processes: how many.
        fast: encode without offsets.
    """
    context = multiprocessing.get_context("spawn")
    answer, ready = context.Queue(), context.Barrier(processes + 1)
    shares = [texts[i::processes] for i in range(processes)]
    workers = [
        context.Process(target=encode_alone, args=(tokenizer.content, s, fast, ready, answer))
        for s in shares
    ]
    for worker in workers:
        worker.start()
    ready.wait()
    began = time.perf_counter()
    found = [answer.get() for _ in workers]
    wall = time.perf_counter() - began
    for worker in workers:
        worker.join()
    tokens = sum(t for t, _ in found)
    return tokens / wall, tokens / sum(c for _, c in found)


def tokenise(options, scratch: Path) -> list[list]:
    source = discover(options.path, "text") if options.path else standard_library(1 << 62)
    texts = [t for batch in source.batches(None) for t in batch.texts]
    tokenizer = (
        load(options.tokenizer, revision=None, eos_token=None)
        if options.tokenizer
        else train(texts, 32000)
    )
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    ours, plain, fast = [], [], []
    for number in range(REPEATS):
        plain.append(alone(tokenizer, texts, options.processes, False))
        fast.append(alone(tokenizer, texts, options.processes, True))

        def work(number=number) -> int:
            out = scratch / f"shards-{number}"
            return list(
                Tokenisation(source, out, tokenizer, Plan(1 << 22), options.processes).run()
            )[-1].tokens

        ours.append(timed(work))
    rates = [medians(r) for r in (plain, fast, ours)]
    name = f"{options.processes} processes"
    return [
        [f"tokenise: `encode_batch` alone, texts in memory, {name}", *(r / 1e6 for r in rates[0])],
        [
            f"tokenise: `encode_batch_fast` alone, texts in memory, {name}",
            *(r / 1e6 for r in rates[1]),
        ],
        [
            f"tokenise: files to shards, {name}, with start-up and reading",
            *(r / 1e6 for r in rates[2]),
        ],
        ["tokenise: ours / `encode_batch`", *(a / b for a, b in zip(rates[2], rates[0]))],
        ["tokenise: ours / `encode_batch_fast`", *(a / b for a, b in zip(rates[2], rates[1]))],
    ]


# ---------------------------------------------------------------- reading


def write_split(directory: Path, shards: int, tokens: int, *, sparse: bool) -> Path:
    """Write shards of random tokens below 32,000 with their manifest.

    Args:
        directory: of the split.
        shards: how many.
        tokens: of each shard.
        sparse: zeros that take no space, in place of random tokens.
    """
    directory.mkdir(parents=True)
    rng, entries = np.random.default_rng(0), []
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    for number in range(shards):
        name = f"shard-{number:05d}"
        with open(directory / f"{name}.bin", "wb") as f:
            if sparse:
                f.truncate(2 * tokens)
            else:
                rng.integers(1, 32000, tokens, dtype=np.uint16).tofile(f)
        index = index_header(2, tokens, 1) + np.array([tokens, number], "<u8").tobytes()
        (directory / f"{name}.idx").write_bytes(index)
        entries.append(
            ShardEntry(
                name=name,
                tokens=tokens,
                documents=1,
                sha256=f"{number:064x}",
                idx_sha256="0" * 64,
                part=number,
            )
        )
    manifest = Manifest(
        format="pdn-shards",
        version=1,
        dtype="uint16",
        vocab_size=32000,
        eos_id=0,
        tokenizer={
            "name": "none",
            "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        },
        source={"name": "synthetic"},
        complete=True,
        cursors=[
            {"at": {"file": number, "row": 0}, "skip": 0, "done": number}
            for number in range(shards)
        ],
        shards=entries,
    )
    manifest.write(directory)
    return directory


def read(options, scratch: Path) -> list[list]:
    from pdn.data.history import Cut
    from pdn.data.loader import TrainingData
    from pdn.data.order import Schedule

    split = write_split(scratch / "read", 8, options.tokens // 8, sparse=False)
    source = ResidentSource("data", split, seed=0)
    count, batch = source.count(LENGTH) // 256 * 256, 64
    data = TrainingData(
        [source],
        Schedule({"data": 1.0}),
        None,
        {},
        _config(split, scratch),
        global_batch_size=batch,
        seed=0,
        rank=0,
        world_size=1,
    )

    def windows() -> int:
        for start in range(0, count, 256):
            source.windows(np.arange(start, start + 256), Cut.plain(LENGTH))
        return count * LENGTH

    def steps() -> int:
        return sum(
            b["tokens"].numel() for b, _ in data.steps(0, micro_batch_size=batch, stop_sample=count)
        )

    windows()
    rates = {
        "raw": medians([timed(windows) for _ in range(REPEATS)]),
        "steps": medians([timed(steps) for _ in range(REPEATS)]),
    }
    return [
        [
            f"read: permuted windows of {LENGTH} + 1, warm files, 1 thread",
            *(r / 1e6 for r in rates["raw"]),
        ],
        [
            "read: whole steps (int64 tokens, labels, digests), 1 thread",
            *(r / 1e6 for r in rates["steps"]),
        ],
    ]


def _config(split: Path, cache: Path):
    from pydantic import TypeAdapter

    from pdn.data.config import DataConfig

    keys = {
        **LOADING,
        "kind": "shards",
        "path": str(split),
        "validation": None,
        "cache_dir": str(cache / "cache"),
    }
    return TypeAdapter(DataConfig).validate_python(keys)


# ---------------------------------------------------------------- resuming

RESUME = """
import json, sys, time
import torch
from pathlib import Path
from pydantic import TypeAdapter
from pdn.data import open_data
from pdn.data.config import DataConfig
import pdn.data.open
def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024 / 1e6
config = TypeAdapter(DataConfig).validate_python(json.loads(sys.argv[1]))
before, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
opened = open_data(config, global_batch_size=8, seed=0)
sample = opened._sources[0].count(config.seq_len) // 2
step, _ = next(opened.steps(sample, micro_batch_size=8, stop_sample=sample + 8))
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu,
                  memory("VmRSS") - before, memory("VmHWM"), opened.tokens_available]))
"""


def resume(options, scratch: Path) -> list[list]:
    """Open 10^12 tokens in the middle, in a new process.

    The manifest is parsed, and every file's size and header looked at.
    """
    from pdn.data.verify import Verification, _fingerprint

    shards = -(-(10**12) // SHARD)
    split = write_split(scratch / "resume", shards, SHARD, sparse=True)
    source = ResidentSource("data", split, seed=0)
    record = Verification._record(argparse.Namespace(_cache=scratch / "cache" / "verified"), split)
    record.parent.mkdir(parents=True, exist_ok=True)
    # as after the first use
    record.write_text(
        json.dumps({e.name: _fingerprint(split, e) for e in source.manifest.shards}),
        encoding="utf-8",
    )
    source.close()
    runs = []
    for _ in range(REPEATS):
        command = [sys.executable, "-c", RESUME, json.dumps(_config(split, scratch).model_dump())]
        runs.append(
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        )
    wall, cpu, grown, peak, tokens = (statistics.median(r[i] for r in runs) for i in range(5))
    return [
        [
            f"resume: {tokens:.3g} tokens in {shards:,} shards, to the first batch: seconds",
            wall,
            cpu,
        ],
        ["resume: memory beyond the imports, MB", grown, None],
        ["resume: peak memory of the process (interpreter and torch take most), MB", peak, None],
    ]


# ---------------------------------------------------------------- other libraries


def peers(options, scratch: Path) -> list[list]:
    rows, windows = (
        [],
        np.random.default_rng(0).integers(1, 32000, (10_000, LENGTH + 1), dtype=np.uint16),
    )
    rows += peer_datasets(windows, scratch / "datasets")
    for module, measure in (("litdata", peer_litdata), ("streaming", peer_mosaic)):
        if importlib.util.find_spec(module) is None:
            rows.append([f"{module}: not installed", None, None])
        else:
            rows += measure(windows, scratch / module)
    return rows


def peer_datasets(windows: np.ndarray, directory: Path) -> list[list]:
    """Stream from parquet in file order, which `datasets` resumes exactly, as arrays.

    Resume is to the first row.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory.mkdir(parents=True)
    for part in range(4):
        column = pa.FixedSizeListArray.from_arrays(pa.array(windows[part::4].ravel()), LENGTH + 1)
        pq.write_table(
            pa.table({"tokens": column}), directory / f"{part}.parquet", row_group_size=500
        )

    def load():
        return datasets.load_dataset(
            "parquet", data_files=f"{directory}/*.parquet", split="train", streaming=True
        ).with_format("numpy")

    def work() -> int:
        return sum(len(row["tokens"]) - 1 for row in load())

    work()
    rates = medians([timed(work) for _ in range(REPEATS)])
    stream = load()
    for _, _ in zip(range(len(windows) // 2), stream):
        pass
    state, began = stream.state_dict(), time.perf_counter()
    fresh = load()
    fresh.load_state_dict(state)
    next(iter(fresh))
    seconds = time.perf_counter() - began
    name = f"datasets {datasets.__version__} streaming, parquet, in order (no shuffle)"
    return [
        [f"read: {name}", *(r / 1e6 for r in rates)],
        [f"resume: {name}, 2e7 tokens: seconds", seconds, None],
    ]


def peer_litdata(windows: np.ndarray, directory: Path) -> list[list]:
    import litdata
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(directory), chunk_bytes=1 << 26)
    for i, row in enumerate(windows):
        writer[i] = {"tokens": row.astype(np.int32)}
    writer.done()
    writer.merge(1)
    dataset = litdata.StreamingDataset(str(directory), shuffle=True, seed=0)

    def work() -> int:
        return sum(len(row["tokens"]) - 1 for row in dataset)

    work()
    rates = medians([timed(work) for _ in range(REPEATS)])
    return [
        [
            f"read: litdata {litdata.__version__} StreamingDataset, shuffled",
            *(r / 1e6 for r in rates),
        ]
    ]


def peer_mosaic(windows: np.ndarray, directory: Path) -> list[list]:
    import streaming

    with streaming.MDSWriter(
        out=str(directory), columns={"tokens": f"ndarray:uint16:{LENGTH + 1}"}
    ) as writer:
        for row in windows:
            writer.write({"tokens": row})
    dataset = streaming.StreamingDataset(local=str(directory), shuffle=True, batch_size=8)

    def work() -> int:
        return sum(len(row["tokens"]) - 1 for row in dataset)

    work()
    rates = medians([timed(work) for _ in range(REPEATS)])
    return [
        [
            f"read: mosaicml-streaming {streaming.__version__} MDS, shuffled",
            *(r / 1e6 for r in rates),
        ]
    ]


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        rows = []
        for part in (tokenise, read, resume):
            if part.__name__ not in options.skip:
                rows += part(options, Path(scratch))
        if options.peers:
            rows += peers(options, Path(scratch) / "peers")
    print(
        markdown(
            ["what (M tokens/s unless it says otherwise)", "wall clock", "per second of CPU"], rows
        )
    )
