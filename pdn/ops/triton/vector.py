"""The chunk kernels of a decay per key channel.

The products of a chunk contract e^(G_ik - G_jk) over the channels k, and no single reference keeps both factors finite.
Rows come in four blocks of 16, as a batch dimension. Between blocks, b later than c::

    e^(G_i - G_j) = e^(G_i - first_b) e^(first_b - last_c) e^(last_c - G_j)

with three factors <= 1 for any decay, and within a block two factors around its middle row as long as neither exceeds
e^80, else one of 16 exact steps a column. The choice is made for each block of BK channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import (
    BETA,
    FROM_TENSOR,
    MIN_LOG_DECAY,
    NORM_K,
    NORM_Q,
    PRECONDITIONED_KEY,
    PRECONDITIONED_QUERY,
    ROWS,
    C,
    curvature,
    decay_above,
    diagonal,
    diagonal_slope,
    dot,
    locate_chunk,
)
from pdn.ops.triton.curvature import load_chunk_gates
from pdn.ops.triton.prepare import load_gain, unit_lower_inverse

NB = tl.constexpr(4)  # blocks of a chunk
R = tl.constexpr(16)  # rows of a block
MAX_SPREAD = tl.constexpr(80.0)  # nats from a block's middle row


@triton.jit
def row_of(G, r: tl.constexpr):
    """Row r of every block: [NB, BK] of [NB, R, BK]."""
    return tl.sum(tl.where((tl.arange(0, R) == r)[None, :, None], G, 0.0), 1)


@triton.jit
def between_blocks(G):
    """e^(G_i - first_b) and e^(last_c - G_j) [NB, R, BK], and e^(first_b - last_c) [NB, NB, BK], 0 unless b > c."""
    first, last = row_of(G, 0), row_of(G, R - 1)
    b = tl.arange(0, NB)
    later = (b[:, None] > b[None, :])[:, :, None]
    link = tl.exp(tl.where(later, first[:, None, :] - last[None, :, :], float("-inf")))
    return tl.exp(G - first[:, None, :]), tl.exp(last[:, None, :] - G), link


@triton.jit
def spread(G):
    """The largest distance of a row from its block's middle one, in nats."""
    middle = row_of(G, R // 2)
    return tl.max(tl.max(tl.maximum(row_of(G, 0) - middle, middle - row_of(G, R - 1)), 1), 0)


@triton.jit
def load_cumulative(log_decay, tile, keep, ACC: tl.constexpr):
    """[C, BK] cumulative log-decay of the chunk."""
    return tl.cumsum(tl.maximum(tl.load(log_decay + tile, mask=keep, other=0.0).to(ACC), MIN_LOG_DECAY), 0)


@triton.jit
def sum_of_squares(x, tile, live, K: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):
    """[C] of x [C, K]."""
    total = tl.zeros([C], dtype=ACC)
    for base in range(0, K, BK):
        cols = base + tl.arange(0, BK)
        a = tl.load(x + tile[:, None] + cols[None, :], mask=live[:, None] & (cols < K)[None, :], other=0.0).to(ACC)
        total += tl.sum(a * a, 1)
    return total


@triton.jit
def prepare_vector_kernel(
    q, k, write_k, log_decay, beta, gP, bP, mu, A_in, chunks,
    table, query_out, key_out, write_out, last_decay, T_out, P_out, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr, L2NORM: tl.constexpr,
    WRITE: tl.constexpr, DELTA: tl.constexpr, INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr,
    EPS: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """T and P [NT, HV, C, C] as ``prepare_kernel``; e^G q, e^G k, e^(G_C - G) kw [M, HV, K] with their norms and the
    scale, and e^(G_C) [NT, HV, K], as the serial kernels read them."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    rows = (start + step).to(tl.int64)
    live = rows < end
    slot = i * HV + h
    keys = (rows * (HV // GROUP) + h // GROUP) * K
    own = (rows * HV + h) * K
    norm_q = tl.full([C], SCALE, ACC)
    norm_k = tl.full([C], 1.0, ACC)
    if L2NORM:
        norm_q = SCALE / tl.sqrt(sum_of_squares(q, keys, live, K, BK, ACC) + 1e-6)
        norm_k = 1.0 / tl.sqrt(sum_of_squares(k, keys, live, K, BK, ACC) + 1e-6)
    b = load_gain(beta, rows, live, h, HV, ACC)
    if WRITE == PRECONDITIONED_KEY or WRITE == PRECONDITIONED_QUERY:  # noqa: SIM109
        bp, c = load_chunk_gates(gP, bP, rows, live, h, HV, ACC)
        m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)

    scores = tl.zeros([NB, R, C], dtype=ACC)
    system = tl.zeros([NB, R, C], dtype=ACC)
    scores_within = tl.zeros([NB, R, R], dtype=ACC)
    system_within = tl.zeros([NB, R, R], dtype=ACC)
    r = tl.arange(0, R)
    for base in range(0, K, BK):
        cols = base + tl.arange(0, BK)
        keep = live[:, None] & (cols < K)[None, :]
        tile = own[:, None] + cols[None, :]
        G = load_cumulative(log_decay, tile, keep, ACC)
        qx = norm_q[:, None] * tl.load(q + keys[:, None] + cols[None, :], mask=keep, other=0.0).to(ACC)
        kx = norm_k[:, None] * tl.load(k + keys[:, None] + cols[None, :], mask=keep, other=0.0).to(ACC)
        wx = kx
        if WRITE == FROM_TENSOR:
            wx = tl.load(write_k + tile, mask=keep, other=0.0).to(ACC)
        if WRITE == PRECONDITIONED_KEY or WRITE == PRECONDITIONED_QUERY:  # noqa: SIM109
            A0 = tl.load(A_in + slot * K + cols, mask=cols < K, other=0.0)
            B = diagonal(curvature(kx, bp, c, A0, PRECISION, ACC), m, INVERSE, LOG_BOUND, EPS)
            if WRITE == PRECONDITIONED_KEY:
                wx = B * wx
            else:
                qx = B * qx
        G_C = tl.sum(tl.where(step[:, None] == C - 1, G, 0.0), 0)
        tl.store(last_decay + slot * K + cols, tl.exp(G_C), mask=cols < K)
        kind = q.dtype.element_ty
        grow = tl.exp(G)
        tl.store(query_out + tile, (qx * grow).to(kind), mask=keep)
        tl.store(write_out + tile, (wx * tl.exp(G_C[None, :] - G)).to(kind), mask=keep)
        if DELTA:
            tl.store(key_out + tile, (kx * grow).to(kind), mask=keep)

        G3 = tl.reshape(G, [NB, R, BK])
        q3 = tl.reshape(qx, [NB, R, BK])
        k3 = tl.reshape(kx, [NB, R, BK])
        w3 = tl.reshape(wx, [NB, R, BK])
        up, down, link = between_blocks(G3)
        right = tl.reshape(link[:, :, None, :] * (w3 * down)[None, :, :, :], [NB, C, BK]).to(kind)
        right = tl.permute(right, [0, 2, 1])
        scores += dot((q3 * up).to(kind), right, PRECISION)
        if DELTA:
            system += dot((k3 * up).to(kind), right, PRECISION)
        if spread(G3) < MAX_SPREAD:
            middle = row_of(G3, R // 2)[:, None, :]
            up = tl.exp(G3 - middle)
            # float16 has not the range for these factors.
            wide = tl.float32 if kind == tl.float16 else kind
            inner = tl.permute((w3 * tl.exp(middle - G3)).to(wide), [0, 2, 1])
            scores_within += dot((q3 * up).to(wide), inner, PRECISION)
            if DELTA:
                system_within += dot((k3 * up).to(wide), inner, PRECISION)
        else:
            for j in range(0, R):
                column = (r == j)[None, :, None]
                G_j = tl.sum(tl.where(column, G3, 0.0), 1)[:, None, :]
                w_j = tl.sum(tl.where(column, w3, 0.0), 1)[:, None, :]
                factor = w_j * tl.exp(tl.where((r >= j)[None, :, None], G3 - G_j, float("-inf")))
                at = (r == j)[None, None, :]
                scores_within += tl.where(at, tl.sum(q3 * factor, 2)[:, :, None], 0.0)
                if DELTA:
                    system_within += tl.where(at, tl.sum(k3 * factor, 2)[:, :, None], 0.0)

    square = (slot * C + step[:, None]) * C + step[None, :]
    P = tl.where(step[:, None] >= step[None, :], assemble(scores, scores_within), 0.0)
    tl.store(P_out + square, P.to(P_out.dtype.element_ty))
    if DELTA:
        L = tl.where(step[:, None] > step[None, :], assemble(system, system_within) * b[None, :], 0.0)
        tl.store(T_out + square, unit_lower_inverse(L, ACC, HALF, PRECISION).to(T_out.dtype.element_ty))
    at = table + slot * ROWS * C + step
    tl.store(at + BETA * C, b)
    tl.store(at + NORM_Q * C, norm_q)
    tl.store(at + NORM_K * C, norm_k)


@triton.jit
def on_diagonal():
    """[NB, 1, NB, 1]: which blocks of [NB, R, NB, R] lie on the diagonal."""
    b = tl.arange(0, NB)
    return (b[:, None] == b[None, :])[:, None, :, None]


@triton.jit
def assemble(between, within):
    """[C, C] of its blocks below the diagonal [NB, R, C] and those on it [NB, R, R]."""
    blocks = tl.where(on_diagonal(), within[:, :, None, :], tl.reshape(between, [NB, R, NB, R]))
    return tl.reshape(blocks, [C, C])


@triton.jit
def diagonal_blocks(x):
    """[NB, R, R] of [C, C]."""
    return tl.sum(tl.where(on_diagonal(), tl.reshape(x, [NB, R, NB, R]), 0.0), 2)


@triton.jit
def vector_gradient_kernel(
    q, k, write_k, log_decay, v, o, x, do, dv, table, states, adjoints, gP, bP, mu, A_in, chunks,
    dq, dk, dwrite, dlog_decay, dbeta, dgP, dbP, dmu, curvature_out, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, WRITE: tl.constexpr, DELTA: tl.constexpr,
    INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``gradient_kernel`` for a vector decay; dlog_decay [M, HV, K]."""
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
    norm_k = tl.load(scalars + NORM_K * C)
    norm_q = tl.load(scalars + NORM_Q * C)
    keys = (rows * (HV // GROUP) + h // GROUP) * K
    own = (rows * HV + h) * K
    value = (rows * HV + h)[:, None] * V + vals[None, :]
    keep_value = live[:, None] & keep_v[None, :]
    at_row = rows * HV + h
    kind = q.dtype.element_ty

    g = tl.load(do + value, mask=keep_value, other=0.0)
    d = tl.load(dv + value, mask=keep_value, other=0.0)
    vx = tl.load(v + value, mask=keep_value, other=0.0)
    along_k = -tl.sum(d.to(ACC) * vx.to(ACC), 1)
    if DELTA:
        vx = tl.load(x + value, mask=keep_value, other=0.0)
    along_w = tl.sum(d.to(ACC) * vx.to(ACC), 1)
    along_k += along_w
    tl.store(dbeta + at_row, along_w / b, mask=live)
    u = (b[:, None] * vx.to(ACC)).to(vx.dtype)
    along_q = tl.zeros([C], dtype=ACC)
    if L2NORM:
        along_q = tl.sum(g.to(ACC) * tl.load(o + value, mask=keep_value, other=0.0).to(ACC), 1)

    ut = tl.trans(u)
    wide = tl.float32 if kind == tl.float16 else kind  # float16 has not the range of the factors within a block
    dP = tl.where(step[:, None] >= step[None, :], dot(g, ut, PRECISION), 0.0)
    dP_within = diagonal_blocks(dP)
    dP3 = tl.reshape(dP.to(kind), [NB, R, C])
    if DELTA:
        dL = tl.where(step[:, None] > step[None, :], -dot(d, ut, PRECISION), 0.0)
        dL_within = diagonal_blocks(dL)
        dL3 = tl.reshape(dL.to(kind), [NB, R, C])
    if WRITE == PRECONDITIONED_KEY or WRITE == PRECONDITIONED_QUERY:  # noqa: SIM109
        bp, c = load_chunk_gates(gP, bP, rows, live, h, HV, ACC)
        m = 0.0 if INVERSE else tl.load(mu + h).to(ACC)
        d_bP = tl.zeros([C], dtype=ACC)
        d_gP = tl.zeros([C], dtype=ACC)
        d_mu = tl.zeros([C], dtype=ACC)
    r = tl.arange(0, R)
    for base in range(0, K, BK):
        cols = base + tl.arange(0, BK)
        keep_k = cols < K
        keep = live[:, None] & keep_k[None, :]
        tile = own[:, None] + cols[None, :]
        at = slot * K * V + vals[:, None] * K + cols[None, :]
        inside = keep_k[None, :] & keep_v[:, None]
        G = load_cumulative(log_decay, tile, keep, ACC)
        G_C = tl.sum(tl.where(step[:, None] == C - 1, G, 0.0), 0)
        raw_q = norm_q[:, None] * tl.load(q + keys[:, None] + cols[None, :], mask=keep, other=0.0).to(ACC)
        kx = norm_k[:, None] * tl.load(k + keys[:, None] + cols[None, :], mask=keep, other=0.0).to(ACC)
        qx = raw_q
        wx = kx
        if WRITE == FROM_TENSOR:
            wx = tl.load(write_k + tile, mask=keep, other=0.0).to(ACC)
        if WRITE == PRECONDITIONED_KEY or WRITE == PRECONDITIONED_QUERY:  # noqa: SIM109
            A0 = tl.load(A_in + slot * K + cols, mask=keep_k, other=0.0)
            A = curvature(kx, bp, c, A0, PRECISION, ACC)
            B = diagonal(A, m, INVERSE, LOG_BOUND, EPS)
            if WRITE == PRECONDITIONED_KEY:
                wx = B * kx
            else:
                qx = B * raw_q
        G3 = tl.reshape(G, [NB, R, BK])
        q3 = tl.reshape(qx, [NB, R, BK])
        w3 = tl.reshape(wx, [NB, R, BK])
        k3 = tl.reshape(kx, [NB, R, BK])
        up, down, link = between_blocks(G3)
        right = tl.reshape(link[:, :, None, :] * (w3 * down)[None, :, :, :], [NB, C, BK]).to(kind)
        d_query = up * dot(dP3, right, PRECISION)
        back = dot(tl.permute(dP3, [0, 2, 1]), (q3 * up).to(kind), PRECISION)
        d_key = tl.zeros([NB, R, BK], dtype=ACC)
        if DELTA:
            d_key += up * dot(dL3, right, PRECISION)
            back += dot(tl.permute(dL3, [0, 2, 1]), (k3 * up).to(kind), PRECISION)
        d_write = down * tl.sum(link[:, :, None, :] * tl.reshape(back, [NB, NB, R, BK]), 0)
        if spread(G3) < MAX_SPREAD:
            middle = row_of(G3, R // 2)[:, None, :]
            up = tl.exp(G3 - middle)
            down = tl.exp(middle - G3)
            inner = (w3 * down).to(wide)
            d_query += up * dot(dP_within.to(wide), inner, PRECISION)
            back_within = dot(tl.permute(dP_within.to(wide), [0, 2, 1]), (q3 * up).to(wide), PRECISION)
            if DELTA:
                d_key += up * dot(dL_within.to(wide), inner, PRECISION)
                back_within += dot(tl.permute(dL_within.to(wide), [0, 2, 1]), (k3 * up).to(wide), PRECISION)
            d_write += down * back_within
        else:
            for j in range(0, R):
                column = (r == j)[None, :, None]
                G_j = tl.sum(tl.where(column, G3, 0.0), 1)[:, None, :]
                w_j = tl.sum(tl.where(column, w3, 0.0), 1)[:, None, :]
                factor = tl.exp(tl.where((r >= j)[None, :, None], G3 - G_j, float("-inf")))
                from_q = tl.sum(tl.where((r == j)[None, None, :], dP_within, 0.0), 2)[:, :, None] * factor
                d_query += from_q * w_j
                taken = from_q * q3
                if DELTA:
                    from_k = tl.sum(tl.where((r == j)[None, None, :], dL_within, 0.0), 2)[:, :, None] * factor
                    d_key += from_k * w_j
                    taken += from_k * k3
                d_write += tl.where(column, tl.sum(taken, 1)[:, None, :], 0.0)

        St = tl.load(states + at, mask=inside, other=0.0)
        Et = tl.load(adjoints + at, mask=inside, other=0.0)
        grow = tl.exp(G)
        d_query = tl.reshape(d_query, [C, BK]) + grow * dot(g, St, PRECISION)
        d_key = tl.reshape(d_key, [C, BK])
        if DELTA:
            d_key -= grow * dot(d, St, PRECISION)
        d_state = tl.exp(G_C[None, :] - G) * dot(u, Et, PRECISION)
        d_write = tl.reshape(d_write, [C, BK]) + d_state
        kept = tl.exp(G_C) * tl.sum(St.to(ACC) * Et.to(ACC), 0) + tl.sum(wx * d_state, 0)
        dG = qx * d_query + kx * d_key - wx * d_write
        dG = tl.sum(dG, 0)[None, :] - tl.cumsum(dG, 0) + dG + kept[None, :]
        tl.store(dlog_decay + tile, dG.to(dlog_decay.dtype.element_ty), mask=keep)

        if WRITE == PRECONDITIONED_KEY or WRITE == PRECONDITIONED_QUERY:  # noqa: SIM109
            update = kx * kx
            slope = diagonal_slope(A, B, m, INVERSE, LOG_BOUND, EPS)
            if WRITE == PRECONDITIONED_KEY:
                d_r = d_write * kx * slope
                d_key += B * d_write
            else:
                d_r = d_query * raw_q * slope
                d_query *= B
                d_key += d_write
            d_r = tl.where(keep, d_r, 0.0)
            d_mu -= tl.sum(d_r, 1)
            a = d_r / (A + EPS)
            tl.store(curvature_out + slot * K + cols, tl.sum(tl.exp(c)[:, None] * a, 0), mask=keep_k)
            D = dot(decay_above(c, ACC), a, PRECISION)
            d_bP += tl.sum(D * update, 1)
            d_gP += tl.sum(D * (A - bp[:, None] * update), 1)
            d_key += 2.0 * bp[:, None] * kx * D
        elif WRITE == FROM_TENSOR:
            tl.store(dwrite + tile, d_write.to(dwrite.dtype.element_ty), mask=keep)
            if L2NORM:
                d_key -= kx * along_k[:, None]
            d_key *= norm_k[:, None]
        else:
            d_key += d_write
            if L2NORM:
                d_key -= kx * (along_k + along_w)[:, None]
            d_key *= norm_k[:, None]
        tl.store(dk + tile, d_key.to(dk.dtype.element_ty), mask=keep)
        if L2NORM:
            d_query -= (along_q / (SCALE * SCALE))[:, None] * raw_q
        tl.store(dq + tile, (d_query * norm_q[:, None]).to(dq.dtype.element_ty), mask=keep)

    if WRITE == PRECONDITIONED_KEY or WRITE == PRECONDITIONED_QUERY:  # noqa: SIM109
        tl.store(dbP + at_row, d_bP, mask=live)
        tl.store(dgP + at_row, d_gP, mask=live)
        if not INVERSE:
            tl.store(dmu + slot, tl.sum(d_mu, 0))
