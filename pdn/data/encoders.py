"""Tokenising batches of documents in order: in this process, or in several.

Worker processes are plain children speaking length-prefixed bytes over their pipes: nothing of the
caller's program is imported again, nothing is pickled, a worker ends when its parent does (its
input closes), and one that is killed is started anew and given its batch again.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from pdn.data.codec import Unencodable
from pdn.data.documents import Batch
from pdn.data.tokenizer import TokenizerFile, encode
from pdn.errors import DataError, DataStorageError

ATTEMPTS = 3
OTHER_FILES = 64  # files that are open beside the pipes of the processes
FAILED = (1 << 64) - 1
"""In place of a number of tokens: what follows is why there are none."""


class Encoded(NamedTuple):
    batch: Batch
    tokens: np.ndarray  # uint32 [N]
    ends: np.ndarray  # int64 [documents]
    hashes: np.ndarray  # uint64 [documents], of the texts


def text_hashes(texts: list[str]) -> np.ndarray:
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(t.encode()) for t in texts), dtype=np.uint64, count=len(texts)
    )


def _well_formed(texts: list[str]) -> list[str]:
    """Replace lone surrogates, which JSON can hold and UTF-8 cannot, by U+FFFD."""
    try:
        "".join(texts).encode()
        return texts
    except UnicodeEncodeError:
        return [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]


class Encoders:
    """Encodes batches of texts in a pool of tokenisers.

    Args:
        tokenizer: what to encode with.
        processes: 1 encodes here, with the threads of `tokenizers`; more start that many worker
            processes.
    """

    def __init__(self, tokenizer: TokenizerFile, processes: int):
        _require_files(processes)
        self._tokenizer, self._processes = tokenizer, processes
        self._built = tokenizer.build() if processes == 1 else None
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self._workers = [self._start() for _ in range(processes)] if processes > 1 else []
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="encode")

    def run(self, batches: Iterator[Batch]) -> Iterator[Encoded]:
        """Encode `batches`, in their order, reading at most a few ahead."""
        waiting: deque[tuple[Batch, Future]] = deque()
        for batch in batches:
            waiting.append((batch, self._threads.submit(self._encode, _well_formed(batch.texts))))
            while len(waiting) > 3 * self._processes:
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())

    def _result(self, batch: Batch, future: Future) -> Encoded:
        try:
            return Encoded(batch, *future.result())
        except Unencodable as error:
            raise Unencodable(error.code, f"{batch.where(error.index)}: {error.args[0]}") from None

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._built is not None:
            return *encode(self._built, self._tokenizer.eos_id, texts), text_hashes(texts)
        worker = self._idle.get()
        for _ in range(ATTEMPTS):
            try:
                answer = _ask(worker, texts)
                break
            except Unencodable:
                self._idle.put(worker)
                raise
            except (OSError, EOFError):
                self._workers.remove(worker)
                _stop(worker)
                worker = self._start()
                self._workers.append(worker)
        else:
            self._idle.put(worker)
            raise DataStorageError(
                "TOKENISER-DIED",
                f"a tokeniser process died {ATTEMPTS} times on one batch; look for the "
                "out-of-memory killer",
            )
        self._idle.put(worker)
        return answer

    def _start(self) -> subprocess.Popen:
        root = str(Path(__file__).resolve().parents[2])
        env = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "RAYON_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        worker = subprocess.Popen(
            [sys.executable, "-m", "pdn.data.encoders", self._tokenizer.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        assert worker.stdin is not None
        with contextlib.suppress(OSError):
            worker.stdin.write(
                struct.pack("<QQ", self._tokenizer.eos_id, len(self._tokenizer.content))
                + self._tokenizer.content
            )
            worker.stdin.flush()
        return worker

    def close(self) -> None:
        for worker in list(self._workers):
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in list(self._workers):
            _stop(worker)


def _require_files(processes: int) -> None:
    """Make sure that as many pipes may be open as the processes need.

    Raises:
        DataError: the limit of open files is too low and cannot be raised.
    """
    if processes == 1:
        return
    needed = 2 * processes + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise DataError(
            "PROCESSES",
            f"{processes} tokenising processes need {needed} open files, {hard} are allowed; "
            f"expected at most {max(1, (hard - OTHER_FILES) // 2)}: lower data.processes "
            "(--processes), or raise the limit with ulimit -n",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _stop(worker: subprocess.Popen) -> None:
    assert worker.stdin is not None and worker.stdout is not None
    worker.kill()
    with contextlib.suppress(OSError):
        worker.stdin.close()
    worker.stdout.close()
    worker.wait()


def _ask(worker: subprocess.Popen, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert worker.stdin is not None and worker.stdout is not None
    encoded = [t.encode() for t in texts]
    lengths = np.array([len(e) for e in encoded], dtype="<u8")
    worker.stdin.write(struct.pack("<Q", len(encoded)) + lengths.tobytes() + b"".join(encoded))
    worker.stdin.flush()
    count = struct.unpack("<Q", _take(worker.stdout, 8))[0]
    if count == FAILED:
        size = struct.unpack("<Q", _take(worker.stdout, 8))[0]
        raise Unencodable(*json.loads(_take(worker.stdout, size)))
    tokens = np.frombuffer(_take(worker.stdout, 4 * count), dtype="<u4")
    ends = np.frombuffer(_take(worker.stdout, 8 * len(texts)), dtype="<i8")
    return tokens, ends, np.frombuffer(_take(worker.stdout, 8 * len(texts)), dtype="<u8")


def _take(stream, count: int) -> bytes:
    content = stream.read(count)
    if len(content) != count:
        raise EOFError
    return content


def _serve() -> None:
    """Run a worker: read the tokenizer, then answer batches of texts until the input closes."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    eos_id, size = struct.unpack("<QQ", _take(source, 16))
    tokenizer = TokenizerFile(sys.argv[1], _take(source, size), 0, eos_id).build()
    while head := source.read(8):
        lengths = np.frombuffer(_take(source, 8 * struct.unpack("<Q", head)[0]), dtype="<u8")
        texts = [_take(source, int(n)).decode() for n in lengths]
        try:
            tokens, ends = encode(tokenizer, eos_id, texts)
        except Unencodable as error:
            said = json.dumps([error.code, error.args[0], error.index]).encode()
            sink.write(struct.pack("<QQ", FAILED, len(said)) + said)
            sink.flush()
            continue
        sink.write(
            struct.pack("<Q", len(tokens))
            + tokens.astype("<u4").tobytes()
            + ends.astype("<i8").tobytes()
        )
        sink.write(text_hashes(texts).astype("<u8").tobytes())
        sink.flush()


if __name__ == "__main__":
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        _serve()
