"""What every kernel of the family uses: where a chunk lies, one matrix product, the preconditioner's diagonal.

Letters: C = 64 tokens a chunk, K key size, V value size, H key heads, HV value heads, M = B * T tokens on one axis,
N sequences (B, or the documents of ``cu_seqlens``), NT chunks of all sequences together.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

CHUNK = 64
C = tl.constexpr(CHUNK)
MIN_LOG_DECAY = tl.constexpr(-30.0)  # exp(-30) = 1e-13: keeps a cumulative sum precise next to a token that erases
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# How a [NT, HV, ROWS, C] table of per-token scalars is laid out; chunk-major, so that a row is one contiguous load.
READ_Q = tl.constexpr(0)  # of q S0: e^G times the norm and scale of q
READ_K = tl.constexpr(1)  # of k S0: e^G times the norm of k
WRITE_K = tl.constexpr(2)  # of the write key into the chunk's last state: e^(G_C - G), times the norm of k
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
RESCALED_KEY = tl.constexpr(2)  # the preconditioner's B times the raw key; the key's norm is its factor
RESCALED_QUERY = tl.constexpr(3)  # the key, and the query is B times the raw query


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in the accumulation dtype. ``PRECISION`` says how float32 operands are multiplied."""
    if a.dtype == tl.float64:
        return tl.dot(a, b, out_dtype=tl.float64)
    if INTERPRETED:  # the interpreter's product of 16-bit operands is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def locate_chunk(i, chunks, T, VARLEN: tl.constexpr):
    """First token of chunk i and the one after its last, on the flattened axis; an unused slot is empty."""
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
def locate_sequence(n, offsets, T, SEGMENT: tl.constexpr, VARLEN: tl.constexpr):
    """First chunk of sequence n, and how many it has; or, with sequences cut every SEGMENT chunks, of segment n."""
    if VARLEN:
        first = tl.load(offsets + n)
        count = tl.load(offsets + n + 1) - first
    else:
        count = (T + C - 1) // C
        if SEGMENT > 0:
            segments = (count + SEGMENT - 1) // SEGMENT
            sequence = n // segments
            before = (n - sequence * segments) * SEGMENT
            first = sequence * count + before
            count = tl.minimum(count - before, SEGMENT)
        else:
            first = n * count
    return first, count


@triton.jit
def inverse_norm(x, ACC: tl.constexpr, L2NORM: tl.constexpr):
    """[C] of x [C, K]: rsqrt(|x|^2 + 1e-6), or one."""
    if L2NORM:
        x = x.to(ACC)
        return 1.0 / tl.sqrt(tl.sum(x * x, 1) + 1e-6)
    else:
        return tl.full([x.shape[0]], 1.0, ACC)


@triton.jit
def decay_below(G, ACC: tl.constexpr):
    """[C, C]: e^(G_i - G_j) for i >= j, else 0; masked before exp, so that nothing overflows."""
    i = tl.arange(0, C)
    return tl.exp(tl.where(i[:, None] >= i[None, :], G[:, None] - G[None, :], float("-inf")))


@triton.jit
def decay_above(G, ACC: tl.constexpr):
    """The transpose of ``decay_below``: [j, i] with e^(G_i - G_j) for i >= j."""
    i = tl.arange(0, C)
    return tl.exp(tl.where(i[:, None] <= i[None, :], G[None, :] - G[:, None], float("-inf")))


@triton.jit
def last_of(G):
    """G[C - 1] of [C]."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, G, 0.0), 0)


@triton.jit
def diagonal(A, mu, INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr):
    """The preconditioner's B [C, K] of A [C, K]."""
    if INVERSE:
        return 1.0 / (A + EPS)
    else:
        r = tl.log(A + EPS) - mu
        return tl.exp(-LOG_BOUND * r / (1.0 + tl.abs(r)))


@triton.jit
def diagonal_slope(A, B, mu, INVERSE: tl.constexpr, LOG_BOUND: tl.constexpr, EPS: tl.constexpr):
    """dB/dr [C, K] with r = log(A + eps) - mu; dB/dA = dB/dr / (A + eps) and dB/dmu = -dB/dr."""
    if INVERSE:
        return -B
    else:
        s = 1.0 + tl.abs(tl.log(A + EPS) - mu)
        return -LOG_BOUND * B / (s * s)
