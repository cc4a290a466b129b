"""Documents to shards: one engine for the cache, for data/prepare.py and for streaming.

Work is committed by whole shards, with the place in the source where each ends: a killed run goes
on after the last whole shard and writes what an uninterrupted one would have written, byte for
byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pdn.data.codec import require_survival
from pdn.data.documents import Batch, Source, sample
from pdn.data.encoders import Encoded, Encoders
from pdn.data.files import making, publish_bytes, remove_temporary
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
from pdn.errors import DataError, DataStorageError
from pdn.wording import counted

SURVIVED = "survived.txt"
"""Says that the tokenizer was tried on the corpus, and what it loses of it."""
FEW_BAD_ROWS = 100
BAD_SHARE = 0.001
"""Rows that `on_bad_row: skip` leaves out at most: the larger of the two."""


@dataclasses.dataclass
class Progress:
    """Counts what a tokenisation has done so far, what was done before a restart included."""

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
            f"{self.new_documents / max(self.seconds, 1e-9):,.0f} documents/s, "
            f"{self.new_tokens / max(self.seconds, 1e-9) / 1e6:.2f}M tokens/s"
        )
        share = f"{self.fraction:.0%}, " if self.fraction is not None else ""
        return (
            f"tokenising: {share}{counted(self.documents, 'document')}, {self.tokens:,} tokens "
            f"({rate}{self.eta()})"
        )

    def eta(self) -> str:
        if not self.fraction or self.seconds < 1:
            return ""
        return f", {self.seconds * (1 - self.fraction) / self.fraction:.0f} s left"


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Chooses the documents that are validated on by their hashes: copies go the same way."""

    cut: int
    """Documents with a hash below this, whole; of those with this hash, the end. What comes before
    it trains.
    """
    tokens: int
    """Length of that end."""

    def identity(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def part(self, text_hash: int, name: str) -> int:
        """Return the hash of one part of the cut document: neither is the other's copy."""
        return xxhash.xxh3_64_intdigest(f"{name} of {text_hash}".encode())


@dataclasses.dataclass(frozen=True)
class Plan:
    """Says what is made of a source.

    With the source's and the tokenizer's identity it fixes every byte of the shards.
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
    held_out: HeldOut | None = None
    """Beside the share: documents of the validation split, by rank of their hash."""

    def identity(self) -> dict[str, Any]:
        excluded = (
            None
            if self.exclude is None
            else hashlib.sha256(self.exclude.astype("<u8").tobytes()).hexdigest()
        )
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # Left out if None, so that shards from before this key keep their identity.
        held_out = fields.pop("held_out")
        more = {} if held_out is None else {"held_out": held_out.identity()}
        return {**fields, "exclude": excluded, **more}


class _Split:
    """Writes the shards of one split, and counts them in its manifest."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self._writer: ShardWriter | None = None

    @property
    def pending(self) -> int:
        return self._writer.tokens if self._writer else 0

    @property
    def pending_documents(self) -> int:
        return self._writer.documents if self._writer else 0

    def append(self, tokens: np.ndarray, text_hash: int) -> None:
        if self._writer is None:
            self._writer = ShardWriter(
                self.directory, f"shard-{len(self.manifest.shards):05d}", self.manifest.dtype
            )
        self._writer.append(tokens, text_hash)

    def commit(self, part: int, complete: bool, cursor: dict[str, Any] | None) -> None:
        shards = list(self.manifest.shards)
        if (entry := self.finish(part)) is not None:
            shards.append(entry)
        cursors = [*self.manifest.cursors, cursor] if cursor is not None else self.manifest.cursors
        self.manifest = self.manifest.model_copy(
            update={"shards": shards, "cursors": cursors, "complete": complete}
        )
        self.manifest.write(self.directory)

    def finish(self, part: int, expected: ShardEntry | None = None) -> ShardEntry | None:
        """Publish the shard that is being written, and return its entry; None if nothing was.

        Args:
            part: number of the commit that it belongs to.
            expected: the entry of the shard that it takes the place of: another one is returned
                but not published.
        """
        if self._writer is None:
            return None
        entry = self._writer.seal(part)
        if expected in (None, entry):
            self._writer.publish()
        else:
            self._writer.abort()
        self._writer = None
        return entry

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.abort()


class Tokenisation:
    """Tokenises `source` into ``<out>/train`` and, when the plan splits, ``<out>/validation``.

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
        self._left_out: Counter[str] = Counter()
        self.train = self._resume(out if flat else out / "train", empty)
        self.splits = [self.train]
        if plan.validation_fraction > 0 or plan.held_out is not None:
            parts = len(self.train.manifest.cursors)
            self.splits.insert(0, self._resume(out / "validation", empty, parts))

    def _resume(self, directory: Path, empty: Manifest, parts: int | None = None) -> _Split:
        """Continue what `directory` holds.

        Shards of commits that the train split has not seen (part >= parts) are dropped.
        """
        found = read_manifest(directory) if (directory / MANIFEST).exists() else None
        for name in ("source", "tokenizer"):
            if found is None:
                break
            old, new = (m.model_dump()[name] for m in (found, empty))
            if old != new:
                raise DataError(
                    "PREPARE-OTHER",
                    f"{directory}: holds shards of another {name}: {'; '.join(_changes(old, new))};"
                    " give another output directory, or remove this one",
                )
        remove_temporary(directory)
        if found is None:
            with making(directory):
                directory.mkdir(parents=True, exist_ok=True)
            publish_bytes(directory / TOKENIZER, self.tokenizer.content)
            return _Split(directory, empty)
        if parts is not None and any(s.part >= parts for s in found.shards):
            found = found.model_copy(
                update={"shards": [s for s in found.shards if s.part < parts], "complete": False}
            )
        return _Split(directory, found)

    def run(self, progress: Callable[[Progress], None] | None = None) -> Generator[Manifest]:
        """Work until the source ends, yielding the train manifest after each commit.

        Closing the iterator stops the work.
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
        self._left_out = Counter(self.train.manifest.left_out)
        for encoded, d, tokens, text_hash in self._documents(encoders, at, self._count_bad):
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
        """Return where part number `part` begins in the source."""
        return self.train.manifest.cursors[part - 1] if part else {"at": None, "skip": 0, "done": 0}

    def _documents(
        self,
        encoders: Encoders,
        at: dict[str, Any],
        count_bad: Callable[[Batch], None] = lambda batch: None,
    ) -> Iterator[tuple[Encoded, int, np.ndarray, int]]:
        """Yield the documents from `at` on: their batch, number in it, tokens and text hash."""
        skip = at["skip"]
        for encoded in encoders.run(self.source.batches(at["at"])):
            start = 0
            if not skip:  # otherwise they were counted when the batch was begun
                count_bad(encoded.batch)
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
                if len(tokens) > 1 and not self._excluded(text_hash):
                    scratch.append(tokens, text_hash)
                if scratch.pending >= entry.tokens:
                    break
            # Compared before it has its name: a reader waits for the file, and would take it.
            found = scratch.finish(entry.part, entry)
        finally:
            encoders.close()
            scratch.abort()
        if found != entry:
            given = f"SHA-256 {found.sha256[:12]}…" if found else "no tokens"
            raise DataError(
                "STREAM-CHANGED",
                f"{self.train.directory / entry.name}.bin: written again from its source it has "
                f"{given}, expected SHA-256 {entry.sha256[:12]}…: the source has changed since; "
                "start a new run, or restore the source",
            )

    def _count_bad(self, batch: Batch) -> None:
        """Count rows that the source left out; too many are a fault of the whole source."""
        if not batch.bad_rows:
            return
        self._left_out["bad rows"] += len(batch.bad_rows)
        bad = self._left_out["bad rows"]
        good = sum(s.manifest.documents + s.pending_documents for s in self.splits)
        if bad > max(FEW_BAD_ROWS, BAD_SHARE * (good + bad)):
            raise DataError(
                "DATA-BAD-ROWS",
                f"{self.source.identity()['name']}: {bad:,} bad rows beside {good:,} good ones; "
                f"data.on_bad_row=skip leaves out at most {FEW_BAD_ROWS} or {BAD_SHARE:.1%}, "
                f"whichever is more; mend the source. The last one: {batch.bad_rows[-1]}",
            )

    def _place(self, tokens: np.ndarray, text_hash: int) -> None:
        if len(tokens) == 1:  # the tokenizer has nothing for this text: a bare EOS teaches nothing
            self._left_out["without tokens"] += 1
            return
        held_out = self.plan.held_out
        if held_out is not None and text_hash <= held_out.cut:
            self._hold_out(held_out, tokens, text_hash)
            return
        if text_hash < self.plan.validation_fraction * 2.0**64:
            self.splits[0].append(tokens, text_hash)
            return
        if not self._excluded(text_hash):
            self.train.append(tokens, text_hash)

    def _hold_out(self, held_out: HeldOut, tokens: np.ndarray, text_hash: int) -> None:
        """Place a document of the validation split, or the two parts of the one that is cut."""
        if text_hash < held_out.cut or held_out.tokens >= len(tokens) - 1:
            self.splits[0].append(tokens, text_hash)
            return
        if held_out.tokens:
            end = tokens[-held_out.tokens :]
            self.splits[0].append(end, held_out.part(text_hash, "end"))
            tokens = np.append(tokens[: -held_out.tokens], tokens[-1])
        self.train.append(tokens, held_out.part(text_hash, "start"))

    def _excluded(self, text_hash: int) -> bool:
        exclude = self.plan.exclude
        if exclude is None or not len(exclude):
            return False
        place = int(np.searchsorted(exclude, np.uint64(text_hash)))
        return place < len(exclude) and int(exclude[place]) == text_hash

    def _commit(
        self, cursor: dict[str, Any] | None, skip: int, done: int, *, complete: bool
    ) -> Iterator[Manifest]:
        """Publish all splits.

        The train split comes last, as its manifest holds the place in the source for all of them.
        """
        part = len(self.train.manifest.cursors)
        left_out = {reason: count for reason, count in self._left_out.items() if count}
        self.train.manifest = self.train.manifest.model_copy(update={"left_out": left_out})
        for split in self.splits:
            split.commit(
                part,
                complete,
                {"at": cursor, "skip": skip, "done": done} if split is self.train else None,
            )
        yield self.train.manifest


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield what differs between two identities, in words."""
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
    """Return the sorted hashes of the texts of all documents of a prepared split, uint64."""
    manifest = read_manifest(directory)
    parts = [read_index(directory, s, manifest.dtype)[1] for s in manifest.shards]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)


def require_text_survives(
    source: Source, tokenizer: TokenizerFile, root: Path, most: float, tell: Callable[[str], None]
) -> None:
    """Refuse a tokenizer that loses more than the share `most` of a sample of the source's text.

    The result is remembered in `root`, where that can be written.

    Args:
        source: of the documents.
        tokenizer: to be checked.
        root: directory of the prepared data.
        most: share of characters that may be lost, 0 to 1.
        tell: called with a line about the result.

    Raises:
        DataError: it loses more, or the source cannot be read.
    """
    if (root / SURVIVED).exists():
        return
    line = require_survival(
        tokenizer.build(), sample(source), str(source.identity().get("name")), most
    )
    tell(line)
    with contextlib.suppress(OSError, DataStorageError):
        remove_temporary(root, SURVIVED)
        publish_bytes(root / SURVIVED, line.encode())
