"""The JSON lines that a run leaves: metrics and ledger."""

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from pdn.errors import ConfigError, StorageError
from pdn.store.local import open_to_write, read_regular, storage_errors, write_durably


class JsonLines:
    """Appends JSON records to a file in order of ``step``.

    Opens lazily; written by one process.

    Raises:
        StorageError: writing failed (free space or errno named), the file was removed, or a line is
            damaged.
    """

    def __init__(self, file: Path):
        self.file = file
        self._fd: int | None = None
        self._sha: hashlib._Hash | None = None

    def append(self, record: dict) -> None:
        if not isinstance(record.get("step"), int):
            raise ValueError(f"record {record}: expected an integer 'step'")
        line = (
            json.dumps({key: _json_value(value) for key, value in record.items()}, allow_nan=False)
            + "\n"
        )
        with storage_errors(self.file):
            if self._fd is None:
                self._fd = open_to_write(self.file, os.O_APPEND)
            # An unlinked file accepts writes for ever; nobody would find them.
            if os.fstat(self._fd).st_nlink == 0:
                raise FileNotFoundError(
                    errno.ENOENT, "removed while the run was writing to it", str(self.file)
                )
            data = line.encode()
            written = os.write(self._fd, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, "short write", str(self.file))
        if self._sha is not None:
            self._sha.update(data)

    def digest(self) -> str:
        """Return the SHA-256 of the file as written so far; read once, then kept up to date."""
        if self._sha is None:
            self._sha = hashlib.sha256(read_regular(self.file) or b"")
        return self._sha.hexdigest()

    def records(self) -> Iterator[tuple[int, dict]]:
        """Yield each whole line after the number of bytes up to its end; stop before a torn one."""
        content, end = read_regular(self.file) or b"", 0
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                if not isinstance(record["step"], int):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise StorageError(
                    "LOG-DAMAGED",
                    f"{self.file}:{number}: not a JSON record with a step; delete from this line "
                    "on",
                ) from None
            end += len(line)
            yield end, record

    def truncate(self, step: int) -> dict | None:
        """Drop the records of later steps, and a torn line; return the last record that stays.

        What came late of an earlier step, such as an evaluation of its checkpoint, stays.
        """
        content, start, last, self._sha = read_regular(self.file) or b"", 0, None, None
        kept = []
        try:
            for end, record in self.records():
                if record["step"] <= step:
                    kept.append(content[start:end])
                    last = record
                start = end
        except StorageError:
            if start == sum(map(len, kept)):  # not among what is dropped
                raise
        left = b"".join(kept)
        with storage_errors(self.file):
            if not content.startswith(left):
                self.close()  # the file gets another inode
                write_durably(self.file, left)
            elif self.file.exists() and self.file.stat().st_size != len(left):
                os.truncate(self.file, len(left))
        return last

    def sync(self) -> None:
        if self._fd is not None:
            with storage_errors(self.file):
                os.fsync(self._fd)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _json_value(value: object) -> object:
    """Turn NaN and infinity, which JSON lacks, into ``"nan"``, ``"inf"`` and ``"-inf"``.

    ``float()`` reads them back.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


COUNTS = ("tokens", "step_seconds", "data_seconds")  # of metrics.jsonl, never negative or NaN


def read_lines(file: Path) -> list[dict]:
    """Return the JSON objects in the lines of a file; none if it is missing.

    A line that a kill cut, or that is damaged, is passed over.

    Raises:
        StorageError: it cannot be read.
    """
    records = []
    for line in (read_regular(file) or b"").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and _is_count(record.get("step", 0)):
                records.append(record)
    return records


def read_object(file: Path) -> dict:
    """Return the JSON object that a file holds; an empty one if it is missing or damaged.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        found = json.loads(read_regular(file) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 63


def _is_metric(key: str, value: object) -> bool:
    if key == "step":
        return _is_count(value)
    if key in COUNTS:
        return isinstance(value, int | float) and 0 <= value < 1 << 63
    if isinstance(value, int):  # no larger than a float
        return abs(value) < 1 << 1000
    return value is None or isinstance(value, float | str)


def read_metrics(run: Path) -> list[dict]:
    """Return the records of a run's metrics.jsonl.

    Raises:
        ConfigError: there is none, or it holds nothing.
    """
    file = Path(run) / "metrics.jsonl"
    content = read_regular(file)
    if content is None:
        raise ConfigError(
            "METRICS",
            f"{file}: No such file or directory; expected the directory of a run, such as "
            "runs/<name>",
        )
    lines = content.decode("utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "step" not in record:
                raise ValueError
            if not all(_is_metric(key, value) for key, value in record.items()):
                raise ValueError
            records.append(record)
        except (ValueError, RecursionError):
            if number < len(lines):  # the last line of a killed run may be cut
                raise ConfigError(
                    "METRICS",
                    f"{file}, line {number}: no JSON record of numbers with a step: {line[:60]!r}; "
                    "remove that line",
                ) from None
    if not records:
        raise ConfigError("METRICS", f"{file}: no records yet; expected a run that has trained")
    return records


def recorded_exit_code(directory: Path, started: float, returned: int) -> int:
    """Return the exit code that the run left in ``status.json``.

    torchrun turns every failure into 1.

    Args:
        directory: of the run.
        started: time of the launch; an older ``status.json`` does not count.
        returned: the process's own exit code, taken if it is 0 or the run left none.
    """
    try:
        status = json.loads((directory / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return returned
    if returned != 0 and status["time"] >= started and status["exit_code"]:
        return status["exit_code"]
    return returned
