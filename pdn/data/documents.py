"""Sources of documents in local files: which files, in which order, and cursors into them.

A source yields batches, each with the cursor of its start; a cursor is a small JSON value, and
opening a source at it gives the same documents again. Documents without text are left out
everywhere.

Which files of a directory: all below it whose names end in one of `SUFFIXES`, in small or capital
letters, sorted by their paths in it. Links are followed, and a file is read once however many lead
to it, hard links included; a link to a directory that holds the corpus leads back to it and is left
out. What has a name that begins with a dot is left out, as are `__MACOSX` directories.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from pdn.data.files import data_storage_error
from pdn.data.records import SUFFIXES, format_of, rows, rows_further_on
from pdn.data.row import BadRow, printable
from pdn.errors import DataError
from pdn.wording import counted

BATCH_CHARACTERS = 1 << 18
BATCH_DOCUMENTS = 256
SAMPLE_CHARACTERS = 1 << 18
SAMPLE_FILES = 16
SAMPLE_DOCUMENTS = 256  # of a file
SAMPLE_PARTS = 8  # of a document, and of a large file
READ_WHOLE = 1 << 24  # bytes of a file, compressed or not
OTHER_SPLIT = re.compile(r"(valid|validation|val|dev|test|eval)(?![a-z])", re.I)


def _unnamed(index: int) -> str:
    return f"document {index} of a batch"


@dataclasses.dataclass(frozen=True)
class Batch:
    cursor: dict[str, Any]
    """Where the batch begins."""
    texts: list[str]
    fraction: float | None
    """Share of the source that lies before the batch, 0 to 1, if known."""
    bad_rows: tuple[str, ...] = ()
    """What was wrong with each row that was left out since the batch before."""
    where: Callable[[int], str] = _unnamed
    """From a text's index to its place in the source, for messages."""


class Source(Protocol):
    def identity(self) -> dict[str, Any]:
        """Return what the documents depend on, as JSON."""
        ...

    def batches(self, cursor: dict[str, Any] | None) -> Iterator[Batch]:
        """Yield batches from `cursor` (None: the start) on."""
        ...


class Files:
    """Reads documents of local files: one a file (.txt), a line (.jsonl) or a row (.parquet).

    Each may also be compressed (.gz, .zst). A .txt file of more than a million bytes is cut at line
    ends into documents of about that size: no sample is so long, and a corpus in one file can be
    read, split and tokenised piece by piece.

    Args:
        root: directory that the names in cursors and messages are relative to.
        files: in reading order.
        text_field: key or column of the text in .jsonl and .parquet.
        label: what the source is called in manifests.
        skip_bad_rows: leave out rows that cannot be used, and count them, instead of stopping.
        left_out: what else is below `root`, by kind.
    """

    def __init__(
        self,
        root: Path,
        files: list[Path],
        text_field: str,
        label: str,
        *,
        skip_bad_rows: bool = False,
        left_out: Counter[str] | None = None,
    ):
        self.root, self.files, self.text_field = root, files, text_field
        self.label, self.skip_bad_rows = label, skip_bad_rows
        self.left_out = Counter() if left_out is None else left_out
        self._stats = [status_of(f) for f in files]
        self._sizes = [status.st_size for status in self._stats]

    def only(self, files: list[Path]) -> Files:
        """Return a source of some of the files."""
        return Files(
            self.root,
            files,
            self.text_field,
            self.label,
            skip_bad_rows=self.skip_bad_rows,
            left_out=self.left_out,
        )

    def identity(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for file, status in zip(self.files, self._stats):
            name = os.fsencode(os.path.relpath(file, self.root))
            listing.update(name + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        found = {
            "kind": "files",
            "name": self.label,
            "files": len(self.files),
            "bytes": sum(self._sizes),
            "listing": listing.hexdigest(),
            "text_field": self.text_field,
        }
        # Left out otherwise, so that caches from before there was a choice keep their names.
        return found | ({"on_bad_row": "skip"} if self.skip_bad_rows else {})

    def describe(self) -> str:
        """Return how many files there are, what was left out, and what may be in by mistake."""
        line = f"{self.label}: {counted(len(self.files), 'file')}, {sum(self._sizes) / 1e6:,.1f} MB"
        if self.left_out:
            kinds = [f"{count:,} {kind}" for kind, count in sorted(self.left_out.items())]
            line += f"; left out: {', '.join(kinds)}"
        names = [os.path.relpath(file, self.root) for file in self.files]
        others = [name for name in names if any(map(OTHER_SPLIT.match, Path(name).parts))]
        if 0 < len(others) < len(names):
            line += (
                f"; among them {counted(len(others), 'file')} named as another split, such as "
                f"{printable(others[0])}: give the path of those that are meant"
            )
        return line

    def batches(self, cursor: dict[str, Any] | None) -> Iterator[Batch]:
        start = cursor or {"file": 0, "row": 0}
        before = sum(self._sizes[: start["file"]])
        total = max(1, sum(self._sizes))
        pending: list[str] = []
        places: list[tuple[int, int]] = []
        bad: list[str] = []
        characters, begin = 0, dict(start)
        for number in range(start["file"], len(self.files)):
            skip = start["row"] if number == start["file"] else 0
            for row, text in enumerate(self._rows(number)):
                if row < skip:
                    continue
                if isinstance(text, BadRow) and not self.skip_bad_rows:
                    raise text
                if not pending and not bad:
                    begin = {"file": number, "row": row}
                if isinstance(text, BadRow):
                    bad.append(text.args[0])
                elif text:
                    pending.append(text)
                    places.append((number, row))
                    characters += len(text)
                full = characters >= BATCH_CHARACTERS or len(pending) >= BATCH_DOCUMENTS
                if full or len(bad) >= BATCH_DOCUMENTS:
                    yield Batch(begin, pending, before / total, tuple(bad), self._where(places))
                    pending, places, bad, characters = [], [], [], 0
            before += self._sizes[number]
        if pending or bad:
            yield Batch(begin, pending, before / total, tuple(bad), self._where(places))

    def _rows(self, number: int) -> Iterator[str | BadRow]:
        """Yield the rows of a file, which has to stay as it was found until the last of them.

        What is wrong with one may come from what is still writing to it: that is said first.
        """
        try:
            for text in rows(self.files[number], self.text_field):
                if isinstance(text, BadRow):
                    self._require_unchanged(number)
                yield text
        except DataError:
            self._require_unchanged(number)
            raise
        self._require_unchanged(number)

    def _require_unchanged(self, number: int) -> None:
        file, before = self.files[number], self._stats[number]
        try:
            now = file.stat()
        except FileNotFoundError:
            return  # reading says so, if it has not ended
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise DataError(
                "DATA-CHANGED",
                f"{printable(file)}: changed while it was read: {before.st_size:,} bytes of time "
                f"(ns) {before.st_mtime_ns}, now {now.st_size:,} of {now.st_mtime_ns}; expected a "
                "file that stays as it is: start again when what writes it has ended",
            )

    def _where(self, places: list[tuple[int, int]]) -> Callable[[int], str]:
        def where(index: int) -> str:
            number, row = places[index]
            file = self.files[number]
            unit = "line" if format_of(file).startswith(".jsonl") else "row"
            return f"{printable(file)}: {unit} {row + (unit == 'line')}"

        return where


def discover(path: str, text_field: str, *, skip_bad_rows: bool = False) -> Files:
    """Find the files at `path`: itself, or those below it; see this module for which.

    Args:
        path: a file or a directory.
        text_field: key or column of the text in .jsonl and .parquet.
        skip_bad_rows: leave out and count rows that cannot be used, instead of stopping.

    Raises:
        DataError: missing, unreadable, empty, or a link that leads nowhere.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return Files(
            root.parent,
            [_checked(root)],
            text_field,
            printable(root.name),
            skip_bad_rows=skip_bad_rows,
        )
    if not root.is_dir():
        found = "not a regular file" if root.exists() else "no such file or directory"
        if root.is_symlink() and not root.exists():
            found = f"a link that leads nowhere ({printable(os.readlink(root))})"
        fix = "give the directory, a path has no wildcards" if "*" in path else "check the path"
        raise DataError(
            "DATA-MISSING",
            f"{printable(root)}: {found}; expected text (one of {', '.join(SUFFIXES)}); {fix}",
        )
    files, left_out = _walk(root)
    if not files:
        others = [f"{count} {kind}" for kind, count in left_out.most_common(5)]
        raise DataError(
            "DATA-EMPTY",
            f"{printable(root)}: no file named {', '.join('*' + s for s in SUFFIXES)}; found "
            f"{', '.join(others) or 'nothing'}; check the path",
        )
    return Files(
        root,
        [_checked(f) for f in files],
        text_field,
        printable(root.name or root.resolve().name),
        skip_bad_rows=skip_bad_rows,
        left_out=left_out,
    )


def _walk(root: Path) -> tuple[list[Path], Counter[str]]:
    """Return the files to read below `root`, sorted, and counts by kind of what is left out."""
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    directories, files_seen = {root.resolve()}, set()
    above = set(root.resolve().parents)

    def unreadable(error: OSError) -> None:
        raise DataError(
            "DATA-UNREADABLE",
            f"{printable(error.filename)}: {error.strerror}; expected a readable directory; fix "
            "its permissions",
        ) from error

    for folder, names, files in os.walk(root, followlinks=True, onerror=unreadable):
        here = Path(folder)
        kept = []
        for name in sorted(names):
            real = (here / name).resolve()
            if name.startswith(".") or name == "__MACOSX":
                left_out["hidden"] += 1
            elif real in directories or real in above:
                left_out["linked again"] += 1
            else:
                directories.add(real)
                kept.append(name)
        names[:] = kept
        for name in sorted(files):
            file = here / name
            if name.startswith("."):
                left_out["hidden"] += 1
            elif file.is_symlink() and not file.exists():
                raise DataError(
                    "DATA-MISSING",
                    f"{printable(file)}: a link that leads nowhere "
                    f"({printable(os.readlink(file))}); expected what it stands for: mount or "
                    "restore it, or remove the link",
                )
            elif not stat.S_ISREG(status_of(file).st_mode):
                left_out["not a regular file"] += 1
            elif not format_of(file):
                left_out[_kind(file)] += 1
            else:
                found.append(file)
    unique = []
    for file in sorted(found, key=lambda f: (f.is_symlink(), f.relative_to(root).as_posix())):
        status = status_of(file)
        # Some network file systems give many files one number: only asked for where links are.
        real = (status.st_dev, status.st_ino) if status.st_nlink > 1 else file.resolve()
        if real in files_seen:
            left_out["linked again"] += 1
            continue
        files_seen.add(real)
        unique.append(file)
    return sorted(unique, key=lambda f: f.relative_to(root).as_posix()), left_out


def status_of(file: Path) -> os.stat_result:
    """Return the status of a file that was found in a corpus.

    Raises:
        DataError: it is gone.
        DataStorageError: it may not be looked at, or its file system fails.
    """
    try:
        return file.stat()
    except FileNotFoundError:
        raise DataError(
            "DATA-CHANGED",
            f"{printable(file)}: gone since it was found; expected files that stay as they are: "
            "start again when what changes them has ended",
        ) from None
    except OSError as error:
        raise data_storage_error(error, file, "looking at it") from error


def _kind(file: Path) -> str:
    """Return what a file that is not read is counted as: "*.pdf", "*.json.gz"."""
    parts = file.suffixes[-2:] if file.suffix.lower() in (".gz", ".zst") else file.suffixes[-1:]
    return f"*{printable(''.join(parts))}" if parts else "without a suffix"


def _checked(path: Path) -> Path:
    name = printable(path)
    if not format_of(path):
        raise DataError(
            "DATA-FORMAT",
            f"{name}: unknown kind of file; expected one of {', '.join(SUFFIXES)}; convert or "
            "rename it",
        )
    size = status_of(path).st_size
    if not os.access(path, os.R_OK):
        raise DataError(
            "DATA-UNREADABLE",
            f"{name}: permission denied; expected a readable file; fix its permissions",
        )
    if size == 0:
        raise DataError(
            "DATA-EMPTY", f"{name}: empty (0 bytes); expected text; restore or remove it"
        )
    return path


def standard_library(max_bytes: int) -> Files:
    """Return the sources of Python's standard library, docstrings included, as text.

    Every machine has them. The library's tests are left out, and its codecs, which are tables.
    """
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
    found: list[Path] = []
    for folder, names, here in os.walk(root):
        # not entered: what is installed beside it may be a hundred times as much
        names[:] = [name for name in names if name not in left_out]
        found += [Path(folder, name) for name in here if name.endswith(".py")]
    files, total = [], 0
    for path in sorted(found, key=lambda f: f.relative_to(root).as_posix()):
        size = path.stat().st_size
        if size and total + size <= max_bytes:
            files.append(path)
            total += size
    if not files:
        raise DataError(
            "DATA-EMPTY",
            f"{root}: this Python has no standard library sources; give data.path, a directory of "
            "text",
        )
    return Files(root, files, "text", f"python-{sysconfig.get_python_version()}-stdlib")


def sample(source: Source) -> list[tuple[str, str]]:
    """Return some `SAMPLE_CHARACTERS` of the source's text, each with its place.

    Of many files it takes some that are spread evenly. A file of at most `READ_WHOLE` bytes is read
    to its end, and documents and parts of them are taken evenly from it. Of a larger one, and of a
    stream, these are the beginning, and parts further on where a reader can begin there.
    """
    if not isinstance(source, Files):
        return list(_beginning(source, SAMPLE_CHARACTERS))
    stride = -(-len(source.files) // SAMPLE_FILES)
    chosen = source.files[::stride]
    found, room = [], SAMPLE_CHARACTERS // len(chosen)
    for file in chosen:
        part = source.only([file])
        if status_of(file).st_size <= READ_WHOLE:
            found += _evenly(part, room)
            continue
        found += _beginning(part, room // SAMPLE_PARTS)
        for place in range(1, SAMPLE_PARTS):
            share = room // SAMPLE_PARTS
            for text in rows_further_on(file, source.text_field, place / SAMPLE_PARTS):
                if isinstance(text, str) and text:
                    where = f"{printable(file)}: beyond {place / SAMPLE_PARTS:.0%} of it"
                    found.append((where, _words(text, 0, share)))
                    share -= len(text)
                if share <= 0:
                    break
    return found


def _beginning(source: Source, room: int) -> Iterator[tuple[str, str]]:
    for batch in source.batches(None):
        for index, text in enumerate(batch.texts):
            yield batch.where(index), _words(text, 0, room)
            room -= len(text)
            if room <= 0:
                return


def _evenly(source: Source, room: int) -> list[tuple[str, str]]:
    """Return parts of every k-th document, k a power of two, over their whole length."""
    kept, stride, number = [], 1, 0
    for batch in source.batches(None):
        for index, text in enumerate(batch.texts):
            if number % stride == 0:
                size = room // min(number + 1, SAMPLE_PARTS)
                kept.append((batch.where(index), _parts(text, size)))
            number += 1
            if len(kept) == SAMPLE_DOCUMENTS:
                kept, stride = kept[::2], 2 * stride
    share = room // max(1, len(kept))
    return [(at, _words(part, 0, share // len(parts))) for at, parts in kept for part in parts]


def _parts(text: str, size: int) -> list[str]:
    """Return a text, or parts of one that is longer than `size`, which have that together."""
    if len(text) <= size:
        return [text]
    part = size // SAMPLE_PARTS
    step = (len(text) - part) // (SAMPLE_PARTS - 1)
    return [_words(text, number * step, part) for number in range(SAMPLE_PARTS)]


def _words(text: str, start: int, size: int) -> str:
    """Return some `size` characters of a text, cut between words if it has any.

    A part of a word may have no token where the word has one.
    """
    end = start + size
    while start > 0 and start < end and not text[start - 1].isspace():
        start += 1
    cut = end
    while cut < len(text) and cut > start and not text[cut].isspace():
        cut -= 1
    return text[start : cut if cut > start else end]
