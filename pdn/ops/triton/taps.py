"""What both passes of the short convolution do with its taps, and with the rows that they reach.

Letters: as in ``convolution``.
"""

# Triton's types are of a call from Python, which a kernel is none: no return, no iteration.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import INTERPRETED, inverse


@triton.jit
def locate(C: tl.constexpr, BC: tl.constexpr):
    """The program's block of channels and stretch of its sequence, and how many stretches there
    are.
    """
    i = tl.program_id(0)
    return (
        i % ((C + BC - 1) // BC),
        i // ((C + BC - 1) // BC),
        tl.num_programs(0) // ((C + BC - 1) // BC),
    )


@triton.jit
def load_taps(
    weight, cols, C: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr
):
    """W taps [BC] of weight [C, W], whose last column is on the current token. WIDE: W padded to a
    power of two.
    """
    i = tl.arange(0, WIDE)
    table = tl.load(
        weight + cols[:, None] * W + i[None, :],
        mask=(cols < C)[:, None] & (i < W)[None, :],
        other=0.0,
    ).to(ACC)
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.sum(tl.where((i == W - 1 - j)[None, :], table, 0.0), 1),)
    return taps


@triton.jit
def load_rows(x, first, step, end, keep, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows [BC] from token first + step on, zeros outside of [0, end). ``x`` points at token
    ``first``.
    """
    rows = ()
    for u in tl.static_range(COUNT):
        at = first + step + u
        rows = rows + (
            tl.load(x + (step + u) * STRIDE, mask=(at >= 0) & (at < end) & keep, other=0.0),
        )
    return rows


@triton.jit
def load_starts(starts, t, end, COUNT: tl.constexpr, VARLEN: tl.constexpr):
    """Whether documents begin at the COUNT tokens from t on, and whether any does; without
    documents nothing.
    """
    flags = ()
    found = False
    if VARLEN:
        for u in tl.static_range(COUNT):
            at = t + u
            flag = tl.load(starts + at, mask=(at >= 0) & (at < end), other=0) != 0
            flags = flags + (flag,)
            found = found | flag
    return flags, found


@triton.jit
def load_window(
    x,
    before,
    starts,
    first,
    end,
    keep,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    W: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    VARLEN: tl.constexpr,
    ACC: tl.constexpr,
):
    """The W - 1 rows before token ``first``, nearest first, zero in other documents, and the age of
    the token before it: how many tokens of its document come before that, as far as these rows say.
    Those before the sequence are zero or, HAS_BEFORE, at ``before``, where ``x`` points within it.
    """
    rows = load_rows(x, first, 1 - W, end, keep, STRIDE, W - 1)
    if HAS_BEFORE:
        given = ()
        for u in tl.static_range(W - 1):
            outside = keep & (first + (u + 1 - W) < 0)
            given = given + (rows[u] + tl.load(before + u * C, mask=outside, other=0.0),)
        rows = given
    flags, _ = load_starts(starts, first + 1 - W, end, W - 1, VARLEN)
    window = ()
    for _ in tl.static_range(W - 1):
        window = window + (tl.zeros(keep.shape, dtype=ACC),)
    age = tl.full([], -1, tl.int32)
    for j in tl.static_range(W - 1):
        if VARLEN:
            window, age = enter(window, age, flags[j], W)
        window = push(rows[j].to(ACC), window, W)
    return window, age


@triton.jit
def enter(window, age, start, W: tl.constexpr):
    """The rows before the next token, zero if it begins a document, and its age."""
    kept = ()
    for j in tl.static_range(W - 1):
        kept = kept + (tl.where(start, 0.0, window[j]),)
    return kept, tl.where(start, 0, tl.minimum(age + 1, W - 1))


@triton.jit
def push(row, window, W: tl.constexpr):
    """The rows before the token after ``row``."""
    return (row,) + window[: W - 2] if W > 1 else window


@triton.jit
def pre_activation(row, window, taps, b, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    p = row * taps[0]
    if HAS_BIAS:
        p += b
    for j in tl.static_range(W - 1):
        p += window[j] * taps[j + 1]
    return p


@triton.jit
def sigmoid(p):
    """1 / (1 + e^-p); of float32 without the sign's own instruction."""
    if INTERPRETED or p.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-p))
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [p * -1.4426950408889634], tl.float32, True, 1
        )
        return inverse(1.0 + power)
