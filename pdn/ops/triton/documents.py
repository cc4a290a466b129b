"""Where the chunks and segments of documents lie, from ``cu_seqlens`` and on the device, so that no
length is read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pdn.ops.triton.common import C, await_inputs
from pdn.ops.triton.compiled import cdiv, run

SLOTS = 64  # rows of the tables that a program fills
DOCUMENTS = 128  # documents that it looks through at a time


@triton.jit(do_not_specialize=["NT", "N", "wholes"])
def tables_kernel(
    cu_seqlens, chunks, offsets, segments, NT, N, wholes,
    SEGMENT: tl.constexpr, SLOTS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The tables of ``document_tables``; SEGMENT = 0: without segments.

    A program counts, for each of its slots, the documents that end before it and what these hold.
    """
    await_inputs()
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    document = tl.zeros([SLOTS], dtype=tl.int32)
    before = tl.zeros([SLOTS], dtype=tl.int32)  # chunks of earlier documents
    owner = tl.zeros([SLOTS], dtype=tl.int32)  # the document of a segment
    wholes_before = tl.zeros([SLOTS], dtype=tl.int32)
    chunks_before = tl.zeros([SLOTS], dtype=tl.int32)
    total = tl.full([], 0, tl.int32)
    total_wholes = tl.full([], 0, tl.int32)
    for base in range(0, N, DOCUMENTS):
        d = base + tl.arange(0, DOCUMENTS)
        live = d < N
        begin = tl.load(cu_seqlens + d, mask=live, other=0)
        count = (tl.load(cu_seqlens + d + 1, mask=live, other=0) - begin + C - 1) // C
        ends = total + tl.cumsum(count, 0)
        past = live[None, :] & (ends[None, :] <= slot[:, None])
        document += tl.sum(past.to(tl.int32), 1)
        before += tl.sum(tl.where(past, count[None, :], 0), 1)
        rest = tl.zeros([DOCUMENTS], dtype=tl.int32)
        if SEGMENT > 0:
            rest = tl.maximum(count - 1, 0) // SEGMENT
            wholes_end = total_wholes + tl.cumsum(rest, 0)
            past = live[None, :] & (wholes_end[None, :] <= slot[:, None])
            owner += tl.sum(past.to(tl.int32), 1)
            wholes_before += tl.sum(tl.where(past, rest[None, :], 0), 1)
            chunks_before += tl.sum(tl.where(past, count[None, :], 0), 1)
        if tl.program_id(0) == 0:
            tl.store(offsets + d, ends - count, mask=live)
            if SEGMENT > 0:
                row = segments + 4 * (wholes + d)
                tl.store(row, d, mask=live)
                tl.store(row + 1, ends - count + rest * SEGMENT, mask=live)
                tl.store(row + 2, count - rest * SEGMENT, mask=live)
                tl.store(row + 3, tl.where(rest > 0, wholes_end - 1, -1), mask=live)
        total += tl.sum(count, 0)
        total_wholes += tl.sum(rest, 0)
    if tl.program_id(0) == 0:
        tl.store(offsets + N, total)
    used = slot < total
    begin = tl.load(cu_seqlens + document, mask=used, other=0)
    end = tl.load(cu_seqlens + document + 1, mask=used, other=0)
    start = begin + (slot - before) * C
    keep = slot < NT
    tl.store(chunks + 2 * slot, tl.where(used, start, 0), mask=keep)
    tl.store(chunks + 2 * slot + 1, tl.where(used, tl.minimum(start + C, end), 0), mask=keep)
    if SEGMENT > 0:
        used = slot < total_wholes
        m = slot - wholes_before
        keep = slot < wholes
        row = segments + 4 * slot
        tl.store(row, tl.where(used, owner, 0), mask=keep)
        tl.store(row + 1, tl.where(used, chunks_before + m * SEGMENT, 0), mask=keep)
        tl.store(row + 2, tl.where(used, SEGMENT, 0), mask=keep)
        tl.store(row + 3, tl.where(used & (m > 0), slot - 1, -1), mask=keep)


def document_tables(
    cu_seqlens: Tensor, NT: int, segment: int, wholes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Say where the chunks of all documents lie and, where these are cut, their segments.

    Args:
        cu_seqlens: [N + 1] int32, the documents' boundaries on the flattened token axis.
        NT: rows of the first table, at least as many as there are chunks.
        segment: chunks of a segment, or 0 if documents are not cut.
        wholes: segments, at most, that have another after them in their document.

    Returns:
        chunks [NT, 2] int32: the first token and the one after the last; 0, 0 where a row is not
        used. offsets [N + 1] int32: the first chunk of every document, and the number of all.
        segments [wholes + N, 4] int32: document, first chunk, number of chunks, and the segment
        before, -1 for none. First those that have another after them, then the last one of every
        document, which has all chunks of a short one; empty where documents are not cut.
    """
    N = cu_seqlens.shape[0] - 1
    chunks, offsets = cu_seqlens.new_empty(NT, 2), cu_seqlens.new_empty(N + 1)
    segments = cu_seqlens.new_empty((wholes + N, 4) if segment else 0)
    run(tables_kernel, (cdiv(max(NT, wholes), SLOTS),),
        cu_seqlens.contiguous(), chunks, offsets, segments, NT, N, wholes,
        SEGMENT=segment, SLOTS=SLOTS, DOCUMENTS=DOCUMENTS, num_warps=4,
    )  # fmt: skip
    return chunks, offsets, segments
