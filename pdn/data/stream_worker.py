"""`kind: stream`, the writing side: one tokeniser a node.

It runs as ``python -m pdn.data.stream_worker <directory> <parent pid>``. It publishes whole shards,
each with the place in the source where it ends, so that it can be killed at any moment. It keeps
within the size cap by evicting shards that no reader needs, and writes evicted ones again when one
is wanted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pdn.data import files
from pdn.data.config import StreamSource
from pdn.data.prepare import Progress, Tokenisation
from pdn.data.shards import Manifest
from pdn.data.stream_prepare import Prepared, resolve, retrying
from pdn.data.stream_tokeniser import LOCK, READERS, SPEC, STATUS
from pdn.errors import DataError

IDLE_SECONDS = 0.05


class Reader(NamedTuple):
    first: int  # shards [first, end) are wanted now, in absolute numbers: epoch · shards + shard
    end: int


def readers(root: Path) -> list[Reader]:
    """Return the readers that are alive, removing files of dead ones, whose locks are free."""
    found = []
    for path in sorted((root / READERS).glob("*.json")):
        with contextlib.suppress(FileNotFoundError), open(path, "r+b") as f:
            try:
                fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                with contextlib.suppress(ValueError):
                    found.append(Reader(**json.loads(f.read())))
    return found


class Worker:
    """Tokenises one stream, in a process of its own.

    Args:
        prepared: the stream.
        config: its configuration.
    """

    def __init__(self, prepared: Prepared, config: StreamSource):
        self.root, self.config = prepared.root, config
        files.remove_temporary(self.root, STATUS)
        source = retrying(prepared.source, config, self.say)
        self.work = Tokenisation(
            source, prepared.root, prepared.tokenizer, prepared.plan, config.processes
        )
        self.shard_bytes = config.shard_tokens * (
            2 if self.work.train.manifest.dtype == "uint16" else 4
        )

    def say(self, message: str, state: str = "running", **more) -> None:
        status = {"state": state, "message": message, "pid": os.getpid(), **more}
        files.publish_bytes(self.root / STATUS, json.dumps(status).encode())

    def run(self) -> None:
        """Tokenise to the end of the source, then stay for evicted shards while somebody reads."""
        steps = self.work.run(self._report)
        with contextlib.closing(steps):
            self._make_room()
            for manifest in steps:
                if not manifest.complete:
                    self._make_room()
        idle = False
        while alive := readers(self.root):
            if self._rebuild_missing(alive):
                idle = False
            else:
                if not idle:
                    self.say("the whole source is tokenised", state="done")
                idle = True
                time.sleep(IDLE_SECONDS)

    def _report(self, progress: Progress) -> None:
        self.say(progress.line(), documents=progress.documents)

    @property
    def manifest(self) -> Manifest:
        return self.work.train.manifest

    def _path(self, number: int) -> Path:
        return self.work.train.directory / f"{self.manifest.shards[number].name}.bin"

    def _make_room(self) -> None:
        """Return when one more shard may be written.

        Shards behind the readers are evicted; if there is none, wait for the readers to move on.
        """
        while True:
            alive = readers(self.root)
            self._rebuild_missing(alive)
            if self._evict(alive):
                return
            self.say(
                f"paused: {self.config.max_cache_bytes} bytes of shards (data.max_cache_bytes) "
                "wait to be read",
                state="paused",
            )
            time.sleep(IDLE_SECONDS)

    def _rebuild_missing(self, alive: list[Reader]) -> bool:
        """Write the first wanted but evicted shard again; whether there was one."""
        count = len(self.manifest.shards)
        for reader in alive:
            for number in range(reader.first, reader.end):
                if (number < count or self.manifest.complete) and not self._path(
                    number % count
                ).exists():
                    self._evict(alive)
                    self.say(
                        f"writing {self._path(number % count).name} again, which was evicted",
                        documents=f"rebuild {number}",
                    )
                    self.work.rebuild(number % count)
                    return True
        return False

    def _evict(self, alive: list[Reader]) -> bool:
        """Remove shards until one more fits below the cap; whether it does."""
        present = [n for n in range(len(self.manifest.shards)) if self._path(n).exists()]
        used = sum(self._path(n).stat().st_size for n in present)
        for number in self._removable(present, alive):
            if used + self.shard_bytes <= self.config.max_cache_bytes:
                break
            used -= self._path(number).stat().st_size
            self._path(number).unlink()
        return used + self.shard_bytes <= self.config.max_cache_bytes

    def _removable(self, present: list[int], alive: list[Reader]) -> list[int]:
        """Return the shards that may go, in the order in which to remove them.

        First those behind the readers, then, once the source is read, those needed last. A resume
        from a checkpoint that needs one of them has it written again.
        """
        count = len(self.manifest.shards)
        wanted = {n % count for r in alive for n in range(r.first, r.end)} if count else set()
        start = min((r.first for r in alive), default=0)
        if not self.manifest.complete:
            return sorted(n for n in present if n < start and n not in wanted)
        return sorted((n for n in present if n not in wanted), key=lambda n: -((n - start) % count))


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def _lock(path: Path) -> Iterator[bool]:
    """Try for two seconds: whoever looks whether the lock is free holds it for a moment."""
    deadline = time.monotonic() + 2
    while True:
        with files.try_lock(path) as got:
            if got or time.monotonic() > deadline:
                yield got
                return
        time.sleep(0.02)


def require_same_source(prepared: Prepared, root: Path) -> None:
    """Refuse to work where nobody reads: the directory's name follows from the source's files."""
    if prepared.root != root:
        raise DataError(
            "STREAM-CHANGED",
            f"{prepared.source.identity()['name']}: its files are not those that {root} was begun "
            "with; expected files that stay as they are while a run reads them: restore them, or "
            "start a new run",
        )


def main(root: Path, parent: int) -> int:
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    with contextlib.contextmanager(_lock)(root / LOCK) as got:
        if not got:
            return 0
        spec = json.loads((root / SPEC).read_bytes())
        config = StreamSource.model_validate(spec["config"])
        files.publish_bytes(root / STATUS, b"{}")
        try:
            prepared = resolve(config, Path(spec["cache_dir"]), print)
            require_same_source(prepared, root)
            Worker(prepared, config).run()
        except DataError as error:
            status = {
                "state": "failed",
                "code": error.code,
                "message": error.args[0],
                "exit_code": error.exit_code,
                "time": time.time(),
            }
            files.publish_bytes(root / STATUS, json.dumps(status).encode())
            return error.exit_code
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(code)  # a hanging source's thread must not keep the process
