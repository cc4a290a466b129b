"""The preconditioner: its diagonal before the recurrence, and its gradients after the recurrence's.

``A_t = e^{gP_t} A_{t-1} + bP_t k_t^2`` is linear, so a chunk maps A -> e^{c_C} A + Z with ``Z =
sum_j e^{c_C - c_j} b_j k_j^2`` and c the cumulative gP: summaries of all chunks, one scan over
them, then every chunk by itself. Backward, with a_t = dL/dA_t by its direct use, the adjoint D_t =
a_t + e^{gP_{t+1}} D_{t+1} runs over chunks the same way, from the last, ``carry -> e^{c_C} carry +
sum_t e^{c_t} a_t``, and::

    dk_t += 2 b_t k_t D_t      dbP_t = <D_t, k_t^2>      dgP_t = e^{gP_t} <D_t, A_{t-1}>

Within a chunk one warp goes through blocks of R tokens: every lane owns some channels for the whole
    chunk, so that A and D stay in its registers, nothing is exchanged but the sums over channels,
    and the kernels only stream. The forward pass keeps A before every block; the backward pass runs
    from there to A of the block's tokens, which it needs in the opposite order.
"""

# Triton's types are of a call from Python, which a kernel is none: no return, no iteration.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import (
    C,
    await_inputs,
    dot,
    exp,
    inverse,
    inverse_norm,
    last_of,
    locate_chunk,
    locate_sequence,
    log,
)
from pdn.ops.triton.gates import decay_gradient, decay_of, gain_gradient, load_gain, load_rate
from pdn.ops.triton.sums import OF_A_LOG_P, OF_DT_BIAS_P, OF_MU, PARTS

SCAN = 32  # chunks a step of the scan over chunks

# The preconditioner's per-token scalars, a [NT, HV, GATES, C] table.
WEIGHT = tl.constexpr(0)  # of the raw key's squares in A: the gain times the norm's square
DECAY = tl.constexpr(1)  # e^gP
NORM_SQUARE = tl.constexpr(2)  # of the key's factor
GAIN = tl.constexpr(3)
DECAY_SUM = tl.constexpr(4)  # c
NUM_GATES = 5
GATES = tl.constexpr(NUM_GATES)


@triton.jit(do_not_specialize=["T"])
def summary_kernel(
    k, gP, A_log, dt_bias, bP, chunks, Z, gates, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    L2NORM: tl.constexpr, RAW: tl.constexpr, RANGE: tl.constexpr, VARLEN: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write Z [NT, HV, K] of every chunk, and its gates [NT, HV, GATES, C]; ROWS keys at a time."""
    await_inputs()
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    block = tl.arange(0, ROWS)
    cols = tl.arange(0, BK)
    x = load_tile(k, start + block, end, cols, HV, GROUP, h, K)
    rows = (start + step).to(tl.int64)
    live = rows < end
    at = rows * HV + h
    b = load_gain(bP, at, live, RANGE, ACC)
    bias = tl.load(dt_bias + h).to(ACC) if RAW else 0.0
    g = decay_of(
        tl.load(gP + at, mask=live, other=0.0).to(ACC), load_rate(A_log, h, RAW, ACC), bias, RAW
    )
    g = tl.where(live, g, 0.0)  # padding neither decays nor adds
    c = tl.cumsum(g, 0)
    share = b * exp(last_of(c) - c)
    table = gates + (i * HV + h) * GATES * C
    tl.store(table + GAIN * C + step, b)
    tl.store(table + DECAY * C + step, exp(g))
    tl.store(table + DECAY_SUM * C + step, c)
    z = tl.zeros([BK], dtype=ACC)
    for first in range(0, C, ROWS):
        now = first + block
        next_x = load_tile(
            k, start + now + ROWS, tl.where(first + ROWS < C, end, start), cols, HV, GROUP, h, K
        )
        norm = inverse_norm(x, ACC, L2NORM)
        x = x.to(ACC)
        z += tl.sum((tl.gather(share, now, 0) * norm * norm)[:, None] * x * x, 0)
        tl.store(table + WEIGHT * C + now, tl.gather(b, now, 0) * norm * norm)
        tl.store(table + NORM_SQUARE * C + now, norm * norm)
        x = next_x
    tl.store(Z + (i * HV + h) * K + cols, z, mask=cols < K)


@triton.jit
def load_tile(x, rows, end, cols, HV: tl.constexpr, GROUP: tl.constexpr, h, K: tl.constexpr):
    """Those rows of x [M, HV // GROUP, K], zeros from end on."""
    at = (rows.to(tl.int64) * (HV // GROUP) + h // GROUP)[:, None] * K + cols[None, :]
    return tl.load(x + at, mask=(rows < end)[:, None] & (cols < K)[None, :], other=0.0)


@triton.jit(do_not_specialize=["T"])
def scan_kernel(
    Z, gates, initial, offsets, before, final, total, T,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_TOTAL: tl.constexpr, REVERSE: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """``x -> e^{c_C} x + Z`` over the chunks of a sequence: ``before`` [NT, HV, K] each of them,
    and ``final`` [N, HV, K]; HAS_TOTAL: and the sum of c_C, ``total`` [N, HV].

    REVERSE runs from the last chunk to the first.
    """
    await_inputs()
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, count = locate_sequence(n, offsets, T, VARLEN)
    cols = tl.program_id(2) * BK + tl.arange(0, BK)
    keep = cols < K
    x = tl.zeros([BK], dtype=ACC)
    if HAS_INITIAL:
        x = tl.load(initial + (n * HV + h) * K + cols, mask=keep, other=0.0).to(ACC)
    step = tl.arange(0, L)
    whole = tl.zeros([1], dtype=ACC)
    for base in range(0, count, L):
        at = base + step
        live = at < count
        i = (first + (count - 1 - at if REVERSE else at)).to(tl.int64)
        z = tl.load(
            Z + (i * HV + h)[:, None] * K + cols[None, :],
            mask=live[:, None] & keep[None, :],
            other=0.0,
        )
        t = tl.load(gates + (i * HV + h) * GATES * C + DECAY_SUM * C + C - 1, mask=live, other=0.0)
        c = tl.cumsum(t, 0)
        # e^{c_i - t_i} x + sum_{j < i} e^{c_i - t_i - c_j} z_j is the value before chunk i.
        exclusive = c - t
        weight = exp(
            tl.where(step[:, None] > step[None, :], exclusive[:, None] - c[None, :], float("-inf"))
        )
        # Written as a sum of products, Triton makes it a product of its own, in tf32.
        y = dot(weight, z, "bf16x6") + exp(exclusive)[:, None] * x[None, :]
        tl.store(
            before + (i * HV + h)[:, None] * K + cols[None, :],
            y,
            mask=live[:, None] & keep[None, :],
        )
        end = tl.sum(tl.where(step == L - 1, c, 0.0), 0)
        if HAS_TOTAL:
            whole += end
        x = exp(end) * x + tl.sum(exp(end - c)[:, None] * z, 0)
    tl.store(final + (n * HV + h) * K + cols, x, mask=keep)
    if HAS_TOTAL and tl.program_id(2) == 0:
        tl.store(total + n * HV + h + tl.arange(0, 1), whole)


@triton.jit
def load_rows(
    x, t, end, cols, HV: tl.constexpr, GROUP: tl.constexpr, h, K: tl.constexpr, R: tl.constexpr
):
    """Rows t to t + R of x [M, HV // GROUP, K]: [BK] each, in the type they have; zeros from end
    on.
    """
    at = x + (t.to(tl.int64) * (HV // GROUP) + h // GROUP) * K + cols
    rows = ()
    for n in tl.static_range(R):
        rows += (tl.load(at + n * (HV // GROUP * K), mask=(cols < K) & (t + n < end), other=0.0),)
    return rows


@triton.jit
def load_scalars(at, R: tl.constexpr):
    """R scalars of a table's row."""
    scalars = ()
    for n in tl.static_range(R):
        scalars += (tl.load(at + n),)
    return scalars


@triton.jit
def accumulate(A, keys, weights, decays, R: tl.constexpr, ACC: tl.constexpr):
    """A before R tokens, as given, and after each of them: R + 1."""
    As = (A,)
    for n in tl.static_range(R):
        kx = keys[n].to(ACC)
        A = decays[n] * A + weights[n] * kx * kx
        As += (A,)
    return As


@triton.jit
def diagonal(A, mu, INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr):
    """The preconditioner's B of A, elementwise."""
    if INVERSE:
        return inverse(A + EPS)
    else:
        r = log(A + EPS) - mu
        return exp(-LOG_BOUND * inverse(1.0 + tl.abs(r)) * r)


@triton.jit
def load_block(
    q,
    k,
    d,
    t,
    end,
    cols,
    HV: tl.constexpr,
    GROUP: tl.constexpr,
    h,
    K: tl.constexpr,
    ON_QUERY: tl.constexpr,
    R: tl.constexpr,
):
    """Rows t to t + R of the rescaled x (the key or, ON_QUERY, the query), of k, and of d [M, HV,
    K].
    """
    keys = load_rows(k, t, end, cols, HV, GROUP, h, K, R)
    xs = load_rows(q, t, end, cols, HV, GROUP, h, K, R) if ON_QUERY else keys
    return xs, keys, load_rows(d, t, end, cols, HV, 1, h, K, R)


@triton.jit(do_not_specialize=["T"])
def rescale_kernel(
    x, k, mu, A_in, gates, chunks, out, A_blocks, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    ON_QUERY: tl.constexpr, SAVE: tl.constexpr,
    INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr, VARLEN: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """B times the raw x (the key or, ON_QUERY, the query) [M, HV, K], and, SAVE, A before every
    block [NT, HV, C / R, K].
    """
    await_inputs()
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    cols = tl.arange(0, BK)
    slot = i * HV + h
    table = gates + slot * GATES * C
    m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)
    A = tl.load(A_in + slot * K + cols, mask=cols < K, other=0.0)
    for first in range(0, end - start, R):
        t = start + first
        keys = load_rows(k, t, end, cols, HV, GROUP, h, K, R)
        xs = load_rows(x, t, end, cols, HV, GROUP, h, K, R) if ON_QUERY else keys
        weights = load_scalars(table + WEIGHT * C + first, R)
        decays = load_scalars(table + DECAY * C + first, R)
        if SAVE:
            tl.store(A_blocks + (slot * (C // R) + first // R) * K + cols, A, mask=cols < K)
        to = out + (t.to(tl.int64) * HV + h) * K + cols
        for n in tl.static_range(R):
            kx = keys[n].to(ACC)
            A = decays[n] * A + weights[n] * kx * kx
            y = diagonal(A, m, INVERSE, LOG_BOUND, EPS) * xs[n].to(ACC)
            tl.store(to + n * (HV * K), y.to(out.dtype.element_ty), mask=(cols < K) & (t + n < end))


@triton.jit
def direct_adjoint(x, d, A, m, INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr):
    """B d, dL/dr and a = dL/dA by its direct use [BK], of d = dL/d(B x)."""
    A += EPS
    if INVERSE:
        B = inverse(A)
        Bd = B * d
        d_r = -Bd * x
        return Bd, d_r, d_r * B
    else:
        r = log(A) - m
        s = 1.0 + tl.abs(r)
        both = inverse(s * A)  # one of two
        squash = both * A
        slope = -LOG_BOUND * squash
        Bd = exp(slope * r) * d
        d_B = Bd * x * slope
        return Bd, d_B * squash, d_B * both


@triton.jit(do_not_specialize=["T"])
def adjoint_summary_kernel(
    q, k, d, mu, A_blocks, gates, chunks, Z, parts, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    ON_QUERY: tl.constexpr,
    INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr, VARLEN: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """sum_t e^{c_t} a_t [NT, HV, K] of every chunk, and its part of dmu in parts [NT, HV, PARTS].

    d [M, HV, K]: the gradient of the raw rescaled key or, ON_QUERY, query.
    """
    await_inputs()
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    cols = tl.arange(0, BK)
    slot = i * HV + h
    table = gates + slot * GATES * C
    m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)
    adjoint = tl.zeros([BK], dtype=ACC)
    sum_r = tl.zeros([BK], dtype=ACC)
    blocks = (end - start + R - 1) // R
    for back in range(0, blocks):
        first = (blocks - 1 - back) * R
        t = start + first
        xs, keys, ds = load_block(q, k, d, t, end, cols, HV, GROUP, h, K, ON_QUERY, R)
        A = tl.load(A_blocks + (slot * (C // R) + first // R) * K + cols, mask=cols < K, other=0.0)
        decays = load_scalars(table + DECAY * C + first, R)
        weights = load_scalars(table + WEIGHT * C + first, R)
        As = accumulate(A, keys, weights, decays, R, ACC)
        for n in tl.static_range(R - 1, -1, -1):
            _, d_r, a = direct_adjoint(
                xs[n].to(ACC), ds[n].to(ACC), As[n + 1], m, INVERSE, LOG_BOUND, EPS
            )
            sum_r += d_r
            adjoint = decays[n] * (adjoint + a)
    tl.store(Z + slot * K + cols, adjoint, mask=cols < K)
    if not INVERSE:
        tl.store(parts + slot * PARTS + OF_MU, -tl.sum(sum_r, 0))


@triton.jit(do_not_specialize=["T"])
def finish_kernel(
    q, k, dq, dk, dwrite, gP, A_log, dt_bias, mu, A_blocks, carry, query_norm, gates, chunks, dgP,
    dbP, parts, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    NORM_STRIDE: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, ON_QUERY: tl.constexpr, RAW: tl.constexpr,
    RANGE: tl.constexpr,
    INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr, VARLEN: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """dgP, dbP [M, HV] (RAW: and the chunk's part of dA_log and ddt_bias in parts), and dk (and dq,
    ON_QUERY) of the raw key from the recurrence's share of them.

    In: dk [M, HV, K] of the raw key without its norm's gradient, dwrite of the raw rescaled key;
        ON_QUERY: dk in all, dq of the raw rescaled query, and query_norm, the query's factors [C]
        in every chunk's table, NORM_STRIDE apart.
    """
    await_inputs()
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    cols = tl.arange(0, BK)
    slot = i * HV + h
    table = gates + slot * GATES * C
    m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)
    adjoint = tl.load(carry + slot * K + cols, mask=cols < K, other=0.0)
    of_square = tl.zeros([C], dtype=ACC)  # <D, k^2> of the raw key
    of_before = tl.zeros([C], dtype=ACC)  # <D, A before the token>
    rescaled = dq if ON_QUERY else dwrite
    blocks = (end - start + R - 1) // R
    for back in range(0, blocks):
        first = (blocks - 1 - back) * R
        t = start + first
        xs, keys, ds = load_block(q, k, rescaled, t, end, cols, HV, GROUP, h, K, ON_QUERY, R)
        d_keys = load_rows(dk, t, end, cols, HV, 1, h, K, R)
        A = tl.load(A_blocks + (slot * (C // R) + first // R) * K + cols, mask=cols < K, other=0.0)
        decays = load_scalars(table + DECAY * C + first, R)
        weights = load_scalars(table + WEIGHT * C + first, R)
        As = accumulate(A, keys, weights, decays, R, ACC)
        to = (t.to(tl.int64) * HV + h) * K + cols
        for n in tl.static_range(R - 1, -1, -1):
            keep = (cols < K) & (t + n < end)
            kx = keys[n].to(ACC)
            x = xs[n].to(ACC)
            Bd, _, a = direct_adjoint(x, ds[n].to(ACC), As[n + 1], m, INVERSE, LOG_BOUND, EPS)
            D = adjoint + a
            Dk = D * kx
            here = step == first + n
            of_square = tl.where(here, tl.sum(Dk * kx, 0), of_square)
            of_before = tl.where(here, tl.sum(D * As[n], 0), of_before)
            d_key = d_keys[n].to(ACC) + 2.0 * weights[n] * Dk
            if ON_QUERY:
                d_query = Bd
                if L2NORM:
                    factor = tl.load(query_norm + slot * NORM_STRIDE + first + n) / SCALE
                    d_query -= factor * factor * tl.sum(x * d_query, 0) * x
                tl.store(dq + to + n * (HV * K), d_query.to(dq.dtype.element_ty), mask=keep)
            else:
                d_key += Bd
            if L2NORM:
                d_key -= tl.load(table + NORM_SQUARE * C + first + n) * tl.sum(kx * d_key, 0) * kx
            tl.store(dk + to + n * (HV * K), d_key.to(dk.dtype.element_ty), mask=keep)
            adjoint = decays[n] * D
    rows = (start + step).to(tl.int64)
    live = rows < end
    at = rows * HV + h
    d_b = tl.load(table + NORM_SQUARE * C + step) * of_square
    tl.store(dbP + at, gain_gradient(d_b, tl.load(table + GAIN * C + step), RANGE), mask=live)
    d_g = tl.load(table + DECAY * C + step) * of_before
    bias = tl.load(dt_bias + h).to(ACC) if RAW else 0.0
    x = tl.load(gP + at, mask=live, other=0.0).to(ACC)
    d_x, d_log_rate = decay_gradient(
        tl.where(live, d_g, 0.0), x, load_rate(A_log, h, RAW, ACC), bias, RAW
    )
    tl.store(dgP + at, d_x, mask=live)
    if RAW:
        tl.store(parts + slot * PARTS + OF_A_LOG_P, tl.sum(d_log_rate, 0))
        tl.store(parts + slot * PARTS + OF_DT_BIAS_P, tl.sum(d_x, 0))
