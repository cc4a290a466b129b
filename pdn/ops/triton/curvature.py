"""The preconditioner's accumulator over chunks: summaries, the scan over them, and the backward fix-up.

``A_t = e^{gP_t} A_{t-1} + bP_t k_t^2`` is linear, so a chunk maps A -> e^{c_C} A + Z with ``Z = sum_j e^{c_C - c_j} b_j
k_j^2``. Backward, with a_t = dL/dA_t by its direct use, the adjoint D_t = a_t + e^{gP_{t+1}} D_{t+1} runs over chunks the
same way: ``carry -> e^{c_C} carry + sum_t e^{c_t} a_t``. What the carry adds inside a chunk needs no A_t::

    w_t = e^{c_C - c_t}   y_t = <carry, k_t^2>   Q_t = e^{c_t} <carry, A_in> + sum_{j<=t} e^{c_t - c_j} b_j y_j
    dk_t += 2 b_t w_t k_t carry      db_t += w_t y_t      dgP_t += w_t (Q_t - b_t y_t)
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import MIN_LOG_DECAY, C, decay_below, inverse_norm, last_of, locate_chunk, locate_sequence

SCAN = 32  # chunks a step of the scan over chunks


@triton.jit
def load_chunk_gates(gP, bP, rows, live, h, heads, ACC: tl.constexpr):
    """Gain and cumulative log-decay [C] of the preconditioner; padding neither decays nor adds."""
    g = tl.load(gP + rows * heads + h, mask=live, other=0.0).to(ACC)
    b = tl.load(bP + rows * heads + h, mask=live, other=0.0).to(ACC)
    return b, tl.cumsum(tl.maximum(g, MIN_LOG_DECAY), 0)


@triton.jit
def summary_kernel(
    k, gP, bP, chunks, Z, total, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    L2NORM: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Z [NT, HV, K] and c_C [NT, HV] of every chunk."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    rows = (start + tl.arange(0, C)).to(tl.int64)
    live = rows < end
    cols = tl.arange(0, BK)
    tile = (rows * (HV // GROUP) + h // GROUP)[:, None] * K + cols[None, :]
    x = tl.load(k + tile, mask=live[:, None] & (cols < K)[None, :], other=0.0)
    norm = inverse_norm(x, ACC, L2NORM)
    x = x.to(ACC) * norm[:, None]
    b, c = load_chunk_gates(gP, bP, rows, live, h, HV, ACC)
    last = last_of(c)
    z = tl.sum((b * tl.exp(last - c))[:, None] * x * x, 0)
    tl.store(Z + (i * HV + h) * K + cols, z, mask=cols < K)
    tl.store(total + i * HV + h, last)


@triton.jit
def scan_kernel(
    Z, total, initial, offsets, before, final, T,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """``x -> e^total x + Z`` over the chunks of a sequence: ``before`` [NT, HV, K] each of them, and ``final`` [N, HV, K].

    REVERSE runs from the last chunk to the first.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, count = locate_sequence(n, offsets, T, VARLEN)
    cols = tl.program_id(2) * BK + tl.arange(0, BK)
    keep = cols < K
    x = tl.zeros([BK], dtype=ACC)
    if HAS_INITIAL:
        x = tl.load(initial + (n * HV + h) * K + cols, mask=keep, other=0.0).to(ACC)
    step = tl.arange(0, L)
    for base in range(0, count, L):
        at = base + step
        live = at < count
        i = (first + (count - 1 - at if REVERSE else at)).to(tl.int64)
        z = tl.load(Z + (i * HV + h)[:, None] * K + cols[None, :], mask=live[:, None] & keep[None, :], other=0.0)
        t = tl.load(total + i * HV + h, mask=live, other=0.0)
        c = tl.cumsum(t, 0)
        # y_i = e^{c_i - t_i} x + sum_{j < i} e^{c_i - t_i - c_j} z_j is the value before chunk i.
        exclusive = c - t
        weight = tl.exp(tl.where(step[:, None] > step[None, :], exclusive[:, None] - c[None, :], float("-inf")))
        y = tl.sum(weight[:, :, None] * z[None, :, :], 1) + tl.exp(exclusive)[:, None] * x[None, :]
        tl.store(before + (i * HV + h)[:, None] * K + cols[None, :], y, mask=live[:, None] & keep[None, :])
        end = tl.sum(tl.where(step == L - 1, c, 0.0), 0)
        x = tl.exp(end) * x + tl.sum(tl.exp(end - c)[:, None] * z, 0)
    tl.store(final + (n * HV + h) * K + cols, x, mask=keep)


@triton.jit
def fixup_kernel(
    k, gP, bP, A_in, carry, chunks, dk, dgP, dbP, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    L2NORM: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds what the carry contributes to dgP, dbP and dk, and takes dk through the norm to the raw key."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    rows = (start + tl.arange(0, C)).to(tl.int64)
    live = rows < end
    cols = tl.arange(0, BK)
    keep = live[:, None] & (cols < K)[None, :]
    x = tl.load(k + (rows * (HV // GROUP) + h // GROUP)[:, None] * K + cols[None, :], mask=keep, other=0.0)
    norm = inverse_norm(x, ACC, L2NORM)
    x = x.to(ACC) * norm[:, None]
    b, c = load_chunk_gates(gP, bP, rows, live, h, HV, ACC)
    w = tl.exp(last_of(c) - c)
    adjoint = tl.load(carry + (i * HV + h) * K + cols, mask=cols < K, other=0.0)
    A = tl.load(A_in + (i * HV + h) * K + cols, mask=cols < K, other=0.0)
    y = tl.sum(x * x * adjoint[None, :], 1)
    Q = tl.exp(c) * tl.sum(adjoint * A, 0) + tl.sum(decay_below(c, ACC) * (b * y)[None, :], 1)
    at = dk + (rows * HV + h)[:, None] * K + cols[None, :]
    dx = tl.load(at, mask=keep, other=0.0).to(ACC) + (2.0 * b * w)[:, None] * x * adjoint[None, :]
    if L2NORM:
        dx = norm[:, None] * (dx - x * tl.sum(x * dx, 1)[:, None])
    tl.store(at, dx.to(dk.dtype.element_ty), mask=keep)
    at = rows * HV + h
    tl.store(dbP + at, tl.load(dbP + at, mask=live, other=0.0) + w * y, mask=live)
    tl.store(dgP + at, tl.load(dgP + at, mask=live, other=0.0) + w * (Q - b * y), mask=live)
