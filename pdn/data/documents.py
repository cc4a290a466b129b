"""Sources of documents: local files in a fixed order, the standard library, a hub dataset. A cursor
names each position.

A source yields batches, each with the cursor of its start; a cursor is a small JSON value, and
opening a source at it gives the same documents again. Documents without text are left out
everywhere.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from pdn.errors import DataError, DataStorageError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt.gz", ".txt.zst")
BATCH_CHARACTERS = 1 << 18
BATCH_DOCUMENTS = 256
LONGEST_TEXT = 1 << 20
READ_FAULTS = (OSError, EOFError)


@dataclasses.dataclass(frozen=True)
class Batch:
    cursor: dict[str, Any]
    """Where the batch begins."""
    texts: list[str]
    fraction: float | None
    """Share of the source that lies before the batch, 0 to 1, if known."""


class Source(Protocol):
    def identity(self) -> dict[str, Any]:
        """What the documents depend on, as JSON."""

    def batches(self, cursor: dict[str, Any] | None) -> Iterator[Batch]:
        """Batches from `cursor` (None: the start) on."""


class Files:
    """Documents of local files: one a file (.txt), a line (.jsonl) or a row (.parquet), also .gz
    and .zst.

    A .txt file of more than a million bytes is cut at line ends into documents of about that size:
    no sample is so long, and a corpus in one file can be read, split and tokenised piece by piece.

    Args:
        root: directory that the names in cursors and messages are relative to.
        files: in reading order.
        text_field: key or column of the text in .jsonl and .parquet.
        label: what the source is called in manifests.
    """

    def __init__(self, root: Path, files: list[Path], text_field: str, label: str):
        self.root, self.files, self.text_field, self.label = root, files, text_field, label
        self._sizes = [f.stat().st_size for f in files]

    def identity(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for file, size in zip(self.files, self._sizes):
            name = os.path.relpath(file, self.root)
            listing.update(f"{name}\0{size}\0{file.stat().st_mtime_ns}\n".encode())
        return {
            "kind": "files",
            "name": self.label,
            "files": len(self.files),
            "bytes": sum(self._sizes),
            "listing": listing.hexdigest(),
            "text_field": self.text_field,
        }

    def batches(self, cursor: dict[str, Any] | None) -> Iterator[Batch]:
        start = cursor or {"file": 0, "row": 0}
        before = sum(self._sizes[: start["file"]])
        total = max(1, sum(self._sizes))
        pending: list[str] = []
        characters, begin = 0, dict(start)
        for number in range(start["file"], len(self.files)):
            skip = start["row"] if number == start["file"] else 0
            for row, text in enumerate(self._rows(self.files[number])):
                if row < skip:
                    continue
                if not pending:
                    begin = {"file": number, "row": row}
                if text:
                    pending.append(text)
                    characters += len(text)
                if characters >= BATCH_CHARACTERS or len(pending) >= BATCH_DOCUMENTS:
                    yield Batch(begin, pending, before / total)
                    pending, characters = [], 0
            before += self._sizes[number]
        if pending:
            yield Batch(begin, pending, before / total)

    def _rows(self, path: Path) -> Iterator[str]:
        if path.suffix == ".parquet":
            yield from _parquet(path, self.text_field)
        elif path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            yield from _jsonl(path, self.text_field)
        else:
            yield from _text_parts(path)


def discover(path: str, text_field: str) -> Files:
    """The files at `path`: itself, or all below it with a known suffix, sorted by name.

    Raises:
        DataError: missing, unreadable or empty.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return Files(root.parent, [_checked(root)], text_field, root.name)
    if not root.is_dir():
        raise DataError(
            "DATA-MISSING",
            f"{root}: no such file or directory; expected text (one of {', '.join(SUFFIXES)}); "
            "check the path",
        )
    files = sorted(
        (f for f in root.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file()),
        key=lambda f: f.relative_to(root).as_posix(),
    )
    if not files:
        others = sorted({f.suffix or f.name for f in root.rglob("*") if f.is_file()})[:5]
        raise DataError(
            "DATA-EMPTY",
            f"{root}: no file named {', '.join('*' + s for s in SUFFIXES)}; found "
            f"{others or 'nothing'}; check the path",
        )
    return Files(root, [_checked(f) for f in files], text_field, root.name)


def _checked(path: Path) -> Path:
    if not path.name.endswith(SUFFIXES):
        raise DataError(
            "DATA-FORMAT",
            f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}; convert or "
            "rename it",
        )
    if not os.access(path, os.R_OK):
        raise DataError(
            "DATA-UNREADABLE",
            f"{path}: permission denied; expected a readable file; fix its permissions",
        )
    if path.stat().st_size == 0:
        raise DataError(
            "DATA-EMPTY", f"{path}: empty (0 bytes); expected text; restore or remove it"
        )
    return path


def standard_library(max_bytes: int) -> Files:
    """The sources, docstrings included, of Python's standard library: text that every machine has.
    Without its tests, and without its codecs, which are tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "__pycache__",
    }
    files, total = [], 0
    for path in sorted(root.rglob("*.py"), key=lambda f: f.relative_to(root).as_posix()):
        size = path.stat().st_size
        if size and not left_out & set(path.relative_to(root).parts) and total + size <= max_bytes:
            files.append(path)
            total += size
    if not files:
        raise DataError(
            "DATA-EMPTY",
            f"{root}: this Python has no standard library sources; give data.path, a directory of "
            "text",
        )
    return Files(root, files, "text", f"python-{sysconfig.get_python_version()}-stdlib")


def _open(path: Path) -> io.BufferedIOBase:
    raw = open(path, "rb")  # noqa: SIM115 (the reader that takes it over closes it)
    head = raw.read(4)
    raw.seek(0)
    for suffix, magic, opener in (
        (".gz", b"\x1f\x8b", gzip.open),
        (".zst", b"\x28\xb5\x2f\xfd", _zstd),
    ):
        if path.name.endswith(suffix):
            if not head.startswith(magic):
                raw.close()
                raise DataError(
                    "DATA-COMPRESSION",
                    f"{path}: offset 0: bytes {head.hex()}, expected {magic.hex()} ({suffix}); "
                    "rename or compress it again",
                )
            return opener(raw)
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        raw.close()
        raise DataError(
            "DATA-COMPRESSION",
            f"{path}: offset 0: compressed ({head.hex()}), but its name does not say so; add .gz "
            "or .zst to it",
        )
    return raw


def _zstd(raw: io.BufferedIOBase) -> io.BufferedReader:
    return io.BufferedReader(_ZstdFrames(raw), 1 << 20)


class _ZstdFrames(io.RawIOBase):
    """Decompressed zstd frames; raises EOFError in a truncated one, which `zstandard`'s own reader
    takes for the end.
    """

    def __init__(self, raw: io.BufferedIOBase):
        import zstandard

        self._raw, self._new = raw, zstandard.ZstdDecompressor().decompressobj
        self._frame, self._rest, self._out = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        while not self._out:
            compressed = self._rest or self._raw.read(1 << 16)
            self._rest = b""
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            self._frame = self._frame or self._new()
            self._out = self._frame.decompress(compressed)
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        part = self._out[: len(target)]
        target[: len(part)] = part
        self._out = self._out[len(part) :]
        return len(part)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _lines(path: Path) -> Iterator[bytes]:
    import zlib

    import zstandard

    at = 0
    try:
        with _open(path) as f:
            for line in f:
                at += len(line)
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(
            "DATA-COMPRESSION",
            f"{path}: damaged after {at} uncompressed bytes ({error}); restore it from its source",
        ) from error


def _decode(path: Path, content: bytes, *, line: int | None = None, start: int = 0) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = (
            f"byte {start + error.start}" if line is None else f"line {line}, byte {error.start}"
        )
        raise DataError(
            "DATA-ENCODING",
            f"{path}: {where}: 0x{content[error.start]:02x}, expected UTF-8; convert the file to "
            "UTF-8",
        ) from None


def _text_parts(path: Path) -> Iterator[str]:
    lines, size, before = [], 0, 0
    for line in _lines(path):
        if size and size + len(line) > LONGEST_TEXT:
            yield _decode(path, b"".join(lines), start=before)
            lines, size, before = [], 0, before + size
        lines.append(line)
        size += len(line)
    yield _decode(path, b"".join(lines), start=before)


def _jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        text = _decode(path, line, line=number)
        if not text.strip():
            yield ""
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                "DATA-JSON",
                f"{path}: line {number}: not JSON ({error}); expected one object a line; mend or "
                "remove the line",
            ) from None
        if not isinstance(row, dict) or field not in row:
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                "DATA-FIELD",
                f"{path}: line {number}: no field {field!r}; found {found}; set data.text_field, "
                "or --text-field, to one of them",
            )
        yield _text(row[field], path, f"line {number}", field)


def _text(value: Any, path: Path | str, where: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            "DATA-FIELD",
            f"{path}: {where}: {field!r} is {type(value).__name__}, expected a string; set "
            "data.text_field, or --text-field",
        )
    return value


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                found = file.schema_arrow.names
                raise DataError(
                    "DATA-FIELD",
                    f"{path}: no column {field!r}; found {found}; set data.text_field, or "
                    "--text-field, to one of them",
                )
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _text(value, path, f"row {row}", field)
                    row += 1
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            "DATA-FORMAT",
            f"{path}: not a readable parquet file ({error}); restore it from its source",
        ) from error


class Hub:
    """A dataset on the Hugging Face hub, read in its own order without downloading it whole.

    The cursor is the state of `datasets`' iterator, which is exact as long as no shuffle buffer is
    used.

    Args:
        load: makes the iterable dataset; called again after a failure.
        label, revision, split, text_field: what is read.
    """

    def __init__(
        self, load: Callable[[], Any], label: str, revision: str, split: str, text_field: str
    ):
        self._load, self.label, self.revision, self.split, self.text_field = (
            load,
            label,
            revision,
            split,
            text_field,
        )

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "hub",
            "name": self.label,
            "revision": self.revision,
            "split": self.split,
            "text_field": self.text_field,
        }

    def batches(self, cursor: dict[str, Any] | None) -> Iterator[Batch]:
        dataset = self._load()
        if cursor is not None:
            dataset.load_state_dict(json.loads(cursor["state"]))
        begin, pending, characters = cursor or {"state": json.dumps(dataset.state_dict())}, [], 0
        for row in dataset:
            if self.text_field not in row:
                raise DataError(
                    "DATA-FIELD",
                    f"{self.label}: no field {self.text_field!r}; found {sorted(row)}; set "
                    "data.text_field, or --text-field, to "
                    "one of them",
                )
            text = _text(row[self.text_field], self.label, "a row", self.text_field)
            if text:
                pending.append(text)
                characters += len(text)
            if characters >= BATCH_CHARACTERS or len(pending) >= BATCH_DOCUMENTS:
                yield Batch(begin, pending, None)
                begin, pending, characters = {"state": json.dumps(dataset.state_dict())}, [], 0
        if pending:
            yield Batch(begin, pending, None)


def hub(name: str, config: str | None, revision: str, split: str, text_field: str) -> Hub:
    """A hub dataset at a pinned revision; `HF_TOKEN` is read from the environment by the hub's
    client.
    """

    def load():
        import datasets

        try:
            return datasets.load_dataset(
                name, config, split=split, revision=revision, streaming=True
            )
        except (ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            raise DataError(
                "HUB-DATASET",
                f"{name}@{revision} split {split!r}: {error}; check dataset, revision, split and "
                "HF_TOKEN",
            ) from error
        except (OSError, ConnectionError) as error:
            raise DataStorageError(
                "HUB-UNREACHABLE",
                f"{name}: the hub cannot be reached ({type(error).__name__}: {error})",
            ) from error

    return Hub(load, f"{name}/{config}" if config else name, revision, split, text_field)
