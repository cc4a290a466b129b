"""How large a validation set must be, and which documents make one of that size.

The share `validation_fraction` goes by the documents' hashes, in one reading of the corpus. Of few
documents, or of one large one, such a share can be nothing, or almost all. Then as many tokens as
are needed are held out: documents in the order of their hashes, the last one cut. Of a stream,
whose end is not known, as many of its first documents are as have these tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pdn.data.codec import Codec
from pdn.data.documents import Source
from pdn.data.prepare import HeldOut
from pdn.data.shards import MANIFEST, read_index, read_manifest

WINDOWS = 64
"""Samples that a validation set has at least: below, its loss is mostly noise."""
MOST = 0.5
"""Share of the tokens that is held out at most, however few they are."""


def validation_tokens(seq_len: int) -> int:
    """Return the tokens of the smallest validation set, of samples of `seq_len`."""
    return WINDOWS * seq_len + 1


def tokens_needed(root: Path, fraction: float, seq_len: int) -> int | None:
    """Return how many tokens must be held out of the corpus in `root`, which is split by hash.

    None if that split will do: it has `WINDOWS` samples and at least half of the share that was
    asked for, and not more than twice of both; and where there is nothing to hold out.

    Args:
        root: directory of the prepared corpus.
        fraction: share of documents that was asked for, 0 to 1.
        seq_len: tokens of a sample.
    """
    train, held = (_tokens(root / split) for split in ("train", "validation"))
    total = train + held
    least = validation_tokens(seq_len)
    most = max(2 * fraction * total, min(2 * least, MOST * total))
    if not total or max(least, fraction / 2 * total) <= held <= most:
        return None
    return int(min(max(least, fraction * total), MOST * total))


def documents_needed(source: Source, codec: Codec, needed: int, *, whole: bool) -> int:
    """Return how many of the first documents of a source have `needed` tokens together.

    Args:
        source: of documents, read from its start.
        codec: what they are encoded with.
        needed: tokens, the ends of documents included.
        whole: all of the source may be taken. Else at most the share `MOST` of its tokens, if it
            ends within what is read to know that; at least one document either way.
    """
    limit = needed if whole else int(needed / MOST)
    ends, total = [], 0
    for batch in source.batches(None):
        for tokens in codec.encode(batch.texts):
            total += len(tokens) + 1
            ends.append(total)
        if total >= limit:
            break
    if total < limit and not whole:
        return max(1, int(np.searchsorted(ends, int(total * MOST), side="right")))
    return int(np.searchsorted(ends, min(needed, total), side="left")) + 1


def _tokens(split: Path) -> int:
    return read_manifest(split).tokens if (split / MANIFEST).exists() else 0


def held_out(root: Path, needed: int) -> HeldOut:
    """Choose the documents in `root` with the lowest hashes that have `needed` tokens together.

    Documents of both splits are candidates.
    """
    hashes, lengths = [], []
    for split in ("train", "validation"):
        if not (root / split / MANIFEST).exists():
            continue
        manifest = read_manifest(root / split)
        for entry in manifest.shards:
            ends, found = read_index(root / split, entry, manifest.dtype)
            hashes.append(found)
            lengths.append(np.diff(ends.astype(np.int64), prepend=0))
    every, inverse = np.unique(np.concatenate(hashes), return_inverse=True)
    copies = np.bincount(inverse)
    tokens = np.bincount(inverse, weights=np.concatenate(lengths)).astype(np.int64)
    before = np.cumsum(tokens) - tokens
    last = int(np.searchsorted(before, needed, side="left")) - 1
    rest = -(-(needed - int(before[last])) // int(copies[last]))
    return HeldOut(cut=int(every[last]), tokens=rest)
