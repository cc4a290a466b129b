"""One reader for each file format: what is a row of a .txt, .jsonl or .parquet file.

Corpora, validation sets and prompt files are all read here. A bad row is yielded as a `BadRow`, so
that the caller may stop or go on; a file that cannot be read raises. Memory is bounded: a `.txt` is
cut, a row of another format may have `LONGEST_ROW` bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdn.data.parquet import parquet_rows
from pdn.data.row import LONGEST_ROW, SET_FIELD, BadRow, Reading, printable, text_of
from pdn.data.zstd import open_zstd
from pdn.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt.gz", ".txt.zst")
LONGEST_TEXT = 1 << 20
BOM = b"\xef\xbb\xbf"
OTHER_ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
# Which of the first four bytes are NUL in ASCII text of another encoding, without its mark
NULS = {"0101": "UTF-16LE", "1010": "UTF-16BE", "0111": "UTF-32LE", "1110": "UTF-32BE"}


def format_of(path: Path) -> str:
    """Return which of `SUFFIXES` a name ends in, in small or capital letters, or ""."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


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
    if format_of(path) == ".parquet":
        found = parquet_rows(path, field)
    elif format_of(path).startswith(".jsonl"):
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
    if format_of(path) == ".parquet":
        yield from parquet_rows(path, field, first=share)
    elif format_of(path) in (".txt", ".jsonl"):
        with Reading(path), _open(path) as f:
            f.seek(int(share * path.stat().st_size))
            f.readline(LONGEST_ROW)  # the rest of a line
            while line := f.readline(LONGEST_TEXT):
                yield _row_of(line.decode("utf-8", "ignore"), path, field)


def _row_of(line: str, path: Path, field: str) -> str | BadRow:
    if format_of(path) == ".txt":
        return line.replace("\r\n", "\n")
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
            # Files that begin with a mark were put together here.
            text = _decode(path, line, line=number).removeprefix("\ufeff")
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
        if path.name.lower().endswith(suffix):
            skippable = suffix == ".zst" and head[1:] == b"\x2a\x4d\x18"  # as pzstd writes first
            if not (head.startswith(magic) or skippable):
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


def _skip_mark(f: Any, path: Path) -> int:
    """Read over a byte order mark; returns its length. One of another encoding is refused."""
    head = f.peek(4)[:4]
    for mark, encoding in OTHER_ENCODINGS:
        if head.startswith(mark):
            raise DataError(
                "DATA-ENCODING",
                f"{printable(path)}: byte 0: a byte order mark of {encoding}, expected UTF-8; "
                f"convert it: iconv -f {encoding} -t UTF-8",
            )
    encoding = NULS.get("".join("01"[byte == 0] for byte in head))
    if encoding is not None:
        raise DataError(
            "DATA-ENCODING",
            f"{printable(path)}: byte 0: {head.hex(' ')}, which is {encoding}, expected UTF-8; "
            f"convert it: iconv -f {encoding} -t UTF-8",
        )
    return len(f.read(len(BOM))) if head.startswith(BOM) else 0


def _lines(path: Path, longest: int) -> Iterator[bytes | BadRow]:
    """Yield lines with their ends, without a byte order mark.

    A line of more than `longest` bytes gives a `BadRow`.
    """
    with Reading(path) as reading, _open(path) as f:
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

    A line is cut only if it is longer than that. Line ends of Windows are those of the file's
    format, as its byte order mark is: the same text has the same tokens whoever saved it.
    """

    def document(content: bytes, start: int) -> str | BadRow:
        try:
            return _decode(path, content, start=start).replace("\r\n", "\n")
        except BadRow as error:
            return error

    with Reading(path) as reading, _open(path) as f:
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
    """Cut UTF-8 where its last character, or a line end of Windows, may be incomplete."""
    if content.endswith(b"\r"):
        return content[:-1], b"\r"
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
        return json.loads(
            text,
            parse_int=lambda digits: 0,
            parse_float=lambda digits: 0.0,
            object_pairs_hook=_object,
        )
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
        elif isinstance(row, _Twice) and field in row.keys_twice:
            yield BadRow(
                "DATA-FIELD",
                f"{printable(path)}: line {number}: {field!r} is there twice; expected one text; "
                "mend or remove the line",
            )
        else:
            yield text_of(row[field], printable(path), f"line {number}", field)


class _Twice(dict):
    """Marks an object that gives a key more than once, which JSON allows; the last one counts.

    ``keys_twice`` are these.
    """

    keys_twice: set[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    found = _Twice(found)
    found.keys_twice = {key for key, n in Counter(key for key, _ in pairs).items() if n > 1}
    return found
