"""Texts of a column of a parquet file, read a few at a time."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdn.data.row import LONGEST_ROW, SET_FIELD, BadRow, Reading, printable, too_long
from pdn.errors import DataError

BATCH_BYTES = 1 << 23  # bytes of a parquet column to read at once


def parquet_rows(path: Path, field: str, *, first: float = 0.0) -> Iterator[str | BadRow]:
    """Yield the texts of a column; `first` is the share of the row groups that is passed over."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, group = printable(path), None
    with Reading(path):
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise DataError("DATA-FORMAT", f"{name}: not a regular file; expected parquet")
            limits: dict[str, Any] = {
                "thrift_string_size_limit": 1 << 28,
                "thrift_container_size_limit": 1 << 26,
            }
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
                    mean = _mean_bytes(file, group, field)
                    if mean > LONGEST_ROW:  # a group of enormous rows is not read
                        for _ in range(file.metadata.row_group(group).num_rows):
                            where = f"row {row} (row group {group})"
                            yield too_long(name, where, field, mean, "bytes on the average")
                            row += 1
                        continue
                    for batch in file.iter_batches(
                        batch_size=max(1, min(1024, BATCH_BYTES // max(1, mean))),
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
    if schema.names.count(field) > 1:
        raise DataError(
            "DATA-FIELD",
            f"{name}: {schema.names.count(field)} columns {field!r}; expected one; rename the "
            "others",
        )
    kind, t = schema.field(field).type, pa.types
    if not holds_text(kind):
        texts = [f.name for f in schema if t.is_string(f.type) or t.is_large_string(f.type)]
        raise DataError(
            "DATA-FIELD",
            f"{name}: column {field!r} is {kind}, expected strings; {SET_FIELD}, to a column of "
            f"strings{f', such as {texts}' if texts else ''}",
        )


def holds_text(kind) -> bool:
    """Return whether a type of pyarrow is that of strings, or bytes, or nulls alone."""
    import pyarrow.types as t

    kind = kind.value_type if t.is_dictionary(kind) else kind
    tests = (t.is_string, t.is_large_string, t.is_string_view)
    tests += (t.is_binary, t.is_large_binary, t.is_binary_view, t.is_null)
    return any(test(kind) for test in tests)


def _mean_bytes(file, group: int, field: str) -> int:
    """Return the mean size of a column's values in a row group."""
    metadata = file.metadata.row_group(group)
    column = file.schema_arrow.names.index(field)
    for number in range(metadata.num_columns):
        if metadata.column(number).path_in_schema == field:
            column = number
    return metadata.column(column).total_uncompressed_size // max(1, metadata.num_rows)


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
            yield too_long(name, f"row {row + i}", field, value.size, "bytes")
        else:
            try:
                yield str(value, "utf-8")
            except UnicodeDecodeError as error:
                yield BadRow(
                    "DATA-ENCODING",
                    f"{name}: row {row + i}, byte {error.start} of {field!r}: "
                    f"0x{error.object[error.start]:02x}, expected UTF-8; convert the column",
                )
