"""Documents to shards: one engine for the cache, for data/prepare.py and for streaming.

Work is committed by whole shards, with the place in the source where each ends: a killed run goes
on after the last whole shard and writes what an uninterrupted one would have written, byte for
byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pdn.data.documents import Source
from pdn.data.encoders import Encoded, Encoders
from pdn.data.files import publish_bytes, remove_temporary
from pdn.data.shards import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    ShardEntry,
    ShardWriter,
    dtype_for,
    read_index,
    read_manifest,
)
from pdn.data.tokenizer import TokenizerFile
from pdn.errors import DataError


@dataclasses.dataclass
class Progress:
    """What a tokenisation has done so far, those before a restart included."""

    documents: int
    tokens: int
    fraction: float | None
    """Share of the source that is read, if known."""
    seconds: float
    """Of this run."""
    new_documents: int
    new_tokens: int

    def line(self) -> str:
        rate = (
            f"{self.new_documents / max(self.seconds, 1e-9):,.0f} documents/s,"
            f" {self.new_tokens / max(self.seconds, 1e-9) / 1e6:.2f}M tokens/s"
        )
        share = f"{self.fraction:.0%}, " if self.fraction is not None else ""
        return f"tokenising: {share}{self.documents:,} documents, {self.tokens:,} tokens ({rate}{self.eta()})"

    def eta(self) -> str:
        if not self.fraction or self.seconds < 1:
            return ""
        return f", {self.seconds * (1 - self.fraction) / self.fraction:.0f} s left"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is made of a source; with the source's and the tokenizer's identity it fixes every byte
    of the shards.
    """

    shard_tokens: int
    """A shard ends with the first document that brings it to this many tokens."""
    validation_fraction: float = 0.0
    """Documents whose text's hash is below this share go to the validation split: the same text,
    the same split.
    """
    exclude: np.ndarray | None = None
    """Hashes of texts to leave out (those of a separate validation set), sorted uint64."""
    max_documents: int | None = None
    """Stop after this many documents."""

    def identity(self) -> dict[str, Any]:
        excluded = (
            None
            if self.exclude is None
            else hashlib.sha256(self.exclude.astype("<u8").tobytes()).hexdigest()
        )
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "exclude": excluded}


class _Split:
    """The shards of one split while they are being written."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self._writer: ShardWriter | None = None

    @property
    def pending(self) -> int:
        return self._writer.tokens if self._writer else 0

    def append(self, tokens: np.ndarray, text_hash: int) -> None:
        if self._writer is None:
            self._writer = ShardWriter(
                self.directory, f"shard-{len(self.manifest.shards):05d}", self.manifest.dtype
            )
        self._writer.append(tokens, text_hash)

    def commit(self, part: int, complete: bool, cursor: dict[str, Any] | None) -> None:
        shards = list(self.manifest.shards)
        if self._writer is not None:
            shards.append(self.finish(part))
        cursors = [*self.manifest.cursors, cursor] if cursor is not None else self.manifest.cursors
        self.manifest = self.manifest.model_copy(
            update={"shards": shards, "cursors": cursors, "complete": complete}
        )
        self.manifest.write(self.directory)

    def finish(self, part: int) -> ShardEntry:
        """Publish the shard that is being written."""
        assert self._writer is not None
        entry, self._writer = self._writer.close(part), None
        return entry

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.abort()


class Tokenisation:
    """Tokenise `source` into ``<out>/train`` and, when the plan splits, ``<out>/validation``.

    Args:
        source: where the documents come from.
        out: directory; what a former run with the same identities left there is continued.
        tokenizer: to encode with.
        plan: shard size and split.
        processes: see `Encoders`.
        flat: write the one split to `out` itself.

    Raises:
        DataError: the source is damaged, or `out` holds something else.
        DataStorageError: writing failed; the temporary files are removed.
    """

    def __init__(
        self,
        source: Source,
        out: Path,
        tokenizer: TokenizerFile,
        plan: Plan,
        processes: int,
        *,
        flat: bool = False,
    ):
        self.source, self.tokenizer, self.plan, self.processes = source, tokenizer, plan, processes
        identity = {**source.identity(), "plan": plan.identity()}
        empty = Manifest(
            format="pdn-shards",
            version=1,
            dtype=dtype_for(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer=tokenizer.identity,
            source=identity,
            complete=False,
            cursors=[],
            shards=[],
        )
        self.train = self._resume(out if flat else out / "train", empty)
        self.splits = [self.train]
        if plan.validation_fraction > 0:
            parts = len(self.train.manifest.cursors)
            self.splits.insert(0, self._resume(out / "validation", empty, parts))

    def _resume(self, directory: Path, empty: Manifest, parts: int | None = None) -> _Split:
        """Continue what `directory` holds; drop shards of commits that the train split has not seen
        (part >= parts).
        """
        found = read_manifest(directory) if (directory / MANIFEST).exists() else None
        for name in ("source", "tokenizer") if found else ():
            old, new = (m.model_dump()[name] for m in (found, empty))
            if old != new:
                raise DataError(
                    "PREPARE-OTHER",
                    f"{directory}: holds shards of another {name}: {'; '.join(_changes(old, new))};"
                    " give another output directory, or remove this one",
                )
        remove_temporary(directory)
        if found is None:
            directory.mkdir(parents=True, exist_ok=True)
            publish_bytes(directory / TOKENIZER, self.tokenizer.content)
            return _Split(directory, empty)
        if parts is not None and any(s.part >= parts for s in found.shards):
            found = found.model_copy(
                update={"shards": [s for s in found.shards if s.part < parts], "complete": False}
            )
        return _Split(directory, found)

    def run(self, progress: Callable[[Progress], None] | None = None) -> Iterator[Manifest]:
        """Work until the source ends, yielding the train manifest after each commit. Closing the
        iterator stops the work.
        """
        if self.train.manifest.complete:
            return
        encoders = Encoders(self.tokenizer, self.processes)
        try:
            yield from self._run(encoders, progress)
        finally:
            encoders.close()
            for split in self.splits:
                split.abort()

    def _run(
        self, encoders: Encoders, progress: Callable[[Progress], None] | None
    ) -> Iterator[Manifest]:
        at = self._cursor(len(self.train.manifest.cursors))
        report = _Reporter(progress, self.splits)
        done, cursor = at["done"], at["at"]
        for encoded, d, tokens, text_hash in self._documents(encoders, at):
            cursor = encoded.batch.cursor
            if self.plan.max_documents is not None and done >= self.plan.max_documents:
                break
            done += 1
            self._place(tokens, text_hash)
            if self.train.pending >= self.plan.shard_tokens:
                yield from self._commit(cursor, d + 1, done, complete=False)
            if d + 1 == len(encoded.ends):
                report(encoded)
        yield from self._commit(cursor, 0, done, complete=True)

    def _cursor(self, part: int) -> dict[str, Any]:
        """Where part number `part` begins in the source."""
        return self.train.manifest.cursors[part - 1] if part else {"at": None, "skip": 0, "done": 0}

    def _documents(
        self, encoders: Encoders, at: dict[str, Any]
    ) -> Iterator[tuple[Encoded, int, np.ndarray, int]]:
        """The documents from `at` on: their batch, number in it, tokens and text hash."""
        skip = at["skip"]
        for encoded in encoders.run(self.source.batches(at["at"])):
            start = 0
            for d, (end, text_hash) in enumerate(
                zip(encoded.ends.tolist(), encoded.hashes.tolist())
            ):
                if skip:
                    skip -= 1
                else:
                    yield encoded, d, encoded.tokens[start:end], text_hash
                start = end

    def rebuild(self, number: int) -> None:
        """Write train shard `number`, which was evicted, again.

        Raises:
            DataError: the source no longer gives the same shard.
        """
        entry = self.train.manifest.shards[number]
        scratch = _Split(
            self.train.directory,
            self.train.manifest.model_copy(update={"shards": self.train.manifest.shards[:number]}),
        )
        encoders = Encoders(self.tokenizer, self.processes)
        try:
            for _, _, tokens, text_hash in self._documents(encoders, self._cursor(entry.part)):
                if not self._excluded(text_hash):
                    scratch.append(tokens, text_hash)
                if scratch.pending >= entry.tokens:
                    break
            found = scratch.finish(entry.part)
        finally:
            encoders.close()
            scratch.abort()
        if found != entry:
            (self.train.directory / f"{entry.name}.bin").unlink()
            raise DataError(
                "STREAM-CHANGED",
                f"{self.train.directory / entry.name}.bin: written again from its source it has "
                "SHA-256"
                f" {found.sha256[:12]}…, expected"
                f" {entry.sha256[:12]}…: the source has changed since; start a new run, or restore "
                "the source",
            )

    def _place(self, tokens: np.ndarray, text_hash: int) -> None:
        if text_hash < self.plan.validation_fraction * 2.0**64:
            self.splits[0].append(tokens, text_hash)
            return
        if not self._excluded(text_hash):
            self.train.append(tokens, text_hash)

    def _excluded(self, text_hash: int) -> bool:
        exclude = self.plan.exclude
        if exclude is None or not len(exclude):
            return False
        place = int(np.searchsorted(exclude, np.uint64(text_hash)))
        return place < len(exclude) and int(exclude[place]) == text_hash

    def _commit(
        self, cursor: dict[str, Any] | None, skip: int, done: int, *, complete: bool
    ) -> Iterator[Manifest]:
        """Publish all splits; the train split last, as its manifest holds the place in the source
        for all.
        """
        part = len(self.train.manifest.cursors)
        for split in self.splits:
            split.commit(
                part,
                complete,
                {"at": cursor, "skip": skip, "done": done} if split is self.train else None,
            )
        yield self.train.manifest


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs between two identities, in words."""
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _changes(was, now, f"{key}.")
        elif was != now:
            yield (
                "the files' names, sizes or times changed"
                if key == "listing"
                else f"{prefix}{key} was {was!r}, now {now!r}"
            )


class _Reporter:
    """Calls `progress` at most twice a second."""

    def __init__(self, progress: Callable[[Progress], None] | None, splits: list[_Split]):
        self._progress, self._start, self._told = progress, time.monotonic(), 0.0
        self._documents = self._old_documents = sum(s.manifest.documents for s in splits)
        self._tokens = self._old_tokens = sum(s.manifest.tokens for s in splits)

    def __call__(self, encoded: Encoded) -> None:
        self._documents += len(encoded.ends)
        self._tokens += len(encoded.tokens)
        now = time.monotonic()
        if self._progress and now - self._told >= 0.5:
            self._told = now
            self._progress(
                Progress(
                    self._documents,
                    self._tokens,
                    encoded.batch.fraction,
                    now - self._start,
                    self._documents - self._old_documents,
                    self._tokens - self._old_tokens,
                )
            )


def hashes_of(directory: Path) -> np.ndarray:
    """The sorted hashes of the texts of all documents of a prepared split, uint64."""
    manifest = read_manifest(directory)
    parts = [read_index(directory, s, manifest.dtype)[1] for s in manifest.shards]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)
