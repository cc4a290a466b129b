"""Sources of windows: where the k-th sample of a source lies.

A mixture draws from several sources, any other kind from one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np

from pdn.data.history import Cut
from pdn.data.order import permute
from pdn.data.reader import ShardReader
from pdn.data.shards import Manifest, read_manifest, require_complete
from pdn.errors import DataError
from pdn.wording import counted


class WindowSource(Protocol):
    name: str
    manifest: Manifest
    directory: Path
    last_progress: float
    """When something that samples are waiting for last moved on, in `time.monotonic` seconds; 0 if
    nothing is waited for.
    """
    note: str
    """What the user is told about where it comes from."""

    def fingerprint(self) -> dict[str, object]:
        """Return named parts of everything that the source's order and content depend on."""
        ...

    def windows(self, samples: np.ndarray, cut: Cut) -> np.ndarray:
        """Return tokens [N, seq_len + 1] of the source's samples [N], waiting until they exist."""
        ...

    def starts(self, samples: np.ndarray, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch [N] and the first token [N] of the source's samples [N]."""
        ...

    def count(self, seq_len: int) -> int | None:
        """Return the windows of one epoch, or None while the end of the source is not known.

        A number of units, if that is what `seq_len` is given.
        """

    def pool_end(self, unit: int, cut: Cut) -> int:
        """Return the first unit after the pool of a unit; both are counted over all epochs."""
        ...

    def check_unchanged(self) -> None:
        """Refuse shards that were read and are other files now, as `ShardReader` does."""
        ...

    def close(self) -> None: ...


def _whole_manifest(directory: Path) -> Manifest:
    manifest = read_manifest(directory)
    require_complete(manifest, directory)
    return manifest


class ResidentSource:
    """Gives windows of shards that are all there: the whole split, permuted anew each epoch.

    The split is cut into units, which are permuted; the windows of a pool of consecutive permuted
    units are permuted again. A window covers T + 1 tokens, so that consecutive windows share the
    one token that is a label in the first.

    Args:
        name: of the source in the mixture.
        directory: one split's shards.
        seed: of the run.
        split: the rule by which its validation documents were chosen, if there is more than one.
        note: what the user is told about where it comes from.
    """

    last_progress = 0.0

    def __init__(
        self, name: str, directory: Path, seed: int, split: str | None = None, note: str = ""
    ):
        self.name, self.directory, self.split, self.note = name, directory, split, note
        self.manifest = _whole_manifest(directory)
        if not self.manifest.shards:
            raise DataError(
                "DATA-EMPTY",
                f"{directory}: holds no tokens{f' of {note}' if note else ''}; expected text: "
                "check what it was made from, data.text_field, and that data.validation has others",
            )
        self._reader = ShardReader(directory, self.manifest)
        self._reader.check_files()
        self._key = f"{seed}/{name}"

    def fingerprint(self) -> dict[str, object]:
        found: dict[str, object] = {
            "content": self.manifest.content,
            "tokens": self.manifest.tokens,
        }
        return found if self.split is None else found | {"split": self.split}

    def count(self, seq_len: int) -> int:
        return max(0, self._reader.tokens - 1) // seq_len

    def windows(self, samples: np.ndarray, cut: Cut) -> np.ndarray:
        return self._reader.read(self.starts(samples, cut)[1], cut.seq_len + 1)

    def starts(self, samples: np.ndarray, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
        n = self.count(cut.unit_tokens)
        if n < 1:
            raise DataError(
                "DATA-SHORT",
                f"{self.directory}: {self._reader.tokens} tokens, shorter than one sample of "
                f"{cut.unit_tokens} + 1; reduce data.seq_len or data.unit_tokens, or give more "
                "text",
            )
        segments, before = cut.split(samples)
        cut = cut.of_segments
        epochs, places = np.divmod(segments, n * cut.per_unit)
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            key = f"{self._key}/{epoch}"
            mine = places[inside] if cut.per_unit == 1 else _in_pools(places[inside], n, cut, key)
            units, rest = np.divmod(mine, cut.per_unit)
            found[inside] = permute(units, n, key) * cut.unit_tokens + rest * cut.seq_len
        return epochs, found + before

    def pool_end(self, unit: int, cut: Cut) -> int:
        n = self.count(cut.unit_tokens)
        epoch, place = divmod(unit, n)
        return epoch * n + min(n, (place // cut.pool_units + 1) * cut.pool_units)

    def check_unchanged(self) -> None:
        self._reader.check_unchanged()

    def close(self) -> None:
        self._reader.close()


def _in_pools(places: np.ndarray, n: int, cut: Cut, key: str) -> np.ndarray:
    """Permute the windows of each pool: `places` [N] are their numbers in an epoch of `n` units."""
    size, found = cut.pool_units * cut.per_unit, np.empty_like(places)
    pools = places // size
    for pool in np.unique(pools).tolist():
        mine, first = pools == pool, pool * size
        inside = min(size, n * cut.per_unit - first)  # the last pool may be smaller
        found[mine] = first + permute(places[mine] - first, inside, f"{key}/pool-{pool}")
    return found


class ValidationSet:
    """Gives the windows of validation splits, one split after the other, in order.

    The last window of each split may be partly empty.

    Args:
        directories: of the splits' shards.
    """

    def __init__(self, directories: list[Path]):
        self.directories = directories
        self.manifests = [_whole_manifest(d) for d in directories]
        self._readers = [ShardReader(d, m) for d, m in zip(directories, self.manifests)]
        for reader in self._readers:
            reader.check_files()

    @property
    def tokens(self) -> int:
        return sum(m.tokens for m in self.manifests)

    def describe(self) -> str:
        if not any(m.documents for m in self.manifests):
            return "0 documents: it measures nothing"
        documents = sum(m.documents for m in self.manifests)
        return f"{counted(documents, 'document')}, {self.tokens:,} tokens"

    def places(self, seq_len: int, most: int | None, *, spread: bool) -> np.ndarray:
        """Return the numbers of at most `most` windows, ascending.

        Args:
            seq_len: tokens of a window (T).
            most: windows of all splits together; None takes all.
            spread: take windows evenly from each split, in proportion to its size but at least one,
                and not the first ones.
        """
        counts = np.array([math.ceil(max(0, r.tokens - 1) / seq_len) for r in self._readers])
        total = int(counts.sum())
        if most is None or most >= total or not spread:
            return np.arange(total if most is None else min(most, total))
        starts = np.cumsum(counts) - counts
        shares = _shares(counts, most).tolist()
        return np.concatenate(
            [
                start + np.arange(share) * count // max(1, share)
                for start, count, share in zip(starts, counts, shares)
            ]
        )

    def windows(self, places: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens [N, T+1] of windows `places` [N], zero-filled.

        The second result [N] is how many tokens of each are real.
        """
        out = np.zeros((len(places), seq_len + 1), dtype=np.uint32)
        real = np.zeros(len(places), dtype=np.int64)
        begin = 0
        for reader in self._readers:
            end = begin + math.ceil(max(0, reader.tokens - 1) / seq_len)
            for row in np.flatnonzero((places >= begin) & (places < end)).tolist():
                start = (int(places[row]) - begin) * seq_len
                real[row] = min(seq_len + 1, reader.tokens - start)
                out[row, : real[row]] = reader.read(np.array([start]), int(real[row]))[0]
            begin = end
        return out, real

    def check_unchanged(self) -> None:
        """Refuse shards that were read and are other files now, as `ShardReader` does."""
        for reader in self._readers:
            reader.check_unchanged()

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def _shares(counts: np.ndarray, total: int) -> np.ndarray:
    """Split `total` into whole numbers in proportion to `counts`.

    Each count that is not zero gets at least one, if `total` suffices.
    """
    shares = np.maximum(counts * total // counts.sum(), np.minimum(counts, 1))
    while shares.sum() < total:
        shares[np.argmax(np.where(shares < counts, counts / (shares + 1), -1))] += 1
    while shares.sum() > total:
        shares[np.argmin(np.where(shares > 0, counts / np.maximum(shares, 1), np.inf))] -= 1
    return shares
