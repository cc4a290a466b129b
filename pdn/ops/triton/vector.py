"""The chunk kernels of a decay per key channel.

The products of a chunk contract e^(G_ik - G_jk) over the channels k; as a product of two matrices that needs a reference
between. The chunk's middle row serves as long as neither factor exceeds e^80; a block of WIDTH channels of a chunk where
one does is steep, and takes more products. Its rows come in four blocks of 16. For row i in block b and j in an earlier
block, with first_b the G of b's first row::

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
    RESCALED_KEY,
    RESCALED_QUERY,
    ROWS,
    C,
    dot,
    locate_chunk,
)
from pdn.ops.triton.gates import decay_gradient, decay_of, gain_gradient, load_rate
from pdn.ops.triton.gradients import state_products, value_sums
from pdn.ops.triton.prepare import nonzero_gain, unit_lower_inverse

WIDTH = 32  # channels that share the choice
R = tl.constexpr(16)  # rows of a block
MAX_SPREAD = tl.constexpr(80.0)  # nats from the reference


@triton.jit
def sum_of_squares(x, tile, live, K: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):
    """[C] of x [C, K]."""
    total = tl.zeros([C], dtype=ACC)
    for base in range(0, K, BK):
        cols = base + tl.arange(0, BK)
        a = tl.load(x + tile + cols[None, :], mask=live[:, None] & (cols < K)[None, :], other=0.0).to(ACC)
        total += tl.sum(a * a, 1)
    return total


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
def is_steep(sums, K: tl.constexpr, cols):
    """Whether a row is too far from the chunk's middle one."""
    middle = row_at(sums, C // 2, K, cols)
    return tl.max(tl.maximum(row_at(sums, 0, K, cols) - middle, middle - row_at(sums, C - 1, K, cols)), 0) >= MAX_SPREAD


@triton.jit
def write_rows(
    k, write, norms, r, start, end, h, cols, K: tl.constexpr, HV: tl.constexpr, GROUP: tl.constexpr, WRITE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Rows r [C] of the chunk's write key with its norm, [C, BK]; norms points to the keys' [C]."""
    rows = (start + r).to(tl.int64)
    keep = (rows < end)[:, None] & (cols < K)[None, :]
    if WRITE == FROM_TENSOR or WRITE == RESCALED_KEY:  # noqa: SIM109
        w = tl.load(write + (rows * HV + h)[:, None] * K + cols[None, :], mask=keep, other=0.0).to(ACC)
    else:
        w = tl.load(k + (rows * (HV // GROUP) + h // GROUP)[:, None] * K + cols[None, :], mask=keep, other=0.0).to(ACC)
    if WRITE != FROM_TENSOR:
        w = tl.load(norms + r)[:, None] * w
    return w


@triton.jit(do_not_specialize=["T"])
def prepare_vector_kernel(
    q, k, query, write, log_decay, A_log, dt_bias, beta, chunks,
    table, decay_sums, steep_out, query_out, key_out, write_out, last_decay, T_out, P_out, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr, L2NORM: tl.constexpr,
    RAW: tl.constexpr, RANGE: tl.constexpr, WRITE: tl.constexpr, DELTA: tl.constexpr, VARLEN: tl.constexpr,
    ACC: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T and P [NT, HV, C, C] as ``prepare_kernel``; G [NT, HV, C, K]; e^G q, e^G k, e^(G_C - G) kw [M, HV, K] with their
    norms and the scale, and e^(G_C) [NT, HV, K], as the serial kernels read them; which blocks are steep [NT, HV, K / BK]."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    block = step // R
    rows = (start + step).to(tl.int64)
    live = rows < end
    slot = i * HV + h
    keys = (rows * (HV // GROUP) + h // GROUP)[:, None] * K
    own = (rows * HV + h)[:, None] * K
    norm_q = tl.full([C], SCALE, ACC)
    norm_k = tl.full([C], 1.0, ACC)
    if L2NORM:
        norm_q = SCALE / tl.sqrt(sum_of_squares(q, keys, live, K, BK, ACC) + 1e-6)
        norm_k = 1.0 / tl.sqrt(sum_of_squares(k, keys, live, K, BK, ACC) + 1e-6)
    b = nonzero_gain(beta, rows * HV + h, live, RANGE, ACC)
    sums = decay_sums + slot * C * K
    rate = load_rate(A_log, h, RAW, ACC)
    for base in range(0, K, BK):
        cols = base + tl.arange(0, BK)
        keep = live[:, None] & (cols < K)[None, :]
        bias = load_bias(dt_bias, h, cols, K, RAW, ACC)
        g = tl.load(log_decay + own + cols[None, :], mask=keep, other=0.0).to(ACC)
        G = tl.cumsum(tl.where(keep, decay_of(g, rate, bias, RAW), 0.0), 0)
        tl.store(sums + step[:, None] * K + cols[None, :], G, mask=(cols < K)[None, :])
    at = table + slot * ROWS * C + step
    tl.store(at + BETA * C, b)
    tl.store(at + NORM_Q * C, norm_q)
    tl.store(at + NORM_K * C, norm_k)
    norms = table + slot * ROWS * C + NORM_K * C
    tl.debug_barrier()  # the rows below are read back by other threads

    kind = q.dtype.element_ty
    wide = tl.float32 if kind == tl.float16 else kind  # float16 has not the range of the factors within a block
    scores = tl.zeros([C, C], dtype=ACC)
    system = tl.zeros([C, C], dtype=ACC)
    same = block[:, None] == block[None, :]
    for base in range(0, K, BK):
        cols = base + tl.arange(0, BK)
        keep = live[:, None] & (cols < K)[None, :]
        G = rows_at(sums, step, K, cols)
        kx = norm_k[:, None] * tl.load(k + keys + cols[None, :], mask=keep, other=0.0).to(ACC)
        if WRITE == RESCALED_QUERY:
            qx = norm_q[:, None] * tl.load(query + own + cols[None, :], mask=keep, other=0.0).to(ACC)
        else:
            qx = norm_q[:, None] * tl.load(q + keys + cols[None, :], mask=keep, other=0.0).to(ACC)
        wx = kx
        if WRITE == FROM_TENSOR or WRITE == RESCALED_KEY:  # noqa: SIM109
            wx = write_rows(k, write, norms, step, start, end, h, cols, K, HV, GROUP, WRITE, ACC)
        G_C = row_at(sums, C - 1, K, cols)
        tl.store(last_decay + slot * K + cols, tl.exp(G_C), mask=cols < K)
        grow = tl.exp(G)
        tl.store(query_out + own + cols[None, :], (qx * grow).to(kind), mask=keep)
        tl.store(write_out + own + cols[None, :], (wx * tl.exp(G_C[None, :] - G)).to(kind), mask=keep)
        if DELTA:
            tl.store(key_out + own + cols[None, :], (kx * grow).to(kind), mask=keep)

        steep = is_steep(sums, K, cols)
        tl.store(steep_out + slot * tl.cdiv(K, BK) + base // BK, steep.to(tl.int32))
        if steep:
            up = tl.exp(G - rows_at(sums, block * R, K, cols))
            q_up = (qx * up).to(kind)
            k_up = (kx * up).to(kind)
            q_between = tl.zeros([C, C], dtype=ACC)
            k_between = tl.zeros([C, C], dtype=ACC)
            for n in tl.static_range(1, 4):
                first = row_at(sums, n * R, K, cols)
                right = wx * tl.exp(tl.where((step < n * R)[:, None], first[None, :] - G, float("-inf")))
                right = tl.trans(right.to(kind))
                here = (block == n)[:, None]
                q_between += dot(tl.where(here, q_up, 0.0).to(kind), right, PRECISION)
                if DELTA:
                    k_between += dot(tl.where(here, k_up, 0.0).to(kind), right, PRECISION)
            q_within = tl.zeros([C, C], dtype=ACC)
            k_within = tl.zeros([C, C], dtype=ACC)
            if spread(sums, K, cols) < MAX_SPREAD:
                middle = rows_at(sums, block * R + R // 2, K, cols)
                up = tl.exp(G - middle)
                inner = tl.trans((wx * tl.exp(middle - G)).to(wide))
                q_within = dot((qx * up).to(wide), inner, PRECISION)
                if DELTA:
                    k_within = dot((kx * up).to(wide), inner, PRECISION)
            else:
                for j in range(0, R):
                    r = block * R + j
                    w_j = write_rows(k, write, norms, r, start, end, h, cols, K, HV, GROUP, WRITE, ACC)
                    factor = w_j * tl.exp(tl.where((step >= r)[:, None], G - rows_at(sums, r, K, cols), float("-inf")))
                    column = step[None, :] == r[:, None]
                    q_within += tl.where(column, tl.sum(qx * factor, 1)[:, None], 0.0)
                    if DELTA:
                        k_within += tl.where(column, tl.sum(kx * factor, 1)[:, None], 0.0)
            scores += tl.where(same, q_within, q_between)
            if DELTA:
                system += tl.where(same, k_within, k_between)
        else:
            middle = row_at(sums, C // 2, K, cols)[None, :]
            up = tl.exp(G - middle)
            inner = tl.trans((wx * tl.exp(middle - G)).to(wide))
            scores += dot((qx * up).to(wide), inner, PRECISION)
            if DELTA:
                system += dot((kx * up).to(wide), inner, PRECISION)

    square = (slot * C + step[:, None]) * C + step[None, :]
    P = tl.where(step[:, None] >= step[None, :], scores, 0.0)
    tl.store(P_out + square, P.to(P_out.dtype.element_ty))
    if DELTA:
        L = tl.where(step[:, None] > step[None, :], system * b[None, :], 0.0)
        tl.store(T_out + square, unit_lower_inverse(L, ACC, HALF, PRECISION).to(T_out.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def vector_gradient_kernel(
    q, k, query, write, log_decay, A_log, dt_bias, v, o, x, do, dv, table, decay_sums, states, adjoints, chunks,
    dq, dk, dwrite, dlog_decay, dbeta, d_rate, d_bias, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, RAW: tl.constexpr, RANGE: tl.constexpr, WRITE: tl.constexpr,
    DELTA: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``gradient_kernel`` for a vector decay; dlog_decay [M, HV, K], and RAW: the chunk's parts of dA_log and
    ddt_bias [NT, HV, K]. Steep blocks come out wrong and are done again."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    rows = (start + step).to(tl.int64)
    live = rows < end
    vals = tl.arange(0, BV)
    keep_v = vals < V
    slot = i * HV + h
    scalars = table + slot * ROWS * C
    b = tl.load(scalars + BETA * C + step)
    norm_k = tl.load(scalars + NORM_K * C + step)
    norm_q = tl.load(scalars + NORM_Q * C + step)
    norms = scalars + NORM_K * C
    sums = decay_sums + slot * C * K
    keys = (rows * (HV // GROUP) + h // GROUP)[:, None] * K
    own = (rows * HV + h)[:, None] * K
    value = (rows * HV + h)[:, None] * V + vals[None, :]
    keep_value = live[:, None] & keep_v[None, :]
    at_row = rows * HV + h
    kind = q.dtype.element_ty
    wide = tl.float32 if kind == tl.float16 else kind  # float16 has not the range of the factors within a block

    WITH_O: tl.constexpr = L2NORM and WRITE != RESCALED_QUERY
    WHOLE: tl.constexpr = BV >= V
    if WHOLE:
        g = tl.load(do + value, mask=keep_value, other=0.0)
        d = tl.load(dv + value, mask=keep_value, other=0.0)
        vx = tl.load(v + value, mask=keep_value, other=0.0)
        along_k = -tl.sum(d.to(ACC) * vx.to(ACC), 1)
        if DELTA:
            vx = tl.load(x + value, mask=keep_value, other=0.0)
        along_w = tl.sum(d.to(ACC) * vx.to(ACC), 1)
        along_k += along_w
        along_q = tl.zeros([C], dtype=ACC)
        if WITH_O:
            along_q = tl.sum(g.to(ACC) * tl.load(o + value, mask=keep_value, other=0.0).to(ACC), 1)
        xt = tl.trans(vx)
    else:
        along_q, along_k, along_w, of_P, of_L = value_sums(
            do, dv, v, x, o, (rows * HV + h) * V, live, V, BV, DELTA, WITH_O, ACC, PRECISION
        )
    tl.store(dbeta + at_row, gain_gradient(along_w / b, b, RANGE), mask=live)

    dP = tl.where(step[:, None] >= step[None, :], (dot(g, xt, PRECISION) if WHOLE else of_P) * b[None, :], 0.0)
    dP_t = tl.trans(dP.to(wide))
    dP = dP.to(wide)
    if DELTA:
        dL = tl.where(step[:, None] > step[None, :], -(dot(d, xt, PRECISION) if WHOLE else of_L) * b[None, :], 0.0)
        dL_t = tl.trans(dL.to(wide))
        dL = dL.to(wide)
    for base in range(0, K, BK):
        cols = base + tl.arange(0, BK)
        keep_k = cols < K
        keep = live[:, None] & keep_k[None, :]
        at = slot * K * V + vals[:, None] * K + cols[None, :]
        inside = keep_k[None, :] & keep_v[:, None]
        if WHOLE:
            St = tl.load(states + at, mask=inside, other=0.0)
            Et = tl.load(adjoints + at, mask=inside, other=0.0)
        else:
            of_g, of_d, of_x, kept = state_products(
                do, dv, x if DELTA else v, states + slot * K * V, adjoints + slot * K * V, (rows * HV + h) * V, live, cols,
                K, BK, V, BV, ACC, PRECISION,
            )  # fmt: skip
        G = rows_at(sums, step, K, cols)
        middle = row_at(sums, C // 2, K, cols)
        G_C = row_at(sums, C - 1, K, cols)
        kx = norm_k[:, None] * tl.load(k + keys + cols[None, :], mask=keep, other=0.0).to(ACC)
        if WRITE == RESCALED_QUERY:
            qx = norm_q[:, None] * tl.load(query + own + cols[None, :], mask=keep, other=0.0).to(ACC)
        else:
            qx = norm_q[:, None] * tl.load(q + keys + cols[None, :], mask=keep, other=0.0).to(ACC)
        wx = kx
        if WRITE == FROM_TENSOR or WRITE == RESCALED_KEY:  # noqa: SIM109
            wx = write_rows(k, write, norms, step, start, end, h, cols, K, HV, GROUP, WRITE, ACC)
        up = tl.exp(G - middle[None, :])
        down = tl.exp(middle[None, :] - G)
        start_to_middle = tl.exp(middle)[None, :]
        right = (wx * down).to(wide)
        d_query = up * (dot(dP, right, PRECISION) + start_to_middle * (dot(g, St, PRECISION) if WHOLE else of_g))
        back = dot(dP_t, (qx * up).to(wide), PRECISION)
        d_key = tl.zeros([C, BK], dtype=ACC)
        if DELTA:
            d_key = up * (dot(dL, right, PRECISION) - start_to_middle * (dot(d, St, PRECISION) if WHOLE else of_d))
            back += dot(dL_t, (kx * up).to(wide), PRECISION)
        d_state = down * tl.exp(G_C - middle)[None, :] * b[:, None] * (dot(vx, Et, PRECISION) if WHOLE else of_x)
        d_write = down * back
        d_write += d_state
        kept = tl.sum(St.to(ACC) * Et.to(ACC), 0) if WHOLE else kept
        kept = tl.exp(G_C) * kept + tl.sum(wx * d_state, 0)
        dG = qx * d_query + kx * d_key - wx * d_write
        dG = tl.where(keep, tl.sum(dG, 0)[None, :] - tl.cumsum(dG, 0) + dG + kept[None, :], 0.0)
        raw = tl.load(log_decay + own + cols[None, :], mask=keep, other=0.0).to(ACC)
        d_raw, d_log_rate = decay_gradient(dG, raw, load_rate(A_log, h, RAW, ACC), load_bias(dt_bias, h, cols, K, RAW, ACC), RAW)
        tl.store(dlog_decay + own + cols[None, :], d_raw.to(dlog_decay.dtype.element_ty), mask=keep)
        if RAW:
            tl.store(d_rate + slot * K + cols, tl.sum(d_log_rate, 0), mask=keep_k)
            tl.store(d_bias + slot * K + cols, tl.sum(d_raw, 0), mask=keep_k)

        if WRITE == FROM_TENSOR or WRITE == RESCALED_KEY:  # noqa: SIM109
            tl.store(dwrite + own + cols[None, :], d_write.to(dwrite.dtype.element_ty), mask=keep)
        else:
            d_key += d_write
        if WRITE == FROM_KEY or WRITE == FROM_TENSOR:  # noqa: SIM109
            if L2NORM:
                d_key -= kx * (along_k if WRITE == FROM_TENSOR else along_k + along_w)[:, None]
            d_key *= norm_k[:, None]
        tl.store(dk + own + cols[None, :], d_key.to(dk.dtype.element_ty), mask=keep)
        if WRITE != RESCALED_QUERY:
            if L2NORM:
                d_query -= (along_q / (SCALE * SCALE))[:, None] * qx
            d_query *= norm_q[:, None]
        tl.store(dq + own + cols[None, :], d_query.to(dq.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["T"])
def steep_gradient_kernel(
    q, k, query, write, log_decay, A_log, dt_bias, v, o, x, do, dv, table, decay_sums, steep, states, adjoints, chunks,
    dq, dk, dwrite, dlog_decay, dbeta, d_rate, d_bias, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, RAW: tl.constexpr, RANGE: tl.constexpr, WRITE: tl.constexpr,
    DELTA: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``vector_gradient_kernel`` again, for the steep blocks of channels."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks = steep + (i * HV + h) * tl.cdiv(K, BK)
    some = tl.load(blocks)
    for n in tl.static_range(1, (K + BK - 1) // BK):
        some |= tl.load(blocks + n)
    if some == 0:
        return
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    block = step // R
    rows = (start + step).to(tl.int64)
    live = rows < end
    vals = tl.arange(0, BV)
    keep_v = vals < V
    slot = i * HV + h
    scalars = table + slot * ROWS * C
    b = tl.load(scalars + BETA * C + step)
    norm_k = tl.load(scalars + NORM_K * C + step)
    norm_q = tl.load(scalars + NORM_Q * C + step)
    norms = scalars + NORM_K * C
    sums = decay_sums + slot * C * K
    keys = (rows * (HV // GROUP) + h // GROUP)[:, None] * K
    own = (rows * HV + h)[:, None] * K
    value = (rows * HV + h)[:, None] * V + vals[None, :]
    keep_value = live[:, None] & keep_v[None, :]
    kind = q.dtype.element_ty
    wide = tl.float32 if kind == tl.float16 else kind  # float16 has not the range of the factors within a block

    WITH_O: tl.constexpr = L2NORM and WRITE != RESCALED_QUERY
    WHOLE: tl.constexpr = BV >= V
    if WHOLE:
        g = tl.load(do + value, mask=keep_value, other=0.0)
        d = tl.load(dv + value, mask=keep_value, other=0.0)
        vx = tl.load(v + value, mask=keep_value, other=0.0)
        along_k = -tl.sum(d.to(ACC) * vx.to(ACC), 1)
        if DELTA:
            vx = tl.load(x + value, mask=keep_value, other=0.0)
        along_w = tl.sum(d.to(ACC) * vx.to(ACC), 1)
        along_k += along_w
        along_q = tl.zeros([C], dtype=ACC)
        if WITH_O:
            along_q = tl.sum(g.to(ACC) * tl.load(o + value, mask=keep_value, other=0.0).to(ACC), 1)
        xt = tl.trans(vx)
    else:
        along_q, along_k, along_w, of_P, of_L = value_sums(
            do, dv, v, x, o, (rows * HV + h) * V, live, V, BV, DELTA, WITH_O, ACC, PRECISION
        )

    same = block[:, None] == block[None, :]
    dP = tl.where(step[:, None] >= step[None, :], (dot(g, xt, PRECISION) if WHOLE else of_P) * b[None, :], 0.0)
    dP_between = tl.where(same, 0.0, dP).to(kind)
    dP_within = tl.where(same, dP, 0.0).to(wide)
    if DELTA:
        dL = tl.where(step[:, None] > step[None, :], -(dot(d, xt, PRECISION) if WHOLE else of_L) * b[None, :], 0.0)
        dL_between = tl.where(same, 0.0, dL).to(kind)
        dL_within = tl.where(same, dL, 0.0).to(wide)
    for base in range(0, K, BK):
        if tl.load(blocks + base // BK) != 0:
            cols = base + tl.arange(0, BK)
            keep_k = cols < K
            keep = live[:, None] & keep_k[None, :]
            G = rows_at(sums, step, K, cols)
            kx = norm_k[:, None] * tl.load(k + keys + cols[None, :], mask=keep, other=0.0).to(ACC)
            if WRITE == RESCALED_QUERY:
                qx = norm_q[:, None] * tl.load(query + own + cols[None, :], mask=keep, other=0.0).to(ACC)
            else:
                qx = norm_q[:, None] * tl.load(q + keys + cols[None, :], mask=keep, other=0.0).to(ACC)
            wx = kx
            if WRITE == FROM_TENSOR or WRITE == RESCALED_KEY:  # noqa: SIM109
                wx = write_rows(k, write, norms, step, start, end, h, cols, K, HV, GROUP, WRITE, ACC)

            up = tl.exp(G - rows_at(sums, block * R, K, cols))
            q_up = (qx * up).to(kind)
            k_up = (kx * up).to(kind)
            d_query = tl.zeros([C, BK], dtype=ACC)
            d_key = tl.zeros([C, BK], dtype=ACC)
            d_write = tl.zeros([C, BK], dtype=ACC)
            for n in tl.static_range(1, 4):
                first = row_at(sums, n * R, K, cols)
                down = tl.exp(tl.where((step < n * R)[:, None], first[None, :] - G, float("-inf")))
                right = (wx * down).to(kind)
                here = (block == n)[:, None]
                d_query += tl.where(here, dot(dP_between, right, PRECISION), 0.0)
                back = dot(tl.trans(dP_between), tl.where(here, q_up, 0.0).to(kind), PRECISION)
                if DELTA:
                    d_key += tl.where(here, dot(dL_between, right, PRECISION), 0.0)
                    back += dot(tl.trans(dL_between), tl.where(here, k_up, 0.0).to(kind), PRECISION)
                d_write += down * back
            d_query *= up
            d_key *= up
            if spread(sums, K, cols) < MAX_SPREAD:
                middle = rows_at(sums, block * R + R // 2, K, cols)
                up = tl.exp(G - middle)
                down = tl.exp(middle - G)
                inner = (wx * down).to(wide)
                d_query += up * dot(dP_within, inner, PRECISION)
                back = dot(tl.trans(dP_within), (qx * up).to(wide), PRECISION)
                if DELTA:
                    d_key += up * dot(dL_within, inner, PRECISION)
                    back += dot(tl.trans(dL_within), (kx * up).to(wide), PRECISION)
                d_write += down * back
            else:
                for j in range(0, R):
                    r = block * R + j
                    w_j = write_rows(k, write, norms, r, start, end, h, cols, K, HV, GROUP, WRITE, ACC)
                    factor = tl.exp(tl.where((step >= r)[:, None], G - rows_at(sums, r, K, cols), float("-inf")))
                    column = step[None, :] == r[:, None]
                    from_q = tl.sum(tl.where(column, dP_within.to(ACC), 0.0), 1)[:, None] * factor
                    d_query += from_q * w_j
                    taken = from_q * qx
                    if DELTA:
                        from_k = tl.sum(tl.where(column, dL_within.to(ACC), 0.0), 1)[:, None] * factor
                        d_key += from_k * w_j
                        taken += from_k * kx
                    for n in tl.static_range(0, 4):
                        row = tl.sum(tl.where((block == n)[:, None], taken, 0.0), 0)
                        d_write += tl.where((step == n * R + j)[:, None], row[None, :], 0.0)

            at = slot * K * V + vals[:, None] * K + cols[None, :]
            inside = keep_k[None, :] & keep_v[:, None]
            if WHOLE:
                St = tl.load(states + at, mask=inside, other=0.0)
                Et = tl.load(adjoints + at, mask=inside, other=0.0)
            else:
                of_g, of_d, of_x, kept = state_products(
                    do, dv, x if DELTA else v, states + slot * K * V, adjoints + slot * K * V, (rows * HV + h) * V, live, cols,
                    K, BK, V, BV, ACC, PRECISION,
                )  # fmt: skip
            grow = tl.exp(G)
            d_query += grow * (dot(g, St, PRECISION) if WHOLE else of_g)
            if DELTA:
                d_key -= grow * (dot(d, St, PRECISION) if WHOLE else of_d)
            G_C = row_at(sums, C - 1, K, cols)
            d_state = tl.exp(G_C[None, :] - G) * b[:, None] * (dot(vx, Et, PRECISION) if WHOLE else of_x)
            d_write += d_state
            kept = tl.sum(St.to(ACC) * Et.to(ACC), 0) if WHOLE else kept
            kept = tl.exp(G_C) * kept + tl.sum(wx * d_state, 0)
            dG = qx * d_query + kx * d_key - wx * d_write
            dG = tl.where(keep, tl.sum(dG, 0)[None, :] - tl.cumsum(dG, 0) + dG + kept[None, :], 0.0)
            raw = tl.load(log_decay + own + cols[None, :], mask=keep, other=0.0).to(ACC)
            d_raw, d_log_rate = decay_gradient(
                dG, raw, load_rate(A_log, h, RAW, ACC), load_bias(dt_bias, h, cols, K, RAW, ACC), RAW
            )
            tl.store(dlog_decay + own + cols[None, :], d_raw.to(dlog_decay.dtype.element_ty), mask=keep)
            if RAW:
                tl.store(d_rate + slot * K + cols, tl.sum(d_log_rate, 0), mask=keep_k)
                tl.store(d_bias + slot * K + cols, tl.sum(d_raw, 0), mask=keep_k)

            if WRITE == FROM_TENSOR or WRITE == RESCALED_KEY:  # noqa: SIM109
                tl.store(dwrite + own + cols[None, :], d_write.to(dwrite.dtype.element_ty), mask=keep)
            else:
                d_key += d_write
            if WRITE == FROM_KEY or WRITE == FROM_TENSOR:  # noqa: SIM109
                if L2NORM:
                    d_key -= kx * (along_k if WRITE == FROM_TENSOR else along_k + along_w)[:, None]
                d_key *= norm_k[:, None]
            tl.store(dk + own + cols[None, :], d_key.to(dk.dtype.element_ty), mask=keep)
            if WRITE != RESCALED_QUERY:
                if L2NORM:
                    d_query -= (along_q / (SCALE * SCALE))[:, None] * qx
                d_query *= norm_q[:, None]
            tl.store(dq + own + cols[None, :], d_query.to(dq.dtype.element_ty), mask=keep)
