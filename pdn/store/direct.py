"""A new file, hashed while it is written, past the system's cache."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from pathlib import Path
from types import TracebackType

import numpy as np

PIECE_BYTES = 4 << 20  # written at a time, and hashed while it is still in the processor's cache
ALIGNMENT = mmap.PAGESIZE  # of memory, position and length of a direct write
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # of direct writes; the latter by network file systems


class HashedFile:
    """Writes a new file and computes its SHA-256 on the way.

    Bytes are gathered in a buffer of ``PIECE_BYTES`` and go to the disk without a copy in the
    system's cache (``O_DIRECT``): making that copy costs a processor two to three times what
    hashing does, and it drives out of memory what the run reads. A file system that has no direct
    writes gets ordinary ones. Large calls leave the interpreter to other threads.

    Args:
        path: of the file, which must not exist.
    """

    def __init__(self, path: Path):
        self._direct = bool(_DIRECT)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self._fd = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            # Linux creates the file before it finds that it cannot be written directly.
            if not self._direct or error.errno not in _REFUSED:
                raise
            self._direct = False
            self._fd = os.open(path, flags & ~os.O_EXCL, 0o666)
        memory = mmap.mmap(-1, PIECE_BYTES)  # begins at a page, as direct writes want it
        self._memory, self._buffer = memoryview(memory), np.frombuffer(memory, np.uint8)
        self._held = self._written = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    @property
    def position(self) -> int:
        """Return how many bytes it was given."""
        return self._written + self._held

    def write(self, data: np.ndarray) -> None:
        """Append ``data``, uint8 [N]."""
        while len(data):
            part = data[: len(self._buffer) - self._held]
            np.copyto(self._buffer[self._held : self._held + len(part)], part)
            self._held += len(part)
            data = data[len(part) :]
            if self._held == len(self._buffer):
                self._flush()

    def finish(self) -> dict:
        """Write the rest and sync; return ``{"sha256": …, "bytes": …}``."""
        self._flush()
        os.fsync(self._fd)
        return {"sha256": self._digest.hexdigest(), "bytes": self._written}

    def _flush(self) -> None:
        piece = self._memory[: self._held]
        self._write_all(piece)
        self._digest.update(piece)
        self._written += self._held
        self._held = 0

    def _write_all(self, piece: memoryview) -> None:
        while piece:
            if self._direct and len(piece) % ALIGNMENT:  # the end of the file
                self._go_through_the_cache()
            try:
                count = os.write(self._fd, piece)
            except OSError as error:
                if not self._direct or error.errno not in _REFUSED:
                    raise
                self._go_through_the_cache()  # another alignment, or none, is asked for
                continue
            piece = piece[count:]

    def _go_through_the_cache(self) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~_DIRECT)
        self._direct = False
