"""The kernels of ``pdn.ops.decoding``: arguments and results are described there.

Plain launches, which CUDA graphs take as they are. Sums are float32, whatever the inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdn.ops.triton.common import await_inputs
from pdn.ops.triton.compiled import cdiv, check_device, next_power_of_2, run

BLOCK = 1024  # channels of a product that a program holds at once
ATTENDED = 64  # tokens of the cache likewise
MANY, ROWS = 64, 4  # from so many sequences, a program of the convolution takes so many of them
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
    """f(x)[b, at] in float32; a GROUP of 0 does not normalise."""
    if SWIGLU:
        row = x + b * (2 * D)
        a = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
        value = silu(a) * tl.load(row + D + at, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.load(x + b * D + at, mask=inside, other=0.0).to(tl.float32)
    if GROUP != 0:
        weight = tl.load(norm + at % GROUP, mask=inside, other=0.0).to(tl.float32)
        if GROUP == D:
            mean = tl.sum(value * value) / D
            value = value / tl.sqrt(mean + EPS) * weight
        else:
            groups = tl.reshape(value, [BD // GROUP, GROUP])
            mean = tl.sum(groups * groups, 1) / GROUP
            groups = groups / tl.sqrt(mean + EPS)[:, None]
            value = tl.reshape(groups, [BD]) * weight
    if GATED:
        value *= tl.load(gate + b * D + at, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def project_kernel(
    x, weight, norm, gate, y, N,
    EPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr,
    SWIGLU: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Grid (B, blocks of N): the sequences of a block of weights run side by side, and share its
    load.
    """
    await_inputs()
    b, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    live = n < N
    total = tl.zeros([BN], tl.float32)
    for first in tl.static_range(0, D, BD):
        at = first + tl.arange(0, BD)
        inside = at < D
        tile = n.to(tl.int64)[:, None] * D + at[None, :]
        w = tl.load(weight + tile, mask=live[:, None] & inside[None, :], other=0.0)
        value = load_input(x, norm, gate, b, at, inside, EPS, D, BD, GROUP, GATED, SWIGLU)
        total += tl.sum(w.to(tl.float32) * value[None, :], 1)
    if ADD:
        total += tl.load(y + b * N + n, mask=live, other=0.0).to(tl.float32)
    tl.store(y + b * N + n, total.to(y.dtype.element_ty), mask=live)


def project(x, weight, *, norm, eps, gate, swiglu, into) -> Tensor:
    """See ``pdn.ops.decoding.project``.

    Raises:
        ValueError: groups that the kernel cannot cut its block of channels into.
    """
    batch, (N, D) = x.shape[0], weight.shape
    group = 0 if norm is None else norm.shape[0]
    whole = next_power_of_2(D)
    block = whole if group == D else min(BLOCK, whole)
    if group not in (0, D) and (group & (group - 1) or block % group):
        raise ValueError(f"norm [{group}]: expected a power of two that divides {block}, or [{D}]")
    y = x.new_empty(batch, N) if into is None else into
    rows = (4 if N < 2048 else 8 if N < 16384 else 16) * BLOCK // max(block, BLOCK)
    check_device(x, weight, norm, gate, y)
    run(project_kernel, (batch, cdiv(N, max(rows, 1))),
        x.contiguous(), weight, norm, None if gate is None else gate.contiguous(), y, N,
        EPS=eps, D=D, BD=block, BN=max(rows, 1), GROUP=group, GATED=gate is not None, SWIGLU=swiglu,
        ADD=into is not None, num_warps=4,
    )  # fmt: skip
    return y


@triton.jit
def swiglu_kernel(x, y, D: tl.constexpr, BD: tl.constexpr):
    """Grid (B, blocks of D)."""
    await_inputs()
    b, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    inside = at < D
    a = tl.load(x + b * (2 * D) + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + b * (2 * D) + D + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + b * D + at, (silu(a) * value).to(y.dtype.element_ty), mask=inside)


def multiply_swiglu(x: Tensor) -> Tensor:
    """See ``pdn.ops.decoding.multiply_swiglu``."""
    batch, D = x.shape[0], x.shape[1] // 2
    y = x.new_empty(batch, D)
    check_device(x)
    run(swiglu_kernel, (batch, cdiv(D, 512)), x.contiguous(), y, D=D, BD=512, num_warps=2)
    return y


@triton.jit
def convolve_kernel(
    x, weight, state, starts, sizes, y, B, TOTAL,
    C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS sequences, blocks of channels). A block writes the states of its own
    channels only.
    """
    await_inputs()
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    live, convolved = c < TOTAL, c < C
    start, size = tl.load(starts + c, mask=live, other=0), tl.load(sizes + c, mask=live, other=0)
    last = tl.load(weight + c * W + (W - 1), mask=convolved, other=0.0).to(tl.float32)
    target = start.to(tl.int64) * B + (c - start)
    for r in tl.static_range(ROWS):
        b = tl.program_id(0).to(tl.int64) * ROWS + r
        there, kept_there = live & (b < B), convolved & (b < B)
        raw = tl.load(x + b * TOTAL + c, mask=there, other=0.0)
        total = raw.to(tl.float32) * last
        kept = state + b * ((W - 1) * C) + c
        newer = raw
        for lag in tl.static_range(1, W):
            past = tl.load(kept + (W - 1 - lag) * C, mask=kept_there, other=0.0)
            tap = tl.load(weight + c * W + (W - 1 - lag), mask=convolved, other=0.0)
            total += past.to(tl.float32) * tap.to(tl.float32)
            tl.store(kept + (W - 1 - lag) * C, newer.to(state.dtype.element_ty), mask=kept_there)
            newer = past
        result = tl.where(convolved, silu(total), raw.to(tl.float32))
        tl.store(y + target + b * size, result.to(y.dtype.element_ty), mask=there)


@functools.cache
def _layout(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every channel, int32: where its part starts, and how many channels the part has."""
    with torch.inference_mode(False):
        each = torch.tensor(sizes, dtype=torch.int32)
        starts = (each.cumsum(0) - each).to(torch.int32)
        widths = each.repeat_interleave(each)
        return starts.repeat_interleave(each).to(device), widths.to(device)


def split_and_convolve(
    x: Tensor, weight: Tensor, state: Tensor, sizes: Sequence[int]
) -> list[Tensor]:
    """See ``pdn.ops.decoding.split_and_convolve``."""
    (batch, total), (C, W) = x.shape, weight.shape
    starts, widths = _layout(tuple(sizes), x.device)
    y = x.new_empty(batch * total)
    check_device(x, weight, state)
    rows = ROWS if batch >= MANY else 1
    run(convolve_kernel, (cdiv(batch, rows), cdiv(total, 256)),
        x.contiguous(), weight, state, starts, widths, y, batch, total,
        C=C, W=W, BC=256, ROWS=rows, num_warps=2,
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
