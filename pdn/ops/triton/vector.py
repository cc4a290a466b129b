"""The chunk kernels of a decay per key channel.

The products of a chunk contract e^(G_ik - G_jk) over the channels k; as a product of two matrices that needs a reference
between. The chunk's middle row serves as long as neither factor exceeds e^80; a block of WIDTH channels of a chunk where
one does is steep: what the plain kernels make of it is overwritten by the steep ones, which take more products. Their rows
come in four blocks of 16. For row i in block b and j in an earlier block, with first_b the G of b's first row::

    e^(G_i - G_j) = e^(G_i - first_b) e^(first_b - G_j)

has both factors <= 1 for any decay: one product for each of three blocks. Within a block the reference is its middle row
if that keeps both factors below e^80, else 16 exact steps, one a column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import (
    BETA,
    FROM_KEY,
    FROM_TENSOR,
    NORM_K,
    NORM_Q,
    READ_K,
    READ_Q,
    RESCALED_KEY,
    RESCALED_QUERY,
    ROWS,
    WRITE_K,
    C,
    dot,
    exp,
    inverse_root,
    locate_chunk,
)
from pdn.ops.triton.gates import decay_gradient, decay_of, gain_gradient, load_rate
from pdn.ops.triton.gradients import state_products, value_sums
from pdn.ops.triton.prepare import nonzero_gain, unit_lower_inverse

WIDTH = 32  # channels that share the choice
R = tl.constexpr(16)  # rows of a block
MAX_SPREAD = tl.constexpr(80.0)  # nats from the reference


@triton.jit
def load_bias(dt_bias, h, cols, K: tl.constexpr, RAW: tl.constexpr, ACC: tl.constexpr):
    """[1, BK] of dt_bias [HV, K]."""
    if RAW:
        return tl.load(dt_bias + h * K + cols, mask=cols < K, other=0.0).to(ACC)[None, :]
    else:
        return 0.0


@triton.jit
def row_at(G, r, K: tl.constexpr, cols):
    """Row r [BK] of G, a pointer to a [C, K] table."""
    return tl.load(G + r * K + cols, mask=cols < K, other=0.0)


@triton.jit
def rows_at(G, r, K: tl.constexpr, cols):
    """Rows r [C] of G: [C, BK]."""
    return tl.load(G + r[:, None] * K + cols[None, :], mask=(cols < K)[None, :], other=0.0)


@triton.jit
def spread(G, K: tl.constexpr, cols):
    """The largest distance in nats of a row from its block's middle one."""
    b = tl.arange(0, 4) * 16
    first = tl.load(G + b[:, None] * K + cols[None, :], mask=(cols < K)[None, :], other=0.0)
    middle = tl.load(G + (b + 8)[:, None] * K + cols[None, :], mask=(cols < K)[None, :], other=0.0)
    last = tl.load(G + (b + 15)[:, None] * K + cols[None, :], mask=(cols < K)[None, :], other=0.0)
    return tl.max(tl.max(tl.maximum(first - middle, middle - last), 1), 0)


@triton.jit
def load_tiles(
    q, k, query, write, rows, end, h, cols,
    K: tl.constexpr, HV: tl.constexpr, GROUP: tl.constexpr, WRITE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows [C] and columns [BK] of the query that reads, the key and the write key, without their norms."""
    rows = rows.to(tl.int64)
    keep = (rows < end)[:, None] & (cols < K)[None, :]
    shared = (rows * (HV // GROUP) + h // GROUP)[:, None] * K + cols[None, :]
    own = (rows * HV + h)[:, None] * K + cols[None, :]
    kx = tl.load(k + shared, mask=keep, other=0.0).to(ACC)
    if WRITE == RESCALED_QUERY:
        qx = tl.load(query + own, mask=keep, other=0.0).to(ACC)
    else:
        qx = tl.load(q + shared, mask=keep, other=0.0).to(ACC)
    wx = kx
    if WRITE == FROM_TENSOR or WRITE == RESCALED_KEY:  # noqa: SIM109
        wx = tl.load(write + own, mask=keep, other=0.0).to(ACC)
    return qx, kx, wx


@triton.jit
def scaled_tiles(
    q, k, query, write, scalars, r, start, end, h, cols,
    K: tl.constexpr, HV: tl.constexpr, GROUP: tl.constexpr, WRITE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``load_tiles`` of the chunk's rows r [C], with the norms of the table."""
    qx, kx, wx = load_tiles(q, k, query, write, start + r, end, h, cols, K, HV, GROUP, WRITE, ACC)
    norm_k = tl.load(scalars + NORM_K * C + r)[:, None]
    qx *= tl.load(scalars + NORM_Q * C + r)[:, None]
    kx *= norm_k
    if WRITE != FROM_TENSOR:
        wx *= norm_k
    return qx, kx, wx


@triton.jit(do_not_specialize=["T"])
def prepare_vector_kernel(
    q, k, query, write, log_decay, A_log, dt_bias, beta, chunks,
    table, decay_sums, steep, query_out, key_out, write_out, last_decay, T_out, P_out, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr, L2NORM: tl.constexpr,
    RAW: tl.constexpr, RANGE: tl.constexpr, WRITE: tl.constexpr, DELTA: tl.constexpr, VARLEN: tl.constexpr,
    ACC: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The table, T and P [NT, HV, C, C] as ``prepare_kernel``; G [NT, HV, C, K]; e^G q, e^G k, e^(G_C - G) kw [M, HV, K] and
    e^(G_C) [NT, HV, K] as the serial kernels read them; which blocks are steep [NT, HV, K / BK]. A chunk with a steep block
    gets its T and P from ``steep_prepare_kernel``."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    rows = (start + step).to(tl.int64)
    live = rows < end
    slot = i * HV + h
    own = (rows * HV + h)[:, None] * K
    kind = q.dtype.element_ty
    wide = tl.float32 if kind == tl.float16 else kind  # float16 has not the range of the factors
    rate = load_rate(A_log, h, RAW, ACC)
    square_q = tl.zeros([C], dtype=ACC)
    square_k = tl.zeros([C], dtype=ACC)
    scores = tl.zeros([C, C], dtype=ACC)
    system = tl.zeros([C, C], dtype=ACC)
    for base in range(0, K, BK):
        cols = base + tl.arange(0, BK)
        keep = live[:, None] & (cols < K)[None, :]
        x = tl.load(log_decay + own + cols[None, :], mask=keep, other=0.0).to(ACC)
        g = tl.where(keep, decay_of(x, rate, load_bias(dt_bias, h, cols, K, RAW, ACC), RAW), 0.0)
        G = tl.cumsum(g, 0)
        middle = tl.sum(tl.where((step <= C // 2)[:, None], g, 0.0), 0)
        G_C = tl.sum(g, 0)
        far = tl.max(tl.maximum(-middle, middle - G_C), 0) >= MAX_SPREAD
        tl.store(steep + slot * tl.cdiv(K, BK) + base // BK, far.to(tl.int32))
        tl.store(decay_sums + (slot * C + step)[:, None] * K + cols[None, :], G, mask=(cols < K)[None, :])
        tl.store(last_decay + slot * K + cols, exp(G_C), mask=cols < K)
        qx, kx, wx = load_tiles(q, k, query, write, rows, end, h, cols, K, HV, GROUP, WRITE, ACC)
        if L2NORM:
            square_k += tl.sum(kx * kx, 1)
            if WRITE == RESCALED_QUERY:
                raw, _, _ = load_tiles(q, k, query, write, rows, end, h, cols, K, HV, GROUP, FROM_KEY, ACC)
                square_q += tl.sum(raw * raw, 1)
            else:
                square_q += tl.sum(qx * qx, 1)
        grow = exp(G)
        tl.store(query_out + own + cols[None, :], (qx * grow).to(kind), mask=keep)
        tl.store(write_out + own + cols[None, :], (wx * exp(G_C[None, :] - G)).to(kind), mask=keep)
        up = exp(G - middle[None, :])
        inner = tl.trans((wx * exp(middle[None, :] - G)).to(wide))
        scores += dot((qx * up).to(wide), inner, PRECISION)
        if DELTA:
            tl.store(key_out + own + cols[None, :], (kx * grow).to(kind), mask=keep)
            system += dot((kx * up).to(wide), inner, PRECISION)

    norm_q = tl.full([C], SCALE, ACC)
    norm_k = tl.full([C], 1.0, ACC)
    if L2NORM:
        norm_q *= inverse_root(square_q)
        norm_k *= inverse_root(square_k)
    norm_w = norm_k
    if WRITE == FROM_TENSOR:
        norm_w = tl.full([C], 1.0, ACC)
    b = nonzero_gain(beta, rows * HV + h, live, RANGE, ACC)
    at = table + slot * ROWS * C + step
    tl.store(at + READ_Q * C, norm_q)
    tl.store(at + READ_K * C, norm_k)
    tl.store(at + WRITE_K * C, norm_w)
    tl.store(at + BETA * C, b)
    tl.store(at + NORM_Q * C, norm_q)
    tl.store(at + NORM_K * C, norm_k)
    square = (slot * C + step[:, None]) * C + step[None, :]
    P = tl.where(step[:, None] >= step[None, :], scores * norm_q[:, None] * norm_w[None, :], 0.0)
    tl.store(P_out + square, P.to(P_out.dtype.element_ty))
    if DELTA:
        L = tl.where(step[:, None] > step[None, :], system * norm_k[:, None] * (b * norm_w)[None, :], 0.0)
        tl.store(T_out + square, unit_lower_inverse(L, ACC, HALF, PRECISION).to(T_out.dtype.element_ty))


@triton.jit
def any_steep(flags, BLOCKS: tl.constexpr):
    """Whether one of a chunk's blocks is."""
    some = tl.load(flags)
    for n in tl.static_range(1, BLOCKS):
        some |= tl.load(flags + n)
    return some != 0


@triton.jit(do_not_specialize=["T"])
def steep_prepare_kernel(
    q, k, query, write, chunks, table, decay_sums, steep, T_out, P_out, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, WRITE: tl.constexpr, DELTA: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T and P of the chunks with a steep block."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = i * HV + h
    flags = steep + slot * tl.cdiv(K, BK)
    if any_steep(flags, (K + BK - 1) // BK):
        start, end = locate_chunk(i, chunks, T, VARLEN)
        step = tl.arange(0, C)
        block = step // R
        scalars = table + slot * ROWS * C
        sums = decay_sums + slot * C * K
        kind = q.dtype.element_ty
        wide = tl.float32 if kind == tl.float16 else kind  # float16 has not the range of the factors within a block
        scores = tl.zeros([C, C], dtype=ACC)
        system = tl.zeros([C, C], dtype=ACC)
        same = block[:, None] == block[None, :]
        for base in range(0, K, BK):
            cols = base + tl.arange(0, BK)
            G = rows_at(sums, step, K, cols)
            qx, kx, wx = scaled_tiles(q, k, query, write, scalars, step, start, end, h, cols, K, HV, GROUP, WRITE, ACC)
            if tl.load(flags + base // BK) != 0:
                up = exp(G - rows_at(sums, block * R, K, cols))
                q_up = (qx * up).to(kind)
                k_up = (kx * up).to(kind)
                q_between = tl.zeros([C, C], dtype=ACC)
                k_between = tl.zeros([C, C], dtype=ACC)
                for n in tl.static_range(1, 4):
                    first = row_at(sums, n * R, K, cols)
                    right = wx * exp(tl.where((step < n * R)[:, None], first[None, :] - G, float("-inf")))
                    right = tl.trans(right.to(kind))
                    here = (block == n)[:, None]
                    q_between += dot(tl.where(here, q_up, 0.0).to(kind), right, PRECISION)
                    if DELTA:
                        k_between += dot(tl.where(here, k_up, 0.0).to(kind), right, PRECISION)
                q_within = tl.zeros([C, C], dtype=ACC)
                k_within = tl.zeros([C, C], dtype=ACC)
                if spread(sums, K, cols) < MAX_SPREAD:
                    middle = rows_at(sums, block * R + R // 2, K, cols)
                    up = exp(G - middle)
                    inner = tl.trans((wx * exp(middle - G)).to(wide))
                    q_within = dot((qx * up).to(wide), inner, PRECISION)
                    if DELTA:
                        k_within = dot((kx * up).to(wide), inner, PRECISION)
                else:
                    for j in range(0, R):
                        r = block * R + j
                        _, _, w_j = scaled_tiles(q, k, query, write, scalars, r, start, end, h, cols, K, HV, GROUP, WRITE, ACC)
                        factor = w_j * exp(tl.where((step >= r)[:, None], G - rows_at(sums, r, K, cols), float("-inf")))
                        column = step[None, :] == r[:, None]
                        q_within += tl.where(column, tl.sum(qx * factor, 1)[:, None], 0.0)
                        if DELTA:
                            k_within += tl.where(column, tl.sum(kx * factor, 1)[:, None], 0.0)
                scores += tl.where(same, q_within, q_between)
                if DELTA:
                    system += tl.where(same, k_within, k_between)
            else:
                middle = row_at(sums, C // 2, K, cols)[None, :]
                up = exp(G - middle)
                inner = tl.trans((wx * exp(middle - G)).to(wide))
                scores += dot((qx * up).to(wide), inner, PRECISION)
                if DELTA:
                    system += dot((kx * up).to(wide), inner, PRECISION)
        square = (slot * C + step[:, None]) * C + step[None, :]
        P = tl.where(step[:, None] >= step[None, :], scores, 0.0)
        tl.store(P_out + square, P.to(P_out.dtype.element_ty))
        if DELTA:
            b = tl.load(scalars + BETA * C + step)
            L = tl.where(step[:, None] > step[None, :], system * b[None, :], 0.0)
            tl.store(T_out + square, unit_lower_inverse(L, ACC, HALF, PRECISION).to(T_out.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def score_gradient_kernel(
    v, o, x, do, dv, table, chunks, dP, dL, along, dbeta, T,
    HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, RANGE: tl.constexpr, DELTA: tl.constexpr, VARLEN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/dP and dL/dL [NT, HV, C, C], with the gain of the column; <q, dq>, <k, dk> of the reading key and <kw, dkw>, as
    ``gradient_kernel`` has them, in ``along`` [NT, HV, 3, C]; dbeta."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    rows = (start + step).to(tl.int64)
    live = rows < end
    slot = i * HV + h
    b = tl.load(table + (slot * ROWS + BETA) * C + step)
    along_q, along_k, along_w, of_P, of_L = value_sums(do, dv, v, x, o, (rows * HV + h) * V, live, V, BV, DELTA, ACC, PRECISION)
    at = along + slot * 3 * C + step
    tl.store(at, along_q)
    tl.store(at + C, along_k)
    tl.store(at + 2 * C, along_w)
    tl.store(dbeta + rows * HV + h, gain_gradient(along_w / b, b, RANGE), mask=live)
    square = (slot * C + step[:, None]) * C + step[None, :]
    of_P = tl.where(step[:, None] >= step[None, :], of_P * b[None, :], 0.0)
    tl.store(dP + square, of_P.to(dP.dtype.element_ty))
    if DELTA:
        of_L = tl.where(step[:, None] > step[None, :], -of_L * b[None, :], 0.0)
        tl.store(dL + square, of_L.to(dL.dtype.element_ty))


@triton.jit
def store_decay_gradient(
    dG, kept, log_decay, A_log, dt_bias, dlog_decay, d_bias, own, keep, h, cols,
    K: tl.constexpr, RAW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of the log-decays [C, BK] from those of their sums G, ``kept`` [BK] being the last one's share of what the chunk hands
    on; RAW: of the raw gate, and the chunk's part of dt_bias's [BK]. Returns the parts [C, BK] of A_log's."""
    d = tl.where(keep, tl.sum(dG, 0)[None, :] - tl.cumsum(dG, 0) + dG + kept[None, :], 0.0)
    x = tl.load(log_decay + own + cols[None, :], mask=keep, other=0.0).to(ACC)
    d_x, d_log_rate = decay_gradient(d, x, load_rate(A_log, h, RAW, ACC), load_bias(dt_bias, h, cols, K, RAW, ACC), RAW)
    tl.store(dlog_decay + own + cols[None, :], d_x.to(dlog_decay.dtype.element_ty), mask=keep)
    if RAW:
        tl.store(d_bias + cols, tl.sum(d_x, 0), mask=cols < K)
    return d_log_rate


@triton.jit
def store_gradients(
    d_query, d_key, d_write, qx, kx, scalars, along, dq, dk, dwrite, at, keep,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """dq, dk and dwrite of the raw tensors from those of the normalised ones, [C, BK], as ``gradient_kernel`` has them."""
    step = tl.arange(0, C)
    norm_q = tl.load(scalars + NORM_Q * C + step)
    norm_k = tl.load(scalars + NORM_K * C + step)
    if WRITE == FROM_TENSOR:
        tl.store(dwrite + at, d_write.to(dwrite.dtype.element_ty), mask=keep)
    elif WRITE == RESCALED_KEY:
        tl.store(dwrite + at, (norm_k[:, None] * d_write).to(dwrite.dtype.element_ty), mask=keep)
    else:
        d_key += d_write
    if L2NORM and (WRITE == FROM_KEY or WRITE == FROM_TENSOR):  # noqa: SIM109
        of_k = tl.load(along + C + step)
        if WRITE == FROM_KEY:
            of_k += tl.load(along + 2 * C + step)
        d_key -= kx * of_k[:, None]
    if L2NORM and WRITE != RESCALED_QUERY:
        d_query -= qx * (tl.load(along + step) / (SCALE * SCALE))[:, None]
    tl.store(dk + at, (norm_k[:, None] * d_key).to(dk.dtype.element_ty), mask=keep)
    tl.store(dq + at, (norm_q[:, None] * d_query).to(dq.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["T"])
def vector_gradient_kernel(
    q, k, query, write, log_decay, A_log, dt_bias, v, x, do, dv, table, decay_sums, steep, states, adjoints, chunks,
    dP, dL, along, dq, dk, dwrite, dlog_decay, d_rate, d_bias, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, RAW: tl.constexpr, WRITE: tl.constexpr,
    DELTA: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rest of ``gradient_kernel`` for one block of channels: dlog_decay [M, HV, K], dq, dk, dwrite, and RAW: the block's
    part of dA_log [NT, HV, K / BK] and ddt_bias [NT, HV, K]. A steep block comes out wrong and is done again."""
    i, h = tl.program_id(1).to(tl.int64), tl.program_id(2)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    rows = (start + step).to(tl.int64)
    live = rows < end
    slot = i * HV + h
    own = (rows * HV + h)[:, None] * K
    kind = q.dtype.element_ty
    wide = tl.float32 if kind == tl.float16 else kind  # float16 has not the range of the factors
    scalars = table + slot * ROWS * C
    sums = decay_sums + slot * C * K
    square = (slot * C + step[:, None]) * C + step[None, :]
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    keep = live[:, None] & (cols < K)[None, :]
    of_g, of_d, of_x, kept = state_products(
        do, dv, x if DELTA else v, states + slot * K * V, adjoints + slot * K * V, (rows * HV + h) * V, live, cols,
        K, BK, V, BV, ACC, PRECISION,
    )  # fmt: skip
    G = rows_at(sums, step, K, cols)
    middle = row_at(sums, C // 2, K, cols)
    G_C = row_at(sums, C - 1, K, cols)
    qx, kx, wx = scaled_tiles(q, k, query, write, scalars, step, start, end, h, cols, K, HV, GROUP, WRITE, ACC)
    up = exp(G - middle[None, :])
    down = exp(middle[None, :] - G)
    right = (wx * down).to(wide)
    left_q = (qx * up).to(wide)
    b = tl.load(scalars + BETA * C + step)
    d_state = of_x * (down * exp(G_C - middle)[None, :] * b[:, None])
    kept = exp(G_C) * kept + tl.sum(wx * d_state, 0)
    # The decay's gradient takes the rounded operands of the products, so that pairs cancel between their two tokens.
    scores = tl.load(dP + square)
    within = dot(scores, right, PRECISION)
    of_g *= exp(middle)[None, :]
    dG = left_q.to(ACC) * within + qx * up * of_g
    d_query = up * (within + of_g)
    back = dot(tl.trans(scores), left_q, PRECISION)
    d_key = tl.zeros([C, BK], dtype=ACC)
    if DELTA:
        left_k = (kx * up).to(wide)
        system = tl.load(dL + square)
        within = dot(system, right, PRECISION)
        of_d *= exp(middle)[None, :]
        dG += left_k.to(ACC) * within - kx * up * of_d
        d_key = up * (within - of_d)
        back += dot(tl.trans(system), left_k, PRECISION)
    dG -= right.to(ACC) * back + wx * d_state
    rates = store_decay_gradient(
        dG, kept, log_decay, A_log, dt_bias, dlog_decay, d_bias + slot * K, own, keep, h, cols, K, RAW, ACC
    )
    if RAW:
        tl.store(d_rate + slot * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(rates, 1), 0))
    store_gradients(
        d_query, d_key, down * back + d_state, qx, kx, scalars, along + slot * 3 * C, dq, dk, dwrite,
        own + cols[None, :], keep, SCALE, L2NORM, WRITE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def steep_gradient_kernel(
    q, k, query, write, log_decay, A_log, dt_bias, v, x, do, dv, table, decay_sums, steep, states, adjoints, chunks,
    dP, dL, along, dq, dk, dwrite, dlog_decay, d_rate, d_bias, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, RAW: tl.constexpr, WRITE: tl.constexpr,
    DELTA: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``vector_gradient_kernel`` again, for the steep blocks of channels."""
    base = tl.program_id(0) * BK
    i, h = tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot = i * HV + h
    if tl.load(steep + slot * tl.cdiv(K, BK) + tl.program_id(0)) != 0:
        start, end = locate_chunk(i, chunks, T, VARLEN)
        step = tl.arange(0, C)
        block = step // R
        rows = (start + step).to(tl.int64)
        live = rows < end
        cols = base + tl.arange(0, BK)
        keep = live[:, None] & (cols < K)[None, :]
        kind = q.dtype.element_ty
        wide = tl.float32 if kind == tl.float16 else kind  # float16 has not the range of the factors within a block
        scalars = table + slot * ROWS * C
        sums = decay_sums + slot * C * K
        square = (slot * C + step[:, None]) * C + step[None, :]
        same = block[:, None] == block[None, :]
        scores = tl.load(dP + square)
        dP_between = tl.where(same, 0.0, scores).to(kind)
        dP_within = tl.where(same, scores, 0.0)
        if DELTA:
            system = tl.load(dL + square)
            dL_between = tl.where(same, 0.0, system).to(kind)
            dL_within = tl.where(same, system, 0.0)
        G = rows_at(sums, step, K, cols)
        qx, kx, wx = scaled_tiles(q, k, query, write, scalars, step, start, end, h, cols, K, HV, GROUP, WRITE, ACC)
        up = exp(G - rows_at(sums, block * R, K, cols))
        q_up = (qx * up).to(kind)
        k_up = (kx * up).to(kind)
        d_query = tl.zeros([C, BK], dtype=ACC)
        d_key = tl.zeros([C, BK], dtype=ACC)
        d_write = tl.zeros([C, BK], dtype=ACC)
        dG = tl.zeros([C, BK], dtype=ACC)  # from the rounded operands, as above
        for n in tl.static_range(1, 4):
            first = row_at(sums, n * R, K, cols)
            down = exp(tl.where((step < n * R)[:, None], first[None, :] - G, float("-inf")))
            right = (wx * down).to(kind)
            here = (block == n)[:, None]
            d_query += tl.where(here, dot(dP_between, right, PRECISION), 0.0)
            back = dot(tl.trans(dP_between), tl.where(here, q_up, 0.0).to(kind), PRECISION)
            if DELTA:
                d_key += tl.where(here, dot(dL_between, right, PRECISION), 0.0)
                back += dot(tl.trans(dL_between), tl.where(here, k_up, 0.0).to(kind), PRECISION)
            d_write += down * back
            dG -= right.to(ACC) * back
        dG += q_up.to(ACC) * d_query + k_up.to(ACC) * d_key
        d_query *= up
        d_key *= up
        if spread(sums, K, cols) < MAX_SPREAD:
            middle = rows_at(sums, block * R + R // 2, K, cols)
            up = exp(G - middle)
            down = exp(middle - G)
            inner = (wx * down).to(wide)
            left = (qx * up).to(wide)
            within = dot(dP_within, inner, PRECISION)
            back = dot(tl.trans(dP_within), left, PRECISION)
            d_query += up * within
            dG += left.to(ACC) * within
            if DELTA:
                left = (kx * up).to(wide)
                within = dot(dL_within, inner, PRECISION)
                back += dot(tl.trans(dL_within), left, PRECISION)
                d_key += up * within
                dG += left.to(ACC) * within
            d_write += down * back
            dG -= inner.to(ACC) * back
        else:
            for j in range(0, R):
                r = block * R + j
                _, _, w_j = scaled_tiles(q, k, query, write, scalars, r, start, end, h, cols, K, HV, GROUP, WRITE, ACC)
                factor = exp(tl.where((step >= r)[:, None], G - rows_at(sums, r, K, cols), float("-inf")))
                column = step[None, :] == r[:, None]
                from_q = tl.sum(tl.where(column, dP_within.to(ACC), 0.0), 1)[:, None] * factor
                d_query += from_q * w_j
                taken = from_q * qx
                if DELTA:
                    from_k = tl.sum(tl.where(column, dL_within.to(ACC), 0.0), 1)[:, None] * factor
                    d_key += from_k * w_j
                    taken += from_k * kx
                dG += taken * w_j
                for n in tl.static_range(0, 4):
                    row = tl.sum(tl.where((block == n)[:, None], taken, 0.0), 0)
                    here = (step == n * R + j)[:, None]
                    d_write += tl.where(here, row[None, :], 0.0)
                    dG -= tl.where(here, row[None, :] * wx, 0.0)

        of_g, of_d, of_x, kept = state_products(
            do, dv, x if DELTA else v, states + slot * K * V, adjoints + slot * K * V, (rows * HV + h) * V, live, cols,
            K, BK, V, BV, ACC, PRECISION,
        )  # fmt: skip
        of_g *= exp(G)
        d_query += of_g
        dG += qx * of_g
        if DELTA:
            of_d *= exp(G)
            d_key -= of_d
            dG -= kx * of_d
        G_C = row_at(sums, C - 1, K, cols)
        d_state = exp(G_C[None, :] - G) * tl.load(scalars + BETA * C + step)[:, None] * of_x
        d_write += d_state
        dG -= wx * d_state
        kept = exp(G_C) * kept + tl.sum(wx * d_state, 0)
        own = (rows * HV + h)[:, None] * K
        rates = store_decay_gradient(
            dG, kept, log_decay, A_log, dt_bias, dlog_decay, d_bias + slot * K, own, keep, h, cols, K, RAW, ACC
        )
        if RAW:
            tl.store(d_rate + slot * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(rates, 1), 0))
        store_gradients(
            d_query, d_key, d_write, qx, kx, scalars, along + slot * 3 * C, dq, dk, dwrite,
            own + cols[None, :], keep, SCALE, L2NORM, WRITE,
        )  # fmt: skip
