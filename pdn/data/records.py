"""One reader for each file format: what is a row of a .txt, .jsonl or .parquet file.

Corpora, validation sets and prompt files are all read here. A bad row is yielded as a `BadRow`, so
that the caller may stop or go on; a file that cannot be read raises. Memory is bounded: a `.txt` is
cut, a row of another format may have `LONGEST_ROW` bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdn.data.files import storage_error
from pdn.data.zstd import LONGEST_WINDOW, open_zstd
from pdn.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt.gz", ".txt.zst")
LONGEST_TEXT = 1 << 20
LONGEST_ROW = 1 << 25
"""Bytes of a line or value. Parsed, a row of this size takes some 300 MB in the worst case."""
BATCH_BYTES = 1 << 23  # bytes of a parquet column to read at once
BOM = b"\xef\xbb\xbf"
OTHER_ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
SET_FIELD = "set data.text_field, or --text-field"


class BadRow(DataError):
    """One row that cannot be used; the rows after it may be good."""


def printable(path: Path | str) -> str:
    """Return a path as UTF-8 text, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def rows(path: Path, field: str) -> Iterator[str | BadRow]:
    """Yield the texts of a file: parts of a .txt, lines of a .jsonl, rows of a .parquet.

    A row without text gives "", so that rows keep their numbers.

    Args:
        path: of a file with one of `SUFFIXES`.
        field: key or column of the text in .jsonl and .parquet.

    Raises:
        DataError: the file is damaged, of another format, or gone.
        DataStorageError: reading failed.
    """
    if path.suffix == ".parquet":
        found = _parquet(path, field)
    elif path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        found = _jsonl(path, field)
    else:
        found = _text_parts(path)
    for text in found:
        # Many documents were files once and begin with the byte order mark of that file.
        yield text.removeprefix("\ufeff") if isinstance(text, str) else text


def rows_further_on(path: Path, field: str, share: float) -> Iterator[str | BadRow]:
    """Yield the texts of a large file from a place in it on, where reading can begin there.

    Of a compressed file, and of a parquet file of one row group, it yields nothing. What is wrong
    with a row is not said with its number, which is not known here: `rows` does.

    Args:
        path: of a file with one of `SUFFIXES`.
        field: key or column of the text in .jsonl and .parquet.
        share: of the file that is passed over, above 0 and below 1.
    """
    if path.suffix == ".parquet":
        yield from _parquet(path, field, first=share)
    elif path.suffix in (".txt", ".jsonl"):
        with _Reading(path), _open(path) as f:
            f.seek(int(share * path.stat().st_size))
            f.readline(LONGEST_ROW)  # the rest of a line
            while line := f.readline(LONGEST_TEXT):
                yield _row_of(line.decode("utf-8", "ignore"), path, field)


def _row_of(line: str, path: Path, field: str) -> str | BadRow:
    if path.suffix == ".txt":
        return line
    try:
        row = _json(line, path, 0)
    except BadRow as error:
        return error
    text = row.get(field) if isinstance(row, dict) else None
    return text if isinstance(text, str) else ""


def read_whole(path: Path) -> str:
    """Return the text of a whole .txt file, compressed or not.

    Raises:
        DataError: it is not UTF-8, damaged, or gone.
    """
    parts = []
    for part in _text_parts(path):
        if isinstance(part, BadRow):
            raise part
        parts.append(part)
    return "".join(parts)


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield number, from 1, and value of each line of a .jsonl file that is not blank.

    The value is a `BadRow` if the line is no JSON.
    """
    for number, line in enumerate(_lines(path, LONGEST_ROW), 1):
        if isinstance(line, BadRow):
            yield number, line
            continue
        try:
            text = _decode(path, line, line=number)
            if text.strip():
                yield number, _json(text, path, number)
        except BadRow as error:
            yield number, error


def _open(path: Path) -> io.BufferedIOBase:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(
            "DATA-FORMAT",
            f"{printable(path)}: not a regular file; expected one that can be read again; copy "
            "its content to a file",
        )
    raw = open(path, "rb")  # noqa: SIM115 (the reader that takes it over closes it)
    head = raw.read(4)
    raw.seek(0)
    for suffix, magic, opener in (
        (".gz", b"\x1f\x8b", gzip.open),
        (".zst", b"\x28\xb5\x2f\xfd", open_zstd),
    ):
        if path.name.endswith(suffix):
            if not head.startswith(magic):
                raw.close()
                raise DataError(
                    "DATA-COMPRESSION",
                    f"{printable(path)}: offset 0: bytes {head.hex()}, expected {magic.hex()} "
                    f"({suffix}); rename or compress it again",
                )
            return opener(raw)
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        raw.close()
        raise DataError(
            "DATA-COMPRESSION",
            f"{printable(path)}: offset 0: compressed ({head.hex()}), but its name does not say "
            "so; add .gz or .zst to it",
        )
    return raw


class _Reading:
    """Turns what reading a file raises into a `DataError` that names the file."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None or isinstance(error, DataError | GeneratorExit):
            return
        import zstandard

        name = printable(self.path)
        if isinstance(error, zstandard.ZstdError) and "memory" in str(error):
            raise DataError(
                "DATA-LIMIT",
                f"{name}: its zstd frame needs a window of more than {LONGEST_WINDOW:,} bytes "
                f"({error}); compress it again without --long or --ultra",
            ) from error
        if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile | zstandard.ZstdError):
            raise DataError(
                "DATA-COMPRESSION",
                f"{name}: damaged after {self.at} uncompressed bytes ({error}); restore it from "
                "its source",
            ) from error
        if isinstance(error, GONE):
            raise DataError(
                "DATA-MISSING",
                f"{name}: {error.strerror or error}; expected a readable file; restore it or fix "
                "its "
                "permissions",
            ) from error
        if isinstance(error, OSError):
            raise storage_error(name, error, "reading") from error


def _skip_mark(f: io.BufferedIOBase, path: Path) -> int:
    """Read over a byte order mark; returns its length. One of another encoding is refused."""
    head = f.peek(4)[:4]
    for mark, encoding in OTHER_ENCODINGS:
        if head.startswith(mark):
            raise DataError(
                "DATA-ENCODING",
                f"{printable(path)}: byte 0: a byte order mark of {encoding}, expected UTF-8; "
                f"convert it: iconv -f {encoding} -t UTF-8",
            )
    return len(f.read(len(BOM))) if head.startswith(BOM) else 0


def _lines(path: Path, longest: int) -> Iterator[bytes | BadRow]:
    """Yield lines with their ends, without a byte order mark.

    A line of more than `longest` bytes gives a `BadRow`.
    """
    with _Reading(path) as reading, _open(path) as f:
        reading.at, number = _skip_mark(f, path), 0
        while line := f.readline(longest + 1):
            number += 1
            reading.at += len(line)
            if len(line) <= longest:
                yield line
                continue
            while line and not line.endswith(b"\n"):
                line = f.readline(1 << 20)
                reading.at += len(line)
            yield BadRow(
                "DATA-LIMIT",
                f"{printable(path)}: line {number}: longer than {longest:,} bytes; expected "
                "shorter rows: split the document, or leave such rows out with "
                "data.on_bad_row=skip (--on-bad-row skip)",
            )


def _decode(path: Path, content: bytes, *, line: int | None = None, start: int = 0) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = (
            f"byte {start + error.start}" if line is None else f"line {line}, byte {error.start}"
        )
        raise BadRow(
            "DATA-ENCODING",
            f"{printable(path)}: {where}: 0x{content[error.start]:02x}, expected UTF-8; convert "
            "the file to UTF-8",
        ) from None


def _text_parts(path: Path) -> Iterator[str | BadRow]:
    """Yield documents of about `LONGEST_TEXT` bytes, cut at line ends.

    A line is cut only if it is longer than that.
    """

    def document(content: bytes, start: int) -> str | BadRow:
        try:
            return _decode(path, content, start=start)
        except BadRow as error:
            return error

    with _Reading(path) as reading, _open(path) as f:
        reading.at = before = _skip_mark(f, path)
        lines, size, rest = [], 0, b""
        while more := f.readline(LONGEST_TEXT - len(rest)):
            reading.at += len(more)
            line, rest = rest + more, b""
            if len(line) == LONGEST_TEXT and not line.endswith(b"\n"):
                line, rest = _whole_characters(line)
            if size and size + len(line) > LONGEST_TEXT:
                yield document(b"".join(lines), before)
                lines, size, before = [], 0, before + size
            lines.append(line)
            size += len(line)
        yield document(b"".join([*lines, rest]), before)


def _whole_characters(content: bytes) -> tuple[bytes, bytes]:
    """Cut UTF-8 where its last character may be incomplete."""
    for back in range(1, min(4, len(content)) + 1):
        byte = content[-back]
        if byte >= 0xC0:
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return (content[:-back], content[-back:]) if wanted > back else (content, b"")
        if byte < 0x80:
            break
    return content, b""


def _json(text: str, path: Path, number: int) -> Any:
    try:
        # Numbers are not used; Python would refuse integers of more than 4,300 digits.
        return json.loads(text, parse_int=lambda digits: 0, parse_float=lambda digits: 0.0)
    except RecursionError:
        raise BadRow(
            "DATA-LIMIT",
            f"{printable(path)}: line {number}: nested more deeply than this reader follows; "
            "expected one object a line; flatten it, or leave such rows out with "
            "data.on_bad_row=skip (--on-bad-row skip)",
        ) from None
    except ValueError as error:
        raise BadRow(
            "DATA-JSON",
            f"{printable(path)}: line {number}: not JSON ({error}); expected one object a line; "
            "mend or remove the line",
        ) from None


def _jsonl(path: Path, field: str) -> Iterator[str | BadRow]:
    expected = 1
    for number, row in json_lines(path):
        for _ in range(expected, number):
            yield ""  # blank lines are rows, too
        expected = number + 1
        if isinstance(row, BadRow):
            yield row
        elif not isinstance(row, dict) or field not in row:
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            yield BadRow(
                "DATA-FIELD",
                f"{printable(path)}: line {number}: no field {field!r}; found {found}; "
                f"{SET_FIELD}, to one of them",
            )
        else:
            yield text_of(row[field], printable(path), f"line {number}", field)


def text_of(value: Any, source: str, where: str, field: str) -> str | BadRow:
    """Return the text in a row's field, "" for a null, a `BadRow` for what is no text or too long.

    Args:
        value: what the field holds.
        source, where: the file and the place in it, as messages name them.
        field: key or column of the text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        return BadRow(
            "DATA-FIELD",
            f"{source}: {where}: {field!r} is {type(value).__name__}, expected a string; "
            f"{SET_FIELD}",
        )
    if len(value) > LONGEST_ROW:
        return _too_long(source, where, field, len(value), "characters")
    return value


def _too_long(source: str, where: str, field: str, size: int, unit: str) -> BadRow:
    return BadRow(
        "DATA-LIMIT",
        f"{source}: {where}: {field!r} has {size:,} {unit}, expected at most {LONGEST_ROW:,}; "
        "split "
        "the document, or leave such rows out with data.on_bad_row=skip (--on-bad-row skip)",
    )


def _parquet(path: Path, field: str, *, first: float = 0.0) -> Iterator[str | BadRow]:
    """Yield the texts of a column; `first` is the share of the row groups that is passed over."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, group = printable(path), None
    with _Reading(path):
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise DataError("DATA-FORMAT", f"{name}: not a regular file; expected parquet")
            limits = {"thrift_string_size_limit": 1 << 28, "thrift_container_size_limit": 1 << 26}
            # Repeated values stay in their dictionary: a few bytes can stand for gigabytes.
            with pq.ParquetFile(path, **limits) as file:
                _check_column(file, name, field)
            with pq.ParquetFile(
                path, read_dictionary=[field], page_checksum_verification=True, **limits
            ) as file:
                groups = file.num_row_groups
                begin = math.ceil(first * groups)
                row = sum(file.metadata.row_group(g).num_rows for g in range(begin))
                for group in range(begin, groups):
                    for batch in file.iter_batches(
                        batch_size=_batch_rows(file, group, name, field, row),
                        row_groups=[group],
                        columns=[field],
                    ):
                        for text in _values(batch.column(0), name, field, row):
                            yield text
                            row += 1
        except pa.ArrowNotImplementedError as error:
            raise DataError(
                "DATA-LIMIT",
                f"{name}: uses what this reader cannot read ({error}); write it again, e.g. with "
                "pyarrow and its defaults",
            ) from error
        except MemoryError as error:
            raise DataError(
                "DATA-LIMIT",
                f"{name}: row group {group}: needs more memory than there is ({error}); write it "
                "again with smaller row groups",
            ) from error
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            where = "" if group is None else f"row group {group}: "
            raise DataError(
                "DATA-FORMAT",
                f"{name}: {where}not a readable parquet file ({error}); restore it from its source",
            ) from error


def _check_column(file, name: str, field: str) -> None:
    """Refuse a missing column, and one that holds no text."""
    import pyarrow as pa

    schema = file.schema_arrow
    if field not in schema.names:
        raise DataError(
            "DATA-FIELD",
            f"{name}: no column {field!r}; found {schema.names}; {SET_FIELD}, to one of them",
        )
    kind = schema.field(field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    t = pa.types
    tests = (t.is_string, t.is_large_string, t.is_string_view)
    tests += (t.is_binary, t.is_large_binary, t.is_binary_view, t.is_null)
    if not any(test(kind) for test in tests):
        texts = [f.name for f in schema if t.is_string(f.type) or t.is_large_string(f.type)]
        raise DataError(
            "DATA-FIELD",
            f"{name}: column {field!r} is {kind}, expected strings; {SET_FIELD}, to a column of "
            f"strings{f', such as {texts}' if texts else ''}",
        )


def _batch_rows(file, group: int, name: str, field: str, row: int) -> int:
    """Return how many rows to read at once, by their mean size.

    A group of enormous rows is refused before it is read.
    """
    metadata = file.metadata.row_group(group)
    column = file.schema_arrow.names.index(field)
    for number in range(metadata.num_columns):
        if metadata.column(number).path_in_schema == field:
            column = number
    chunk = metadata.column(column)
    mean = chunk.total_uncompressed_size // max(1, metadata.num_rows)
    if mean > LONGEST_ROW:
        where = f"rows {row} to {row + metadata.num_rows - 1} (row group {group})"
        error = _too_long(name, where, field, mean, "bytes each")
        raise DataError(error.code, error.args[0])
    return max(1, min(1024, BATCH_BYTES // max(1, mean)))


def _values(column, name: str, field: str, row: int) -> Iterator[str | BadRow]:
    """Yield the texts of a column of strings or bytes, decoded one by one."""
    import pyarrow as pa

    if pa.types.is_null(column.type):
        yield from [""] * len(column)
        return
    places = None
    if pa.types.is_dictionary(column.type):
        column, places = column.dictionary, column.indices
    column = column.cast(pa.large_binary())  # the bytes as they are, not yet taken for UTF-8
    for i in range(len(column if places is None else places)):
        at = i if places is None else places[i].as_py()
        value = None if at is None else column[at].as_buffer()
        if value is None:
            yield ""
        elif value.size > LONGEST_ROW:
            yield _too_long(name, f"row {row + i}", field, value.size, "bytes")
        else:
            try:
                yield str(value, "utf-8")
            except UnicodeDecodeError as error:
                yield BadRow(
                    "DATA-ENCODING",
                    f"{name}: row {row + i}, byte {error.start} of {field!r}: "
                    f"0x{error.object[error.start]:02x}, expected UTF-8; convert the column",
                )
