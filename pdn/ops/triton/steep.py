"""The steep blocks of a decay per key channel: products between a chunk's tokens that stay right at
any decay.

Rows come in four blocks of 16. For row i in block b and j in an earlier one, G being the cumulative
log-decay and first_b that of b's first row::

    e^(G_i - G_j) = e^(G_i - first_b) e^(first_b - G_j)

has both factors <= 1: one product for each of three blocks. Within a block the reference is its
middle row if that keeps both factors below e^80, else 16 exact steps, one a column.
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
    await_inputs,
    dot,
    exp,
    locate_chunk,
)
from pdn.ops.triton.gates import decay_of, load_rate
from pdn.ops.triton.gradients import state_products, value_sums
from pdn.ops.triton.prepare import unit_lower_inverse
from pdn.ops.triton.vector import (
    ENDS,
    ENTER,
    ENTER_ON,
    KEEP,
    LEAVE,
    RATES,
    any_steep,
    lift,
    load_bias,
    load_tile,
    store_decay_gradient,
)

BLOCK = tl.constexpr(16)  # rows of a block
MAX_SPREAD = tl.constexpr(80.0)  # nats from its middle row


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
    q, k, query, write, scalars, r, start, end, h, cols,
    K: tl.constexpr, HV: tl.constexpr, GROUP: tl.constexpr, WRITE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows r [C] of a chunk, columns [BK]: the query that reads, the key and the write key, with
    their norms.
    """
    rows = (start + r).to(tl.int64)
    keep = (rows < end)[:, None] & (cols < K)[None, :]
    shared = (rows * (HV // GROUP) + h // GROUP)[:, None] * K + cols[None, :]
    own = (rows * HV + h)[:, None] * K + cols[None, :]
    norm_k = tl.load(scalars + NORM_K * C + r)[:, None]
    kx = norm_k * tl.load(k + shared, mask=keep, other=0.0).to(ACC)
    if WRITE == RESCALED_QUERY:
        qx = tl.load(query + own, mask=keep, other=0.0).to(ACC)
    else:
        qx = tl.load(q + shared, mask=keep, other=0.0).to(ACC)
    wx = kx
    if WRITE == FROM_TENSOR:
        wx = tl.load(write + own, mask=keep, other=0.0).to(ACC)
    elif WRITE == RESCALED_KEY:
        wx = norm_k * tl.load(write + own, mask=keep, other=0.0).to(ACC)
    return qx * tl.load(scalars + NORM_Q * C + r)[:, None], kx, wx


@triton.jit
def is_steep(flags, n, BLOCKS: tl.constexpr):
    """Whether block n of a chunk is, in one half or the other."""
    return (tl.load(flags + n) | tl.load(flags + BLOCKS + n)) != 0


@triton.jit(do_not_specialize=["T"])
def steep_prepare_kernel(
    q, k, query, write, log_decay, A_log, dt_bias, chunks,
    folded_query, folded_key, folded_write, decay_sums, ends, steep, table, T_out, P_out, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, RAW: tl.constexpr,
    WRITE: tl.constexpr,
    DELTA: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What ``fold_kernel`` left wrong where a block is steep: its q', k', kw' and ``ends``, with G
    [NT, HV, C, K]; and T and P of the chunk, which ``prepare_kernel`` leaves out.
    """
    await_inputs()
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = i * HV + h
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    flags = steep + slot * 2 * BLOCKS
    if any_steep(steep, slot, K):
        start, end = locate_chunk(i, chunks, T, VARLEN)
        step = tl.arange(0, C)
        block = step // BLOCK
        rows = (start + step).to(tl.int64)
        scalars = table + slot * ROWS * C
        sums = decay_sums + slot * C * K
        kind = folded_query.dtype.element_ty
        wide = (
            tl.float32 if kind == tl.float16 else kind
        )  # float16 has not the range of the factors within a block
        rate = load_rate(A_log, h, RAW, ACC)
        scores = tl.zeros([C, C], dtype=ACC)
        system = tl.zeros([C, C], dtype=ACC)
        same = block[:, None] == block[None, :]
        for base in range(0, K, BK):
            cols = base + tl.arange(0, BK)
            if is_steep(flags, base // BK, BLOCKS):
                keep = (rows < end)[:, None] & (cols < K)[None, :]
                x = tl.load(
                    log_decay + (rows * HV + h)[:, None] * K + cols[None, :], mask=keep, other=0.0
                ).to(ACC)
                bias = load_bias(dt_bias, h, cols, K, RAW, ACC)
                if RAW:
                    bias = bias[None, :]
                g = tl.where(keep, decay_of(x, rate, bias, RAW), 0.0)
                G = tl.cumsum(g, 0)
                G_C = tl.sum(g, 0)
                at = (slot * C + step)[:, None] * K + cols[None, :]
                columns = (cols < K)[None, :]
                tl.store(decay_sums + at, G, mask=columns)
                at_ends = ends + slot * ENDS * K + cols
                tl.store(at_ends + ENTER * K, tl.full([BK], 1.0, ACC), mask=cols < K)
                tl.store(at_ends + LEAVE * K, tl.full([BK], 1.0, ACC), mask=cols < K)
                for row in tl.static_range(ENTER_ON, KEEP + 1):
                    tl.store(at_ends + row * K, exp(G_C), mask=cols < K)
                qx, kx, wx = load_tiles(
                    q, k, query, write, scalars, step, start, end, h, cols, K, HV, GROUP, WRITE, ACC
                )
                tl.store(folded_query + at, (exp(G) * qx).to(kind), mask=columns)
                tl.store(folded_write + at, (exp(G_C[None, :] - G) * wx).to(kind), mask=columns)
                if DELTA:
                    tl.store(folded_key + at, (exp(G) * kx).to(kind), mask=columns)
                tl.debug_barrier()  # other threads read G
                up = exp(G - rows_at(sums, block * BLOCK, K, cols))
                q_up = (qx * up).to(kind)
                k_up = (kx * up).to(kind)
                q_between = tl.zeros([C, C], dtype=ACC)
                k_between = tl.zeros([C, C], dtype=ACC)
                for n in tl.static_range(1, 4):
                    first = row_at(sums, n * BLOCK, K, cols)
                    right = wx * exp(
                        tl.where((step < n * BLOCK)[:, None], first[None, :] - G, float("-inf"))
                    )
                    right = tl.trans(right.to(kind))
                    here = (block == n)[:, None]
                    q_between += dot(tl.where(here, q_up, 0.0).to(kind), right, PRECISION)
                    if DELTA:
                        k_between += dot(tl.where(here, k_up, 0.0).to(kind), right, PRECISION)
                q_within = tl.zeros([C, C], dtype=ACC)
                k_within = tl.zeros([C, C], dtype=ACC)
                if spread(sums, K, cols) < MAX_SPREAD:
                    middle = rows_at(sums, block * BLOCK + BLOCK // 2, K, cols)
                    up = exp(G - middle)
                    inner = tl.trans((wx * exp(middle - G)).to(wide))
                    q_within = dot((qx * up).to(wide), inner, PRECISION)
                    if DELTA:
                        k_within = dot((kx * up).to(wide), inner, PRECISION)
                else:
                    for j in range(0, BLOCK):
                        r = block * BLOCK + j
                        _, _, w_j = load_tiles(
                            q,
                            k,
                            query,
                            write,
                            scalars,
                            r,
                            start,
                            end,
                            h,
                            cols,
                            K,
                            HV,
                            GROUP,
                            WRITE,
                            ACC,
                        )
                        factor = w_j * exp(
                            tl.where(
                                (step >= r)[:, None], G - rows_at(sums, r, K, cols), float("-inf")
                            )
                        )
                        column = step[None, :] == r[:, None]
                        q_within += tl.where(column, tl.sum(qx * factor, 1)[:, None], 0.0)
                        if DELTA:
                            k_within += tl.where(column, tl.sum(kx * factor, 1)[:, None], 0.0)
                scores += tl.where(same, q_within, q_between)
                if DELTA:
                    system += tl.where(same, k_within, k_between)
            else:
                inner = tl.trans(load_tile(folded_write + slot * C * K, C, cols, K, BK))
                scores += dot(
                    load_tile(folded_query + slot * C * K, C, cols, K, BK), inner, PRECISION
                )
                if DELTA:
                    system += dot(
                        load_tile(folded_key + slot * C * K, C, cols, K, BK), inner, PRECISION
                    )
        square = (slot * C + step[:, None]) * C + step[None, :]
        P = tl.where(step[:, None] >= step[None, :], scores, 0.0)
        tl.store(P_out + square, P.to(P_out.dtype.element_ty))
        if DELTA:
            b = tl.load(scalars + BETA * C + step)
            L = tl.where(step[:, None] > step[None, :], system * b[None, :], 0.0)
            tl.store(
                T_out + square,
                unit_lower_inverse(L, ACC, HALF, PRECISION).to(T_out.dtype.element_ty),
            )


@triton.jit(do_not_specialize=["T"])
def steep_gradient_kernel(
    q, k, query, write, log_decay, A_log, dt_bias, v, o, x, do, dv, table, decay_sums, ends, steep,
    states, adjoints, chunks,
    dq, dk, dwrite, dlog_decay, d_rate, d_bias, T,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, RAW: tl.constexpr, WRITE: tl.constexpr,
    DELTA: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``vector_gradient_kernel`` again, for the steep blocks of channels; their parts of dA_log
    follow its in d_rate.
    """
    await_inputs()
    i, h = tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot = i * HV + h
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    if is_steep(steep + slot * 2 * BLOCKS, tl.program_id(0), BLOCKS):
        start, end = locate_chunk(i, chunks, T, VARLEN)
        step = tl.arange(0, C)
        block = step // BLOCK
        rows = (start + step).to(tl.int64)
        live = rows < end
        cols = tl.program_id(0) * BK + tl.arange(0, BK)
        keep = live[:, None] & (cols < K)[None, :]
        kind = do.dtype.element_ty
        wide = (
            tl.float32 if kind == tl.float16 else kind
        )  # float16 has not the range of the factors within a block
        scalars = table + slot * ROWS * C
        sums = decay_sums + slot * C * K
        b = tl.load(scalars + BETA * C + step)
        along_q, along_k, along_w, scores, system = value_sums(
            do, dv, v, x, o, (rows * HV + h) * V, live, V, BV, DELTA, ACC, PRECISION
        )
        same = block[:, None] == block[None, :]
        scores = tl.where(step[:, None] >= step[None, :], scores * b[None, :], 0.0).to(wide)
        dP_between = tl.where(same, 0.0, scores).to(wide)
        dP_within = tl.where(same, scores, 0.0).to(wide)
        if DELTA:
            system = tl.where(step[:, None] > step[None, :], -system * b[None, :], 0.0).to(wide)
            dL_between = tl.where(same, 0.0, system).to(wide)
            dL_within = tl.where(same, system, 0.0).to(wide)
        G = rows_at(sums, step, K, cols)
        qx, kx, wx = load_tiles(
            q, k, query, write, scalars, step, start, end, h, cols, K, HV, GROUP, WRITE, ACC
        )
        up = exp(G - rows_at(sums, block * BLOCK, K, cols))
        q_up = (qx * up).to(wide)
        k_up = (kx * up).to(wide)
        d_query = tl.zeros([C, BK], dtype=ACC)
        d_key = tl.zeros([C, BK], dtype=ACC)
        d_write = tl.zeros([C, BK], dtype=ACC)
        dG = tl.zeros([C, BK], dtype=ACC)  # from the rounded operands, as there
        for n in tl.static_range(1, 4):
            first = row_at(sums, n * BLOCK, K, cols)
            down = exp(tl.where((step < n * BLOCK)[:, None], first[None, :] - G, float("-inf")))
            right = (wx * down).to(wide)
            here = (block == n)[:, None]
            d_query += tl.where(here, dot(dP_between, right, PRECISION), 0.0)
            back = dot(tl.trans(dP_between), tl.where(here, q_up, 0.0).to(wide), PRECISION)
            if DELTA:
                d_key += tl.where(here, dot(dL_between, right, PRECISION), 0.0)
                back += dot(tl.trans(dL_between), tl.where(here, k_up, 0.0).to(wide), PRECISION)
            d_write += down * back
            dG -= right.to(ACC) * back
        dG += q_up.to(ACC) * d_query + k_up.to(ACC) * d_key
        d_query *= up
        d_key *= up
        if spread(sums, K, cols) < MAX_SPREAD:
            half = rows_at(sums, block * BLOCK + BLOCK // 2, K, cols)
            up = exp(G - half)
            down = exp(half - G)
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
            for j in range(0, BLOCK):
                r = block * BLOCK + j
                _, _, w_j = load_tiles(
                    q, k, query, write, scalars, r, start, end, h, cols, K, HV, GROUP, WRITE, ACC
                )
                factor = exp(
                    tl.where((step >= r)[:, None], G - rows_at(sums, r, K, cols), float("-inf"))
                )
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
                    here = (step == n * BLOCK + j)[:, None]
                    d_write += tl.where(here, row[None, :], 0.0)
                    dG -= tl.where(here, row[None, :] * wx, 0.0)

        of_g, of_d, of_x, kept = state_products(
            do, dv, x if DELTA else v, states + slot * K * V, adjoints + slot * K * V,
            (rows * HV + h) * V, live, cols,
            K, BK, V, BV, ACC, PRECISION,
        )  # fmt: skip
        at_ends = ends + slot * ENDS * K + cols
        grow = exp(G)
        of_g *= grow
        d_query += of_g
        dG += qx * of_g
        if DELTA:
            of_d *= grow
            d_key -= of_d
            dG -= kx * of_d
        d_state = exp(row_at(sums, C - 1, K, cols)[None, :] - G) * (b / lift(kind))[:, None] * of_x
        d_write += d_state
        dG -= wx * d_state
        kept *= tl.load(at_ends + KEEP * K, mask=cols < K, other=0.0) / lift(kind)
        kept += tl.sum(wx * d_state, 0)
        at = (rows * HV + h)[:, None] * K + cols[None, :]
        gate = G
        rate = load_rate(A_log, h, RAW, ACC)
        if RAW:
            gate = tl.load(log_decay + at, mask=keep, other=0.0).to(ACC)
            gate = decay_of(gate, rate, load_bias(dt_bias, h, cols, K, RAW, ACC)[None, :], RAW)
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
        if RAW:
            part = d_rate + slot * (RATES + BLOCKS) + RATES + tl.program_id(0)
            tl.store(part, tl.sum(rates, 0))
        norm_q = tl.load(scalars + NORM_Q * C + step)[:, None]
        norm_k = tl.load(scalars + NORM_K * C + step)[:, None]
        if WRITE == FROM_TENSOR:
            tl.store(dwrite + at, d_write.to(dwrite.dtype.element_ty), mask=keep)
        elif WRITE == RESCALED_KEY:
            tl.store(dwrite + at, (norm_k * d_write).to(dwrite.dtype.element_ty), mask=keep)
        else:
            d_key += d_write
        if L2NORM and (WRITE == FROM_KEY or WRITE == FROM_TENSOR):  # noqa: SIM109
            if WRITE == FROM_KEY:
                along_k += along_w
            d_key -= along_k[:, None] * kx
        if L2NORM and WRITE != RESCALED_QUERY:
            d_query -= (along_q / (SCALE * SCALE))[:, None] * qx
        tl.store(dk + at, (norm_k * d_key).to(dk.dtype.element_ty), mask=keep)
        tl.store(dq + at, (norm_q * d_query).to(dq.dtype.element_ty), mask=keep)
