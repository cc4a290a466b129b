"""The short convolution: depthwise and causal over time, then SiLU, forward and backward, each in one pass over memory.

A program owns some channels of LANES stretches of BT tokens each, one stretch a warp. It walks all of them at once, a
token at a time, with the last W - 1 rows in registers: x is read once, the taps' rounding-free sums never leave a
register, and the next UNROLL rows are on their way meanwhile. Backward, with the pre-activation p recomputed and
d_t = dL/dp_t, a token t adds to the gradients of its own inputs::

    dx_{t-j} += w_j d_t      dw_j += x_{t-j} d_t        j = 0 ... W - 1, within the document

so the last W - 1 gradients of inputs wait in registers, too, and a stretch reads W - 1 rows beyond its end.

Letters: B batch, T time, C channels, W width, M = B * T tokens. A tap j is on the token j before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pdn.ops.triton.common import exp, inverse
from pdn.ops.triton.compiled import check_device, run
from pdn.ops.types import accumulation_dtype

# BC channels and LANES stretches of BT tokens a program, in blocks of UNROLL rows; a lane of a warp has BC / 32 channels.
FORWARD = dict(BC=128, BT=64, UNROLL=8, LANES=1, num_warps=1)
BACKWARD = dict(BC=128, BT=64, UNROLL=4, LANES=4, num_warps=4)


@triton.jit
def load_taps(weight, cols, C: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr):
    """W rows [1, BC]: tap j of the channels, from weight [C, W], whose last tap is on the current token. WIDE: W padded."""
    i = tl.arange(0, WIDE)
    all = tl.load(weight + cols[:, None] * W + i[None, :], mask=(cols < C)[:, None] & (i < W)[None, :], other=0.0).to(ACC)
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.sum(tl.where((i == W - 1 - j)[None, :], all, 0.0), 1)[None, :],)
    return taps


@triton.jit
def load_rows(x, t, end, step, keep, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows [LANES, BC] of tokens t + step ... (t [LANES]), zeros outside of [0, end); ``x`` points at token t."""
    rows = ()
    for u in tl.static_range(COUNT):
        at = t + (step + u)
        rows = rows + (tl.load(x + (step + u) * STRIDE, mask=((at >= 0) & (at < end))[:, None] & keep, other=0.0),)
    return rows


@triton.jit
def load_starts(starts, t, end, step, COUNT: tl.constexpr, VARLEN: tl.constexpr):
    """Whether a document begins at tokens t + step ..., COUNT of [LANES, 1]; without documents nothing."""
    flags = ()
    if VARLEN:
        for u in tl.static_range(COUNT):
            at = t + (step + u)
            flags = flags + ((tl.load(starts + at, mask=(at >= 0) & (at < end), other=0) != 0)[:, None],)
    return flags


@triton.jit
def load_window(x, starts, t, end, keep, STRIDE: tl.constexpr, W: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr):
    """The W - 1 rows before token t, nearest first, and the age of the token before it: how many tokens of its document
    come before that, as far as these rows say.
    """
    rows = load_rows(x, t, end, 1 - W, keep, STRIDE, W - 1)
    flags = load_starts(starts, t, end, 1 - W, W - 1, VARLEN)
    window = ()
    age = tl.full([t.shape[0], 1], -1, tl.int32)
    for j in tl.static_range(W - 1):
        window = window + (rows[W - 2 - j].to(ACC),)
        if VARLEN:
            age = tl.where(flags[j], 0, age + 1)
    return window, age


@triton.jit
def convolve(row, window, age, taps, b, W: tl.constexpr, VARLEN: tl.constexpr):
    """The pre-activation of a token from its row and the rows before, which count as far as its age says."""
    p = row * taps[0] + b
    for j in tl.static_range(W - 1):
        p += (tl.where(age > j, window[j], 0.0) if VARLEN else window[j]) * taps[j + 1]
    return p


@triton.jit
def push(row, window, W: tl.constexpr):
    """The window of the next token."""
    return (row,) + window[: W - 2] if W > 1 else window


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x, weight, bias, starts, y, T,
    C: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, VARLEN: tl.constexpr,
    BC: tl.constexpr, BT: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y [M, C] from x [M, C], whose rows are STRIDE apart. Grid (channel blocks, blocks of time, sequences)."""
    n = tl.program_id(2).to(tl.int64) * T
    first = tl.program_id(1) * (LANES * BT)
    t = first + tl.arange(0, LANES) * BT
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    keep = (cols < C)[None, :]
    x += (n + t)[:, None] * STRIDE + cols[None, :]
    y += (n + t)[:, None] * C + cols[None, :]
    window, age = load_window(x, starts, t, T, keep, STRIDE, W, VARLEN, ACC)
    rows = load_rows(x, t, T, 0, keep, STRIDE, UNROLL)
    taps = load_taps(weight, cols, C, W, WIDE, ACC)
    b = tl.load(bias + cols, mask=cols < C, other=0.0).to(ACC)[None, :] if HAS_BIAS else 0.0
    for step in range(0, tl.minimum(BT, T - first), UNROLL):
        # the last rows of a stretch have none after them
        following = load_rows(x, t, tl.minimum(t + BT, T), step + UNROLL, keep, STRIDE, UNROLL)
        flags = load_starts(starts, t, T, step, UNROLL, VARLEN)
        for u in tl.static_range(UNROLL):
            if VARLEN:
                age = tl.where(flags[u], 0, tl.minimum(age + 1, W - 1))
            row = rows[u].to(ACC)
            p = convolve(row, window, age, taps, b, W, VARLEN)
            live = (t + (step + u) < T)[:, None] & keep
            tl.store(y + (step + u) * C, (p * inverse(1.0 + exp(-p))).to(y.dtype.element_ty), mask=live)
            window = push(row, window, W)
        rows = following


@triton.jit
def differentiate(row, dy, window, age, taps, b, W: tl.constexpr, VARLEN: tl.constexpr):
    """dL/dp of a token: the gradient of its pre-activation."""
    p = convolve(row, window, age, taps, b, W, VARLEN)
    s = inverse(1.0 + exp(-p))
    return dy * (s + p * s * (1.0 - s))


@triton.jit
def add_to_inputs(d, pending, age, taps, W: tl.constexpr, VARLEN: tl.constexpr):
    """A token's share added to the gradients of its inputs: the one that is then complete, and the W - 1 that are not."""
    sums = (d * taps[0],)
    for j in tl.static_range(W - 1):
        sums = sums + (pending[j] + (tl.where(age > j, d, 0.0) if VARLEN else d) * taps[j + 1],)
    return sums[W - 1], sums[: W - 1]


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    x, weight, bias, starts, dy, dx, dweight, dbias, T,
    C: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, VARLEN: tl.constexpr,
    BC: tl.constexpr, BT: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx [M, C], and the program's part of dweight [programs of a channel, C, W] and dbias [..., C]. UNROLL >= W - 1."""
    i = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    n = tl.program_id(2).to(tl.int64) * T
    first = tl.program_id(1) * (LANES * BT)
    t = first + tl.arange(0, LANES) * BT
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    keep = (cols < C)[None, :]
    x += (n + t)[:, None] * STRIDE + cols[None, :]
    dy += (n + t)[:, None] * C + cols[None, :]
    dx += (n + t)[:, None] * C + cols[None, :]
    window, age = load_window(x, starts, t, T, keep, STRIDE, W, VARLEN, ACC)
    rows = load_rows(x, t, T, 0, keep, STRIDE, UNROLL)
    dys = load_rows(dy, t, T, 0, keep, C, UNROLL)
    taps = load_taps(weight, cols, C, W, WIDE, ACC)
    b = tl.load(bias + cols, mask=cols < C, other=0.0).to(ACC)[None, :] if HAS_BIAS else 0.0
    zero = tl.zeros([LANES, BC], dtype=ACC)
    pending = ()
    d_taps = (zero,)
    d_bias = zero
    for _ in tl.static_range(W - 1):
        pending = pending + (zero,)
        d_taps = d_taps + (zero,)
    length = (tl.minimum(BT, T - first) + UNROLL - 1) // UNROLL * UNROLL
    for step in range(0, length, UNROLL):
        next_rows = load_rows(x, t, T, step + UNROLL, keep, STRIDE, UNROLL)
        next_dys = load_rows(dy, t, T, step + UNROLL, keep, C, UNROLL)
        flags = load_starts(starts, t, T, step, UNROLL, VARLEN)
        for u in tl.static_range(UNROLL):
            if VARLEN:
                age = tl.where(flags[u], 0, tl.minimum(age + 1, W - 1))
            row = rows[u].to(ACC)
            d = differentiate(row, dys[u].to(ACC), window, age, taps, b, W, VARLEN)
            sums = (d_taps[0] + d * row,)
            for j in tl.static_range(W - 1):
                sums = sums + (d_taps[j + 1] + d * (tl.where(age > j, window[j], 0.0) if VARLEN else window[j]),)
            d_taps = sums
            d_bias += d
            done, pending = add_to_inputs(d, pending, age, taps, W, VARLEN)
            at = step + (u + 1 - W)
            live = ((at >= 0) & (t + at < T))[:, None] & keep
            tl.store(dx + at * C, done.to(dx.dtype.element_ty), mask=live)
            window = push(row, window, W)
        rows = next_rows
        dys = next_dys
    flags = load_starts(starts, t, T, length, W - 1, VARLEN)
    for u in tl.static_range(W - 1):  # what the tokens after the stretch add to its last inputs
        if VARLEN:
            age = tl.where(flags[u], 0, tl.minimum(age + 1, W - 1))
        row = rows[u].to(ACC)
        d = differentiate(row, dys[u].to(ACC), window, age, taps, b, W, VARLEN)
        done, pending = add_to_inputs(d, pending, age, taps, W, VARLEN)
        at = length + (u + 1 - W)
        tl.store(dx + at * C, done.to(dx.dtype.element_ty), mask=((at >= 0) & (t + at < T))[:, None] & keep)
        window = push(row, window, W)
    for j in tl.static_range(W):
        tl.store(dweight + (i * C + cols) * W + (W - 1 - j), tl.sum(d_taps[j], 0), mask=cols < C)
    if HAS_BIAS:
        tl.store(dbias + i * C + cols, tl.sum(d_bias, 0), mask=cols < C)


def forward_pass(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None) -> Tensor:
    """y [B, T, C] of x [B, T, C], weight [C, W], bias [C]; starts: [B * T] int8, one where a document begins."""
    check_device(x, weight, bias, starts)
    y = x.new_empty(x.shape)
    if x.numel():
        rows, grid, options = _launch(x, weight, bias, starts, FORWARD)
        run(forward_kernel, grid, rows, weight, bias, starts, y, options.pop("T"), **options)
    return y


def backward_pass(
    x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty without one)."""
    dx = x.new_empty(x.shape)
    rows, grid, options = _launch(x, weight, bias, starts, BACKWARD)
    acc = accumulation_dtype(x)
    dweight = x.new_empty(grid[1] * grid[2], *weight.shape, dtype=acc)
    dbias = None if bias is None else x.new_empty(grid[1] * grid[2], *bias.shape, dtype=acc)
    if x.numel():
        run(backward_kernel, grid, rows, weight, bias, starts, dy, dx, dweight, dbias, options.pop("T"), **options)
    return dx, dweight.sum(0).to(weight.dtype), weight.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype)


def _launch(x: Tensor, weight: Tensor, bias, starts, config: dict) -> tuple[Tensor, tuple[int, int, int], dict]:
    """x as rows [M, C] that lie a constant stride apart, the grid, and the kernels' other arguments."""
    batch, time, channels = x.shape
    if starts is not None:
        batch, time = 1, batch * time
    rows = x.flatten(0, 1)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    width = weight.shape[1]
    block, span = min(config["BC"], triton.next_power_of_2(channels)), config["BT"] * config["LANES"]
    options = dict(
        T=time, C=channels, STRIDE=rows.stride(0), W=width, WIDE=triton.next_power_of_2(width), HAS_BIAS=bias is not None,
        VARLEN=starts is not None, ACC=tl.float64 if accumulation_dtype(x) == torch.float64 else tl.float32,
    )  # fmt: skip
    options |= config | dict(BC=block, UNROLL=max(config["UNROLL"], triton.next_power_of_2(width - 1)))
    return rows, (triton.cdiv(channels, block), triton.cdiv(time, span), batch), options


short_convolution = torch.library.custom_op("pdn::short_convolution", forward_pass, mutates_args=())
short_convolution_backward = torch.library.custom_op("pdn::short_convolution_backward", backward_pass, mutates_args=())


@short_convolution.register_fake
def _(x, weight, bias, starts):
    return x.new_empty(x.shape)


@short_convolution_backward.register_fake
def _(x, weight, bias, starts, dy):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else bias.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy, backward=short_convolution_backward):
    bias = ctx.saved_tensors[2]
    dx, dweight, dbias = backward(*ctx.saved_tensors, dy.contiguous())
    return dx, dweight, None if bias is None else dbias, None


short_convolution.register_autograd(_gradients, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The operators' passes without the operators, whose dispatch takes the host longer than the launches."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return forward_pass(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return _gradients(ctx, dy, backward_pass)


def convolve_rows(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``pdn.ops.short_convolution`` without a state."""
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    starts = None if cu_seqlens is None else document_starts(cu_seqlens, x.shape[0] * x.shape[1])
    traced = torch.compiler.is_compiling() or type(x) is not Tensor or _get_current_dispatch_mode() is not None
    return short_convolution(x, weight, bias, starts) if traced else _Eager.apply(x, weight, bias, starts)


def document_starts(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[tokens + 1] int8: one where a document begins; the end of the last one is where an empty one would begin."""
    return cu_seqlens.new_zeros(tokens + 1, dtype=torch.int8).index_fill_(0, cu_seqlens.long(), 1)
