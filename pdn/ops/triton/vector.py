"""A decay per key channel: what turns its chunks into products of two matrices.

The products of a chunk contract e^(G_ik - G_jk) over the channels k, G being the cumulative
log-decay. With a reference between the two, each factor goes to its own operand, and with both
norms folded in as well, every other kernel sees the undecayed recurrence::

    q' = |q|-norm e^R q      k' = |k|-norm e^R k      kw' = e^-R kw      R = G - G_middle

of the states ``enter`` S before the chunk and ``leave`` E after it, where enter = e^(G_middle),
leave = e^(G_C - G_middle). The latter are kept with a factor ``lift``, since gradients may be small
and the range of their type begins at 1e-38.

That holds as long as no factor leaves the range of its type. A block of WIDTH channels of a chunk
where one does is steep: its q' and k' take the chunk's start as reference and its kw' the end, so
that all factors are <= 1 and the products with states are right; those between its tokens come out
finite and wrong, and the kernels of ``steep.py`` do them again.
"""

# Triton's types are of a call from Python, which a kernel is none: no return, no iteration.
# pyright: reportGeneralTypeIssues=false

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
    await_inputs,
    dot,
    exp,
    in_three,
    inverse,
    inverse_root,
    locate_chunk,
)
from pdn.ops.triton.gates import decay_of, decay_slope, gain_gradient, load_rate
from pdn.ops.triton.gradients import state_products, value_sums

WIDTH = tl.constexpr(16)  # channels that share the choice of references
STEEP = tl.constexpr(
    75.0
)  # nats in half a chunk, which leave float32 states and adjoints the range of 5e-13 to 9e5
STEEP_HALF = tl.constexpr(6.0)  # likewise of float16

# How ``ends`` [NT, HV, ENDS, K] is laid out.
ENTER = tl.constexpr(0)  # of the state before the chunk where it is read: e^(G_middle), steep 1
LEAVE = tl.constexpr(1)  # of the adjoint after it: e^(G_C - G_middle), steep 1
ENTER_ON = tl.constexpr(2)  # of the state before what the chunk adds, e^(G_C) / leave
LEAVE_ON = tl.constexpr(3)  # of the adjoint likewise, e^(G_C) / enter
KEEP = tl.constexpr(4)  # e^(G_C) / (enter leave): 1, steep less
NUM_ENDS = 5
ENDS = tl.constexpr(NUM_ENDS)

NUM_RATES = 8  # parts of dA_log that a chunk has before those of its steep blocks
RATES = tl.constexpr(NUM_RATES)


@triton.jit
def lift(kind: tl.constexpr):
    """What kept adjoints are multiplied by, 2^40; float16 has no room for it."""
    return 1.0 if kind == tl.float16 else 1099511627776.0


@triton.jit
def load_bias(dt_bias, h, cols, K: tl.constexpr, RAW: tl.constexpr, ACC: tl.constexpr):
    """[BK] of dt_bias [HV, K]."""
    if RAW:
        return tl.load(dt_bias + h * K + cols, mask=cols < K, other=0.0).to(ACC)
    else:
        return 0.0


@triton.jit
def load_token(
    log_decay, q, k, query, write, t, live, h, cols, HV: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, WRITE: tl.constexpr
):  # fmt: skip
    """Token t's log-decay, query, key, query that reads and write key [BK], as they are."""
    shared = (t.to(tl.int64) * (HV // GROUP) + h // GROUP) * K + cols
    own = (t.to(tl.int64) * HV + h) * K + cols
    keep = live & (cols < K)
    kx = tl.load(k + shared, mask=keep, other=0.0)
    qx = tl.load(q + shared, mask=keep, other=0.0)
    px = qx
    if WRITE == RESCALED_QUERY:
        px = tl.load(query + own, mask=keep, other=0.0)
    wx = kx
    if WRITE == FROM_TENSOR or WRITE == RESCALED_KEY:  # noqa: SIM109
        wx = tl.load(write + own, mask=keep, other=0.0)
    return tl.load(log_decay + own, mask=keep, other=0.0), qx, kx, px, wx


@triton.jit
def normalised(
    qx, kx, px, wx, SCALE: tl.constexpr, L2NORM: tl.constexpr, WRITE: tl.constexpr,
    ACC: tl.constexpr
):  # fmt: skip
    """The query that reads, the key and the write key [BK] with their norms, and the norms of query
    (with SCALE) and key.
    """
    kx = kx.to(ACC)
    wx = wx.to(ACC)
    norm_q = tl.sum(tl.full([1], SCALE, ACC), 0)
    norm_k = tl.sum(tl.full([1], 1.0, ACC), 0)
    if L2NORM:
        qx = qx.to(ACC)
        norm_q = SCALE * inverse_root(tl.sum(qx * qx, 0))
        norm_k = inverse_root(tl.sum(kx * kx, 0))
    if WRITE != FROM_TENSOR:
        wx *= norm_k
    return norm_q * px.to(ACC), norm_k * kx, wx, norm_q, norm_k


@triton.jit(do_not_specialize=["T"])
def fold_kernel(
    q, k, query, write, log_decay, A_log, dt_bias, chunks,
    query_out, key_out, write_out, growth, gates, ends, steep, table, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, W: tl.constexpr,
    LIMIT: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, RAW: tl.constexpr, WRITE: tl.constexpr,
    DELTA: tl.constexpr, FACTORS: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q', k', kw' and, FACTORS, e^R and, RAW, the log-decays [NT, HV, C, K]; ``ends`` [NT, HV,
    ENDS, K]; which halves of blocks of W channels are steep [NT, HV, 2, K / W]; and the norms of q
    and k in the table.

    One warp goes through half a chunk, from the middle row down or from the one before it up; every
    lane owns some channels.
    """
    await_inputs()
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    up = tl.program_id(2) == 1
    start, end = locate_chunk(i, chunks, T, VARLEN)
    slot = i * HV + h
    cols = tl.arange(0, BK)
    inside = cols < K
    kind = query_out.dtype.element_ty
    rate = load_rate(A_log, h, RAW, ACC)
    bias = load_bias(dt_bias, h, cols, K, RAW, ACC)
    M: tl.constexpr = C // 2  # the middle row
    scalars = table + slot * ROWS * C
    R = tl.zeros([BK], dtype=ACC)
    t = start + M
    x = tl.load(
        log_decay + (t.to(tl.int64) * HV + h) * K + cols, mask=inside & (t < end), other=0.0
    ).to(ACC)
    last = tl.where(
        inside & (t < end), decay_of(x, rate, bias, RAW), 0.0
    )  # log-decay of the row before
    t = start + tl.where(up, M - 1, M)
    token = load_token(log_decay, q, k, query, write, t, t < end, h, cols, HV, GROUP, K, WRITE)
    for n in range(0, M):
        r = tl.where(up, M - 1 - n, M + n)
        t = start + tl.where(up, r - 1, r + 1)
        following = load_token(
            log_decay, q, k, query, write, t, (t < end) & (n + 1 < M), h, cols, HV, GROUP, K, WRITE
        )
        gate, qx, kx, px, wx = token
        g = tl.where(inside & (start + r < end), decay_of(gate.to(ACC), rate, bias, RAW), 0.0)
        R += tl.where(up, -last, tl.where(n > 0, g, 0.0))
        last = g
        qx, kx, wx, norm_q, norm_k = normalised(qx, kx, px, wx, SCALE, L2NORM, WRITE, ACC)
        grow = exp(R)
        to = (slot * C + r) * K + cols
        tl.store(query_out + to, (grow * qx).to(kind), mask=inside)
        tl.store(write_out + to, (exp(-R) * wx).to(kind), mask=inside)
        if DELTA:
            tl.store(key_out + to, (grow * kx).to(kind), mask=inside)
        if FACTORS:
            tl.store(growth + to, grow.to(kind), mask=inside)
            if RAW:
                tl.store(gates + to, g.to(kind), mask=inside)
        tl.store(scalars + NORM_Q * C + r, norm_q)
        tl.store(scalars + NORM_K * C + r, norm_k)
        token = following

    total = tl.where(up, last - R, R)  # of the rows up to the middle one, or after it
    far = tl.max(tl.reshape((total <= -LIMIT).to(tl.int32), [BK // W, W]), 1)
    block = tl.arange(0, BK // W)
    side = tl.program_id(2)
    tl.store(steep + (slot * 2 + side) * tl.cdiv(K, W) + block, far, mask=block * W < K)
    to = ends + slot * ENDS * K + cols
    grow = exp(total)
    tl.store(to + tl.where(up, ENTER, LEAVE) * K, grow, mask=inside)
    tl.store(to + tl.where(up, ENTER_ON, LEAVE_ON) * K, grow, mask=inside)
    if up:
        tl.store(to + KEEP * K, tl.full([BK], 1.0, ACC), mask=inside)


@triton.jit
def suffix_sums(x, after, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """[C, BK]: each row of x with all below it and ``after`` [BK]. As a product: a scan along rows
    crosses warps.
    """
    if INTERPRETED or tl.float64 == ACC:
        return (tl.sum(x, 0) + after)[None, :] - tl.cumsum(x, 0) + x
    else:
        i = tl.arange(0, C)
        ones = tl.where(i[None, :] >= i[:, None], 1.0, 0.0).to(tl.bfloat16)
        x0, x1, x2 = in_three(x)
        y = tl.broadcast_to(after[None, :], x.shape)
        if PRECISION == "bf16x6":
            y = tl.dot(ones, x2, y)
        return tl.dot(ones, x0, tl.dot(ones, x1, y))


@triton.jit
def store_decay_gradient(
    dG, kept, g, rate, dlog_decay, d_bias, at, keep, cols, K: tl.constexpr, RAW: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the log-decays g [C, BK] from those of their sums G, ``kept`` [BK] being the last one's
    share of what the chunk hands on; RAW: of the raw gates, and their sum, ddt_bias's part [BK].
    Returns dA_log's by row [C].
    """
    d = tl.where(keep, suffix_sums(dG, kept, ACC, PRECISION), 0.0)
    of_rate = tl.zeros([C], dtype=ACC)
    if RAW:
        g = g.to(ACC)
        of_rate = tl.sum(d * g, 1)
        d *= decay_slope(g, rate, PRECISION == "bf16x6" and tl.float32 == ACC)
        tl.store(d_bias + cols, tl.sum(d, 0), mask=cols < K)
    tl.store(dlog_decay + at, d.to(dlog_decay.dtype.element_ty), mask=keep)
    return of_rate


@triton.jit
def load_tile(
    x, SIZE: tl.constexpr, cols, K: tl.constexpr, BK: tl.constexpr,
    LENGTH: tl.constexpr = 0,  # pyright: ignore[reportArgumentType] (a kernel's int is a constexpr)
):  # fmt: skip
    """The first SIZE rows [SIZE, BK] of x [LENGTH, K], columns ``cols``; zeros from row LENGTH on,
    if that is given.
    """
    r = tl.arange(0, SIZE)
    at = r[:, None] * K + cols[None, :]
    if K % BK == 0 and (LENGTH == 0 or LENGTH == SIZE):
        return tl.load(x + at)
    elif LENGTH == 0:
        return tl.load(x + at, mask=(cols < K)[None, :], other=0.0)
    else:
        return tl.load(x + at, mask=(cols < K)[None, :] & (r < LENGTH)[:, None], other=0.0)


@triton.jit
def any_steep(steep, slot, K: tl.constexpr):
    """Whether a chunk has steep blocks, by ``steep`` [NT * HV, 2, K / WIDTH]."""
    FLAGS: tl.constexpr = 2 * ((K + WIDTH - 1) // WIDTH)
    n = tl.arange(0, 32)
    return tl.max(tl.load(steep + slot * FLAGS + n, mask=n < FLAGS, other=0), 0) != 0


@triton.jit
def fold_rows(x):
    """[C, BK], whose column sums are those of x [ROWS, BK]; ROWS a multiple of C."""
    return tl.sum(tl.reshape(x, [x.shape[0] // C, C, x.shape[1]]), 0)


@triton.jit(do_not_specialize=["T"])
def vector_gradient_kernel(
    query, key, write, growth, gates, A_log, v, o, x, do, dv, table, ends, states, adjoints, chunks,
    dq, dk, dwrite, dlog_decay, dbeta, d_rate, d_bias, T,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, RAW: tl.constexpr, RANGE: tl.constexpr,
    WRITE: tl.constexpr,
    STAGES: tl.constexpr, DELTA: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``gradient_kernel`` for q', k', kw' [NT, HV, C, K], and back to the raw tensors by their
    factors: dq, dk, dwrite, dlog_decay [M, HV, K], dbeta [M, HV], and RAW: the chunk's part of
    dA_log, in the first of d_rate [NT, HV, RATES + K / BK], and of ddt_bias, in d_bias [NT, HV, K].
    dA_log is <dg, g>; the rest of d_rate is zero.

    The decay's gradient q' dq' + k' dk' - kw' dkw' takes the rounded operands of the products, so
    that what a pair of tokens adds at the one it takes at the other, and all between cancels as it
    should. Steep blocks are done again.
    """
    await_inputs()
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
        along_q = tl.sum(g.to(ACC) * tl.load(o + value, mask=keep_value, other=0.0).to(ACC), 1)
        xt = tl.trans(vx)
        of_P = dot(g, xt, PRECISION)
        of_L = of_P
        if DELTA:
            of_L = dot(d, xt, PRECISION)
            along_w = tl.sum(tl.where(step[:, None] == step[None, :], of_L, 0.0), 1)
        else:
            along_w = -along_k
        along_k += along_w
    else:
        along_q, along_k, along_w, of_P, of_L = value_sums(
            do, dv, v, x, o, (rows * HV + h) * V, live, V, BV, DELTA, ACC, PRECISION
        )
    tl.store(dbeta + rows * HV + h, gain_gradient(along_w / b, b, RANGE), mask=live)
    wide = (
        tl.float32 if kind == tl.float16 else kind
    )  # float16 has not the range of a gradient times a value
    dP = tl.where(step[:, None] >= step[None, :], of_P * b[None, :], 0.0).to(wide)
    dP_t = tl.trans(dP)
    if DELTA:
        dL = tl.where(step[:, None] > step[None, :], -of_L * b[None, :], 0.0).to(wide)
        dL_t = tl.trans(dL)
    norm_q = tl.load(scalars + NORM_Q * C)
    norm_k = tl.load(scalars + NORM_K * C)
    along_q /= SCALE * SCALE
    if WRITE == FROM_KEY:
        along_k += along_w
    of_rate = tl.zeros([C], dtype=ACC)
    rate = load_rate(A_log, h, RAW, ACC)
    for base in tl.range(0, K, BK, num_stages=STAGES):
        cols = base + tl.arange(0, BK)
        up = load_tile(growth + slot * C * K, C, cols, K, BK)
        qx = load_tile(query + slot * C * K, C, cols, K, BK)
        wx = load_tile(write + slot * C * K, C, cols, K, BK)
        gate = up
        if RAW:
            gate = load_tile(gates + slot * C * K, C, cols, K, BK)
        survives = tl.load(ends + (slot * ENDS + KEEP) * K + cols, mask=cols < K, other=1.0)
        if WHOLE:
            St = load_tile(states + slot * K * V, BV, cols, K, BK, V)
            Et = load_tile(adjoints + slot * K * V, BV, cols, K, BK, V)
            of_g = dot(g, St, PRECISION)
            of_x = dot(vx, Et, PRECISION)
            passed = St.to(ACC) * Et.to(ACC)
            if C <= BV:
                passed = fold_rows(passed) * (survives / lift(kind))[None, :]
            else:
                kept = tl.sum(passed, 0)
        else:
            of_g, of_d, of_x, kept = state_products(
                do, dv, x if DELTA else v, states + slot * K * V, adjoints + slot * K * V,
                (rows * HV + h) * V, live, cols,
                K, BK, V, BV, ACC, PRECISION,
            )  # fmt: skip
        d_write = (b / lift(kind))[:, None] * of_x
        if WHOLE and C <= BV:
            kept = tl.sum(passed + wx.to(ACC) * d_write, 0)
        else:
            kept = kept * survives / lift(kind) + tl.sum(wx.to(ACC) * d_write, 0)
        at = own + cols[None, :]
        keep = live[:, None] & (cols < K)[None, :]
        up = up.to(ACC)
        down = inverse(up)
        d_query = of_g + dot(dP, wx.to(wide), PRECISION)
        dG = qx.to(ACC) * d_query
        d_query *= up
        if L2NORM and WRITE != RESCALED_QUERY:
            d_query -= along_q[:, None] * (down * qx.to(ACC))
        tl.store(dq + at, (norm_q[:, None] * d_query).to(dq.dtype.element_ty), mask=keep)
        d_write += dot(dP_t, qx.to(wide), PRECISION)
        d_key = tl.zeros([C, BK], dtype=ACC)
        if DELTA:
            kx = load_tile(key + slot * C * K, C, cols, K, BK)
            d_write += dot(dL_t, kx.to(wide), PRECISION)
            if WHOLE:
                of_d = dot(d, St, PRECISION)
            d_key = dot(dL, wx.to(wide), PRECISION) - of_d
            dG += kx.to(ACC) * d_key
        dG -= wx.to(ACC) * d_write
        if L2NORM and WRITE == FROM_KEY:
            d_key -= along_k[:, None] * wx.to(ACC)
        d_key *= up
        if L2NORM and WRITE == FROM_TENSOR:
            d_key -= along_k[:, None] * (down * kx.to(ACC))
        d_write *= down
        if WRITE == FROM_TENSOR:
            tl.store(dwrite + at, d_write.to(dwrite.dtype.element_ty), mask=keep)
        elif WRITE == RESCALED_KEY:
            tl.store(
                dwrite + at, (norm_k[:, None] * d_write).to(dwrite.dtype.element_ty), mask=keep
            )
        else:
            d_key += d_write
        tl.store(dk + at, (norm_k[:, None] * d_key).to(dk.dtype.element_ty), mask=keep)
        rates = store_decay_gradient(
            dG,
            kept,
            gate,
            rate,
            dlog_decay,
            d_bias + slot * K,
            at,
            keep,
            cols,
            K,
            RAW,
            ACC,
            PRECISION,
        )
        of_rate += tl.where(tl.min(survives, 0) < 1.0, 0.0, rates)  # a steep block adds its own
    if RAW:
        BLOCKS: tl.constexpr = (K + BK - 1) // BK
        parts = tl.arange(0, 32)
        tl.store(
            d_rate + slot * (RATES + BLOCKS) + parts,
            tl.where(parts == 0, tl.sum(of_rate, 0), 0.0),
            mask=parts < RATES + BLOCKS,
        )
