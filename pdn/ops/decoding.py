"""What a layer does for one token of every sequence besides its recurrence, in few launches.

A decoding step is bound by launches, not by arithmetic: each function here is one kernel on a GPU
where its certificate holds, and PyTorch elsewhere. States are advanced in place, so that a CUDA
graph can replay the step. No gradients.

Letters: B sequences, D channels in, N channels out, C convolved channels, W taps, H query heads,
HKV key heads, K head size, L tokens that a cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pdn import verdicts
from pdn.ops.types import accumulation_dtype

FEW = (
    4  # sequences up to which a product is bound by reading its weights, and the kernel reads best
)


def project(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    swiglu: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """``f(x) @ weight.T``, where f normalises, gates, or applies SwiGLU.

    Args:
        x: [B, D]; with ``swiglu`` [B, 2 D], the gate before the values.
        weight: [N, D].
        norm: [G] with G a divisor of D: RMSNorm of every G channels by themselves, with this
            weight.
        gate: [B, D], multiplied with the normalised x.
        into: [B, N], contiguous: add the product to it, in place.

    Returns:
        [B, N] in the dtype of ``weight``; ``into`` if it was given.
    """
    if x.shape[0] <= FEW and _project_usable(x, weight, norm, gate, swiglu, into):
        from pdn.ops.triton.decoding import project as kernel

        return kernel(x, weight, norm=norm, eps=eps, gate=gate, swiglu=swiglu, into=into)
    if swiglu:
        x = multiply_swiglu(x)
    if norm is not None:
        groups = x.to(norm.dtype).unflatten(-1, (-1, norm.shape[0]))
        x = F.rms_norm(groups, norm.shape, norm, eps).flatten(-2)
    if gate is not None:
        x = x * gate
    x = x.to(weight.dtype)
    if into is None:
        return F.linear(x, weight)
    same = into.dtype == weight.dtype
    return into.addmm_(x, weight.mT) if same else into.add_(F.linear(x, weight))


def multiply_swiglu(x: Tensor) -> Tensor:
    """``silu(a) * b`` [B, D] of a and b, the halves of x [B, 2 D]."""
    if _usable("multiply_swiglu", x, x.shape[1] // 2):
        from pdn.ops.triton.decoding import multiply_swiglu as kernel

        return kernel(x)
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def split_and_convolve(
    x: Tensor, weight: Tensor, state: Tensor, sizes: Sequence[int]
) -> list[Tensor]:
    """Split x into contiguous parts, the first channels through the short convolution and SiLU.

    Args:
        x: [B, C + rest].
        weight: [C, W], as of ``pdn.ops.short_convolution``.
        state: [B, W - 1, C], the inputs before x; moved on by one token, in place.
        sizes: channels of each part; their sum is C + rest, and C is the sum of the first ones.

    Returns:
        The parts, [B, size] each.
    """
    if _usable("split_and_convolve", x, *weight.shape, weight.itemsize, *sizes):
        from pdn.ops.triton.decoding import split_and_convolve as kernel

        return kernel(x, weight, state, sizes)
    dtype, channels = accumulation_dtype(x), weight.shape[0]
    window = torch.cat([state, x[:, None, :channels]], 1)
    taps = weight.to(dtype)
    y = window[:, -1].to(dtype) * taps[:, -1]
    for lag in range(1, weight.shape[1]):
        y = y + window[:, -1 - lag].to(dtype) * taps[:, -1 - lag]
    state.copy_(window[:, 1:])
    y = torch.cat([F.silu(y).to(x.dtype), x[:, channels:]], 1)
    return [part.contiguous() for part in y.split(list(sizes), 1)]


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    table: Tensor,
    *,
    heads: int,
    window: int = 0,
) -> Tensor:
    """Causal attention of one token to itself and those before it; its key and value join the
    cache.

    Args:
        qkv: [B, (H + 2 HKV) K], the query's heads, the keys', the values'.
        keys, values: [B, HKV, L, K], rotated keys and values of the tokens before; written in
            place.
        position: [B] int64, how many tokens came before, below L.
        table: [L, 2, K / 2], cos and sin of the rotary angles at every position.
        heads: H.
        window: tokens that it sees, itself included; 0: all.

    Returns:
        [B, H K].
    """
    if _usable("attend", qkv, heads, keys.shape[1], keys.shape[3], window):
        from pdn.ops.triton.decoding import attend as kernel

        return kernel(qkv, keys, values, position, table, heads=heads, window=window)
    batch, kv_heads, length, size = keys.shape
    q, k, v = qkv.unflatten(1, (-1, size)).split([heads, kv_heads, kv_heads], 1)
    angles = table[position]
    q, k = _rotate(q, angles), _rotate(k, angles)
    rows = torch.arange(batch, device=qkv.device)
    keys[rows, :, position] = k
    values[rows, :, position] = v
    at = torch.arange(length, device=qkv.device)
    seen = at <= position[:, None]
    if window:
        seen &= at > position[:, None] - window
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
    o = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen[:, None, None])
    return o.flatten(1)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, heads, K] by angles [B, 2, K / 2], in the halves convention."""
    cos, sin = angles[:, None, 0], angles[:, None, 1]
    a, b = x.to(angles.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def _project_usable(x, weight, norm, gate, swiglu, into) -> bool:
    group = 0 if norm is None else norm.shape[0]
    if group not in (0, weight.shape[1]) and group & (group - 1):
        return False  # the kernel cuts its block of channels into groups
    if x.dtype != weight.dtype or (into is not None and into.dtype != weight.dtype):
        return False  # a float32 residual stream
    flags = gate is not None, swiglu, into is not None
    return _usable("project", x, *weight.shape, group, *map(int, flags))


def _usable(name: str, x: Tensor, *sizes: int) -> bool:
    """Whether the kernel of this name may run on x. sizes: what else its compilation depends on."""
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    return verdicts.certifier().decoding_is_usable(x.device, name, x.dtype, x.shape[0], sizes)
