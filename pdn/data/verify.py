"""Verify each shard's SHA-256 at first use, and that no document is both trained and validated on.

Hashing happens in the background. What was verified is remembered by size, modification time and
inode, so that it is read once. Small data are verified before training starts; of large data a
damaged shard stops the run when it is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from pathlib import Path

import numpy as np

from pdn.data.files import data_storage_error, publish_bytes, try_lock
from pdn.data.prepare import hashes_of
from pdn.data.reader import RESTORE, file_identity
from pdn.data.shards import TOKENIZER, Manifest, ShardEntry, read_index
from pdn.data.sources import ValidationSet, WindowSource
from pdn.errors import DataError, DataStorageError
from pdn.store.local import read_bytes
from pdn.wording import Tell

AT_ONCE_BYTES = 256 << 20
"""Up to so much is verified before training starts: a second or less."""
AT_ONCE_DOCUMENTS = 4_000_000
CHUNK = 1 << 22


class Verification:
    """Verifies the splits of a run.

    Construction raises for small data, `raise_if_failed` for large ones.

    Args:
        sources: whose present shards are verified.
        validation: all validation sets.
        cache_dir: where what is known to be good is remembered.
        tell: called with a line when large data begin to be verified.
    """

    def __init__(
        self,
        sources: list[WindowSource],
        validation: list[ValidationSet],
        cache_dir: Path,
        tell: Tell,
    ):
        splits = [(s.directory, s.manifest) for s in sources]
        held_out = list(
            {d: m for v in validation for d, m in zip(v.directories, v.manifests)}.items()
        )
        self._splits, self._train, self._held_out = splits + held_out, splits, held_out
        self._cache, self._stop, self._failure = cache_dir / "verified", threading.Event(), None
        for directory, manifest in self._splits:
            check_tokenizer(directory, manifest)
        _refuse_same_shards(self._train, self._held_out)
        self._todo = [(d, m, self._unverified(d, m)) for d, m in self._splits]
        todo = sum(
            e.tokens * (2 if m.dtype == "uint16" else 4)
            for _, m, entries in self._todo
            for e in entries
        )
        self._thread: threading.Thread | None = None
        if todo <= AT_ONCE_BYTES and sum(m.documents for _, m in splits) <= AT_ONCE_DOCUMENTS:
            self._verify()
            return
        tell(f"verifying {todo / 1e9:.1f} GB of shards in the background")
        self._thread = threading.Thread(target=self._run, name="verify", daemon=True)
        self._thread.start()

    def raise_if_failed(self) -> None:
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._verify()
        except DataError as error:
            self._failure = error

    def _verify(self) -> None:
        for directory, manifest, entries in self._todo:
            if entries:
                self._verify_split(directory, manifest)
        if not self._stop.is_set():
            self._refuse_overlap()

    def _record(self, directory: Path) -> Path:
        return (
            self._cache
            / f"{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:24]}.json"
        )

    def _known(self, directory: Path) -> dict[str, list]:
        try:
            found = json.loads(read_bytes(self._record(directory)))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _unverified(self, directory: Path, manifest: Manifest) -> list[ShardEntry]:
        known, found = self._known(directory), []
        for entry in manifest.shards:
            with contextlib.suppress(FileNotFoundError):
                # evicted: whoever writes it again verifies it
                if known.get(entry.name) != _fingerprint(directory, entry):
                    found.append(entry)
        return found

    def _verify_split(self, directory: Path, manifest: Manifest) -> None:
        """Hash what is not known to be good.

        One process of a node does it; the others wait and find it done.
        """
        while not self._stop.is_set():
            try:
                with try_lock(self._record(directory).with_suffix(".lock")) as got:
                    if got:
                        self._hash_shards(directory, manifest)
                        return
            except DataStorageError:
                if self._record(directory).with_suffix(".lock").exists():
                    raise
                # The cache cannot be written: every process verifies for itself.
                self._hash_shards(directory, manifest)
                return
            time.sleep(0.1)

    def _remember(self, directory: Path, known: dict) -> None:
        """Keep what is known to be good; where nothing can be written, it is found out again."""
        with contextlib.suppress(DataStorageError):
            publish_bytes(self._record(directory), json.dumps(known).encode())

    def _hash_shards(self, directory: Path, manifest: Manifest) -> None:
        known, written = self._known(directory), time.monotonic()
        for entry in self._unverified(directory, manifest):
            if self._stop.is_set():
                break
            with contextlib.suppress(FileNotFoundError):  # a stream's shard, evicted just now
                identity = _fingerprint(directory, entry)
                for suffix, expected in ((".bin", entry.sha256), (".idx", entry.idx_sha256)):
                    self._check_hash(directory / f"{entry.name}{suffix}", expected)
                _check_ids(directory / f"{entry.name}.bin", manifest)
                read_index(directory, entry, manifest.dtype)
                known[entry.name] = identity
            if time.monotonic() - written > 5:
                written = time.monotonic()
                self._remember(directory, known)
        self._remember(directory, known)

    def _check_hash(self, path: Path, expected: str) -> None:
        state = hashlib.sha256()
        try:
            with open(path, "rb", buffering=0) as f:
                while chunk := f.read(CHUNK):
                    if self._stop.is_set():
                        return
                    state.update(chunk)
                size = f.tell()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise data_storage_error(error, path, "reading") from error
        if state.hexdigest() != expected:
            raise DataError(
                "SHARD-HASH",
                f"{path}: SHA-256 {state.hexdigest()}, expected {expected}: some of its bytes "
                f"0–{size - 1} are damaged; {RESTORE}",
            )

    def _refuse_overlap(self) -> None:
        """Refuse a text of a validation split in the training data; remember results by content."""
        if not self._held_out:
            return
        held = np.unique(np.concatenate([hashes_of(d) for d, _ in self._held_out]))
        for directory, manifest in self._train:
            if not manifest.complete:
                continue  # a stream leaves its validation documents out while it is tokenised
            known = self._known(directory)
            name = f"disjoint:{manifest.content}:{hashlib.sha256(held.tobytes()).hexdigest()}"
            if name in known or self._stop.is_set():
                continue
            for entry in manifest.shards:
                if (directory / f"{entry.name}.idx").exists():
                    _refuse_shared(
                        directory,
                        entry,
                        read_index(directory, entry, manifest.dtype)[1],
                        held,
                        self._held_out,
                    )
            self._remember(directory, {**self._known(directory), name: True})


def _fingerprint(directory: Path, entry: ShardEntry) -> list:
    parts = [
        list(file_identity(os.stat(f"{directory}/{entry.name}{suffix}")))
        for suffix in (".bin", ".idx")
    ]
    return [*parts, entry.sha256, entry.idx_sha256]


def _check_ids(path: Path, manifest: Manifest) -> None:
    """Refuse ids that the tokenizer does not have.

    The order may take long to come upon one of them.
    """
    start = 0
    with open(path, "rb") as f:
        # Not through a memory map: of a file that is cut meanwhile it would end the process.
        while len(piece := np.fromfile(f, dtype=manifest.dtype, count=CHUNK)):
            if int(piece.max()) >= manifest.vocab_size:
                at = int(np.argmax(piece >= manifest.vocab_size))
                raise DataError(
                    "SHARD-TOKEN",
                    f"{path}: id {piece[at]} at token {start + at} (byte "
                    f"{(start + at) * piece.itemsize}), expected ids below vocab_size "
                    f"{manifest.vocab_size}; {RESTORE}",
                )
            start += len(piece)


def _refuse_shared(
    directory: Path,
    entry: ShardEntry,
    hashes: np.ndarray,
    held: np.ndarray,
    held_out: list[tuple[Path, Manifest]],
) -> None:
    shared = np.isin(hashes, held)
    if shared.any():
        first = int(np.flatnonzero(shared)[0])
        where = next(d for d, _ in held_out if hashes[first] in hashes_of(d))
        raise DataError(
            "DATA-OVERLAP",
            f"{directory / entry.name}.idx: document {first} (and {int(shared.sum()) - 1} more of "
            f"this shard) is also in the validation set {where}; expected none in common: prepare "
            "the training data with --validation, which leaves such documents out",
        )


def _refuse_same_shards(
    train: list[tuple[Path, Manifest]], held_out: list[tuple[Path, Manifest]]
) -> None:
    for directory, manifest in train:
        for other, held in held_out:
            shared = {s.sha256 for s in manifest.shards} & {s.sha256 for s in held.shards}
            if directory.resolve() == other.resolve() or shared:
                raise DataError(
                    "DATA-OVERLAP",
                    f"{other}: the validation set holds shards of the training set {directory} "
                    f"({len(shared)} are equal); expected none in common: give another directory "
                    "in data.validation, data.validation_sets",
                )


def check_tokenizer(directory: Path, manifest: Manifest) -> None:
    path = directory / TOKENIZER
    try:
        found = hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError as error:
        raise DataError(
            "TOKENIZER-MISSING",
            f"{path}: {error.strerror}; expected the tokenizer of the shards; restore it from a "
            "copy",
        ) from None
    if found != manifest.tokenizer.sha256:
        raise DataError(
            "TOKENIZER-DATA",
            f"{path}: SHA-256 {found}, but the shards were made with {manifest.tokenizer.sha256} "
            f"({manifest.tokenizer.name}); restore that tokenizer.json, or prepare the data again "
            "with this one",
        )
