"""The gradients of a chunk, all chunks at once, from the state before it and the adjoint after it."""

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import (
    BETA,
    DECAY_SUM,
    FROM_KEY,
    FROM_TENSOR,
    NO_DECAY,
    NORM_K,
    NORM_Q,
    PRECONDITIONED_KEY,
    PRECONDITIONED_QUERY,
    ROWS,
    C,
    curvature,
    decay_above,
    decay_below,
    diagonal,
    diagonal_slope,
    dot,
    last_of,
    locate_chunk,
)
from pdn.ops.triton.curvature import load_chunk_gates


@triton.jit
def through_norm(d, x, norm, L2NORM: tl.constexpr):
    """Gradient of raw [C, K] from d, that of x = raw * norm."""
    if L2NORM:
        d -= x * tl.sum(x * d, 1)[:, None]
    return d * norm[:, None]


@triton.jit
def gradient_kernel(
    q, k, query, write, v, do, du, table, T_in, states, adjoints, gP, bP, mu, A_in, chunks,
    dq, dk, dwrite, dv, dlog_decay, dbeta, dgP, dbP, dmu, curvature_out, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, DECAY: tl.constexpr, WRITE: tl.constexpr, DELTA: tl.constexpr,
    INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scalar decay or none. dq, dk [M, HV, K] of the raw q and k; gP's and dk's share of the carry comes later.

    With v' = T beta W, W = v - e^G k S0 and du = dL/d(beta W), the inverse needs no adjoint of its own:
    (I + L) v' = beta W gives dL/dL = -stril(du v'^T).
    """
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    rows = (start + step).to(tl.int64)
    live = rows < end
    cols = tl.arange(0, BK)
    keep_k = cols < K
    keep = live[:, None] & keep_k[None, :]
    key_tile = (rows * (HV // GROUP) + h // GROUP)[:, None] * K + cols[None, :]
    tile = (rows * HV + h)[:, None] * K + cols[None, :]
    slot = i * HV + h
    scalars = table + slot * ROWS * C + step
    b = tl.load(scalars + BETA * C)
    G = tl.load(scalars + DECAY_SUM * C)
    norm_q = tl.load(scalars + NORM_Q * C)
    norm_k = tl.load(scalars + NORM_K * C)
    grow = tl.exp(G)
    G_C = last_of(G)
    remain = tl.exp(G_C - G)
    kx = tl.load(k + key_tile, mask=keep, other=0.0)
    square = (slot * C + step[:, None]) * C + step[None, :]

    dP = tl.zeros([C, C], dtype=ACC)
    dL = tl.zeros([C, C], dtype=ACC)
    d_query = tl.zeros([C, BK], dtype=ACC)
    d_read = tl.zeros([C, BK], dtype=ACC)
    d_write = tl.zeros([C, BK], dtype=ACC)
    d_beta = tl.zeros([C], dtype=ACC)
    kept = tl.zeros([BK], dtype=ACC)
    for base in range(0, V, BV):
        vals = base + tl.arange(0, BV)
        keep_v = vals < V
        value = (rows * HV + h)[:, None] * V + vals[None, :]
        state_t = slot * K * V + cols[None, :] * V + vals[:, None]
        inside = keep_k[None, :] & keep_v[:, None]
        St = tl.load(states + state_t, mask=inside, other=0.0)
        Et = tl.load(adjoints + state_t, mask=inside, other=0.0)
        W = tl.load(v + value, mask=live[:, None] & keep_v[None, :], other=0.0).to(ACC)
        g = tl.load(do + value, mask=live[:, None] & keep_v[None, :], other=0.0)
        d = tl.load(du + value, mask=live[:, None] & keep_v[None, :], other=0.0)
        if DELTA:
            inverse = tl.load(T_in + square)
            W -= (norm_k * grow)[:, None] * dot(kx, tl.trans(St), PRECISION)
            u = dot(inverse, (b[:, None] * W).to(inverse.dtype), PRECISION).to(g.dtype)
        else:
            u = (b[:, None] * W).to(g.dtype)
        d_beta += tl.sum(d.to(ACC) * W, 1)
        d_value = (b[:, None] * d.to(ACC)).to(g.dtype)
        tl.store(dv + value, d_value.to(dv.dtype.element_ty), mask=live[:, None] & keep_v[None, :])
        ut = tl.trans(u)
        dP += dot(g, ut, PRECISION)
        d_query += dot(g, St, PRECISION)
        d_write += dot(u, Et, PRECISION)
        if DELTA:
            dL -= dot(d, ut, PRECISION)
            d_read -= dot(d_value, St, PRECISION)
        if DECAY != NO_DECAY:
            kept += tl.sum(St.to(ACC) * Et.to(ACC), 0)

    # From here on the operands are the raw tiles, and their row factors go to the [C, C] matrices.
    qx = tl.load(q + key_tile, mask=keep, other=0.0)
    wx = kx
    norm_w = norm_k
    row_q = norm_q
    if WRITE == FROM_TENSOR or WRITE == PRECONDITIONED_KEY:
        wx = tl.load(write + tile, mask=keep, other=0.0)
        norm_w = tl.full([C], 1.0, ACC)
    px = qx
    if WRITE == PRECONDITIONED_QUERY:
        px = tl.load(query + tile, mask=keep, other=0.0)
        row_q = tl.full([C], 1.0, ACC)
    decay = decay_below(G, ACC)
    dP = dP * decay
    d_query = grow[:, None] * d_query + dot((dP * norm_w[None, :]).to(wx.dtype), wx, PRECISION)
    d_write = remain[:, None] * d_write
    last = tl.exp(G_C) * tl.sum(kept, 0) + tl.sum(tl.sum(norm_w[:, None] * wx.to(ACC) * d_write, 1), 0)
    d_write += dot(tl.trans((dP * row_q[:, None]).to(px.dtype)), px, PRECISION)
    unit = norm_k[:, None] * kx.to(ACC)
    if DELTA:
        dL = tl.where(step[:, None] > step[None, :], dL * decay, 0.0)
        inner = dot((dL * norm_w[None, :]).to(wx.dtype), wx, PRECISION)
        d_beta += tl.sum(unit * inner, 1)
        d_read = grow[:, None] * d_read + b[:, None] * inner
        d_write += dot(tl.trans((dL * (b * norm_k)[:, None]).to(kx.dtype)), kx, PRECISION)
    at = rows * HV + h
    tl.store(dbeta + at, d_beta, mask=live)
    if DECAY != NO_DECAY:
        dG = tl.sum(row_q[:, None] * px.to(ACC) * d_query + unit * d_read - norm_w[:, None] * wx.to(ACC) * d_write, 1)
        tl.store(dlog_decay + at, tl.sum(dG, 0) - tl.cumsum(dG, 0) + dG + last, mask=live)

    if WRITE == FROM_TENSOR:
        tl.store(dwrite + tile, d_write.to(dwrite.dtype.element_ty), mask=keep)
        d_key = d_read
    elif WRITE == FROM_KEY:
        d_key = d_read + d_write
    else:
        d_key = d_read
        bp, c = load_chunk_gates(gP, bP, rows, live, h, HV, ACC)
        A0 = tl.load(A_in + slot * K + cols, mask=keep_k, other=0.0)
        m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)
        A = curvature(unit, bp, c, A0, PRECISION, ACC)
        B = diagonal(A, m, INVERSE, LOG_BOUND, EPS)
        if WRITE == PRECONDITIONED_KEY:
            d_B = d_write * unit
            d_key += B * d_write
        else:
            d_B = d_query * norm_q[:, None] * qx.to(ACC)
            d_query = B * d_query
            d_key += d_write
        d_r = tl.where(keep, d_B * diagonal_slope(A, B, m, INVERSE, LOG_BOUND, EPS), 0.0)
        if not INVERSE:
            tl.store(dmu + slot, -tl.sum(tl.sum(d_r, 1), 0))
        a = d_r / (A + EPS)
        tl.store(curvature_out + slot * K + cols, tl.sum(tl.exp(c)[:, None] * a, 0), mask=keep_k)
        D = dot(decay_above(c, ACC), a, PRECISION)
        update = unit * unit
        tl.store(dbP + at, tl.sum(D * update, 1), mask=live)
        tl.store(dgP + at, tl.sum(D * (A - bp[:, None] * update), 1), mask=live)
        d_key += 2.0 * bp[:, None] * unit * D
    tl.store(dk + tile, through_norm(d_key, unit, norm_k, L2NORM).to(dk.dtype.element_ty), mask=keep)
    unit_q = qx.to(ACC) * (norm_q / SCALE)[:, None]
    d_query = SCALE * through_norm(d_query, unit_q, norm_q / SCALE, L2NORM)
    tl.store(dq + tile, d_query.to(dq.dtype.element_ty), mask=keep)
