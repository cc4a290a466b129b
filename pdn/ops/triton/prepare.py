"""Everything of a chunk that needs no state: norms, cumulative decay, the write key, the inverse
and the scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import (
    BETA,
    DECAY_SUM,
    FROM_TENSOR,
    NORM_K,
    NORM_Q,
    READ_K,
    READ_Q,
    RESCALED_KEY,
    RESCALED_QUERY,
    ROWS,
    SCALAR,
    VECTOR,
    WRITE_K,
    C,
    await_inputs,
    decay_below,
    dot,
    exp,
    inverse_norm,
    last_of,
    locate_chunk,
)
from pdn.ops.triton.gates import decay_of, load_gain, load_rate
from pdn.ops.triton.vector import any_steep


@triton.jit
def merge(X, L, S: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """From the inverses of the diagonal blocks of size S of I + L to those of size 2 S; [.., SIZE,
    SIZE], exact.
    """
    r = tl.arange(0, SIZE)
    block = (r // S)[:, None]
    other = (r // S)[None, :]
    mask = (block % 2 == 1) & (other == block - 1)
    if len(X.shape) == 3:
        mask = mask[None, :, :]
    if HALF:
        half = X.to(tl.float16)
        return X - dot(
            dot(half, tl.where(mask, L, 0.0).to(tl.float16), PRECISION).to(tl.float16),
            half,
            PRECISION,
        )
    return X - dot(dot(X, tl.where(mask, L, 0.0), PRECISION), X, PRECISION)


@triton.jit
def unit_lower_inverse(L, ACC: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 of a strictly lower [C, C]: block doubling, 16 x 16 diagonal blocks first, then
    two merges.

    Every step is an identity, so the error does not grow with the powers of L as a Neumann series'
    does. HALF multiplies in float16, whose mantissa is tf32's and whose range the entries of
    normalised keys are far from leaving.
    """
    b = tl.arange(0, C // 16)
    r = tl.arange(0, 16)
    same = b[:, None, None, None] == b[None, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(L, [C // 16, 16, C // 16, 16]), 0.0), 2)
    first = ((r % 2 == 1)[:, None] & (r[None, :] == r[:, None] - 1))[None, :, :]
    X = tl.where((r[:, None] == r[None, :])[None, :, :], 1.0, tl.where(first, -blocks, 0.0)).to(ACC)
    X = merge(X, blocks, 2, 16, HALF, PRECISION)
    X = merge(X, blocks, 4, 16, HALF, PRECISION)
    X = merge(X, blocks, 8, 16, HALF, PRECISION)
    X = tl.reshape(tl.where(same, X[:, :, None, :], 0.0), [C, C]).to(ACC)
    X = merge(X, L, 16, C, HALF, PRECISION)
    return merge(X, L, 32, C, HALF, PRECISION)


@triton.jit
def nonzero_gain(beta, at, live, RANGE: tl.constexpr, ACC: tl.constexpr):
    """beta [C]; a zero becomes 1e-20, which changes no result and lets dbeta be a quotient."""
    b = load_gain(beta, at, live, RANGE, ACC)
    return tl.where(tl.abs(b) < 1e-20, 1e-20, b)


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    q, k, query, write, log_decay, A_log, dt_bias, beta, chunks, steep, table, T_out, P_out, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr,
    L2NORM: tl.constexpr,
    DECAY: tl.constexpr, RAW: tl.constexpr, RANGE: tl.constexpr, WRITE: tl.constexpr,
    DELTA: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The table of per-token scalars, T = (I + L)^-1 and P [NT, HV, C, C].

    query, write [M, HV, K]: the rescaled query, or the write key, where ``WRITE`` says that there
    is one.

    L_ij = e^(G_i - G_j) k_i . kw_j beta_j: with the gain of the column, the solution x of (I + L) x
    = v - e^G k S0 is free of its own gain, and what the state takes in is beta x. The decay leaves
    the inverse: T_ij = e^(G_i - G_j) T0_ij with T0 the inverse without decay. A vector decay is in
    q, k and ``write`` [NT, HV, C, K], with the norms; T and P of a chunk with ``steep`` blocks of
    channels are left out.
    """
    await_inputs()
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = locate_chunk(i, chunks, T, VARLEN)
    step = tl.arange(0, C)
    rows = (start + step).to(tl.int64)
    live = rows < end
    cols = tl.arange(0, BK)
    keep = live[:, None] & (cols < K)[None, :]
    key_tile = (rows * (HV // GROUP) + h // GROUP)[:, None] * K + cols[None, :]
    tile = (rows * HV + h)[:, None] * K + cols[None, :]
    if DECAY == VECTOR:
        key_tile = ((i * HV + h) * C + step)[:, None] * K + cols[None, :]
        tile = key_tile
    qx = tl.load(q + key_tile, mask=keep, other=0.0)
    kx = tl.load(k + key_tile, mask=keep, other=0.0)
    norm_q = SCALE * inverse_norm(qx, ACC, L2NORM)
    norm_k = inverse_norm(kx, ACC, L2NORM)
    b = nonzero_gain(beta, rows * HV + h, live, RANGE, ACC)
    G = tl.zeros([C], dtype=ACC)
    if DECAY == SCALAR:
        bias = tl.load(dt_bias + h).to(ACC) if RAW else 0.0
        g = tl.load(log_decay + rows * HV + h, mask=live, other=0.0).to(ACC)
        G = tl.cumsum(tl.where(live, decay_of(g, load_rate(A_log, h, RAW, ACC), bias, RAW), 0.0), 0)

    wx = kx
    norm_w = norm_k
    if WRITE == FROM_TENSOR or WRITE == RESCALED_KEY:  # noqa: SIM109
        wx = tl.load(write + tile, mask=keep, other=0.0)
    if WRITE == FROM_TENSOR:
        norm_w = tl.full([C], 1.0, ACC)
    if WRITE == RESCALED_QUERY:
        qx = tl.load(query + tile, mask=keep, other=0.0)

    decay = decay_below(G, ACC)
    left_out = False
    if DECAY == VECTOR:
        left_out = any_steep(steep, i * HV + h, K)
    if not left_out:
        wt = tl.trans(wx)
        square = ((i * HV + h) * C + step[:, None]) * C + step[None, :]
        P = dot(qx, wt, PRECISION)
        if DECAY == VECTOR:
            P = tl.where(
                step[:, None] >= step[None, :], P, 0.0
            )  # above the diagonal it may be infinite
        else:
            P *= (norm_q[:, None] * norm_w[None, :]) * decay
        tl.store(P_out + square, P.to(P_out.dtype.element_ty))
        if DELTA:
            L = dot(kx, wt, PRECISION) * (norm_k[:, None] * (b * norm_w)[None, :])
            L = tl.where(step[:, None] > step[None, :], L, 0.0)
            X = unit_lower_inverse(L, ACC, HALF, PRECISION)
            tl.store(T_out + square, (X * decay).to(T_out.dtype.element_ty))

    grow = exp(G)
    at = table + (i * HV + h) * ROWS * C + step
    tl.store(at + READ_Q * C, norm_q * grow)
    tl.store(at + READ_K * C, norm_k * grow)
    tl.store(at + WRITE_K * C, norm_w * exp(last_of(G) - G))
    tl.store(at + BETA * C, b)
    tl.store(at + DECAY_SUM * C, G)
    if DECAY != VECTOR:
        tl.store(at + NORM_Q * C, norm_q)
        tl.store(at + NORM_K * C, norm_k)
