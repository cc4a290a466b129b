"""The preconditioner: its diagonal before the recurrence, and its gradients after the recurrence's.

``A_t = e^{gP_t} A_{t-1} + bP_t k_t^2`` is linear, so a chunk maps A -> e^{c_C} A + Z with ``Z = sum_j e^{c_C - c_j} b_j
k_j^2`` and c the cumulative gP: summaries of all chunks, one scan over them, then every chunk by itself. Backward, with
a_t = dL/dA_t by its direct use, the adjoint D_t = a_t + e^{gP_{t+1}} D_{t+1} runs over chunks the same way, from the last,
``carry -> e^{c_C} carry + sum_t e^{c_t} a_t``, and::

    dk_t += 2 b_t k_t D_t      dbP_t = <D_t, k_t^2>      dgP_t = <D_t, A_t - b_t k_t^2>
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import (
    C,
    decay_above,
    decay_below,
    diagonal,
    diagonal_slope,
    dot,
    inverse_norm,
    last_of,
    locate_chunk,
    locate_sequence,
)
from pdn.ops.triton.gates import decay_gradient, decay_of, gain_gradient, load_gain, load_rate

SCAN = 32  # chunks a step of the scan over chunks


@triton.jit(do_not_specialize=["T"])
def summary_kernel(
    k, gP, A_log, dt_bias, bP, chunks, Z, gates, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    L2NORM: tl.constexpr, RAW: tl.constexpr, RANGE: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Z [NT, HV, K] of every chunk, and its gates [NT, HV, 3, C]: bP, the cumulative gP, and the keys' inverse norms."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    rows = (start + step).to(tl.int64)
    live = rows < end
    cols = tl.arange(0, BK)
    tile = (rows * (HV // GROUP) + h // GROUP)[:, None] * K + cols[None, :]
    x = tl.load(k + tile, mask=live[:, None] & (cols < K)[None, :], other=0.0)
    norm = inverse_norm(x, ACC, L2NORM)
    x = x.to(ACC)
    at = rows * HV + h
    b = load_gain(bP, at, live, RANGE, ACC)
    bias = tl.load(dt_bias + h).to(ACC) if RAW else 0.0
    g = decay_of(tl.load(gP + at, mask=live, other=0.0).to(ACC), load_rate(A_log, h, RAW, ACC), bias, RAW)
    c = tl.cumsum(tl.where(live, g, 0.0), 0)  # padding neither decays nor adds
    last = last_of(c)
    z = tl.sum((b * tl.exp(last - c) * norm * norm)[:, None] * x * x, 0)
    tl.store(Z + (i * HV + h) * K + cols, z, mask=cols < K)
    to = gates + (i * HV + h) * 3 * C + step
    tl.store(to, b)
    tl.store(to + C, c)
    tl.store(to + 2 * C, norm)


@triton.jit(do_not_specialize=["T"])
def scan_kernel(
    Z, gates, initial, offsets, before, final, T,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """``x -> e^{c_C} x + Z`` over the chunks of a sequence: ``before`` [NT, HV, K] each of them, and ``final`` [N, HV, K].

    REVERSE runs from the last chunk to the first.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, count = locate_sequence(n, offsets, T, 0, VARLEN)
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
        t = tl.load(gates + (i * HV + h) * 3 * C + 2 * C - 1, mask=live, other=0.0)
        c = tl.cumsum(t, 0)
        # e^{c_i - t_i} x + sum_{j < i} e^{c_i - t_i - c_j} z_j is the value before chunk i.
        exclusive = c - t
        weight = tl.exp(tl.where(step[:, None] > step[None, :], exclusive[:, None] - c[None, :], float("-inf")))
        y = tl.sum(weight[:, :, None] * z[None, :, :], 1) + tl.exp(exclusive)[:, None] * x[None, :]
        tl.store(before + (i * HV + h)[:, None] * K + cols[None, :], y, mask=live[:, None] & keep[None, :])
        end = tl.sum(tl.where(step == L - 1, c, 0.0), 0)
        x = tl.exp(end) * x + tl.sum(tl.exp(end - c)[:, None] * z, 0)
    tl.store(final + (n * HV + h) * K + cols, x, mask=keep)


@triton.jit
def load_gates(gates, slot):
    """Gain, cumulative log-decay and key norm [C] of a chunk."""
    at = gates + slot * 3 * C + tl.arange(0, C)
    return tl.load(at), tl.load(at + C), tl.load(at + 2 * C)


@triton.jit(do_not_specialize=["T"])
def rescale_kernel(
    x, k, mu, A_in, gates, chunks, out, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """B times the raw x (the key or the query) [M, HV, K]."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    rows = (start + step).to(tl.int64)
    live = rows < end
    cols = tl.program_id(2) * BK + tl.arange(0, BK)
    keep = live[:, None] & (cols < K)[None, :]
    tile = (rows * (HV // GROUP) + h // GROUP)[:, None] * K + cols[None, :]
    b, c, norm = load_gates(gates, i * HV + h)
    unit = norm[:, None] * tl.load(k + tile, mask=keep, other=0.0).to(ACC)
    A0 = tl.load(A_in + (i * HV + h) * K + cols, mask=cols < K, other=0.0)
    A = dot(decay_below(c, ACC), b[:, None] * unit * unit, PRECISION) + tl.exp(c)[:, None] * A0[None, :]
    m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)
    y = diagonal(A, m, INVERSE, LOG_BOUND, EPS) * tl.load(x + tile, mask=keep, other=0.0).to(ACC)
    tl.store(out + (rows * HV + h)[:, None] * K + cols[None, :], y.to(out.dtype.element_ty), mask=keep)


@triton.jit
def direct_adjoint(
    unit, x, d, A, m, keep, INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr
):  # fmt: skip
    """B, dL/dr and a = dL/dA by its direct use [C, BK], of d = dL/d(B x) with x normalised."""
    B = diagonal(A, m, INVERSE, LOG_BOUND, EPS)
    d_r = tl.where(keep, d * x * diagonal_slope(A, B, m, INVERSE, LOG_BOUND, EPS), 0.0)
    return B, d_r, d_r / (A + EPS)


@triton.jit(do_not_specialize=["T"])
def adjoint_summary_kernel(
    x, k, d, mu, A_in, table_norm, gates, chunks, Z, dmu, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NORM_STRIDE: tl.constexpr,
    INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_t e^{c_t} a_t [NT, HV, K] of every chunk, and its part of dmu [NT, HV, blocks of K].

    x: the raw key or query; d [M, HV, K]: the gradient of its rescaled form; table_norm: its factor [C] in every
    chunk's table, NORM_STRIDE apart.
    """
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    rows = (start + step).to(tl.int64)
    live = rows < end
    cols = tl.program_id(2) * BK + tl.arange(0, BK)
    keep = live[:, None] & (cols < K)[None, :]
    tile = (rows * (HV // GROUP) + h // GROUP)[:, None] * K + cols[None, :]
    slot = i * HV + h
    b, c, norm = load_gates(gates, slot)
    unit = norm[:, None] * tl.load(k + tile, mask=keep, other=0.0).to(ACC)
    xs = tl.load(table_norm + slot * NORM_STRIDE + step)[:, None] * tl.load(x + tile, mask=keep, other=0.0).to(ACC)
    dx = tl.load(d + (rows * HV + h)[:, None] * K + cols[None, :], mask=keep, other=0.0).to(ACC)
    A0 = tl.load(A_in + slot * K + cols, mask=cols < K, other=0.0)
    A = dot(decay_below(c, ACC), b[:, None] * unit * unit, PRECISION) + tl.exp(c)[:, None] * A0[None, :]
    m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)
    _, d_r, a = direct_adjoint(unit, xs, dx, A, m, keep, INVERSE, LOG_BOUND, EPS)
    tl.store(Z + slot * K + cols, tl.sum(tl.exp(c)[:, None] * a, 0), mask=cols < K)
    if not INVERSE:
        tl.store(dmu + slot * tl.num_programs(2) + tl.program_id(2), -tl.sum(tl.sum(d_r, 1), 0))


@triton.jit(do_not_specialize=["T"])
def finish_kernel(
    q, k, dq, dk, dwrite, gP, A_log, dt_bias, mu, A_in, carry, table_norm, gates, chunks, dgP, dbP, d_parameters, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NORM_STRIDE: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, ON_QUERY: tl.constexpr, RAW: tl.constexpr, RANGE: tl.constexpr,
    INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dgP, dbP [M, HV] (RAW: and the chunk's part of dA_log and ddt_bias [NT, HV, 2]), and dk (and dq, ON_QUERY) of the raw
    key from the recurrence's share of them.

    In: dk [M, HV, K] of the normalised key as the recurrence reads it, dwrite of the rescaled key; ON_QUERY: dk of the
    normalised key in all, dq of the rescaled query. table_norm: the query's factor.
    """
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    rows = (start + step).to(tl.int64)
    live = rows < end
    slot = i * HV + h
    b, c, norm = load_gates(gates, slot)
    norm_q = tl.load(table_norm + slot * NORM_STRIDE + step)
    m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)
    keys = (rows * (HV // GROUP) + h // GROUP)[:, None] * K
    own = (rows * HV + h)[:, None] * K
    remain = tl.exp(last_of(c) - c)
    below = decay_below(c, ACC)
    above = decay_above(c, ACC)
    along_k = tl.zeros([C], dtype=ACC)
    along_q = tl.zeros([C], dtype=ACC)
    d_b = tl.zeros([C], dtype=ACC)
    d_g = tl.zeros([C], dtype=ACC)
    for base in range(0, K, BK):
        cols = base + tl.arange(0, BK)
        keep_k = cols < K
        keep = live[:, None] & keep_k[None, :]
        unit = norm[:, None] * tl.load(k + keys + cols[None, :], mask=keep, other=0.0).to(ACC)
        A0 = tl.load(A_in + slot * K + cols, mask=keep_k, other=0.0)
        adjoint = tl.load(carry + slot * K + cols, mask=keep_k, other=0.0)
        update = unit * unit
        A = dot(below, b[:, None] * update, PRECISION) + tl.exp(c)[:, None] * A0[None, :]
        d_key = tl.load(dk + own + cols[None, :], mask=keep, other=0.0).to(ACC)
        if ON_QUERY:
            xs = norm_q[:, None] * tl.load(q + keys + cols[None, :], mask=keep, other=0.0).to(ACC)
            dx = tl.load(dq + own + cols[None, :], mask=keep, other=0.0).to(ACC)
            B, _, a = direct_adjoint(unit, xs, dx, A, m, keep, INVERSE, LOG_BOUND, EPS)
            along_q += tl.sum(xs * B * dx, 1)
            tl.store(dq + own + cols[None, :], (B * dx).to(dq.dtype.element_ty), mask=keep)
        else:
            dx = tl.load(dwrite + own + cols[None, :], mask=keep, other=0.0).to(ACC)
            B, _, a = direct_adjoint(unit, unit, dx, A, m, keep, INVERSE, LOG_BOUND, EPS)
            d_key += B * dx
        D = dot(above, a, PRECISION) + remain[:, None] * adjoint[None, :]
        d_b += tl.sum(D * update, 1)
        d_g += tl.sum(D * (A - b[:, None] * update), 1)
        d_key += 2.0 * b[:, None] * unit * D
        along_k += tl.sum(unit * d_key, 1)
        tl.store(dk + own + cols[None, :], d_key.to(dk.dtype.element_ty), mask=keep)
    at = rows * HV + h
    tl.store(dbP + at, gain_gradient(d_b, b, RANGE), mask=live)
    bias = tl.load(dt_bias + h).to(ACC) if RAW else 0.0
    x = tl.load(gP + at, mask=live, other=0.0).to(ACC)
    d_x, d_log_rate = decay_gradient(tl.where(live, d_g, 0.0), x, load_rate(A_log, h, RAW, ACC), bias, RAW)
    tl.store(dgP + at, d_x, mask=live)
    if RAW:
        tl.store(d_parameters + slot * 2, tl.sum(d_log_rate, 0))
        tl.store(d_parameters + slot * 2 + 1, tl.sum(d_x, 0))
    if L2NORM:
        tl.debug_barrier()  # the second pass reads what the first has written
        for base in range(0, K, BK):
            cols = base + tl.arange(0, BK)
            keep = live[:, None] & (cols < K)[None, :]
            unit = norm[:, None] * tl.load(k + keys + cols[None, :], mask=keep, other=0.0).to(ACC)
            d_key = tl.load(dk + own + cols[None, :], mask=keep, other=0.0).to(ACC)
            d_key = norm[:, None] * (d_key - along_k[:, None] * unit)
            tl.store(dk + own + cols[None, :], d_key.to(dk.dtype.element_ty), mask=keep)
    if ON_QUERY:
        tl.debug_barrier()
        for base in range(0, K, BK):
            cols = base + tl.arange(0, BK)
            keep = live[:, None] & (cols < K)[None, :]
            d_query = tl.load(dq + own + cols[None, :], mask=keep, other=0.0).to(ACC)
            if L2NORM:
                xs = norm_q[:, None] * tl.load(q + keys + cols[None, :], mask=keep, other=0.0).to(ACC)
                d_query -= (along_q / (SCALE * SCALE))[:, None] * xs
            tl.store(dq + own + cols[None, :], (norm_q[:, None] * d_query).to(dq.dtype.element_ty), mask=keep)
