"""What a run prints: on a terminal or pipe that may vanish, and in ``run.log`` with times.

The reader of a run's output (a terminal, ``tee``, a pager, a disk that fills) may go away while
training goes on. What cannot be shown is then dropped, and ``lost`` says why.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pdn.store.local import open_to_write

_KEPT_LINES = 1000  # printed before the log is opened
_lost: str | None = None


def lost() -> str | None:
    """Return why output is no longer shown; None while it is."""
    return _lost


class GuardedStream:
    """Drops what its stream cannot take, and hands whole lines to the open log.

    Everything else is that of the stream itself.
    """

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        _log.take(text)
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        global _lost
        if _lost is None:
            _lost = f"{self._name}: {error.strerror or error}; what the run prints is in run.log"
            _log.line(_lost)
        # Python flushes at its exit what is still buffered: that must not fail again.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """Guard standard output and error inside; nested uses change nothing."""
    if isinstance(sys.stdout, GuardedStream):
        yield
        return
    stdout = GuardedStream(sys.stdout, "standard output")
    stderr = GuardedStream(sys.stderr, "standard error")
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield
    finally:
        # Not what others have put there since: of a run that failed this is only reached when its
        # directory is collected, which may be in the middle of another run.
        if sys.stdout is stdout:
            sys.stdout = before[0]
        if sys.stderr is stderr:
            sys.stderr = before[1]


class _Log:
    """Keeps the lines of this process, each with its time, until a file is opened for them."""

    def __init__(self):
        self._file: TextIO | None = None
        self._kept: list[str] = []
        self._rest = ""

    def take(self, text: str) -> None:
        """Log the whole lines of what was printed; frames of a progress bar are none."""
        if "\x1b" in text or "\r" in text:
            return
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self.line(line)

    def line(self, line: str) -> None:
        if not line.strip():
            return
        self._kept.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line.rstrip()}\n")
        if self._file is None:
            del self._kept[:-_KEPT_LINES]
        else:
            self._write(self._file)

    def _write(self, file: TextIO) -> None:
        # The log is a convenience: the records are metrics.jsonl and status.json.
        with contextlib.suppress(OSError, ValueError):
            file.writelines(self._kept)
            file.flush()
        self._kept.clear()

    def open(self, file: Path) -> None:
        self.close()
        with contextlib.suppress(OSError):
            self._file = os.fdopen(
                open_to_write(file, os.O_APPEND), "a", encoding="utf-8", errors="backslashreplace"
            )
            self._write(self._file)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None


_log = _Log()
open_log, close_log, note = _log.open, _log.close, _log.line
