"""The two serial kernels: the state forward with the outputs, and its adjoint backward.

Both hold the state transposed, [V, K], so that values are the rows of every product: the state, the solution of the
triangular system and what the state takes in are then left operands one after the other, which never leave registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import (
    BETA,
    DECAY_SUM,
    READ_K,
    READ_Q,
    ROWS,
    VECTOR,
    WRITE_K,
    C,
    dot,
    exp,
    locate_chunk,
    locate_sequence,
)
from pdn.ops.triton.vector import ENDS, ENTER, ENTER_ON, LEAVE, LEAVE_ON, lift


@triton.jit
def load_keys(
    x, rows, slot, h, keep, cols, HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, DECAY: tl.constexpr
):  # fmt: skip
    """A chunk's [C, BK] of x [M, HV // GROUP, K], or of x [NT, HV, C, K] with a vector decay."""
    if DECAY == VECTOR:
        return tl.load(
            x + (slot * C + tl.arange(0, C))[:, None] * K + cols[None, :],
            mask=(cols < K)[None, :],
            other=0.0,
        )
    else:
        return tl.load(
            x + (rows * (HV // GROUP) + h // GROUP)[:, None] * K + cols[None, :],
            mask=keep,
            other=0.0,
        )


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q, k, w, v, table, ends, T_in, P_in, initial, chunks, offsets,
    o, x, states, final, T,
    HV: tl.constexpr, QG: tl.constexpr, KG: tl.constexpr, WG: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, KEY_WRITES: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_VALUES: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr, FINAL: tl.constexpr,
    SEGMENT: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o, the state before every chunk [NT, HV, V, K] and after the last one [N, HV, K, V].

    x = T (v - e^G k S) [M, HV, V], o = e^G q S + P beta x, S <- e^(G_C) S + w^T beta x. Without HAS_VALUES, v is zero;
    without OUTPUT only the last state matters. With SEGMENT, a sequence is a segment, also in ``initial`` and ``final``.

    q, k, w: [M, HV // group, K] with groups QG, KG, WG, their rows' factors in the table. KEY_WRITES: w is k itself. With a
    vector decay they are those [NT, HV, C, K] of ``vector.py``, and the states that they read and that are kept are ``enter`` S.
    """
    n, h = tl.program_id(1).to(tl.int64), tl.program_id(2)
    vals = tl.program_id(0) * BV + tl.arange(0, BV)
    first, count = locate_sequence(n, offsets, T, SEGMENT, VARLEN)
    step = tl.arange(0, C)
    cols = tl.arange(0, BK)
    keep_k = cols < K
    keep_v = vals < V
    inside = keep_v[:, None] & keep_k[None, :]
    S = tl.zeros([BV, BK], dtype=ACC)
    at_state = (n * HV + h) * K * V + vals[:, None] + cols[None, :] * V
    if HAS_INITIAL:
        S = tl.load(initial + at_state, mask=inside, other=0.0).to(ACC)
    for m in tl.range(0, count, num_stages=STAGES):
        i = first + m
        start, end = locate_chunk(i, chunks, T, VARLEN)
        rows = (start + step).to(tl.int64)
        live = rows < end
        keep = live[:, None] & keep_k[None, :]
        slot = i.to(tl.int64) * HV + h
        scalars = table + slot * ROWS * C + step
        square = (slot * C + step[:, None]) * C + step[None, :]
        value = (rows * HV + h)[None, :] * V + vals[:, None]
        keep_value = keep_v[:, None] & live[None, :]
        if OUTPUT:
            qx = load_keys(q, rows, slot, h, keep, cols, HV, QG, K, DECAY)
            P = tl.load(P_in + square)
        wx = load_keys(w, rows, slot, h, keep, cols, HV, WG, K, DECAY)
        if HAS_VALUES:
            u = tl.load(v + value, mask=keep_value, other=0.0).to(ACC)
        else:
            u = tl.zeros([BV, C], dtype=ACC)
        b = tl.load(scalars + BETA * C)
        at_ends = ends + slot * ENDS * K + cols
        if DECAY == VECTOR:
            state = (S * tl.load(at_ends + ENTER * K, mask=keep_k, other=0.0)[None, :]).to(
                w.dtype.element_ty
            )
        else:
            state = S.to(w.dtype.element_ty)
        if DELTA:
            kx = wx
            if not KEY_WRITES:
                kx = load_keys(k, rows, slot, h, keep, cols, HV, KG, K, DECAY)
            inverse = tl.load(T_in + square)
            erased = dot(state, tl.trans(kx), PRECISION)
            if DECAY != VECTOR:
                erased *= tl.load(scalars + READ_K * C)[None, :]
            u = dot((u - erased).to(inverse.dtype), tl.trans(inverse), PRECISION)
            if SAVE:
                tl.store(x + value, u.to(x.dtype.element_ty), mask=keep_value)
        u = b[None, :] * u
        if OUTPUT:
            out = dot(state, tl.trans(qx), PRECISION)
            if DECAY != VECTOR:
                out *= tl.load(scalars + READ_Q * C)[None, :]
            out += dot(u.to(P.dtype), tl.trans(P), PRECISION)
            tl.store(o + value, out.to(o.dtype.element_ty), mask=keep_value)
        if SAVE:
            tl.store(states + slot * K * V + vals[:, None] * K + cols[None, :], state, mask=inside)
        if DECAY == VECTOR:
            S *= tl.load(at_ends + ENTER_ON * K, mask=keep_k, other=0.0)[None, :]
        else:
            S *= exp(tl.load(table + slot * ROWS * C + DECAY_SUM * C + C - 1))
            u *= tl.load(scalars + WRITE_K * C)[None, :]
        S += dot(u.to(wx.dtype), wx, PRECISION)
        if DECAY == VECTOR:
            S *= tl.load(at_ends + LEAVE * K, mask=keep_k, other=0.0)[None, :]
    if FINAL:
        tl.store(final + at_state, S, mask=inside)


@triton.jit(do_not_specialize=["T"])
def reverse_kernel(
    q, k, w, do, table, ends, T_in, P_in, d_final, chunks, offsets,
    dv, adjoints, d_initial, T,
    HV: tl.constexpr, QG: tl.constexpr, KG: tl.constexpr, WG: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, KEY_WRITES: tl.constexpr, HAS_FINAL: tl.constexpr, INITIAL: tl.constexpr,
    STORE: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv, dL/dS after every chunk [NT, HV, V, K] and before the first one [N, HV, K, V].

    With E the adjoint after the chunk: dv = T^T beta (P^T do + w E), E <- e^(G_C) E + (e^G q)^T do - (e^G k)^T dv.
    Without STORE only the adjoint before the first matters. With a vector decay w reads
    and ``adjoints`` keeps ``leave`` E, lifted.
    """
    n, h = tl.program_id(1).to(tl.int64), tl.program_id(2)
    vals = tl.program_id(0) * BV + tl.arange(0, BV)
    first, count = locate_sequence(n, offsets, T, SEGMENT, VARLEN)
    step = tl.arange(0, C)
    cols = tl.arange(0, BK)
    keep_k = cols < K
    keep_v = vals < V
    inside = keep_v[:, None] & keep_k[None, :]
    E = tl.zeros([BV, BK], dtype=ACC)
    at_state = (n * HV + h) * K * V + vals[:, None] + cols[None, :] * V
    if HAS_FINAL:
        E = tl.load(d_final + at_state, mask=inside, other=0.0).to(ACC)
    for m in tl.range(0, count, num_stages=STAGES):
        i = first + count - 1 - m
        start, end = locate_chunk(i, chunks, T, VARLEN)
        rows = (start + step).to(tl.int64)
        live = rows < end
        keep = live[:, None] & keep_k[None, :]
        slot = i.to(tl.int64) * HV + h
        scalars = table + slot * ROWS * C + step
        square = (slot * C + step[:, None]) * C + step[None, :]
        value = (rows * HV + h)[None, :] * V + vals[:, None]
        keep_value = keep_v[:, None] & live[None, :]
        qx = load_keys(q, rows, slot, h, keep, cols, HV, QG, K, DECAY)
        wx = load_keys(w, rows, slot, h, keep, cols, HV, WG, K, DECAY)
        g = tl.load(do + value, mask=keep_value, other=0.0)
        P = tl.load(P_in + square)
        at_ends = ends + slot * ENDS * K + cols
        if DECAY == VECTOR:
            lifted = lift(g.dtype) * tl.load(at_ends + LEAVE * K, mask=keep_k, other=0.0)
            adjoint = (E * lifted[None, :]).to(g.dtype)
            d = dot(adjoint, tl.trans(wx), PRECISION) / lift(g.dtype)
        else:
            adjoint = E.to(g.dtype)
            d = dot(adjoint, tl.trans(wx), PRECISION)
            d *= tl.load(scalars + WRITE_K * C)[None, :]
        d += dot(g, P, PRECISION)
        d *= tl.load(scalars + BETA * C)[None, :]
        if DELTA:
            inverse = tl.load(T_in + square)
            d = dot(d.to(inverse.dtype), inverse, PRECISION)
        if STORE:
            tl.store(dv + value, d.to(dv.dtype.element_ty), mask=keep_value)
            tl.store(
                adjoints + slot * K * V + vals[:, None] * K + cols[None, :], adjoint, mask=inside
            )
        if DECAY == VECTOR:
            E *= tl.load(at_ends + LEAVE_ON * K, mask=keep_k, other=0.0)[None, :]
        else:
            E *= exp(tl.load(table + slot * ROWS * C + DECAY_SUM * C + C - 1))
            g = (g.to(ACC) * tl.load(scalars + READ_Q * C)[None, :]).to(g.dtype)
        E += dot(g, qx, PRECISION)
        if DELTA:
            kx = wx
            if not KEY_WRITES:
                kx = load_keys(k, rows, slot, h, keep, cols, HV, KG, K, DECAY)
            if DECAY != VECTOR:
                d *= tl.load(scalars + READ_K * C)[None, :]
            E -= dot(d.to(kx.dtype), kx, PRECISION)
        if DECAY == VECTOR:
            E *= tl.load(at_ends + ENTER * K, mask=keep_k, other=0.0)[None, :]
    if INITIAL:
        tl.store(d_initial + at_state, E, mask=inside)


@triton.jit(do_not_specialize=["segments"])
def combine_kernel(
    transitions, offsets, initial, starts, segments,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The value before every segment, ``starts`` [B * segments, HV, K, V], of S -> transition S + offset; or, REVERSE, the
    adjoint after it, of E -> transition^T E + offset from the last.

    transitions [B * segments, HV, K, K]; offsets as starts; initial [B, HV, K, V].
    """
    n, h = tl.program_id(1).to(tl.int64), tl.program_id(2)
    vals = tl.program_id(0) * BV + tl.arange(0, BV)
    cols = tl.arange(0, BK)
    inside = (cols < K)[:, None] & (vals < V)[None, :]
    square = (cols < K)[:, None] & (cols < K)[None, :]
    tile = cols[:, None] * V + vals[None, :]
    S = tl.zeros([BK, BV], dtype=ACC)
    if HAS_INITIAL:
        S = tl.load(initial + (n * HV + h) * K * V + tile, mask=inside, other=0.0).to(ACC)
    for m in range(0, segments):
        i = (n * segments + (segments - 1 - m if REVERSE else m)) * HV + h
        tl.store(starts + i * K * V + tile, S, mask=inside)
        if REVERSE:
            A = tl.load(
                transitions + i * K * K + cols[None, :] * K + cols[:, None], mask=square, other=0.0
            )
        else:
            A = tl.load(
                transitions + i * K * K + cols[:, None] * K + cols[None, :], mask=square, other=0.0
            )
        if HALF:  # two bfloat16 numbers each, 16 bits of a mantissa
            A0, S0 = A.to(tl.bfloat16), S.to(tl.bfloat16)
            A1, S1 = (A - A0.to(ACC)).to(tl.bfloat16), (S - S0.to(ACC)).to(tl.bfloat16)
            S = dot(A0, S0, "tf32") + (dot(A0, S1, "tf32") + dot(A1, S0, "tf32"))
        else:
            S = dot(A, S, "bf16x6")
        S += tl.load(offsets + i * K * V + tile, mask=inside, other=0.0)
