"""What every kernel of the family uses: where a chunk lies, one matrix product, decays, elementary
functions.

Letters: C = 64 tokens a chunk, K key size, V value size, H key heads, HV value heads, M = B * T
    tokens on one axis, N sequences (B, or the documents of ``cu_seqlens``), NT chunks of all
    sequences together.
"""

# Triton's types are of a call from Python, which a kernel is none: no return, no iteration.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

CHUNK = 64
C = tl.constexpr(CHUNK)
MIN_LOG_DECAY = tl.constexpr(
    -30.0
)  # exp(-30) = 1e-13: keeps a cumulative sum precise next to a token that erases
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# How a [NT, HV, ROWS, C] table of per-token scalars is laid out; chunk-major, so that a row is one
# contiguous load.
READ_Q = tl.constexpr(0)  # of q S0: the norm and scale of q, and e^G; one with a vector decay
READ_K = tl.constexpr(1)  # of k S0: the norm of k, and e^G likewise
WRITE_K = tl.constexpr(
    2
)  # of the write key into the chunk's last state: the norm of k, and e^(G_C - G) likewise
BETA = tl.constexpr(3)
DECAY_SUM = tl.constexpr(4)  # G
NORM_Q = tl.constexpr(5)  # scale * rsqrt(|q|^2 + 1e-6)
NORM_K = tl.constexpr(6)
NUM_ROWS = 7
ROWS = tl.constexpr(NUM_ROWS)

# DECAY
NO_DECAY = tl.constexpr(0)
SCALAR = tl.constexpr(1)
VECTOR = tl.constexpr(2)
# WRITE: what the write key is
FROM_KEY = tl.constexpr(0)  # the key
FROM_TENSOR = tl.constexpr(1)  # its own tensor, taken as it is
RESCALED_KEY = tl.constexpr(
    2
)  # the preconditioner's B times the raw key; the key's norm is its factor
RESCALED_QUERY = tl.constexpr(3)  # the key, and the query is B times the raw query


@triton.jit
def await_inputs():
    """Wait for the launch before, whose last programs may still run, and let the next one take what
    they leave free.

    Every kernel begins with this, before it writes anything or reads what that launch may write:
    ``compiled.run`` launches all of them so that they may start early where the device has that
    (compute capability 9.0). Those of a decoding step read weights and states before.
    """
    if not INTERPRETED:  # noqa: SIM102 (the interpreter has no target to ask for)
        if cuda_capability_geq(9, 0):
            gdc_wait()
            gdc_launch_dependents()


@triton.jit
def exp(x):
    """e^x; of float32 without the care for results below the normal numbers, which become zero."""
    if INTERPRETED or x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x *= 1.4426950408889634
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )


@triton.jit
def log(x):
    """log(x) of a normal number; of float32 in three instructions, precise to 1.2e-7 where it is
    small, else relatively.
    """
    if INTERPRETED or x.dtype == tl.float64:
        return tl.log(x)
    else:
        return 0.6931471805599453 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )


@triton.jit
def inverse(x):
    """1 / x to an ulp; of float32 without what division does for the ends of its range."""
    if INTERPRETED or x.dtype == tl.float64:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in the accumulation dtype. ``PRECISION`` of float32 operands: "tf32", or "bf16x6",
    which loses nothing.
    """
    if a.dtype == tl.float64:
        return tl.dot(a, b, out_dtype=tl.float64)
    elif INTERPRETED:  # the interpreter's product of 16-bit operands is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif PRECISION == "bf16x6":
        a0, a1, a2 = in_three(a)
        b0, b1, b2 = in_three(b)
        small = tl.dot(a2, b0, tl.dot(a1, b1, tl.dot(a0, b2)))
        return tl.dot(a0, b0, tl.dot(a1, b0, tl.dot(a0, b1, small)))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def in_three(x):
    """A float32 x as the sum of three bfloat16."""
    x0 = x.to(tl.bfloat16)
    rest = x - x0.to(tl.float32)
    x1 = rest.to(tl.bfloat16)
    return x0, x1, (rest - x1.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def locate_chunk(i, chunks, T, VARLEN: tl.constexpr):
    """First token of chunk i and the one after its last, on the flattened axis; an unused slot is
    empty.
    """
    if VARLEN:
        start = tl.load(chunks + 2 * i)
        end = tl.load(chunks + 2 * i + 1)
    else:
        count = (T + C - 1) // C
        n = i // count
        start = n * T + (i - n * count) * C
        end = tl.minimum(start + C, (n + 1) * T)
    return start, end


@triton.jit
def locate_sequence(n, offsets, T, VARLEN: tl.constexpr):
    """First chunk of sequence n, and how many it has."""
    if VARLEN:
        first = tl.load(offsets + n)
        count = tl.load(offsets + n + 1) - first
    else:
        count = (T + C - 1) // C
        first = n * count
    return first, count


@triton.jit
def locate_segment(
    i, segments, offsets, T, wholes, SEGMENT: tl.constexpr, VARLEN: tl.constexpr
):  # fmt: skip
    """Segment i of sequences that are cut every SEGMENT chunks: the first ``wholes`` have another
    after them in their sequence, and then comes the last one of every sequence. SEGMENT = 0:
    segment i is sequence i.

    segments: [wholes + N, 4] int32 with VARLEN, see ``documents.py``.

    Returns:
        The segment's sequence, its first chunk, its number of chunks, and which segment is before
        it; -1 for none.
    """
    if SEGMENT == 0:
        first, count = locate_sequence(i, offsets, T, VARLEN)
        n = i
        before = tl.full([], -1, tl.int64)
    elif VARLEN:
        n = tl.load(segments + 4 * i).to(tl.int64)
        first = tl.load(segments + 4 * i + 1)
        count = tl.load(segments + 4 * i + 2)
        before = tl.load(segments + 4 * i + 3).to(tl.int64)
    else:
        chunks = (T + C - 1) // C
        rest = (chunks + SEGMENT - 1) // SEGMENT - 1
        last = i >= wholes
        n = tl.where(last, i - wholes, i // rest)
        m = tl.where(last, rest, i % rest)
        first = n * chunks + m * SEGMENT
        count = tl.minimum(chunks - m * SEGMENT, SEGMENT)
        before = tl.where(m > 0, n * rest + m - 1, -1)
    return n, first, count, before


@triton.jit
def locate_border(segment, n, before, border, wholes, VARLEN: tl.constexpr):
    """Of a segment of pieces of sequences: where what was before it is, and where what is after it
    goes, among the ``wholes`` segments and, behind them, the ends of the B rows; -1 for none.

    n, before: of ``locate_segment``.  border: [wholes + N, 2] int32 with VARLEN, see borders.py.
    """
    if VARLEN:
        before = tl.load(border + 2 * segment).to(tl.int64)
        place = tl.load(border + 2 * segment + 1).to(tl.int64)
    else:
        before = tl.where(before < 0, wholes + n, before)
        place = segment
    return before, place


@triton.jit
def inverse_root(x):
    """rsqrt(x + 1e-6)."""
    return 1.0 / tl.sqrt(x + 1e-6)


@triton.jit
def inverse_norm(x, ACC: tl.constexpr, L2NORM: tl.constexpr):
    """[C] of x [C, K]: rsqrt(|x|^2 + 1e-6), or one."""
    if L2NORM:
        x = x.to(ACC)
        return inverse_root(tl.sum(x * x, 1))
    else:
        return tl.full([x.shape[0]], 1.0, ACC)


@triton.jit
def decay_below(G, ACC: tl.constexpr):
    """[C, C]: e^(G_i - G_j) for i >= j, else 0; masked before exp, so that nothing overflows."""
    i = tl.arange(0, C)
    return exp(tl.where(i[:, None] >= i[None, :], G[:, None] - G[None, :], float("-inf")))


@triton.jit
def last_of(G):
    """G[C - 1] of [C]."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, G, 0.0), 0)
