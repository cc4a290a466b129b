"""From windows of tokens to batches: labels, document boundaries, digests.

numpy only; no Python per token.
"""

from __future__ import annotations

import numpy as np
import xxhash

IGNORE = -100
"""Label of a position without a target."""


def boundary_slots(rows: int, seq_len: int, min_tokens: int) -> int:
    """Return the length of `cu_seqlens` for `rows` windows.

    That is every row's start and end, and as many boundaries as can fall inside.

    Args:
        rows: windows of the micro-batch (M).
        seq_len: tokens of a window (T).
        min_tokens: shortest segment.
    """
    return rows * (1 + (seq_len - 1) // min_tokens) + 1


def pack(windows: np.ndarray, eos_id: int, *, isolate: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and labels of windows.

    Args:
        windows: [N, T+1], any unsigned dtype.
        eos_id: id that ends every document.
        isolate: give no label where the target belongs to another document than its context.

    Returns:
        tokens [N, T] and labels [N, T], int64; a label is the next token, or -100.
    """
    wide = windows.astype(np.int64)
    # copies, since views of one window would change each other
    tokens, labels = wide[:, :-1].copy(), wide[:, 1:].copy()
    if isolate:
        labels[tokens == eos_id] = IGNORE
    return tokens, labels


def document_boundaries(tokens: np.ndarray, eos_id: int, min_tokens: int) -> np.ndarray:
    """Return `cu_seqlens` of one micro-batch: where documents start in the flattened [M·T] axis.

    A document starts after each EOS, and at each row. A start closer than `min_tokens` to the one
    before, in its row, is left out: the short document shares the state of the one after it (its
    labels stay isolated). So the length below always suffices, and kernels, which specialise on it,
    are compiled once.

    Args:
        tokens: [M, T].
        eos_id: id that ends every document.
        min_tokens: shortest segment; 1 keeps every boundary.

    Returns:
        int32 [boundary_slots(M, T, min_tokens)], rising from 0 to M·T, then M·T repeated.
    """
    rows, seq_len = tokens.shape
    starts = np.flatnonzero(tokens.reshape(-1) == eos_id) + 1
    starts = np.union1d(starts, np.arange(0, rows * seq_len + 1, seq_len))
    if (np.diff(starts) < min_tokens).any():
        starts = _drop_close(starts, seq_len, min_tokens)
    out = np.full(boundary_slots(rows, seq_len, min_tokens), rows * seq_len, dtype=np.int32)
    out[: len(starts)] = starts
    return out


def _drop_close(starts: np.ndarray, seq_len: int, min_tokens: int) -> np.ndarray:
    kept = []
    for start in starts.tolist():
        if start % seq_len == 0 or start - kept[-1] >= min_tokens:
            kept.append(start)
    return np.array(kept)


def digests(windows: np.ndarray) -> np.ndarray:
    """Hash each window's tokens to 64 bits (XXH3), whatever dtype they are stored in: int64 [N]."""
    wide = np.ascontiguousarray(windows, dtype="<u4")
    found = np.fromiter(
        (xxhash.xxh3_64_intdigest(row) for row in wide), dtype=np.uint64, count=len(wide)
    )
    return found.view(np.int64)
