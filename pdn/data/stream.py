"""`kind: stream`, the reading side: windows of shards that are still being written.

A block is `block_shards` consecutive shards; its windows are the ones that end in it; they are
permuted among themselves. So a sample's place is a pure function of (seed, epoch, index) once its
block is published, and only the wait for that depends on time. Shards that were evicted are written
again on demand.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pdn.data import files
from pdn.data.config import StreamSource
from pdn.data.history import Cut
from pdn.data.locate import located
from pdn.data.order import permute
from pdn.data.reader import ShardReader, file_identity
from pdn.data.shards import MANIFEST, read_manifest
from pdn.data.stream_prepare import (
    Prepared,
    require_rest,
    resolve,
    validates_on_its_own,
    wider_split,
)
from pdn.data.stream_tokeniser import READERS, SPEC, TokeniserProcess
from pdn.errors import DataError, DataStorageError
from pdn.wording import Tell

POLL_SECONDS = 0.05
PAUSED_SECONDS = 30.0


class StreamingSource:
    """Gives windows of a stream. See `pdn.data.sources.WindowSource`.

    Args:
        name: of the source in the mixture.
        config: the stream.
        cache_dir: where the node's processes share the shards.
        seed: of the run.
        timeout_seconds: longest wait for a block without any progress of the tokeniser.
        tell: called with lines for the user.
        seq_len: tokens of a sample, of which a validation set has a certain number.
        recorded: source, revision and split in the fingerprint of a run that is continued.
    """

    def __init__(
        self,
        name: str,
        config: StreamSource,
        cache_dir: Path,
        seed: int,
        timeout_seconds: float,
        tell: Tell,
        seq_len: int = 1,
        recorded: tuple[str, str, str | None] | None = None,
    ):
        config = located(config, cache_dir, tell, recorded and recorded[:2])
        prepared, self.split = None, recorded and recorded[2]
        if recorded is None:
            prepared = resolve(config, cache_dir, tell)
            self.split = wider_split(prepared, config, seq_len, tell)
        if self.split is not None:
            documents = int(self.split.split()[0])
            config = config.model_copy(update={"validation_documents": documents})
            prepared = None
        prepared = prepared or resolve(config, cache_dir, tell)
        self.name, self._config, self._timeout, self._tell = name, config, timeout_seconds, tell
        self._root, self.directory, self.validation = (
            prepared.root,
            prepared.root / "train",
            prepared.validation,
        )
        self._plan_identity = {**prepared.source.identity(), "plan": prepared.plan.identity()}
        self._key = f"{seed}/{name}"
        self.note = prepared.source.describe()
        self.last_progress = 0.0
        self._guard = threading.RLock()
        self._tokeniser = TokeniserProcess(self._root)
        self._registration: int | None = None
        self._block = (0, -1)
        self._manifest_file: tuple[int, int, int] | None = None
        self._opened_reader: ShardReader | None = None
        spec = {
            "config": {k: getattr(config, k) for k in StreamSource.model_fields},
            "cache_dir": str(cache_dir),
        }
        files.publish_bytes(self._root / SPEC, json.dumps(spec).encode())
        try:
            self._register(0, config.block_shards)
            self._wait("the first shard", lambda: (self.directory / MANIFEST).exists())
            self.manifest = read_manifest(self.directory)
            self._opened_reader = ShardReader(self.directory, self.manifest)
            if recorded is None and validates_on_its_own(config):
                self._require_rest(prepared, seq_len)
        except BaseException:
            self.close()
            raise

    def _require_rest(self, prepared: Prepared, seq_len: int) -> None:
        """Wait until as much is there to train on as is held out, or until the source ends.

        The tokeniser has that to do in any case, and the cache must have room for it.
        """
        assert prepared.validation is not None
        room = self._config.max_cache_bytes // 16  # tokens; a quarter of what the cap holds
        enough = min(read_manifest(prepared.validation).tokens, room)
        self._wait(
            "as much as is held out",
            lambda: self.manifest.complete or self._reader.tokens >= enough,
        )
        if self.manifest.complete:
            require_rest(prepared, self._reader.tokens, seq_len)

    @property
    def _reader(self) -> ShardReader:
        assert self._opened_reader is not None  # until the first shard is there, nobody reads
        return self._opened_reader

    def fingerprint(self) -> dict[str, object]:
        identity = json.dumps(self._plan_identity, sort_keys=True).encode()
        found: dict[str, object] = {
            "source": str(self._plan_identity.get("name")),
            "revision": str(
                self._plan_identity.get("revision") or self._plan_identity.get("listing")
            ),
            "plan": hashlib.sha256(identity).hexdigest(),
            "block_shards": self._config.block_shards,
        }
        return found if self.split is None else found | {"split": self.split}

    def count(self, seq_len: int) -> int | None:
        self._refresh()
        return max(0, self._reader.tokens - 1) // seq_len if self.manifest.complete else None

    def windows(self, samples: np.ndarray, cut: Cut) -> np.ndarray:
        epochs, blocks, starts = self._placed(samples, cut)
        out = np.empty((len(samples), cut.seq_len + 1), dtype=np.uint32)
        for epoch, block in sorted(set(zip(epochs.tolist(), blocks.tolist()))):
            mine = (epochs == epoch) & (blocks == block)
            out[mine] = self._read(epoch, block, starts[mine], cut.seq_len + 1)
        return out

    def starts(self, samples: np.ndarray, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
        epochs, _, starts = self._placed(samples, cut)
        return epochs, starts

    def _placed(self, samples: np.ndarray, cut: Cut) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the epoch, block and first token of samples; a block is one pool."""
        samples, before = cut.split(samples)
        cut = cut.of_segments
        bounds = self._published(int(samples.max()) // cut.per_unit, cut) * cut.per_unit
        total = int(bounds[-1])
        epochs, places = (
            np.divmod(samples, total)
            if self.manifest.complete
            else (np.zeros_like(samples), samples)
        )
        blocks = np.searchsorted(bounds, places, side="right") - 1
        starts = np.empty_like(places)
        for epoch, block in sorted(set(zip(epochs.tolist(), blocks.tolist()))):
            mine = (epochs == epoch) & (blocks == block)
            first, size = int(bounds[block]), int(bounds[block + 1] - bounds[block])
            window = first + permute(places[mine] - first, size, f"{self._key}/{epoch}/{block}")
            starts[mine] = window * cut.seq_len
        return epochs, blocks, starts + before

    def _published(self, unit: int, cut: Cut) -> np.ndarray:
        """Wait until a unit is published; return the first unit of each block, and the end."""
        length = cut.unit_tokens
        self._wait(f"sample {unit}", lambda: self._known(length) > unit or self.manifest.complete)
        bounds = self._block_bounds(length)
        if bounds[-1] < 1:
            raise DataError(
                "DATA-SHORT",
                f"{self._root}: the stream ended after {self._reader.tokens} tokens, shorter than "
                f"one sample of {length} + 1",
            )
        return bounds

    def pool_end(self, unit: int, cut: Cut) -> int:
        bounds = self._published(unit, cut)
        total = int(bounds[-1])
        epoch, place = divmod(unit, total) if self.manifest.complete else (0, unit)
        return epoch * total + int(bounds[np.searchsorted(bounds, place, side="right")])

    def _read(self, epoch: int, block: int, starts: np.ndarray, length: int) -> np.ndarray:
        size = self._config.block_shards
        shards = range(max(0, block * size - 1), min(len(self.manifest.shards), (block + 1) * size))
        self._enter(epoch, block)
        for attempt in range(3):
            if not self._present(shards):
                self._announce(epoch, block)
                self._wait(f"block {block}, which was evicted,", lambda: self._present(shards))
            try:
                return self._reader.read(starts, length)
            except DataError as error:
                # evicted after the look at the files: it is wanted now, so it comes back
                if error.code != "SHARD-MISSING" or attempt == 2:
                    raise
        raise AssertionError

    def _present(self, shards: range) -> bool:
        return all(
            (self.directory / f"{self.manifest.shards[s].name}.bin").exists() for s in shards
        )

    def _enter(self, epoch: int, block: int) -> None:
        with self._guard:
            if (epoch, block) > self._block:
                self._announce(epoch, block)

    def _announce(self, epoch: int, block: int) -> None:
        """Want this block, the one before, which another thread may still read, and the next."""
        with self._guard:
            self._block = (epoch, block)
            turn = epoch * len(self.manifest.shards) if self.manifest.complete else 0
            size = self._config.block_shards
            self._reader.close()  # a shard that is written again is another file
            self._register(max(0, turn + (block - 1) * size - 1), turn + (block + 2) * size)

    def _register(self, first: int, end: int) -> None:
        """Write this process's reader file: shards [first, end) are wanted now."""
        path = self._root / READERS / f"{os.uname().nodename}-{os.getpid()}-{id(self):x}.json"
        content = json.dumps({"first": first, "end": end}).encode().ljust(128)
        try:
            if self._registration is None:
                self._registration = _locked_file(path)
            os.pwrite(self._registration, content, 0)
        except OSError as error:
            raise files.data_storage_error(error, path, "writing") from error

    def _refresh(self) -> None:
        with self._guard:
            if self._opened_reader is None or self.manifest.complete:
                return
            identity = file_identity(os.stat(self.directory / MANIFEST))
            if identity != self._manifest_file:
                found = read_manifest(self.directory)
                self._reader.extend(found)
                self.manifest, self._manifest_file = found, identity

    def _block_bounds(self, seq_len: int) -> np.ndarray:
        """Return the first window of each published block, and the end: int64 [blocks + 1].

        A window belongs to the block it ends in.
        """
        size, offsets = self._config.block_shards, self._reader.offsets
        count = len(offsets) - 1
        ends = list(range(size, count + 1, size))
        if self.manifest.complete and (not ends or ends[-1] != count):
            ends.append(count)
        return (
            np.concatenate([[0], np.maximum(0, offsets[ends] - 1) // seq_len]).astype(np.int64)
            if ends
            else np.zeros(1, np.int64)
        )

    def _known(self, seq_len: int) -> int:
        return int(self._block_bounds(seq_len)[-1])

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        """Return when `ready`, keeping a tokeniser running meanwhile.

        It gives up when nothing happens for `timeout_seconds`.
        """
        self._tokeniser.look()
        if ready():
            return
        began = moved = paused = time.monotonic()
        told, seen = began, None
        while not ready():
            self._tokeniser.ensure()
            progress, status = self._tokeniser.progress(), self._tokeniser.status()
            now = time.monotonic()
            if progress != seen:
                moved, seen = now, progress
                self.last_progress = now
            if status.get("state") != "paused":
                paused = now
            self._give_up(what, now - moved, now - paused, status)
            if now - told > 10:
                told = now
                self._tell(
                    f"waiting for {what} of {self.name} ({now - began:.0f} s): "
                    f"{status.get('message', 'starting')}"
                )
            time.sleep(POLL_SECONDS)
            self._refresh()

    def _give_up(self, what: str, still: float, paused: float, status: dict[str, Any]) -> None:
        if paused > min(PAUSED_SECONDS, self._timeout):
            raise DataStorageError(
                "STREAM-CAP",
                f"{self._root}: {what} is waited for, but "
                f"data.max_cache_bytes={self._config.max_cache_bytes} leaves no room for it beside "
                "the shards in use; raise it",
            )
        if still > self._timeout:
            raise DataStorageError(
                "STREAM-STALLED",
                f"{self._root}: no progress towards {what} for {still:.0f} s "
                f"(data.timeout_seconds); the tokeniser says {status.get('message', 'nothing')!r}; "
                "check the source, then start again: it continues after the last whole shard",
            )

    def check_unchanged(self) -> None:
        try:
            self._reader.check_unchanged()
        except DataError as error:
            if error.code != "SHARD-MISSING":  # what is behind the readers may be evicted
                raise

    def close(self) -> None:
        with self._guard:
            self._tokeniser.stop()
            if self._registration is not None:
                os.close(self._registration)
                self._registration = None
            if self._opened_reader is not None:
                self._reader.close()


def _locked_file(path: Path) -> int:
    """Create and lock `path`, which shows that its reader is alive.

    The lock is free as soon as this process is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.lockf(fd, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            # another process removed it before it was locked, taking its reader for dead
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)
