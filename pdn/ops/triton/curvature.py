"""The preconditioner: its diagonal before the recurrence, and its gradients after the recurrence's.

``A_t = e^{gP_t} A_{t-1} + bP_t k_t^2`` is linear, so a chunk maps A -> e^{c_C} A + Z with ``Z = sum_j e^{c_C - c_j} b_j
k_j^2`` and c the cumulative gP: summaries of all chunks, one scan over them, then every chunk by itself. Backward, with
a_t = dL/dA_t by its direct use, the adjoint D_t = a_t + e^{gP_{t+1}} D_{t+1} runs over chunks the same way, from the last,
``carry -> e^{c_C} carry + sum_t e^{c_t} a_t``, and::

    dk_t += 2 b_t k_t D_t      dbP_t = <D_t, k_t^2>      dgP_t = <D_t, A_t - b_t k_t^2>

Within a chunk one warp goes from token to token: every lane owns some channels for the whole chunk, so that A and D stay
in its registers, nothing is exchanged but the sums over channels, and the kernels only stream.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import C, dot, exp, inverse, inverse_norm, last_of, locate_chunk, locate_sequence, log
from pdn.ops.triton.gates import decay_gradient, decay_of, gain_gradient, load_gain, load_rate

SCAN = 32  # chunks a step of the scan over chunks

# The preconditioner's per-token scalars, a [NT, HV, GATES, C] table.
GAIN = tl.constexpr(0)
DECAY = tl.constexpr(1)  # e^gP
KEY_NORM = tl.constexpr(2)
DECAY_SUM = tl.constexpr(3)  # c
NUM_GATES = 4
GATES = tl.constexpr(NUM_GATES)


@triton.jit(do_not_specialize=["T"])
def summary_kernel(
    k, gP, A_log, dt_bias, bP, chunks, Z, gates, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    L2NORM: tl.constexpr, RAW: tl.constexpr, RANGE: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Z [NT, HV, K] of every chunk, and its table of gates [NT, HV, GATES, C]."""
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
    g = tl.where(live, g, 0.0)  # padding neither decays nor adds
    c = tl.cumsum(g, 0)
    last = last_of(c)
    z = tl.sum((b * exp(last - c) * norm * norm)[:, None] * x * x, 0)
    tl.store(Z + (i * HV + h) * K + cols, z, mask=cols < K)
    to = gates + (i * HV + h) * GATES * C + step
    tl.store(to + GAIN * C, b)
    tl.store(to + DECAY * C, exp(g))
    tl.store(to + KEY_NORM * C, norm)
    tl.store(to + DECAY_SUM * C, c)


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
        t = tl.load(gates + (i * HV + h) * GATES * C + DECAY_SUM * C + C - 1, mask=live, other=0.0)
        c = tl.cumsum(t, 0)
        # e^{c_i - t_i} x + sum_{j < i} e^{c_i - t_i - c_j} z_j is the value before chunk i.
        exclusive = c - t
        weight = exp(tl.where(step[:, None] > step[None, :], exclusive[:, None] - c[None, :], float("-inf")))
        # Written as a sum of products, Triton makes it a product of its own, in tf32.
        y = dot(weight, z, "bf16x6") + exp(exclusive)[:, None] * x[None, :]
        tl.store(before + (i * HV + h)[:, None] * K + cols[None, :], y, mask=live[:, None] & keep[None, :])
        end = tl.sum(tl.where(step == L - 1, c, 0.0), 0)
        x = exp(end) * x + tl.sum(exp(end - c)[:, None] * z, 0)
    tl.store(final + (n * HV + h) * K + cols, x, mask=keep)


@triton.jit
def load_row(x, t, cols, HV: tl.constexpr, GROUP: tl.constexpr, h, K: tl.constexpr, live, ACC: tl.constexpr):
    """Row t of x [M, HV // GROUP, K]: [BK], zeros where not live."""
    at = (t.to(tl.int64) * (HV // GROUP) + h // GROUP) * K + cols
    return tl.load(x + at, mask=(cols < K) & live, other=0.0).to(ACC)


@triton.jit
def diagonal(A, mu, INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr):
    """The preconditioner's B of A, elementwise."""
    if INVERSE:
        return inverse(A + EPS)
    else:
        r = log(A + EPS) - mu
        return exp(-LOG_BOUND * r * inverse(1.0 + tl.abs(r)))


@triton.jit(do_not_specialize=["T"])
def rescale_kernel(
    x, k, mu, A_in, gates, chunks, out, A_out, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, ON_QUERY: tl.constexpr, SAVE: tl.constexpr,
    INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """B times the raw x (the key or, ON_QUERY, the query) [M, HV, K], and, SAVE, A of every token [M, HV, K]."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    cols = tl.arange(0, BK)
    slot = i * HV + h
    row_gates = gates + slot * GATES * C
    m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)
    A = tl.load(A_in + slot * K + cols, mask=cols < K, other=0.0)
    kx = load_row(k, start, cols, HV, GROUP, h, K, start < end, ACC)
    px = kx
    if ON_QUERY:
        px = load_row(x, start, cols, HV, GROUP, h, K, start < end, ACC)
    for n in range(0, end - start):
        t = start + n
        next_k = load_row(k, t + 1, cols, HV, GROUP, h, K, t + 1 < end, ACC)
        next_p = next_k
        if ON_QUERY:
            next_p = load_row(x, t + 1, cols, HV, GROUP, h, K, t + 1 < end, ACC)
        at = row_gates + n
        unit = tl.load(at + KEY_NORM * C) * kx
        A = tl.load(at + DECAY * C) * A + tl.load(at + GAIN * C) * unit * unit
        to = (t.to(tl.int64) * HV + h) * K + cols
        if SAVE:
            tl.store(A_out + to, A.to(A_out.dtype.element_ty), mask=cols < K)
        y = diagonal(A, m, INVERSE, LOG_BOUND, EPS) * px
        tl.store(out + to, y.to(out.dtype.element_ty), mask=cols < K)
        kx = next_k
        px = next_p


@triton.jit
def direct_adjoint(x, d, A, m, INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr):
    """B, dL/dr and a = dL/dA by its direct use [BK], of d = dL/d(B x)."""
    A += EPS
    if INVERSE:
        B = inverse(A)
        d_r = -d * x * B
        return B, d_r, d_r * B
    else:
        r = log(A) - m
        s = 1.0 + tl.abs(r)
        both = inverse(s * A)  # one of two
        squash = both * A
        B = exp(-LOG_BOUND * r * squash)
        d_r = -LOG_BOUND * d * x * B * squash * squash
        return B, d_r, d_r * both * s


@triton.jit(do_not_specialize=["T"])
def adjoint_summary_kernel(
    x, d, mu, A_tokens, gates, chunks, Z, dmu, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sum_t e^{c_t} a_t [NT, HV, K] of every chunk, and its part of dmu [NT, HV].

    x: the raw key or query; d [M, HV, K]: the gradient of its raw rescaled form.
    """
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    cols = tl.arange(0, BK)
    slot = i * HV + h
    row_gates = gates + slot * GATES * C
    m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)
    adjoint = tl.zeros([BK], dtype=ACC)
    sum_r = tl.zeros([BK], dtype=ACC)
    xs = load_row(x, end - 1, cols, HV, GROUP, h, K, start < end, ACC)
    dx = load_row(d, end - 1, cols, HV, 1, h, K, start < end, ACC)
    A = load_row(A_tokens, end - 1, cols, HV, 1, h, K, start < end, ACC)
    for back in range(0, end - start):
        t = end - 1 - back
        next_x = load_row(x, t - 1, cols, HV, GROUP, h, K, t > start, ACC)
        next_d = load_row(d, t - 1, cols, HV, 1, h, K, t > start, ACC)
        next_A = load_row(A_tokens, t - 1, cols, HV, 1, h, K, t > start, ACC)
        _, d_r, a = direct_adjoint(xs, dx, A, m, INVERSE, LOG_BOUND, EPS)
        sum_r += d_r
        adjoint = tl.load(row_gates + DECAY * C + (t - start)) * (adjoint + a)
        xs = next_x
        dx = next_d
        A = next_A
    tl.store(Z + slot * K + cols, adjoint, mask=cols < K)
    if not INVERSE:
        tl.store(dmu + slot, -tl.sum(sum_r, 0))


@triton.jit(do_not_specialize=["T"])
def finish_kernel(
    q, k, dq, dk, dwrite, gP, A_log, dt_bias, mu, A_tokens, carry, query_norm, gates, chunks, dgP, dbP, d_parameters, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NORM_STRIDE: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, ON_QUERY: tl.constexpr, RAW: tl.constexpr, RANGE: tl.constexpr,
    INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dgP, dbP [M, HV] (RAW: and the chunk's part of dA_log and ddt_bias [NT, HV, 2]), and dk (and dq, ON_QUERY) of the raw
    key from the recurrence's share of them.

    In: dk [M, HV, K] of the raw key without its norm's gradient, dwrite of the raw rescaled key; ON_QUERY: dk in all, dq
    of the raw rescaled query, and query_norm, the query's factors [C] in every chunk's table, NORM_STRIDE apart.
    """
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    cols = tl.arange(0, BK)
    slot = i * HV + h
    row_gates = gates + slot * GATES * C
    m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)
    adjoint = tl.load(carry + slot * K + cols, mask=cols < K, other=0.0)
    d_b = tl.zeros([C], dtype=ACC)
    d_g = tl.zeros([C], dtype=ACC)
    rescaled = dq if ON_QUERY else dwrite
    kx = load_row(k, end - 1, cols, HV, GROUP, h, K, start < end, ACC)
    dx = load_row(rescaled, end - 1, cols, HV, 1, h, K, start < end, ACC)
    A = load_row(A_tokens, end - 1, cols, HV, 1, h, K, start < end, ACC)
    d_key = load_row(dk, end - 1, cols, HV, 1, h, K, start < end, ACC)
    xs = kx
    if ON_QUERY:
        xs = load_row(q, end - 1, cols, HV, GROUP, h, K, start < end, ACC)
    for back in range(0, end - start):
        t = end - 1 - back
        next_k = load_row(k, t - 1, cols, HV, GROUP, h, K, t > start, ACC)
        next_d = load_row(rescaled, t - 1, cols, HV, 1, h, K, t > start, ACC)
        next_A = load_row(A_tokens, t - 1, cols, HV, 1, h, K, t > start, ACC)
        next_d_key = load_row(dk, t - 1, cols, HV, 1, h, K, t > start, ACC)
        next_x = next_k
        if ON_QUERY:
            next_x = load_row(q, t - 1, cols, HV, GROUP, h, K, t > start, ACC)
        at = row_gates + (t - start)
        to = (t.to(tl.int64) * HV + h) * K + cols
        b = tl.load(at + GAIN * C)
        norm = tl.load(at + KEY_NORM * C)
        B, _, a = direct_adjoint(xs, dx, A, m, INVERSE, LOG_BOUND, EPS)
        D = adjoint + a
        unit = norm * kx
        update = unit * unit
        here = step == t - start
        of_b = tl.sum(D * update, 0)
        d_b = tl.where(here, of_b, d_b)
        d_g = tl.where(here, tl.sum(D * A, 0) - b * of_b, d_g)
        d_key += 2.0 * b * norm * unit * D
        if ON_QUERY:
            d_query = B * dx
            if L2NORM:
                factor = tl.load(query_norm + slot * NORM_STRIDE + (t - start)) / SCALE
                d_query -= factor * factor * tl.sum(xs * d_query, 0) * xs
            tl.store(dq + to, d_query.to(dq.dtype.element_ty), mask=cols < K)
        else:
            d_key += B * dx
        if L2NORM:
            d_key -= norm * norm * tl.sum(kx * d_key, 0) * kx
        tl.store(dk + to, d_key.to(dk.dtype.element_ty), mask=cols < K)
        adjoint = tl.load(at + DECAY * C) * D
        kx = next_k
        dx = next_d
        A = next_A
        d_key = next_d_key
        xs = next_x
    rows = (start + step).to(tl.int64)
    live = rows < end
    at = rows * HV + h
    b = tl.load(row_gates + GAIN * C + step)
    tl.store(dbP + at, gain_gradient(d_b, b, RANGE), mask=live)
    bias = tl.load(dt_bias + h).to(ACC) if RAW else 0.0
    x = tl.load(gP + at, mask=live, other=0.0).to(ACC)
    d_x, d_log_rate = decay_gradient(tl.where(live, d_g, 0.0), x, load_rate(A_log, h, RAW, ACC), bias, RAW)
    tl.store(dgP + at, d_x, mask=live)
    if RAW:
        tl.store(d_parameters + slot * 2, tl.sum(d_log_rate, 0))
        tl.store(d_parameters + slot * 2 + 1, tl.sum(d_x, 0))
