"""What every reader of rows keeps to: how long one may be, and what is said of a bad one."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import Any

from pdn.data.files import data_storage_error
from pdn.data.zstd import LONGEST_WINDOW
from pdn.errors import DataError

LONGEST_ROW = 1 << 25
"""Bytes of a line or value. Parsed, a row of this size takes some 300 MB in the worst case."""
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
SET_FIELD = "set data.text_field, or --text-field"


class BadRow(DataError):
    """Tells that one row cannot be used; the rows after it may be good."""


def printable(path: Path | str) -> str:
    """Return a path as UTF-8 text in one line, whatever bytes its name has."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Reading:
    """Turns what reading a file raises into a `DataError` that names the file."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0

    def __enter__(self) -> Reading:
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
                "its permissions",
            ) from error
        if isinstance(error, OSError):
            raise data_storage_error(error, name, "reading") from error


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
        return too_long(source, where, field, len(value), "characters")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return BadRow(
                "DATA-ENCODING",
                f"{source}: {where}: {field!r}, character {error.start}: "
                f"\\u{ord(value[error.start]):04x}, half of a pair; expected text: mend the row",
            )
    return value


def too_long(source: str, where: str, field: str, size: int, unit: str) -> BadRow:
    """Return what is said of a row of ``size`` characters or bytes; ``unit`` says which."""
    return BadRow(
        "DATA-LIMIT",
        f"{source}: {where}: {field!r} has {size:,} {unit}, expected at most {LONGEST_ROW:,}; "
        "split the document, or leave such rows out with data.on_bad_row=skip (--on-bad-row skip)",
    )
