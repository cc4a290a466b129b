"""The short convolution: depthwise and causal over time, then SiLU, forward and backward, each in
one pass over memory.

A program owns some channels and walks a stretch of BT tokens with the last W - 1 rows in registers:
x is read once, and a sum over taps never leaves a register. Many programs a multiprocessor hide
each other's loads. Backward recomputes the pre-activation p; with d_t = dL/dp_t a token adds to the
gradients of what it read::

    dx_{t-j} += w_j d_t      dw_j += x_{t-j} d_t        j = 0 ... W - 1, within the document

so the gradients of the last W - 1 inputs wait in registers, too, and a stretch reads W - 1 rows
beyond its end.

Letters: B batch, T time, C channels, W width, M = B * T tokens. Tap j is on the token j before.
"""

# Triton's types are of a call from Python, which a kernel is none: no return, no iteration.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pdn.ops.checks import check_first_derivative
from pdn.ops.triton.common import await_inputs
from pdn.ops.triton.compiled import cdiv, check_device, next_power_of_2, run
from pdn.ops.triton.sums import sum_rows
from pdn.ops.triton.taps import (
    enter,
    load_rows,
    load_starts,
    load_taps,
    load_window,
    locate,
    pre_activation,
    push,
    sigmoid,
)
from pdn.ops.types import accumulation_dtype

# BC channels and BT tokens a program; a lane of a warp has BC / 32 / num_warps channels. The rows
# of UNROLL tokens are fetched together, backward while those before them are computed. The
# registers: for 16 programs a multiprocessor.
FORWARD = dict(BC=128, BT=64, UNROLL=4, num_warps=1)
BACKWARD = dict(BC=128, BT=128, UNROLL=4, num_warps=1, maxnreg=128)


@triton.jit
def forward_block(
    y, rows, window, age, flags, taps, b, t, end, keep, C: tl.constexpr, W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    VARLEN: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """COUNT tokens from t on, where ``y`` points. Returns the window and the age for the next
    block.
    """
    for u in tl.static_range(COUNT):
        if VARLEN:
            window, age = enter(window, age, flags[u], W)
        row = rows[u].to(ACC)
        p = pre_activation(row, window, taps, b, W, HAS_BIAS)
        tl.store(y + u * C, (p * sigmoid(p)).to(y.dtype.element_ty), mask=(t + u < end) & keep)
        window = push(row, window, W)
    return window, age


@triton.jit(do_not_specialize=["T"])
def convolution_kernel(
    x, weight, bias, starts, before, y, T,
    C: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BEFORE: tl.constexpr, VARLEN: tl.constexpr,
    BC: tl.constexpr, BT: tl.constexpr, UNROLL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y [M, C] from x [M, C], whose rows are STRIDE apart, and with HAS_BEFORE the rows before each
    sequence, before [sequences, W - 1, C]. Grid (channel blocks of stretches, sequences).
    """
    await_inputs()
    block, stretch, _ = locate(C, BC)
    n = tl.program_id(1).to(tl.int64) * T
    first = stretch * BT
    end = tl.minimum(first + BT, T)
    cols = block * BC + tl.arange(0, BC)
    keep = cols < C
    x += (n + first) * STRIDE + cols
    y += (n + first) * C + cols
    if VARLEN:
        starts += n
    if HAS_BEFORE:
        before += tl.program_id(1) * (W - 1) * C + cols
    window, age = load_window(
        x, before, starts, first, end, keep, C, STRIDE, W, HAS_BEFORE, VARLEN, ACC
    )  # fmt: skip
    taps = load_taps(weight, cols, C, W, WIDE, ACC)
    b = tl.load(bias + cols, mask=keep, other=0.0).to(ACC) if HAS_BIAS else 0.0
    for step in range(0, end - first, UNROLL):
        rows = load_rows(x, first, step, end, keep, STRIDE, UNROLL)
        flags, found = load_starts(starts, first + step, end, UNROLL, VARLEN)
        to = y + step * C
        t = first + step
        if (
            (found | (age < W - 1)) if VARLEN else False
        ):  # few blocks: the others are spared the choices
            window, age = forward_block(
                to,
                rows,
                window,
                age,
                flags,
                taps,
                b,
                t,
                end,
                keep,
                C,
                W,
                HAS_BIAS,
                True,
                UNROLL,
                ACC,
            )
        else:
            window, age = forward_block(
                to,
                rows,
                window,
                age,
                flags,
                taps,
                b,
                t,
                end,
                keep,
                C,
                W,
                HAS_BIAS,
                False,
                UNROLL,
                ACC,
            )


@triton.jit
def backward_block(
    dx, d_before, rows, dys, window, age, flags, pending, d_taps, d_bias, taps, b, step, length,
    keep, C: tl.constexpr, DX_STRIDE: tl.constexpr, W: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BEFORE: tl.constexpr, VARLEN: tl.constexpr, COUNT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """COUNT tokens from ``step`` of the stretch on, where ``dx`` points. Returns what the next
    block needs.

    pending: of the W - 1 inputs before, nearest first, the gradients so far.
    d_before: where those of the rows before the sequence go; behind its first stretch it is not
        written to.
    """
    for u in tl.static_range(COUNT):
        if VARLEN:
            window, age = enter(window, age, flags[u], W)
        row = rows[u].to(ACC)
        p = pre_activation(row, window, taps, b, W, HAS_BIAS)
        s = sigmoid(p)
        d = dys[u].to(ACC) * (s + p * s * (1.0 - s))
        sums = (d_taps[0] + d * row,)
        for j in tl.static_range(W - 1):
            sums = sums + (d_taps[j + 1] + d * window[j],)
        d_taps = sums
        d_bias += d
        sums = (d * taps[0],)
        for j in tl.static_range(W - 1):
            sums = sums + (pending[j] + (tl.where(age > j, d, 0.0) if VARLEN else d) * taps[j + 1],)
        at = step + (u + 1 - W)
        tl.store(
            dx + at * DX_STRIDE,
            sums[W - 1].to(dx.dtype.element_ty),
            mask=(at >= 0) & (at < length) & keep,
        )
        if HAS_BEFORE:
            to = d_before + (at + W - 1) * C
            begins = tl.program_id(0) < (C + keep.shape[0] - 1) // keep.shape[0]
            tl.store(to, sums[W - 1].to(dx.dtype.element_ty), mask=(at < 0) & begins & keep)
        pending = sums[: W - 1]
        window = push(row, window, W)
    return window, age, pending, d_taps, d_bias


@triton.jit(do_not_specialize=["T"])
def convolution_backward_kernel(
    x, weight, bias, starts, before, dy, dx, dweight, dbias, d_before, T,
    C: tl.constexpr, STRIDE: tl.constexpr, DX_STRIDE: tl.constexpr,
    W: tl.constexpr, WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BEFORE: tl.constexpr, VARLEN: tl.constexpr,
    BC: tl.constexpr, BT: tl.constexpr, UNROLL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx [M, C], whose rows are DX_STRIDE apart, d_before [sequences, W - 1, C], and each stretch's
    part of dweight [stretches, C, W] and dbias [stretches, C].
    """
    await_inputs()
    block, stretch, stretches = locate(C, BC)
    i = tl.program_id(1).to(tl.int64) * stretches + stretch
    n = tl.program_id(1).to(tl.int64) * T
    first = stretch * BT
    length = tl.minimum(BT, T - first)
    cols = block * BC + tl.arange(0, BC)
    keep = cols < C
    x += (n + first) * STRIDE + cols
    dy += (n + first) * C + cols
    dx += (n + first) * DX_STRIDE + cols
    if VARLEN:
        starts += n
    if HAS_BEFORE:
        before += tl.program_id(1) * (W - 1) * C + cols
        d_before += tl.program_id(1) * (W - 1) * C + cols
    window, age = load_window(
        x, before, starts, first, T, keep, C, STRIDE, W, HAS_BEFORE, VARLEN, ACC
    )  # fmt: skip
    next_rows = load_rows(x, first, 0, T, keep, STRIDE, UNROLL)
    next_dys = load_rows(dy, first, 0, T, keep, C, UNROLL)
    taps = load_taps(weight, cols, C, W, WIDE, ACC)
    b = tl.load(bias + cols, mask=keep, other=0.0).to(ACC) if HAS_BIAS else 0.0
    zero = tl.zeros([BC], dtype=ACC)
    pending = ()
    d_taps = (zero,)
    d_bias = zero
    for _ in tl.static_range(W - 1):
        pending = pending + (zero,)
        d_taps = d_taps + (zero,)
    after = tl.cdiv(length, UNROLL) * UNROLL
    for step in range(0, after, UNROLL):
        rows = next_rows
        dys = next_dys
        next_rows = load_rows(x, first, step + UNROLL, T, keep, STRIDE, UNROLL)
        next_dys = load_rows(dy, first, step + UNROLL, T, keep, C, UNROLL)
        flags, found = load_starts(starts, first + step, T, UNROLL, VARLEN)
        if (found | (age < W - 1)) if VARLEN else False:
            window, age, pending, d_taps, d_bias = backward_block(
                dx, d_before, rows, dys, window, age, flags, pending, d_taps, d_bias, taps, b,
                step, length, keep, C, DX_STRIDE, W,
                HAS_BIAS, HAS_BEFORE, True, UNROLL, ACC,
            )  # fmt: skip
        else:
            window, age, pending, d_taps, d_bias = backward_block(
                dx, d_before, rows, dys, window, age, flags, pending, d_taps, d_bias, taps, b,
                step, length, keep, C, DX_STRIDE, W,
                HAS_BIAS, HAS_BEFORE, False, UNROLL, ACC,
            )  # fmt: skip
    last_rows = load_rows(x, first, after, T, keep, STRIDE, W - 1)
    last_dys = load_rows(dy, first, after, T, keep, C, W - 1)
    flags, _ = load_starts(starts, first + after, T, W - 1, VARLEN)
    # of the tokens after the stretch only what they add to the gradients of its last inputs
    backward_block(
        dx, d_before, last_rows, last_dys, window, age, flags, pending, d_taps, d_bias, taps, b,
        after, length, keep, C, DX_STRIDE, W,
        HAS_BIAS, HAS_BEFORE, VARLEN, W - 1, ACC,
    )  # fmt: skip
    for j in tl.static_range(W):
        tl.store(dweight + (i * C + cols) * W + (W - 1 - j), d_taps[j], mask=keep)
    if HAS_BIAS:
        tl.store(dbias + i * C + cols, d_bias, mask=keep)


def forward_pass(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], starts: Tensor | None,
    before: Sequence[Tensor] = (),
) -> list[Tensor]:  # fmt: skip
    """Convolve the channels of x by one table of taps after the other.

    Args:
        x: [B, T, C].
        weights, biases: [C_i, W] and [C_i]; no bias at all, or one for each weight.
        starts: of ``document_starts``.
        before: [B, W - 1, C_i] for each weight, the inputs before every row, of the document that
            it begins with; or none: zeros.

    Returns:
        y_i [B, T, C_i], and a copy of the channels that are left, if any are.
    """
    check_device(x, *weights, *biases, starts, *before)
    found = []
    for i, (part, weight, bias) in enumerate(_parts(x, weights, biases)):
        y, past = x.new_empty(part.shape), before[i] if before else None
        if x.numel():
            rows, grid, options = _launch(part, weight, bias, starts, past, FORWARD)
            time = options.pop("T")
            run(convolution_kernel, grid, rows, weight, bias, starts, past, y, time, **options)
        found.append(y)
    rest = _rest(x, weights)
    return [*found, rest.clone(memory_format=torch.contiguous_format)] if rest.shape[2] else found


def backward_pass(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], starts: Tensor | None,
    dys: list[Tensor], before: Sequence[Tensor] = (),
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of x, of every weight, of every bias, and of what is before.

    Args:
        x, weights, biases, starts, before: as of ``forward_pass``.
        dys: gradients of what it returned, contiguous.
    """
    dx = x.new_empty(x.shape)
    acc, sums = accumulation_dtype(x), []
    d_before = [torch.empty_like(past) for past in before]
    for i, ((part, weight, bias), (into, _, _), dy) in enumerate(
        zip(_parts(x, weights, biases), _parts(dx, weights, biases), dys, strict=False)
    ):
        past, d_past = (before[i], d_before[i]) if before else (None, None)
        rows, grid, options = _launch(part, weight, bias, starts, past, BACKWARD)
        count = grid[0] // cdiv(part.shape[2], options["BC"]) * grid[1]
        own = [
            None if parameter is None else x.new_empty(count, *parameter.shape, dtype=acc)
            for parameter in (weight, bias)
        ]
        if x.numel():
            time, stride = options.pop("T"), dx.stride(1)
            run(
                convolution_backward_kernel,
                grid,
                rows, weight, bias, starts, past, dy, into, *own, d_past, time,
                DX_STRIDE=stride, **options,
            )  # fmt: skip
        sums.append([None if part is None else sum_rows(part) for part in own])
    rest = _rest(dx, weights)
    if rest.shape[2]:
        rest.copy_(dys[-1])
    return [
        dx,
        *(dweight.to(weight.dtype) for (dweight, _), weight in zip(sums, weights, strict=True)),
        *(dbias.to(bias.dtype) for (_, dbias), bias in zip(sums, biases, strict=False)),
        *d_before,
    ]


def _parts(
    x: Tensor, weights: list[Tensor], biases: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield the channels of x that each weight convolves, the weight, and its bias."""
    end = 0
    for i, weight in enumerate(weights):
        first, end = end, end + weight.shape[0]
        yield x[:, :, first:end], weight, biases[i] if biases else None


def _rest(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Return the channels that no weight convolves, a view."""
    return x[:, :, sum(weight.shape[0] for weight in weights) :]


def _launch(
    x: Tensor, weight: Tensor, bias, starts, before, config: dict
) -> tuple[Tensor, tuple[int, int], dict]:
    """x as rows [M, C] that lie a constant stride apart, the grid, and the kernels' other
    arguments.
    """
    batch, time, channels = x.shape
    if starts is not None and before is None:
        batch, time = 1, batch * time
    rows = x.flatten(0, 1)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    width = weight.shape[1]
    block = min(config["BC"], next_power_of_2(channels))
    options = dict(
        T=time, C=channels, STRIDE=rows.stride(0), W=width, WIDE=next_power_of_2(width),
        HAS_BIAS=bias is not None,
        HAS_BEFORE=before is not None,
        VARLEN=starts is not None,
        ACC=tl.float64 if accumulation_dtype(x) == torch.float64 else tl.float32,
    )  # fmt: skip
    options |= config | dict(BC=block)
    return rows, (cdiv(channels, block) * cdiv(time, config["BT"]), batch), options


@torch.library.custom_op("pdn::short_convolutions", mutates_args=())
def convolution(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], starts: Tensor | None
) -> list[Tensor]:
    return forward_pass(x, weights, biases, starts)


@torch.library.custom_op("pdn::short_convolutions_backward", mutates_args=())
def convolution_backward(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], starts: Tensor | None,
    dys: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    return backward_pass(x, weights, biases, starts, dys)


def empty_results(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return uninitialised results of ``forward_pass``, for a tracer."""
    sizes = [weight.shape[0] for weight in weights]
    rest = x.shape[2] - sum(sizes)
    return [x.new_empty(*x.shape[:2], size) for size in (*sizes, *([rest] if rest else []))]


@convolution.register_fake
def _(x, weights, biases, starts):
    return empty_results(x, weights)


@convolution_backward.register_fake
def _(x, weights, biases, starts, dys):
    return [x.new_empty(x.shape), *(y.new_empty(y.shape) for y in (*weights, *biases))]


def _save(ctx, inputs, output):
    x, weights, biases, starts = inputs
    ctx.save_for_backward(x, starts, *weights, *biases)
    ctx.weights = len(weights)


def _gradients(ctx, dys, backward: Callable[..., list[Tensor]] = convolution_backward):
    x, starts, *parameters = ctx.saved_tensors
    weights, biases = parameters[: ctx.weights], parameters[ctx.weights :]
    dx, *found = backward(x, weights, biases, starts, [dy.contiguous() for dy in dys])
    return dx, found[: ctx.weights], found[ctx.weights :], None


convolution.register_autograd(_gradients, setup_context=_save)


class _Eager(torch.autograd.Function):
    """Runs the operators' passes without the operators.

    Their dispatch takes the host longer than the launches.
    """

    @staticmethod
    def forward(ctx, x, starts, count, *parameters):
        inputs = x, list(parameters[:count]), list(parameters[count:]), starts
        _save(ctx, inputs, None)
        return tuple(forward_pass(*inputs))

    @staticmethod
    def backward(ctx, *dys):
        check_first_derivative("the Triton kernels", "use backend='chunkwise'")
        dx, dweights, dbiases, _ = _gradients(ctx, dys, backward_pass)
        return dx, None, None, *dweights, *dbiases


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, cu_seqlens: Tensor | None
) -> Tensor:
    """See ``pdn.ops.short_convolution``; without a state."""
    biases = [] if bias is None else [bias]
    return convolve_parts(x, [weight], biases, cu_seqlens=cu_seqlens)[0]


def convolve_parts(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, cu_seqlens: Tensor | None
) -> list[Tensor]:
    """See ``pdn.ops.short_convolutions``."""
    weights, biases = ([y.contiguous() for y in parameters] for parameters in (weights, biases))
    starts = None if cu_seqlens is None else document_starts(cu_seqlens, x.shape[0] * x.shape[1])
    traced = (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or _get_current_dispatch_mode() is not None
    )
    if traced:
        return convolution(x, weights, biases, starts)
    return list(_Eager.apply(x, starts, len(weights), *weights, *biases))


def document_starts(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[tokens + 1] int8: one where a document begins, or, empty, would begin. Where a graph has
    several, they are one.
    """
    return cu_seqlens.new_zeros(tokens + 1, dtype=torch.int8).index_fill_(0, cu_seqlens.long(), 1)
