"""A decay per key channel: what turns its chunks into products of two matrices.

The products of a chunk contract e^(G_ik - G_jk) over the channels k, G being the cumulative log-decay. With a reference
between the two, each factor goes to its own operand, and with both norms folded in as well, every other kernel sees the
undecayed recurrence::

    q' = |q|-norm e^R q      k' = |k|-norm e^R k      kw' = e^-R kw      R = G - G_middle

of the states ``enter`` S before the chunk and ``leave`` E after it, where enter = e^(G_middle), leave = e^(G_C - G_middle).
The latter are kept with a factor ``lift``, since gradients may be small and the range of their type begins at 1e-38.

That holds as long as no factor leaves the range of its type. A block of WIDTH channels of a chunk where one does is steep:
its q' and k' take the chunk's start as reference and its kw' the end, so that all factors are <= 1 and the products with
states are right; those between its tokens come out finite and wrong, and the kernels of ``steep.py`` do them again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import (
    BETA,
    FROM_KEY,
    FROM_TENSOR,
    INTERPRETED,
    NORM_K,
    NORM_Q,
    RESCALED_KEY,
    RESCALED_QUERY,
    ROWS,
    C,
    dot,
    exp,
    in_three,
    inverse_root,
    locate_chunk,
)
from pdn.ops.triton.curvature import load_row
from pdn.ops.triton.gates import decay_gradient, decay_of, gain_gradient, load_rate
from pdn.ops.triton.gradients import state_products, value_sums

WIDTH = 32  # channels that share the choice of references
STEEP = tl.constexpr(75.0)  # nats in half a chunk: e^75 leaves float32 sums of 5e-13 to 9e5 times enter or leave
STEEP_HALF = tl.constexpr(6.0)  # of float16

# How ``ends`` [NT, HV, ENDS, K] is laid out.
ENTER = tl.constexpr(0)  # of the state before the chunk
LEAVE = tl.constexpr(1)  # of the adjoint after it
KEEP = tl.constexpr(2)  # e^(G_C) / (enter leave): one unless steep
MIDDLE = tl.constexpr(3)  # G_middle, nats
NUM_ENDS = 4
ENDS = tl.constexpr(NUM_ENDS)


@triton.jit
def lift(kind: tl.constexpr):
    """What bfloat16 adjoints are multiplied by."""
    return 1.0 if kind == tl.float16 else 1099511627776.0


@triton.jit
def load_bias(dt_bias, h, cols, K: tl.constexpr, RAW: tl.constexpr, ACC: tl.constexpr):
    """[BK] of dt_bias [HV, K]."""
    if RAW:
        return tl.load(dt_bias + h * K + cols, mask=cols < K, other=0.0).to(ACC)
    else:
        return 0.0


@triton.jit
def load_operands(
    q, k, query, write, t, live, h, cols,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, L2NORM: tl.constexpr,
    WRITE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Token t's query that reads, key and write key [BK], with their norms, and the norms of query (with SCALE) and key."""
    kx = load_row(k, t, cols, HV, GROUP, h, K, live, ACC)
    qx = load_row(q, t, cols, HV, GROUP, h, K, live, ACC)
    norm_q = SCALE
    norm_k = 1.0
    if L2NORM:
        norm_q = SCALE * inverse_root(tl.sum(qx * qx, 0))
        norm_k = inverse_root(tl.sum(kx * kx, 0))
    if WRITE == RESCALED_QUERY:
        qx = load_row(query, t, cols, HV, 1, h, K, live, ACC)
    if WRITE == FROM_TENSOR:
        wx = load_row(write, t, cols, HV, 1, h, K, live, ACC)
    elif WRITE == RESCALED_KEY:
        wx = norm_k * load_row(write, t, cols, HV, 1, h, K, live, ACC)
    else:
        wx = norm_k * kx
    return norm_q * qx, norm_k * kx, wx, norm_q, norm_k


@triton.jit(do_not_specialize=["T"])
def fold_kernel(
    q, k, query, write, log_decay, A_log, dt_bias, chunks,
    query_out, key_out, write_out, decay_sums, ends, steep, table, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, LIMIT: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, RAW: tl.constexpr, WRITE: tl.constexpr, DELTA: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q', k', kw' [M, HV, K], R [NT, HV, C, K], ``ends`` [NT, HV, ENDS, K], which blocks of W channels are steep
    [NT, HV, K / W], and the norms of q and k in the table.

    One warp goes through the tokens from the middle of the chunk to both ends; every lane owns some channels.
    """
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    slot = i * HV + h
    cols = tl.arange(0, BK)
    inside = cols < K
    kind = query_out.dtype.element_ty
    rate = load_rate(A_log, h, RAW, ACC)
    bias = load_bias(dt_bias, h, cols, K, RAW, ACC)
    M: tl.constexpr = C // 2  # the middle row
    scalars = table + slot * ROWS * C
    sums = decay_sums + slot * C * K + cols
    x = load_row(log_decay, start + M, cols, HV, 1, h, K, start + M < end, ACC)
    later = decay_of(x, rate, bias, RAW) * (inside & (start + M < end)).to(ACC)
    R_up = tl.zeros([BK], dtype=ACC)
    R_down = tl.zeros([BK], dtype=ACC)
    for n in range(0, M):
        for side in tl.static_range(0, 2):
            r = M + n if side == 0 else M - 1 - n
            t = start + r
            live = t < end
            g = load_row(log_decay, t, cols, HV, 1, h, K, live, ACC)
            g = decay_of(g, rate, bias, RAW) * (inside & live).to(ACC)
            if side == 0:
                R_down += tl.where(n > 0, g, 0.0)
                R = R_down
            else:
                R_up -= later
                later = g
                R = R_up
            qx, kx, wx, norm_q, norm_k = load_operands(
                q, k, query, write, t, live, h, cols, HV, GROUP, K, SCALE, L2NORM, WRITE, ACC
            )
            up = exp(R)
            to = (t.to(tl.int64) * HV + h) * K + cols
            tl.store(query_out + to, (up * qx).to(kind), mask=inside & live)
            tl.store(write_out + to, (exp(-R) * wx).to(kind), mask=inside & live)
            if DELTA:
                tl.store(key_out + to, (up * kx).to(kind), mask=inside & live)
            tl.store(sums + r * K, R, mask=inside)
            tl.store(scalars + NORM_Q * C + r, norm_q)
            tl.store(scalars + NORM_K * C + r, norm_k)

    middle = later - R_up
    far = tl.maximum(-middle, -R_down) >= LIMIT
    block = tl.max(tl.reshape(far.to(tl.int32), [BK // W, W]), 1)
    of_block = tl.arange(0, BK // W)
    tl.store(steep + slot * tl.cdiv(K, W) + of_block, block, mask=of_block * W < K)
    here = tl.reshape(tl.broadcast_to(block[:, None], [BK // W, W]), [BK]) != 0
    at_ends = ends + slot * ENDS * K + cols
    tl.store(at_ends + ENTER * K, tl.where(here, 1.0, exp(middle)), mask=inside)
    tl.store(at_ends + LEAVE * K, tl.where(here, 1.0, exp(R_down)), mask=inside)
    tl.store(at_ends + KEEP * K, tl.where(here, exp(middle + R_down), 1.0), mask=inside)
    tl.store(at_ends + MIDDLE * K, middle, mask=inside)
    if tl.max(block, 0) != 0:
        for r in range(0, C):
            t = start + r
            live = t < end
            R = tl.load(sums + r * K, mask=inside, other=0.0)
            qx, kx, wx, _, _ = load_operands(q, k, query, write, t, live, h, cols, HV, GROUP, K, SCALE, L2NORM, WRITE, ACC)
            up = exp(R + middle)
            to = (t.to(tl.int64) * HV + h) * K + cols
            tl.store(query_out + to, (up * qx).to(kind), mask=inside & live & here)
            tl.store(write_out + to, (exp(R_down - R) * wx).to(kind), mask=inside & live & here)
            if DELTA:
                tl.store(key_out + to, (up * kx).to(kind), mask=inside & live & here)


@triton.jit
def suffix_sums(x, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """[C, BK]: each row with all after it. As a product: a scan along rows crosses warps."""
    if INTERPRETED or tl.float64 == ACC:
        return tl.sum(x, 0)[None, :] - tl.cumsum(x, 0) + x
    else:
        i = tl.arange(0, C)
        ones = tl.where(i[None, :] >= i[:, None], 1.0, 0.0).to(tl.bfloat16)
        x0, x1, x2 = in_three(x)
        y = tl.dot(ones, x1)
        if PRECISION == "bf16x6":
            y = tl.dot(ones, x2, y)
        return tl.dot(ones, x0, y)


@triton.jit
def store_decay_gradient(
    dG, kept, raw, A_log, dt_bias, dlog_decay, d_rate, d_bias, at, keep, h, cols,
    K: tl.constexpr, RAW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the log-decays [C, BK] from those of their sums G, ``kept`` [BK] being the last one's share of what the chunk hands
    on; RAW: of the raw gate, and the block's part of dA_log and ddt_bias [BK]."""
    d = tl.where(keep, suffix_sums(dG, ACC, PRECISION) + kept[None, :], 0.0)
    bias = load_bias(dt_bias, h, cols, K, RAW, ACC)
    if RAW:
        bias = bias[None, :]
    d_x, d_log_rate = decay_gradient(d, raw, load_rate(A_log, h, RAW, ACC), bias, RAW)
    tl.store(dlog_decay + at, d_x.to(dlog_decay.dtype.element_ty), mask=keep)
    if RAW:
        tl.store(d_bias + cols, tl.sum(d_x, 0), mask=cols < K)
        tl.store(d_rate, tl.sum(tl.reshape(d_log_rate, [d_log_rate.shape[0] * d_log_rate.shape[1]]), 0))


@triton.jit(do_not_specialize=["T"])
def vector_gradient_kernel(
    query, key, write, log_decay, A_log, dt_bias, v, o, x, do, dv, table, decay_sums, ends, states, adjoints, chunks,
    dq, dk, dwrite, dlog_decay, dbeta, d_rate, d_bias, T,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, RAW: tl.constexpr, RANGE: tl.constexpr, WRITE: tl.constexpr,
    DELTA: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``gradient_kernel`` for q', k', kw' [M, HV, K], and back to the raw tensors by their factors: dq, dk, dwrite,
    dlog_decay [M, HV, K], dbeta [M, HV], and RAW: the parts of dA_log [NT, HV, K / BK] and ddt_bias [NT, HV, K].

    The decay's gradient q' dq' + k' dk' - kw' dkw' takes the rounded operands of the products, so that what a pair of
    tokens adds at the one it takes at the other, and all between cancels as it should. Steep blocks are done again.
    """
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    rows = (start + step).to(tl.int64)
    live = rows < end
    vals = tl.arange(0, BV)
    keep_v = vals < V
    slot = i * HV + h
    scalars = table + slot * ROWS * C + step
    b = tl.load(scalars + BETA * C)
    own = (rows * HV + h)[:, None] * K
    value = (rows * HV + h)[:, None] * V + vals[None, :]
    keep_value = live[:, None] & keep_v[None, :]
    kind = do.dtype.element_ty
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
        along_q = tl.sum(g.to(ACC) * tl.load(o + value, mask=keep_value, other=0.0).to(ACC), 1)
        xt = tl.trans(vx)
        of_P = dot(g, xt, PRECISION)
        of_L = of_P
        if DELTA:
            of_L = dot(d, xt, PRECISION)
    else:
        along_q, along_k, along_w, of_P, of_L = value_sums(
            do, dv, v, x, o, (rows * HV + h) * V, live, V, BV, DELTA, ACC, PRECISION
        )
    tl.store(dbeta + rows * HV + h, gain_gradient(along_w / b, b, RANGE), mask=live)
    wide = tl.float32 if kind == tl.float16 else kind  # float16 has not the range of a gradient times a value
    dP = tl.where(step[:, None] >= step[None, :], of_P * b[None, :], 0.0).to(wide)
    dP_t = tl.trans(dP)
    if DELTA:
        dL = tl.where(step[:, None] > step[None, :], -of_L * b[None, :], 0.0).to(wide)
        dL_t = tl.trans(dL)
    norm_q = tl.load(scalars + NORM_Q * C)
    norm_k = tl.load(scalars + NORM_K * C)
    along_q *= norm_q / (SCALE * SCALE)
    if WRITE == FROM_KEY:
        along_k += along_w
    along_k *= norm_k
    for base in range(0, K, BK):
        cols = base + tl.arange(0, BK)
        keep_k = cols < K
        keep = live[:, None] & keep_k[None, :]
        inside = keep_k[None, :] & keep_v[:, None]
        at = own + cols[None, :]
        R = tl.load(decay_sums + (slot * C + step[:, None]) * K + cols[None, :], mask=keep_k[None, :], other=0.0)
        raw = tl.load(log_decay + at, mask=keep, other=0.0)
        qx = tl.load(query + at, mask=keep, other=0.0)
        wx = tl.load(write + at, mask=keep, other=0.0)
        if WHOLE:
            at_state = slot * K * V + vals[:, None] * K + cols[None, :]
            St = tl.load(states + at_state, mask=inside, other=0.0)
            Et = tl.load(adjoints + at_state, mask=inside, other=0.0)
            of_g = dot(g, St, PRECISION)
            of_x = dot(vx, Et, PRECISION)
            kept = tl.sum(St.to(ACC) * Et.to(ACC), 0)
        else:
            of_g, of_d, of_x, kept = state_products(
                do, dv, x if DELTA else v, states + slot * K * V, adjoints + slot * K * V, (rows * HV + h) * V, live, cols,
                K, BK, V, BV, ACC, PRECISION,
            )  # fmt: skip
        d_write = (b / lift(kind))[:, None] * of_x
        kept *= tl.load(ends + (slot * ENDS + KEEP) * K + cols, mask=keep_k, other=0.0) / lift(kind)
        kept += tl.sum(wx.to(ACC) * d_write, 0)
        d_query = of_g + dot(dP, wx.to(wide), PRECISION)
        d_write += dot(dP_t, qx.to(wide), PRECISION)
        dG = qx.to(ACC) * d_query
        d_key = tl.zeros([C, BK], dtype=ACC)
        if DELTA:
            kx = tl.load(key + at, mask=keep, other=0.0)
            d_write += dot(dL_t, kx.to(wide), PRECISION)
            if WHOLE:
                of_d = dot(d, St, PRECISION)
            d_key = dot(dL, wx.to(wide), PRECISION) - of_d
            dG += kx.to(ACC) * d_key
        dG -= wx.to(ACC) * d_write
        store_decay_gradient(
            dG, kept, raw.to(ACC), A_log, dt_bias, dlog_decay, d_rate + slot * tl.cdiv(K, BK) + base // BK, d_bias + slot * K,
            at, keep, h, cols, K, RAW, ACC, PRECISION,
        )  # fmt: skip
        up = exp(R)
        down = exp(-R)
        if WRITE == FROM_TENSOR:
            tl.store(dwrite + at, (down * d_write).to(dwrite.dtype.element_ty), mask=keep)
        elif WRITE == RESCALED_KEY:
            tl.store(dwrite + at, (norm_k[:, None] * down * d_write).to(dwrite.dtype.element_ty), mask=keep)
        d_key *= up
        if WRITE == FROM_KEY or WRITE == RESCALED_QUERY:  # noqa: SIM109
            d_key += down * d_write
        d_key *= norm_k[:, None]
        d_query *= norm_q[:, None] * up
        if L2NORM:
            if WRITE == FROM_KEY:
                d_key -= along_k[:, None] * up * wx.to(ACC)
            elif WRITE == FROM_TENSOR:
                d_key -= along_k[:, None] * down * kx.to(ACC)
            if WRITE != RESCALED_QUERY:
                d_query -= along_q[:, None] * down * qx.to(ACC)
        tl.store(dk + at, d_key.to(dk.dtype.element_ty), mask=keep)
        tl.store(dq + at, d_query.to(dq.dtype.element_ty), mask=keep)
