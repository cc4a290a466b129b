"""The two serial kernels: the state forward with the outputs, and its adjoint backward.

Both hold the state transposed, [V, K], so that values are the rows of every product: the state, the
solution of the triangular system and what the state takes in are then left operands one after the
other, which never leave registers.
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
    await_inputs,
    dot,
    exp,
    locate_border,
    locate_chunk,
    locate_segment,
    locate_sequence,
)
from pdn.ops.triton.vector import ENDS, ENTER, ENTER_ON, LEAVE, LEAVE_ON, lift


@triton.jit
def load_keys(
    x, rows, slot, h, keep, cols, HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr,
    DECAY: tl.constexpr
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


@triton.jit(do_not_specialize=["T", "wholes"])
def forward_kernel(
    q, k, w, v, table, ends, T_in, P_in, initial, starts, chunks, offsets, segments, border,
    o, x, states, final, T, wholes,
    HV: tl.constexpr, QG: tl.constexpr, KG: tl.constexpr, WG: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, KEY_WRITES: tl.constexpr,
    HAS_INITIAL: tl.constexpr, CONTINUES: tl.constexpr, HAS_VALUES: tl.constexpr,
    OUTPUT: tl.constexpr, BORDER: tl.constexpr,
    SAVE: tl.constexpr, FINAL: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o, the state before every chunk [NT, HV, V, K] and after the last one [N, HV, K, V].

    x = T (v - e^G k S) [M, HV, V], o = e^G q S + P beta x, S <- e^(G_C) S + w^T beta x.

    SEGMENT: a program takes one segment of a sequence, see ``locate_segment``. Without OUTPUT it
        keeps its last state alone, in ``final`` [wholes, HV, K, V]: from zero or, without
        HAS_VALUES, from the identity and of v = 0. CONTINUES: ``starts`` [wholes, HV, K, V] are the
        states after every segment that is not the last of its sequence.
    BORDER: the sequences are pieces of longer ones, and ``starts`` and, without OUTPUT, ``final``
        have the B rows' ends behind the ``wholes``, see ``locate_border``.

    q, k, w: [M, HV // group, K] with groups QG, KG, WG, their rows' factors in the table.
        KEY_WRITES: w is k itself. With a vector decay they are those [NT, HV, C, K] of
        ``vector.py``, and the states that they read and that are kept are ``enter`` S.
    """
    await_inputs()
    segment, h = tl.program_id(1).to(tl.int64), tl.program_id(2)
    vals = tl.program_id(0) * BV + tl.arange(0, BV)
    n, first, count, before = locate_segment(
        segment, segments, offsets, T, wholes, SEGMENT, VARLEN
    )  # fmt: skip
    step = tl.arange(0, C)
    cols = tl.arange(0, BK)
    keep_k = cols < K
    keep_v = vals < V
    inside = keep_v[:, None] & keep_k[None, :]
    place = segment
    if BORDER:
        before, place = locate_border(segment, n, before, border, wholes, VARLEN)
        if not OUTPUT:
            count = tl.where(place < 0, 0, count)  # nobody asks for what is after it
    S = tl.zeros([BV, BK], dtype=ACC)
    at_state = h * K * V + vals[:, None] + cols[None, :] * V
    if HAS_INITIAL:
        at = initial + n * HV * K * V + at_state
        S = tl.load(at, mask=inside & (before < 0), other=0.0).to(ACC)
    if CONTINUES:
        S += tl.load(
            starts + before * HV * K * V + at_state, mask=inside & (before >= 0), other=0.0
        )
    if not HAS_VALUES:
        S = tl.where(vals[:, None] == cols[None, :], 1.0, 0.0).to(ACC)
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
        if OUTPUT:
            to, keep_final = n, inside & (segment >= wholes)
        else:
            to, keep_final = place, inside & (place >= 0)
        tl.store(final + to * HV * K * V + at_state, S, mask=keep_final)


@triton.jit(do_not_specialize=["T", "wholes"])
def reverse_kernel(
    q, k, w, do, table, ends, T_in, P_in, d_final, starts, chunks, offsets, segments, border,
    dv, adjoints, d_initial, T, wholes,
    HV: tl.constexpr, QG: tl.constexpr, KG: tl.constexpr, WG: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, KEY_WRITES: tl.constexpr,
    HAS_FINAL: tl.constexpr, CONTINUES: tl.constexpr, INITIAL: tl.constexpr, STORE: tl.constexpr,
    BORDER: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv, dL/dS after every chunk [NT, HV, V, K] and before the first one [N, HV, K, V].

    With E the adjoint after the chunk: dv = T^T beta (P^T do + w E), E <- e^(G_C) E + (e^G q)^T do
        - (e^G k)^T dv. With a vector decay w reads and ``adjoints`` keeps ``leave`` E, lifted.

    SEGMENT: a program takes one segment of a sequence. Without STORE it keeps its first adjoint
        alone, with the segment before it, in ``d_initial`` [wholes, HV, K, V]: from zero or, of the
        last of a sequence, from ``d_final``.
    CONTINUES: ``starts`` [wholes, HV, K, V] are the adjoints after every segment that is not the
        last of its sequence.
    BORDER: the sequences are pieces of longer ones, and ``starts`` and, without STORE,
        ``d_initial`` have the B rows' ends behind the ``wholes``, see ``locate_border``.
    """
    await_inputs()
    segment, h = tl.program_id(1).to(tl.int64), tl.program_id(2)
    vals = tl.program_id(0) * BV + tl.arange(0, BV)
    n, first, count, before = locate_segment(
        segment, segments, offsets, T, wholes, SEGMENT, VARLEN
    )  # fmt: skip
    step = tl.arange(0, C)
    cols = tl.arange(0, BK)
    keep_k = cols < K
    keep_v = vals < V
    inside = keep_v[:, None] & keep_k[None, :]
    place = segment
    if BORDER:
        before, place = locate_border(segment, n, before, border, wholes, VARLEN)
    E = tl.zeros([BV, BK], dtype=ACC)
    at_state = h * K * V + vals[:, None] + cols[None, :] * V
    last = segment >= wholes
    if HAS_FINAL:
        E = tl.load(d_final + n * HV * K * V + at_state, mask=inside & last, other=0.0).to(ACC)
    if CONTINUES:
        follows = place >= 0 if BORDER else ~last
        E += tl.load(starts + place * HV * K * V + at_state, mask=inside & follows, other=0.0)
    if not STORE:
        count = tl.where(before < 0, 0, count)  # nothing is before the first one
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
        if STORE:
            # a row of the table that stands for no segment (no chunks, not last) writes nothing
            to, keep_initial = n, inside & (before < 0) & (last | (count > 0))
        else:
            to, keep_initial = before, inside & (before >= 0)
        tl.store(d_initial + to * HV * K * V + at_state, E, mask=keep_initial)


@triton.jit
def carried(A, S, HALF: tl.constexpr):
    """A S, of float32."""
    if HALF:  # two bfloat16 numbers each, 16 bits of a mantissa
        A0, S0 = A.to(tl.bfloat16), S.to(tl.bfloat16)
        A1, S1 = (A - A0.to(A.dtype)).to(tl.bfloat16), (S - S0.to(S.dtype)).to(tl.bfloat16)
        return dot(A0, S0, "tf32") + (dot(A0, S1, "tf32") + dot(A1, S0, "tf32"))
    else:
        return dot(A, S, "bf16x6")


@triton.jit(do_not_specialize=["T", "wholes"])
def combine_kernel(
    transitions, parts, initial, offsets, segments, rows, starts, through, T, wholes,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_PARTS: tl.constexpr, HAS_ROWS: tl.constexpr,
    STORE: tl.constexpr, THROUGH: tl.constexpr, REVERSE: tl.constexpr, SEGMENT: tl.constexpr,
    VARLEN: tl.constexpr, ACC: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The state after every segment but the last of its sequence, ``starts`` [wholes, HV, K, V], by
    S <- transition S + part; or, REVERSE, the adjoint there, by E <- (the next segment's
    transition)^T E + part from the last.

    transitions [wholes, HV, K, K]; parts as starts; initial [N, HV, K, V].

    On a piece of longer sequences, all three have the B rows' ends behind the wholes: their last
    segments or, of an adjoint's parts, their first. THROUGH: the state after the last segment, or
    the adjoint before the first, goes to ``through`` [B, HV, K, V]; without HAS_PARTS from the
    identity. HAS_ROWS: of the sequences ``rows`` [B] alone. An initial adjoint is that after the
    last segment.
    """
    await_inputs()
    row, h = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n = tl.load(rows + row) if HAS_ROWS else row
    vals = tl.program_id(0) * BV + tl.arange(0, BV)
    _, first, _, before = locate_segment(
        wholes + n, segments, offsets, T, wholes, SEGMENT, VARLEN
    )  # fmt: skip
    beginning, _ = locate_sequence(n, offsets, T, VARLEN)
    count = (first - beginning) // SEGMENT
    cols = tl.arange(0, BK)
    inside = (cols < K)[:, None] & (vals < V)[None, :]
    square = (cols < K)[:, None] & (cols < K)[None, :]
    tile = cols[:, None] * V + vals[None, :]
    end = (wholes + row) * HV + h
    S = tl.zeros([BK, BV], dtype=ACC)
    if HAS_INITIAL:
        S = tl.load(initial + (row * HV + h) * K * V + tile, mask=inside, other=0.0).to(ACC)
    if not HAS_PARTS:
        S = tl.where(cols[:, None] == vals[None, :], 1.0, 0.0).to(ACC)
    for m in range(0, count):
        if REVERSE:
            i = (before - m) * HV + h
            next = i + HV
            if HAS_INITIAL:
                next = tl.where(m > 0, next, end)
            at = transitions + next * K * K + cols[None, :] * K + cols[:, None]
            A = tl.load(at, mask=square & ((m > 0) | HAS_INITIAL), other=0.0)
        else:
            i = (before + 1 - count + m) * HV + h
            at = transitions + i * K * K + cols[:, None] * K + cols[None, :]
            A = tl.load(at, mask=square, other=0.0)
        S = carried(A, S, HALF)
        if HAS_PARTS:
            S += tl.load(parts + i * K * V + tile, mask=inside, other=0.0)
        if STORE:
            tl.store(starts + i * K * V + tile, S, mask=inside)
    if THROUGH:
        if REVERSE:
            i = (before + 1 - count) * HV + h
            at = transitions + i * K * K + cols[None, :] * K + cols[:, None]
            A = tl.load(at, mask=square & (count > 0), other=0.0)
        else:
            at = transitions + end * K * K + cols[:, None] * K + cols[None, :]
            A = tl.load(at, mask=square, other=0.0)
        S = carried(A, S, HALF)
        if HAS_PARTS:
            S += tl.load(parts + end * K * V + tile, mask=inside, other=0.0)
        tl.store(through + (row * HV + h) * K * V + tile, S, mask=inside)
