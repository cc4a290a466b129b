"""What a layer does for one token of every sequence besides its recurrence, in few launches.

A decoding step is bound by launches, not by arithmetic: each function here is one kernel on a GPU
where its certificate holds, and PyTorch elsewhere. States are advanced in place, so that a CUDA
graph can replay the step. No gradients. Kernels read weights and states while the launch before
them may still run: that one must not write to these, and in a step it never does.

Letters: B sequences, D channels in, N channels out, C convolved channels, W taps, H query heads,
HKV key heads, K head size, L tokens that a cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pdn import ops, verdicts
from pdn.ops.recurrences import Solve
from pdn.ops.types import (
    DiagonalPreconditioner,
    RecurrentState,
    SigmoidGain,
    SoftplusDecay,
    accumulation_dtype,
)

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
    if swiglu or norm is not None or gate is not None:
        x = prepare(x, norm=norm, eps=eps, gate=gate, swiglu=swiglu)
    x = x.to(weight.dtype)
    if into is None:
        return F.linear(x, weight)
    same = into.dtype == weight.dtype
    return into.addmm_(x, weight.mT) if same else into.add_(F.linear(x, weight))


def prepare(
    x: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """Return f(x) [B, D] of ``project``, whose arguments these are."""
    D = x.shape[1] // (2 if swiglu else 1)
    if _prepare_usable(x, D, norm, gate, swiglu):
        from pdn.ops.triton.decoding import prepare as kernel

        return kernel(x, norm=norm, eps=eps, gate=gate, swiglu=swiglu)
    if swiglu:
        a, value = x.chunk(2, -1)
        x = F.silu(a) * value
    if norm is not None:
        groups = x.to(norm.dtype).unflatten(-1, (-1, norm.shape[0]))
        x = F.rms_norm(groups, norm.shape, norm, eps).flatten(-2)
    return x if gate is None else x * gate


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


def advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    solve: Solve,
    beta: Tensor | SigmoidGain | None,
    log_decay: Tensor | SoftplusDecay | None,
    write: Tensor | DiagonalPreconditioner | None,
    qk_l2norm: bool,
    S: Tensor,
    A: Tensor | None,
    clock: Tensor,
) -> Tensor:
    """Move a recurrence on by one token of every sequence, in place.

    Args:
        q, k, v, beta, log_decay, qk_l2norm: as of ``pdn.ops.delta_rule``, with T = 1.
        solve: whether that is the op ("online") or ``linear_attention`` ("offline").
        write: the op's write key or its preconditioner.
        S: of its state, overwritten; contiguous, of the accumulation dtype.
        A: [2, B, H, K], that of its state twice, likewise; one of them is read, the other written.
        clock: [1] int64; where it is even, the first of them is read.

    Returns:
        [B, HV V] in the dtype of v.
    """
    if _steps_by_kernel(solve, q, v, log_decay, write):
        from pdn.ops.triton.step import advance as kernel

        return kernel(
            q, k, v, solve=solve, beta=beta, log_decay=log_decay, write=write,
            qk_l2norm=qk_l2norm, S=S, A=A, clock=clock,
        )  # fmt: skip
    state = RecurrentState(S, None if A is None else A.index_select(0, clock % 2)[0])
    options: Any = dict(log_decay=log_decay, qk_l2norm=qk_l2norm, state=state, in_place=True)
    if solve == "online":
        assert beta is not None
        o, _ = ops.delta_rule(q, k, v, beta=beta, write_k=write, **options)
    else:
        assert not isinstance(write, Tensor)
        o, _ = ops.linear_attention(q, k, v, beta=beta, preconditioner=write, **options)
    if A is not None and state.A is not None:
        A.index_copy_(0, (clock + 1) % 2, state.A[None])
    return o.flatten(1)


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


def draw(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Tensor:
    """Draw one token of every row: the inverse of its distribution at a given number.

    Args:
        logits: [B, vocab].
        uniform: [B] float64 in [0, 1).
        temperature: that the logits are divided by, above 0 in float32.
        top_k: only the k most likely, and what is as likely as the last of them; None keeps all.
        top_p: the smallest set of tokens that together have at least this probability.

    Returns:
        [B] int64. Distances from the largest logit are float32, what is summed is float64.
    """
    known = top_p == 1 and _usable("draw", logits, logits.shape[1], top_k or 0)
    if known:
        from pdn.ops.triton.decoding import draw as kernel

        return kernel(logits, uniform, temperature=temperature, top_k=top_k)
    # Less the largest, so that a low temperature divides none of them to infinity.
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = torch.full_like(logits, float("-inf")).scatter(
            -1, index, ordered.masked_fill(before >= top_p, float("-inf"))
        )
    cumulative = logits.double().softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return chosen[:, 0].clamp(max=logits.shape[-1] - 1)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, heads, K] by angles [B, 2, K / 2], in the halves convention."""
    cos, sin = angles[:, None, 0], angles[:, None, 1]
    a, b = x.to(angles.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def _steps_by_kernel(solve, q, v, log_decay, write) -> bool:
    if isinstance(write, DiagonalPreconditioner) and not write.is_plain:
        return False
    options: Any = {"log_decay": log_decay, "cu_seqlens": None}
    return ops._backend(None, solve, q, v, write, options).__name__ == "pdn.ops.triton.step"


def _project_usable(x, weight, norm, gate, swiglu, into) -> bool:
    if x.dtype != weight.dtype or (into is not None and into.dtype != weight.dtype):
        return False  # a float32 residual stream
    group = _group(weight.shape[1], norm)
    flags = gate is not None, swiglu, into is not None
    return group is not None and _usable("project", x, *weight.shape, group, *map(int, flags))


def _prepare_usable(x, D, norm, gate, swiglu) -> bool:
    group = _group(D, norm)
    if group is None or (norm is not None and norm.dtype != x.dtype):
        return False  # a float32 residual stream
    return _usable("prepare", x, D, group, int(gate is not None), int(swiglu))


def _group(D: int, norm: Tensor | None) -> int | None:
    """Return the channels that are normalised together, 0 for none.

    None: the kernels cannot cut their blocks of channels into such groups.
    """
    group = 0 if norm is None else norm.shape[0]
    return group if group in (0, D) or not group & (group - 1) else None


def _usable(name: str, x: Tensor, *sizes: int) -> bool:
    """Whether the kernel of this name may run on x. sizes: what else its compilation depends on."""
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    return verdicts.certifier().decoding_is_usable(x.device, name, x.dtype, x.shape[0], sizes)
