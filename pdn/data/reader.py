"""Read windows of tokens from shards, at any position of the concatenated stream, without a scan.

`os.preadv` and not a memory map: the speed from the page cache is the same; a shard that is
truncated while training runs gives a short read, which names the shard and the offset, where a
memory map would kill the process with SIGBUS; and the interpreter's lock is free while a slow disk
or file server answers.
"""

from __future__ import annotations

import os
import resource
import stat
import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

from pdn.data.shards import Manifest, ShardEntry, check_header
from pdn.errors import DataError, DataStorageError

RECHECK_SECONDS = 5.0
RESTORE = "restore the file from a copy, or prepare the data again"


class _Open:
    """Holds an open shard, and when its file was last looked at."""

    __slots__ = ("checked", "fd")

    def __init__(self, fd: int):
        self.fd, self.checked = fd, time.monotonic()

    def __del__(self, close=os.close):  # bound here, as `os` may be gone when the interpreter ends
        close(self.fd)


def file_identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


class ShardReader:
    """Reads the concatenated token stream of one split. Thread-safe.

    A shard is the same file, unchanged, for as long as a reader lives: from `check_files` on, or
    else from its first use.

    Args:
        directory: of the shards.
        manifest: as read from it.
    """

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory = directory
        self._files: OrderedDict[int, _Open] = OrderedDict()
        self._identities: dict[int, tuple[int, int, int]] = {}
        self._used: set[int] = set()
        self._lock = threading.Lock()
        self._limit = max(16, min(2048, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self.extend(manifest)

    def extend(self, manifest: Manifest) -> None:
        """Take over a manifest that continues the present one."""
        self.manifest = manifest
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.offsets = np.concatenate(
            [[0], np.cumsum([s.tokens for s in manifest.shards], dtype=np.int64)]
        ).astype(np.int64)
        """Global token offset at which each shard starts, and the total."""

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    def check_files(self) -> None:
        """Refuse missing, unreadable or wrongly sized files, before anything is read.

        It reads 48 bytes a shard, no tokens.
        """
        for number, entry in enumerate(self.manifest.shards):
            self._identities[number] = file_identity(self._check_size(entry))
            check_header(f"{self.directory}/{entry.name}.idx", entry, self.dtype.itemsize)

    def check_unchanged(self) -> None:
        """Refuse a shard that was read since the last call and is not the file that it was.

        A read looks only every `RECHECK_SECONDS` and before it takes the tokens; what must not
        depend on changed ones calls this first.

        Raises:
            DataError: one was truncated, replaced, deleted or written to.
        """
        with self._lock:
            used, self._used = self._used, set()
        for number in sorted(used):
            self._require_same(number, file_identity(self._check_size(self._entry(number))))

    def _entry(self, number: int) -> ShardEntry:
        return self.manifest.shards[number]

    def _require_same(self, number: int, found: tuple[int, int, int]) -> None:
        before = self._identities.setdefault(number, found)
        if found != before:
            raise DataError(
                "SHARD-CHANGED",
                f"{self.directory / self._entry(number).name}.bin: changed while in use: size, "
                f"mtime (ns), inode were {before}, are {found}; any offset of it may differ; "
                f"{RESTORE}, then start again: the run resumes from its last checkpoint",
            )

    def _check_size(self, entry: ShardEntry) -> os.stat_result:
        path = f"{self.directory}/{entry.name}.bin"
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            raise DataError(
                "SHARD-MISSING", f"{path}: missing; expected {entry.tokens} tokens; {RESTORE}"
            ) from None
        except OSError as error:
            raise DataError(
                "SHARD-UNREADABLE",
                f"{path}: {error.strerror}; expected a readable file; fix its permissions",
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(
                "SHARD-PATH",
                f"{path}: not a regular file (a link could leave the directory): refused; copy the "
                "shard itself there",
            )
        expected = entry.tokens * self.dtype.itemsize
        if status.st_size != expected:
            odd = ", not a whole number of tokens" if status.st_size % self.dtype.itemsize else ""
            empty = "empty" if status.st_size == 0 else f"{status.st_size} bytes{odd}"
            raise DataError(
                "SHARD-SIZE",
                f"{path}: {empty}, expected {expected} bytes ({entry.tokens} tokens of "
                f"{self.dtype.itemsize} bytes); first difference at byte "
                f"{min(status.st_size, expected)}; {RESTORE}",
            )
        if not os.access(path, os.R_OK):
            raise DataError(
                "SHARD-UNREADABLE",
                f"{path}: permission denied; expected a readable file; fix its permissions",
            )
        return status

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the tokens [len(starts), length] in the shards' dtype.

        Row i begins at global token offset `starts[i]`.

        Raises:
            DataError: a shard was truncated, replaced or deleted since it was opened, or holds an
                id outside the vocabulary.
            DataStorageError: the read failed.
        """
        rows = np.empty((len(starts), length), dtype=self.dtype)
        shards = np.searchsorted(self.offsets, starts, side="right") - 1
        local = (starts - self.offsets[shards]).tolist()
        inside = (starts + length <= self.offsets[shards + 1]).tolist()
        view = rows.view(np.uint8).reshape(-1).data
        row_bytes, itemsize = length * self.dtype.itemsize, self.dtype.itemsize
        files: dict[int, _Open] = {}
        for i, shard in enumerate(shards.tolist()):
            target = view[i * row_bytes : (i + 1) * row_bytes]
            if inside[i]:
                file = files.get(shard) or files.setdefault(shard, self._file(shard))
                if os.preadv(file.fd, [target], local[i] * itemsize) != row_bytes:
                    self._read_part(shard, local[i] * itemsize, target)
            else:
                self._read_across(shard, local[i] * itemsize, target)
        if rows.size and int(rows.max()) >= self.manifest.vocab_size:
            self._refuse_id(rows, starts)
        return rows

    def _read_across(self, shard: int, offset: int, target: memoryview) -> None:
        """Fill `target` from byte `offset` of `shard` on, going on in the following shards."""
        while len(target):
            size = self.manifest.shards[shard].tokens * self.dtype.itemsize
            part = target[: min(len(target), size - offset)]
            self._read_part(shard, offset, part)
            target, shard, offset = target[len(part) :], shard + 1, 0

    def _read_part(self, shard: int, offset: int, target: memoryview) -> None:
        path = self.directory / f"{self.manifest.shards[shard].name}.bin"
        file, done = self._file(shard), 0
        while done < len(target):
            try:
                got = os.preadv(file.fd, [target[done:]], offset + done)
            except OSError as error:
                raise DataStorageError(
                    "DATA-IO",
                    f"{path}: reading at byte {offset + done} failed: {error.strerror}; check the "
                    "disk or mount",
                ) from error
            if got == 0:
                raise DataError(
                    "SHARD-SIZE",
                    f"{path}: ends at byte {offset + done}, expected {len(target) - done} bytes "
                    f"more; {RESTORE}",
                )
            done += got

    def _file(self, shard: int) -> _Open:
        with self._lock:
            self._used.add(shard)
            file = self._files.get(shard)
            if file is None:
                file = self._open(shard)
                if len(self._files) >= self._limit:
                    self._files.popitem(last=False)
                self._files[shard] = file
            else:
                self._files.move_to_end(shard)
        if time.monotonic() - file.checked > RECHECK_SECONDS:
            self._require_same(shard, file_identity(self._check_size(self._entry(shard))))
            file.checked = time.monotonic()
        return file

    def _open(self, shard: int) -> _Open:
        entry = self.manifest.shards[shard]
        self._check_size(entry)
        path = self.directory / f"{entry.name}.bin"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise DataError(
                "SHARD-UNREADABLE",
                f"{path}: {error.strerror}; expected a readable file; fix its permissions",
            ) from error
        file = _Open(fd)  # closes it, whatever follows
        self._require_same(shard, file_identity(os.fstat(fd)))
        return file

    def _refuse_id(self, rows: np.ndarray, starts: np.ndarray) -> None:
        i, j = (int(x[0]) for x in np.nonzero(rows >= self.manifest.vocab_size))
        position = int(starts[i]) + j
        shard = int(np.searchsorted(self.offsets, position, side="right")) - 1
        offset = position - int(self.offsets[shard])
        raise DataError(
            "SHARD-TOKEN",
            f"{self.directory / self.manifest.shards[shard].name}.bin: id {int(rows[i, j])} at "
            f"token {offset} (byte {offset * self.dtype.itemsize}), expected ids below vocab_size "
            f"{self.manifest.vocab_size}; {RESTORE}",
        )

    def close(self) -> None:
        """Close the files, and forget what they were: each may be another one when it is read."""
        with self._lock:
            self._files.clear()
            self._identities.clear()
            self._used.clear()
