"""The kernels of ``pdn.ops.decoding``: arguments and results are described there.

Plain launches, which CUDA graphs take as they are. Sums are float32, whatever the inputs.
"""

# Triton's types are of a call from Python, which a kernel is none: no return, no iteration.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdn.ops.triton.common import await_inputs
from pdn.ops.triton.compiled import cdiv, check_device, next_power_of_2, run

BLOCK = 1024  # channels of a product that a program holds at once
AHEAD = 32768  # bytes of weights that a program loads before its input is there
ATTENDED = 64  # tokens of the cache likewise
CHANNELS, UNIT = 1024, 8  # of a program of the convolution; what a thread takes of them, at most
DRAWN = 4096  # tokens of the vocabulary that a program draws from at once
SPLITS = 16  # programs that share one head's tokens, at most


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def load_input(
    x, norm, gate, b, at, inside,
    EPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
    SWIGLU: tl.constexpr,
):  # fmt: skip
    """f(x)[b, at] in float32, but for a factor, which is the second result; a GROUP of 0 does not
    normalise.
    """
    scale = 1.0
    if SWIGLU:
        row = x + b * (2 * D)
        a = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
        value = silu(a) * tl.load(row + D + at, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.load(x + b * D + at, mask=inside, other=0.0).to(tl.float32)
    if GROUP != 0:
        weight = tl.load(norm + at % GROUP, mask=inside, other=0.0).to(tl.float32)
        if GROUP == D:
            scale = 1.0 / tl.sqrt(tl.sum(value * value) / D + EPS)
        else:
            groups = tl.reshape(value, [BD // GROUP, GROUP])
            mean = tl.sum(groups * groups, 1) / GROUP
            groups = groups / tl.sqrt(mean + EPS)[:, None]
            value = tl.reshape(groups, [BD])
        value *= weight
    if GATED:
        value *= tl.load(gate + b * D + at, mask=inside, other=0.0).to(tl.float32)
    return value, scale


@triton.jit
def load_weights(weight, n, live, i: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Block i of the columns of rows n."""
    at = i * BD + tl.arange(0, BD)
    tile = n.to(tl.int64)[:, None] * D + at[None, :]
    return tl.load(weight + tile, mask=live[:, None] & (at < D)[None, :], other=0.0)


@triton.jit
def project_kernel(
    x, weight, norm, gate, y, N,
    EPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr,
    SWIGLU: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (B, blocks of N): the sequences of a block of weights run side by side, and share its
    load.

    The first EARLY blocks of weights are loaded while the launch before still runs.
    """
    b, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    live = n < N
    blocks: tl.constexpr = (D + BD - 1) // BD
    early: tl.constexpr = EARLY if blocks > EARLY else blocks
    tiles = ()
    for i in tl.static_range(early):
        tiles = tiles + (load_weights(weight, n, live, i, D, BD),)
    await_inputs()
    for i in tl.static_range(blocks):
        w = tiles[i] if i < early else load_weights(weight, n, live, i, D, BD)
        at = i * BD + tl.arange(0, BD)
        inside = at < D
        value, scale = load_input(x, norm, gate, b, at, inside, EPS, D, BD, GROUP, GATED, SWIGLU)
        product = w.to(tl.float32) * value[None, :]
        if i == 0:
            products = product
        else:
            products += product
    total = tl.sum(products, 1) * scale
    if ADD:
        total += tl.load(y + b * N + n, mask=live, other=0.0).to(tl.float32)
    tl.store(y + b * N + n, total.to(y.dtype.element_ty), mask=live)


def project(x, weight, *, norm, eps, gate, swiglu, into) -> Tensor:
    """See ``pdn.ops.decoding.project``."""
    batch, (N, D) = x.shape[0], weight.shape
    group, block = _groups(D, norm)
    y = x.new_empty(batch, N) if into is None else into
    rows = max(1, (4 if N < 2048 else 8 if N < 16384 else 16) * BLOCK // max(block, BLOCK))
    check_device(x, weight, norm, gate, y)
    run(project_kernel, (batch, cdiv(N, rows)),
        x.contiguous(), weight, norm, None if gate is None else gate.contiguous(), y, N,
        EPS=eps, D=D, BD=block, BN=rows, GROUP=group, GATED=gate is not None, SWIGLU=swiglu,
        ADD=into is not None, EARLY=max(1, AHEAD // (rows * block * weight.itemsize)), num_warps=4,
    )  # fmt: skip
    return y


def _groups(D: int, norm: Tensor | None) -> tuple[int, int]:
    """Return the channels that are normalised together, 0 for none, and those of a block.

    Raises:
        ValueError: groups that a block cannot be cut into.
    """
    group, whole = 0 if norm is None else norm.shape[0], next_power_of_2(D)
    block = whole if group == D else min(BLOCK, whole)
    if group not in (0, D) and (group & (group - 1) or block % group):
        raise ValueError(f"norm [{group}]: expected a power of two that divides {block}, or [{D}]")
    return group, block


@triton.jit
def prepare_kernel(
    x, norm, gate, y,
    EPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
    SWIGLU: tl.constexpr,
):  # fmt: skip
    """Grid (B, blocks of D)."""
    await_inputs()
    b, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    inside = at < D
    value, scale = load_input(x, norm, gate, b, at, inside, EPS, D, BD, GROUP, GATED, SWIGLU)
    tl.store(y + b * D + at, (value * scale).to(y.dtype.element_ty), mask=inside)


def prepare(x, *, norm, eps, gate, swiglu) -> Tensor:
    """See ``pdn.ops.decoding.prepare``."""
    batch, D = x.shape[0], x.shape[1] // (2 if swiglu else 1)
    group, block = _groups(D, norm)
    y = x.new_empty(batch, D)
    check_device(x, norm, gate)
    run(prepare_kernel, (batch, cdiv(D, block)),
        x.contiguous(), norm, None if gate is None else gate.contiguous(), y,
        EPS=eps, D=D, BD=block, GROUP=group, GATED=gate is not None, SWIGLU=swiglu,
        num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip
    return y


@triton.jit
def convolve_kernel(
    x, weight, state, starts, sizes, y, B, TOTAL,
    C: tl.constexpr, W: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Grid (B, blocks of UNITS times UNIT channels). A block writes the states of its own channels
    only.

    weight [W, C], starts, sizes: of ``_layout``.
    """
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    start = tl.load(starts + unit, mask=unit * UNIT < TOTAL, other=0)
    size = tl.load(sizes + unit, mask=unit * UNIT < TOTAL, other=0)
    start, size = tl.multiple_of(start, UNIT), tl.multiple_of(size, UNIT)
    c = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    live, convolved = (unit * UNIT < TOTAL)[:, None], (unit * UNIT < C)[:, None]
    kept = state + b * ((W - 1) * C) + c
    # All rows are loaded before any is stored: the compiler moves no load over a store that might
    # be to the same place, so that each would wait until the one before had come from memory.
    taps, pasts = (), ()
    for lag in tl.static_range(1, W):
        pasts = pasts + (tl.load(kept + (W - 1 - lag) * C, mask=convolved, other=0.0),)
    for lag in tl.static_range(W):
        tap = tl.load(weight + (W - 1 - lag) * C + c, mask=convolved, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    await_inputs()
    raw = tl.load(x + b * TOTAL + c, mask=live, other=0.0)
    total = raw.to(tl.float32) * taps[0]
    newer = raw
    for lag in tl.static_range(1, W):
        total += pasts[lag - 1].to(tl.float32) * taps[lag]  # pyright: ignore[reportAttributeAccessIssue]
        tl.store(kept + (W - 1 - lag) * C, newer.to(state.dtype.element_ty), mask=convolved)
        newer = pasts[lag - 1]
    result = tl.where(convolved, silu(total), raw.to(tl.float32))
    row = y + start.to(tl.int64) * B + b * size + (unit * UNIT - start)
    target = row[:, None] + tl.arange(0, UNIT)[None, :]
    tl.store(target, result.to(y.dtype.element_ty), mask=live)


@functools.cache
def _layout(sizes: tuple[int, ...], unit: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every ``unit`` channels, int32: where their part starts, and how many channels it has."""
    with torch.inference_mode(False):
        each = torch.tensor(sizes, dtype=torch.int32)
        starts = (each.cumsum(0) - each).to(torch.int32)
        count = each // unit
        widths = each.repeat_interleave(count)
        return starts.repeat_interleave(count).to(device), widths.to(device)


def split_and_convolve(
    x: Tensor, weight: Tensor, state: Tensor, sizes: Sequence[int]
) -> list[Tensor]:
    """See ``pdn.ops.decoding.split_and_convolve``."""
    (batch, total), (C, W) = x.shape, weight.shape
    unit = min(UNIT, math.gcd(*sizes, UNIT))
    starts, widths = _layout(tuple(sizes), unit, x.device)
    y = x.new_empty(batch * total)
    check_device(x, weight, state)
    run(convolve_kernel, (batch, cdiv(total, CHANNELS)),
        x.contiguous(), weight.mT.contiguous(), state, starts, widths, y, batch, total,
        C=C, W=W, UNIT=unit, UNITS=CHANNELS // unit, num_warps=CHANNELS // 256,
    )  # fmt: skip
    return [part.view(batch, -1) for part in y.split([batch * size for size in sizes])]


@triton.jit
def rotate_kernel(
    qkv, keys, values, position, table, q, L,
    H: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Grid (B, H + 2 HKV): rotate queries and keys, write keys and values into the cache."""
    await_inputs()
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = tl.arange(0, HALF)
    inside = j < K // 2
    at = tl.load(position + b)
    row = qkv + b * ((H + 2 * HKV) * K) + h * K + j
    x = tl.load(row, mask=inside, other=0.0).to(table.dtype.element_ty)
    y = tl.load(row + K // 2, mask=inside, other=0.0).to(table.dtype.element_ty)
    if h < H + HKV:
        cos = tl.load(table + at * K + j, mask=inside, other=0.0)
        sin = tl.load(table + at * K + K // 2 + j, mask=inside, other=0.0)
        first, second = x * cos - y * sin, y * cos + x * sin
    else:
        first, second = x, y
    if h < H:
        target = q + (b * H + h) * K + j
    elif h < H + HKV:
        target = keys + ((b * HKV + h - H) * L + at) * K + j
    else:
        target = values + ((b * HKV + h - H - HKV) * L + at) * K + j
    tl.store(target, first.to(q.dtype.element_ty), mask=inside)
    tl.store(target + K // 2, second.to(q.dtype.element_ty), mask=inside)


@triton.jit
def attend_kernel(
    q, keys, values, position, partial, weights, L,
    H: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr,
    SPLITS: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid (SPLITS, H, B): one of the SPLITS shares of a head's tokens, by a running softmax.

    partial [B, H, SPLITS, K]: the share's weighted mean times the sum of its weights.
    weights [B, H, SPLITS, 2]: the largest score and the sum of exp(score - largest).
    """
    await_inputs()
    split, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    j, inside = tl.arange(0, BK), tl.arange(0, BK) < K
    length = tl.load(position + b) + 1
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(length - begin, SPLITS), BL) * BL
    query = tl.load(q + (b * H + h) * K + j, mask=inside, other=0.0).to(tl.float32) * SCALE
    base = (b * HKV + h // (H // HKV)) * L
    largest, total = tl.full([], -1e30, tl.float32), tl.full([], 0.0, tl.float32)
    mean = tl.zeros([BK], tl.float32)
    end = tl.minimum(begin + (split + 1) * share, length)
    for first in range(begin + split * share, end, BL):
        t = first + tl.arange(0, BL)
        seen = t < length
        tile = (base + t)[:, None] * K + j[None, :]
        mask = seen[:, None] & inside[None, :]
        k = tl.load(keys + tile, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + tile, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(k * query[None, :], 1), -1e30)
        new = tl.maximum(largest, tl.max(score))
        shrink, p = tl.exp(largest - new), tl.exp(score - new)
        total = total * shrink + tl.sum(p)
        mean = mean * shrink + tl.sum(p[:, None] * v, 0)
        largest = new
    slot = (b * H + h) * SPLITS + split
    tl.store(partial + slot * K + j, mean, mask=inside)
    tl.store(weights + slot * 2, largest)
    tl.store(weights + slot * 2 + 1, total)


@triton.jit
def join_kernel(partial, weights, o, K: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr):
    """Grid (H, B): the shares of a head as one softmax."""
    await_inputs()
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    s, j = tl.arange(0, SPLITS), tl.arange(0, BK)
    inside = j < K
    largest = tl.load(weights + (row * SPLITS + s) * 2)
    factor = tl.exp(largest - tl.max(largest))
    total = tl.sum(factor * tl.load(weights + (row * SPLITS + s) * 2 + 1))
    tile = (row * SPLITS + s)[:, None] * K + j[None, :]
    mean = tl.load(partial + tile, mask=inside[None, :], other=0.0)
    result = tl.sum(mean * factor[:, None], 0) / total
    tl.store(o + row * K + j, result.to(o.dtype.element_ty), mask=inside)


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    table: Tensor,
    *,
    heads: int,
    window: int,
) -> Tensor:
    """See ``pdn.ops.decoding.attend``."""
    batch, kv_heads, length, size = keys.shape
    q, o = qkv.new_empty(batch, heads, size), qkv.new_empty(batch, heads * size)
    splits = max(1, min(SPLITS, next_power_of_2(512 // (batch * heads))))
    partial = qkv.new_empty(batch, heads, splits, size, dtype=torch.float32)
    weights = qkv.new_empty(batch, heads, splits, 2, dtype=torch.float32)
    padded = max(16, next_power_of_2(size))
    check_device(qkv, keys, values, position, table)
    run(rotate_kernel, (batch, heads + 2 * kv_heads),
        qkv.contiguous(), keys, values, position, table, q, length,
        H=heads, HKV=kv_heads, K=size, HALF=next_power_of_2(size // 2), num_warps=1,
    )  # fmt: skip
    run(attend_kernel, (splits, heads, batch), q, keys, values, position, partial, weights, length,
        H=heads, HKV=kv_heads, K=size, BK=padded, BL=ATTENDED, SPLITS=splits, SCALE=size**-0.5,
        WINDOW=window, num_warps=4,
    )  # fmt: skip
    run(
        join_kernel,
        (heads, batch),
        partial,
        weights,
        o,
        K=size,
        BK=padded,
        SPLITS=splits,
        num_warps=1,
    )
    return o


@triton.jit
def load_logits(logits, first, VOCAB: tl.constexpr, BV: tl.constexpr):
    """Logits from token ``first`` on in float32, -inf beyond the vocabulary."""
    at = first + tl.arange(0, BV)
    return tl.load(logits + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)


@triton.jit
def in_order(x, SHIFT: tl.constexpr):
    """Integers in the order of float32 x, whose last SHIFT bits are zero."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def weigh(x, largest, lowest, RATE: tl.constexpr):
    """exp((x - largest) * RATE) in float64 from distances in float32; zero for an x whose distance
    is above that of ``lowest``.
    """
    distance = (largest - x) * RATE
    limit = (largest - lowest) * RATE
    return tl.where(distance <= limit, tl.exp(-distance.to(tl.float64)), 0.0)


@triton.jit
def draw_kernel(
    logits, uniform, token,
    RATE: tl.constexpr, TOP_K: tl.constexpr, VOCAB: tl.constexpr, BV: tl.constexpr,
    BLOCKS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Grid (B). BLOCKS: no fewer than those of BV tokens; TOP_K = 0 keeps all; SHIFT: see above."""
    await_inputs()
    b = tl.program_id(0).to(tl.int64)
    logits += b * VOCAB
    top = tl.full([BV], float("-inf"), tl.float32)
    for first in range(0, VOCAB, BV):
        top = tl.maximum(top, load_logits(logits, first, VOCAB, BV))
    largest = tl.max(top)
    lowest = tl.full([], float("-inf"), tl.float32)
    if TOP_K != 0:
        # The TOP_K-th in order, by bisection; or any that exactly TOP_K are not below.
        low, high = in_order(lowest, SHIFT), in_order(largest, SHIFT)
        while low < high:
            middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up
            above = tl.zeros([BV], tl.int32)
            for first in range(0, VOCAB, BV):
                x = load_logits(logits, first, VOCAB, BV)
                above += (in_order(x, SHIFT) >= middle).to(tl.int32)
            count = tl.sum(above)
            low = tl.where(count < TOP_K, low, middle)
            high = tl.where(count < TOP_K, middle - 1, tl.where(count == TOP_K, middle, high))
        bottom = tl.full([BV], float("inf"), tl.float32)
        for first in range(0, VOCAB, BV):
            x = load_logits(logits, first, VOCAB, BV)
            bottom = tl.where(in_order(x, SHIFT) >= low, tl.minimum(bottom, x), bottom)
        lowest = tl.min(bottom)
    block = tl.arange(0, BLOCKS)
    sums = tl.zeros([BLOCKS], tl.float64)  # of all tokens up to a block's end
    for first in range(0, VOCAB, BV):
        weight = weigh(load_logits(logits, first, VOCAB, BV), largest, lowest, RATE)
        sums += tl.where(block >= first // BV, tl.sum(weight), 0.0)
    target = tl.load(uniform + b) * tl.max(sums)
    chosen = tl.minimum(tl.sum((sums <= target).to(tl.int32)), (VOCAB - 1) // BV)
    before = tl.sum(tl.where(block == chosen - 1, sums, 0.0))
    weight = weigh(load_logits(logits, chosen * BV, VOCAB, BV), largest, lowest, RATE)
    passed = tl.sum((before + tl.cumsum(weight, 0) <= target).to(tl.int32))
    # Two ways of adding up the block may differ in the last bit: what is not kept is never taken.
    last = tl.max(tl.where(weight > 0, tl.arange(0, BV), 0))
    tl.store(token + b, (chosen * BV + tl.minimum(passed, last)).to(tl.int64))


def draw(logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int | None) -> Tensor:
    """See ``pdn.ops.decoding.draw``."""
    batch, vocabulary = logits.shape
    token = uniform.new_empty(batch, dtype=torch.int64)
    # On a GPU torch multiplies by the reciprocal in float32, too: so tokens are those of both.
    rate = float(torch.tensor(temperature, dtype=torch.float32, device="cpu").reciprocal())
    check_device(logits, uniform)
    run(draw_kernel, (batch,), logits.contiguous(), uniform.contiguous(), token,
        RATE=rate, TOP_K=0 if top_k is None or top_k >= vocabulary else top_k,
        VOCAB=vocabulary, BV=DRAWN, BLOCKS=next_power_of_2(cdiv(vocabulary, DRAWN)),
        SHIFT={torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0), num_warps=16,
    )  # fmt: skip
    return token
