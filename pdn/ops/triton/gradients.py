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
def total(x):
    """The sum of a matrix, within a thread first."""
    return tl.sum(tl.reshape(x, [x.shape[0] * x.shape[1]]), 0)


@triton.jit
def gradient_kernel(
    q, k, query, write, v, o, x, do, dv, table, states, adjoints, gP, bP, mu, A_in, chunks,
    dq, dk, dwrite, dlog_decay, dbeta, dgP, dbP, dmu, curvature_out, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, DECAY: tl.constexpr, WRITE: tl.constexpr, DELTA: tl.constexpr,
    INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scalar decay or none. dq, dk [M, HV, K] of the raw q and k; a preconditioned key's dk is that of the normalised
    key and, like dgP and dbP, without the share of the carry: the fix-up finishes them.

    Of the solve (I + L) x = v - e^G k S0 only the solution x and dv are needed, since dL/dL = -stril(dv x^T). And every
    result is linear in each q_i, k_i, kw_i and beta_i, which gives, without a product,
    <q_i, dq_i> = <o_i, do_i>, <kw_i, dkw_i> = beta_i dbeta_i = <x_i, dv_i> and <k_i, dk_i> = <x_i, dv_i> - <v_i, dv_i>
    (k_i as it reads): the sums that dbeta, the decay and the norms' gradients take.
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
    G = tl.load(scalars + DECAY_SUM * C)
    norm_k = tl.load(scalars + NORM_K * C)
    norm_q = tl.load(scalars + NORM_Q * C)
    grow = tl.exp(G)
    keys = (rows * (HV // GROUP) + h // GROUP) * K
    own = (rows * HV + h) * K
    value = (rows * HV + h)[:, None] * V + vals[None, :]
    keep_value = live[:, None] & keep_v[None, :]

    g = tl.load(do + value, mask=keep_value, other=0.0)
    d = tl.load(dv + value, mask=keep_value, other=0.0)
    vx = tl.load(v + value, mask=keep_value, other=0.0)
    along_k = -tl.sum(d.to(ACC) * vx.to(ACC), 1)
    if DELTA:
        vx = tl.load(x + value, mask=keep_value, other=0.0)
    along_w = tl.sum(d.to(ACC) * vx.to(ACC), 1)
    u = (b[:, None] * vx.to(ACC)).to(vx.dtype)
    along_k += along_w
    along_q = tl.zeros([C], dtype=ACC)
    if L2NORM or DECAY != NO_DECAY:
        along_q = tl.sum(g.to(ACC) * tl.load(o + value, mask=keep_value, other=0.0).to(ACC), 1)

    # The operands below are raw tiles: their row factors go to the [C, C] matrices.
    norm_w = norm_k
    if WRITE == FROM_TENSOR:
        norm_w = tl.full([C], 1.0, ACC)
    decay = decay_below(G, ACC)
    ut = tl.trans(u)
    dP = dot(g, ut, PRECISION) * decay
    dP_for_q = (dP * norm_w[None, :]).to(g.dtype)
    dP_for_w = tl.trans((dP * norm_q[:, None]).to(g.dtype))
    if DELTA:
        dL = tl.where(step[:, None] > step[None, :], -dot(d, ut, PRECISION) * decay, 0.0)
        dL_for_k = (dL * norm_w[None, :]).to(g.dtype)
        dL_for_w = tl.trans((dL * norm_k[:, None]).to(g.dtype))
    if WRITE == PRECONDITIONED_KEY or WRITE == PRECONDITIONED_QUERY:  # noqa: SIM109
        bp, c = load_chunk_gates(gP, bP, rows, live, h, HV, ACC)
        m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)
        d_bP = tl.zeros([C], dtype=ACC)
        d_gP = tl.zeros([C], dtype=ACC)
        d_mu = tl.zeros([C], dtype=ACC)
    G_C = last_of(G)
    remain = tl.exp(G_C - G)
    kept = tl.sum(tl.zeros([C], dtype=ACC), 0)
    for base in range(0, K, BK):
        cols = base + tl.arange(0, BK)
        keep_k = cols < K
        keep = live[:, None] & keep_k[None, :]
        key = keys[:, None] + cols[None, :]
        tile = own[:, None] + cols[None, :]
        at = slot * K * V + vals[:, None] * K + cols[None, :]
        inside = keep_k[None, :] & keep_v[:, None]
        St = tl.load(states + at, mask=inside, other=0.0)
        Et = tl.load(adjoints + at, mask=inside, other=0.0)
        qx = tl.load(q + key, mask=keep, other=0.0)
        kx = tl.load(k + key, mask=keep, other=0.0)
        wx = kx
        px = qx
        if WRITE == FROM_TENSOR or WRITE == PRECONDITIONED_KEY:  # noqa: SIM109
            wx = tl.load(write + tile, mask=keep, other=0.0)
        if WRITE == PRECONDITIONED_QUERY:
            px = tl.load(query + tile, mask=keep, other=0.0)
        d_query = grow[:, None] * dot(g, St, PRECISION) + dot(dP_for_q, wx, PRECISION)
        if WRITE != PRECONDITIONED_QUERY:
            if L2NORM:
                d_query -= (along_q * norm_q / (SCALE * SCALE))[:, None] * qx.to(ACC)
            tl.store(dq + tile, (d_query * norm_q[:, None]).to(dq.dtype.element_ty), mask=keep)
        d_write = remain[:, None] * dot(u, Et, PRECISION)
        if DECAY != NO_DECAY:
            kept += tl.exp(G_C) * total(St.to(ACC) * Et.to(ACC)) + total(norm_w[:, None] * wx.to(ACC) * d_write)
        d_write += dot(dP_for_w, px, PRECISION)
        unit = norm_k[:, None] * kx.to(ACC)
        d_key = tl.zeros([C, BK], dtype=ACC)
        if DELTA:
            d_write += dot(dL_for_w, kx, PRECISION)
            d_key = dot(dL_for_k, wx, PRECISION) - grow[:, None] * dot(d, St, PRECISION)

        if WRITE == FROM_KEY:
            d_key += d_write
            if L2NORM:
                d_key -= unit * (along_k + along_w)[:, None]
            d_key *= norm_k[:, None]
        elif WRITE == FROM_TENSOR:
            tl.store(dwrite + tile, d_write.to(dwrite.dtype.element_ty), mask=keep)
            if L2NORM:
                d_key -= unit * along_k[:, None]
            d_key *= norm_k[:, None]
        else:
            A0 = tl.load(A_in + slot * K + cols, mask=keep_k, other=0.0)
            update = unit * unit
            A = dot(decay_below(c, ACC), bp[:, None] * update, PRECISION) + tl.exp(c)[:, None] * A0[None, :]
            B = diagonal(A, m, INVERSE, LOG_BOUND, EPS)
            slope = diagonal_slope(A, B, m, INVERSE, LOG_BOUND, EPS)
            if WRITE == PRECONDITIONED_KEY:
                d_r = d_write * unit * slope
                d_key += B * d_write
            else:
                d_r = d_query * (norm_q[:, None] * qx.to(ACC)) * slope
                d_key += d_write
                d_query *= B
                if L2NORM:
                    d_query -= (along_q * norm_q / (SCALE * SCALE))[:, None] * qx.to(ACC)
                tl.store(dq + tile, (d_query * norm_q[:, None]).to(dq.dtype.element_ty), mask=keep)
            d_r = tl.where(keep, d_r, 0.0)
            d_mu -= tl.sum(d_r, 1)
            a = d_r / (A + EPS)
            tl.store(curvature_out + slot * K + cols, tl.sum(tl.exp(c)[:, None] * a, 0), mask=keep_k)
            D = dot(decay_above(c, ACC), a, PRECISION)
            d_bP += tl.sum(D * update, 1)
            d_gP += tl.sum(D * (A - bp[:, None] * update), 1)
            d_key += 2.0 * bp[:, None] * unit * D
        tl.store(dk + tile, d_key.to(dk.dtype.element_ty), mask=keep)

    at_row = rows * HV + h
    tl.store(dbeta + at_row, along_w / b, mask=live)
    if DECAY != NO_DECAY:
        dG = along_q + along_k - along_w
        tl.store(dlog_decay + at_row, tl.sum(dG, 0) - tl.cumsum(dG, 0) + dG + kept, mask=live)
    if WRITE == PRECONDITIONED_KEY or WRITE == PRECONDITIONED_QUERY:  # noqa: SIM109
        tl.store(dbP + at_row, d_bP, mask=live)
        tl.store(dgP + at_row, d_gP, mask=live)
        if not INVERSE:
            tl.store(dmu + slot, tl.sum(d_mu, 0))
