"""The gradients of all chunks at once, from the states before them and the adjoints after."""

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
    RESCALED_KEY,
    RESCALED_QUERY,
    ROWS,
    C,
    await_inputs,
    decay_below,
    dot,
    exp,
    last_of,
    locate_chunk,
)
from pdn.ops.triton.gates import decay_gradient, gain_gradient, load_rate
from pdn.ops.triton.sums import OF_A_LOG, OF_DT_BIAS, PARTS


@triton.jit
def total(x):
    """The sum of a matrix, within a thread first."""
    return tl.sum(tl.reshape(x, [x.shape[0] * x.shape[1]]), 0)


@triton.jit
def value_sums(
    g, d, v, x, o, value, live, V: tl.constexpr, BV: tl.constexpr,
    DELTA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<o, do>, <x, dv> - <v, dv> and <x, dv> [C], and do x^T and dv x^T [C, C], by blocks of
    values.
    """
    of_o = tl.zeros([C], dtype=ACC)
    of_v = tl.zeros([C], dtype=ACC)
    of_x = tl.zeros([C], dtype=ACC)
    of_P = tl.zeros([C, C], dtype=ACC)
    of_L = tl.zeros([C, C], dtype=ACC)
    for base in range(0, V, BV):
        vals = base + tl.arange(0, BV)
        keep = live[:, None] & (vals < V)[None, :]
        at = value[:, None] + vals[None, :]
        gx = tl.load(g + at, mask=keep, other=0.0)
        dx = tl.load(d + at, mask=keep, other=0.0)
        vx = tl.load(v + at, mask=keep, other=0.0)
        of_v += tl.sum(dx.to(ACC) * vx.to(ACC), 1)
        if DELTA:
            vx = tl.load(x + at, mask=keep, other=0.0)
        of_x += tl.sum(dx.to(ACC) * vx.to(ACC), 1)
        of_o += tl.sum(gx.to(ACC) * tl.load(o + at, mask=keep, other=0.0).to(ACC), 1)
        of_P += dot(gx, tl.trans(vx), PRECISION)
        of_L += dot(dx, tl.trans(vx), PRECISION)
    return of_o, of_x - of_v, of_x, of_P, of_L


@triton.jit
def state_products(
    g, d, x, states, adjoints, value, live, cols, K: tl.constexpr, BK: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return do S^T, dv S^T and x E^T [C, BK], and the sum over values of E S [BK].

    They are summed by blocks of values.
    """
    of_g = tl.zeros([C, BK], dtype=ACC)
    of_d = tl.zeros([C, BK], dtype=ACC)
    of_x = tl.zeros([C, BK], dtype=ACC)
    kept = tl.zeros([BK], dtype=ACC)
    for base in range(0, V, BV):
        vals = base + tl.arange(0, BV)
        keep = live[:, None] & (vals < V)[None, :]
        at = value[:, None] + vals[None, :]
        inside = (vals < V)[:, None] & (cols < K)[None, :]
        St = tl.load(states + vals[:, None] * K + cols[None, :], mask=inside, other=0.0)
        Et = tl.load(adjoints + vals[:, None] * K + cols[None, :], mask=inside, other=0.0)
        of_g += dot(tl.load(g + at, mask=keep, other=0.0), St, PRECISION)
        of_d += dot(tl.load(d + at, mask=keep, other=0.0), St, PRECISION)
        of_x += dot(tl.load(x + at, mask=keep, other=0.0), Et, PRECISION)
        kept += tl.sum(St.to(ACC) * Et.to(ACC), 0)
    return of_g, of_d, of_x, kept


@triton.jit(do_not_specialize=["T"])
def gradient_kernel(
    q, k, query, write, log_decay, A_log, dt_bias, v, o, x, do, dv, table, states, adjoints, chunks,
    dq, dk, dwrite, dlog_decay, dbeta, parts, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, DECAY: tl.constexpr, RAW: tl.constexpr,
    RANGE: tl.constexpr,
    WRITE: tl.constexpr, DELTA: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scalar decay or none. dq, dk [M, HV, K], dbeta, dlog_decay [M, HV] (RAW: and the chunk's part
    of dA_log and ddt_bias in parts [NT, HV, PARTS]). What a preconditioner rescales stays without
    its norm's gradient: dwrite and dk, or dq and dk.

    Of the solve (I + L) x = v - e^G k S0 only the solution x and dv are needed, since dL/dL =
    -stril(dv x^T). And every result is linear in each q_i, k_i, kw_i and beta_i, which gives,
    without a product, <q_i, dq_i> = <o_i, do_i>, <kw_i, dkw_i> = beta_i dbeta_i = <x_i, dv_i> and
    <k_i, dk_i> = <x_i, dv_i> - <v_i, dv_i> (k_i as it reads): the sums that dbeta and the norms'
    gradients take. So columns go in blocks of BK.

    Every pair of tokens is in one rounded number of ``dP`` or ``dL``, read by its row and by its
    column, with raw operands: what it adds to the decay's gradient at the one it takes at the
    other, and all between cancels as it should.
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
    G = tl.load(scalars + DECAY_SUM * C)
    norm_k = tl.load(scalars + NORM_K * C)
    norm_q = tl.load(scalars + NORM_Q * C)
    norm_w = norm_k
    if WRITE == FROM_TENSOR:
        norm_w = tl.full([C], 1.0, ACC)
    grow = exp(G)
    keys = (rows * (HV // GROUP) + h // GROUP)[:, None] * K
    own = (rows * HV + h)[:, None] * K
    value = (rows * HV + h)[:, None] * V + vals[None, :]
    keep_value = live[:, None] & keep_v[None, :]
    at_row = rows * HV + h

    kind = do.dtype.element_ty
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
            do, dv, v, x, o, (rows * HV + h) * V, live, V, BV, DELTA, ACC, PRECISION
        )
    tl.store(dbeta + at_row, gain_gradient(along_w / b, b, RANGE), mask=live)

    # The operands are raw tiles: all factors of their rows, and beta of x, are in the [C, C]
    # matrices.
    wide = tl.float32 if kind == tl.float16 else kind  # float16 has not the range of two norms
    factor = decay_below(G, ACC) * (b * norm_w)[None, :]
    dP = ((dot(g, xt, PRECISION) if WHOLE else of_P) * factor * norm_q[:, None]).to(wide)
    dP_t = tl.trans(dP)
    if DELTA:
        dL = -(dot(d, xt, PRECISION) if WHOLE else of_L) * factor * norm_k[:, None]
        dL = tl.where(step[:, None] > step[None, :], dL, 0.0).to(wide)
        dL_t = tl.trans(dL)
    G_C = last_of(G)
    remain = exp(G_C - G) * b * norm_w
    read_q = grow * norm_q
    read_k = grow * norm_k
    kept = tl.sum(tl.zeros([C], dtype=ACC), 0)
    along_decay = tl.zeros([C], dtype=ACC)
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
            of_g, of_d, of_x, kept_here = state_products(
                do, dv, x if DELTA else v, states + slot * K * V, adjoints + slot * K * V,
                (rows * HV + h) * V, live, cols,
                K, BK, V, BV, ACC, PRECISION,
            )  # fmt: skip
        qx = tl.load(q + keys + cols[None, :], mask=keep, other=0.0)
        kx = tl.load(k + keys + cols[None, :], mask=keep, other=0.0)
        wx = kx
        px = qx
        if WRITE == FROM_TENSOR or WRITE == RESCALED_KEY:  # noqa: SIM109
            wx = tl.load(write + own + cols[None, :], mask=keep, other=0.0)
        if WRITE == RESCALED_QUERY:
            px = tl.load(query + own + cols[None, :], mask=keep, other=0.0)
        d_query = read_q[:, None] * (dot(g, St, PRECISION) if WHOLE else of_g) + dot(
            dP, wx.to(wide), PRECISION
        )
        if DECAY != NO_DECAY:
            along_decay += tl.sum(px.to(ACC) * d_query, 1)
        if L2NORM and WRITE != RESCALED_QUERY:
            d_query -= (along_q * norm_q * norm_q / (SCALE * SCALE))[:, None] * qx.to(ACC)
        tl.store(dq + own + cols[None, :], d_query.to(dq.dtype.element_ty), mask=keep)
        d_write = remain[:, None] * (dot(vx, Et, PRECISION) if WHOLE else of_x)
        if DECAY != NO_DECAY:
            kept_here = total(St.to(ACC) * Et.to(ACC)) if WHOLE else tl.sum(kept_here, 0)
            kept += exp(G_C) * kept_here + total(wx.to(ACC) * d_write)
        d_write += dot(dP_t, px.to(wide), PRECISION)
        d_key = tl.zeros([C, BK], dtype=ACC)
        if DELTA:
            d_write += dot(dL_t, kx.to(wide), PRECISION)
            d_key = dot(dL, wx.to(wide), PRECISION) - read_k[:, None] * (
                dot(d, St, PRECISION) if WHOLE else of_d
            )
        if DECAY != NO_DECAY:
            along_decay += tl.sum(kx.to(ACC) * d_key - wx.to(ACC) * d_write, 1)
        if WRITE == FROM_TENSOR or WRITE == RESCALED_KEY:  # noqa: SIM109
            tl.store(dwrite + own + cols[None, :], d_write.to(dwrite.dtype.element_ty), mask=keep)
        else:
            d_key += d_write
        if L2NORM and (WRITE == FROM_KEY or WRITE == FROM_TENSOR):  # noqa: SIM109
            d_key -= (norm_k * norm_k * (along_k if WRITE == FROM_TENSOR else along_k + along_w))[
                :, None
            ] * kx.to(ACC)
        tl.store(dk + own + cols[None, :], d_key.to(dk.dtype.element_ty), mask=keep)

    if DECAY != NO_DECAY:
        dG = along_decay
        d_g = tl.where(live, tl.sum(dG, 0) - tl.cumsum(dG, 0) + dG + kept, 0.0)
        bias = tl.load(dt_bias + h).to(ACC) if RAW else 0.0
        raw = tl.load(log_decay + at_row, mask=live, other=0.0).to(ACC)
        d_raw, d_log_rate = decay_gradient(d_g, raw, load_rate(A_log, h, RAW, ACC), bias, RAW)
        tl.store(dlog_decay + at_row, d_raw, mask=live)
        if RAW:
            tl.store(parts + slot * PARTS + OF_A_LOG, tl.sum(d_log_rate, 0))
            tl.store(parts + slot * PARTS + OF_DT_BIAS, tl.sum(d_raw, 0))
