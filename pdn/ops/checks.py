"""What the shapes of a call have to be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, state: Tensor | None
) -> None:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected [B, T, C] and [C, W] "
            "with W >= 1"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias {tuple(bias.shape)}: expected [C] with C of weight {tuple(weight.shape)}"
        )
    check_documents(cu_seqlens)
    if state is None:
        return
    expected = x.shape[0], weight.shape[1] - 1, x.shape[2]
    if state.shape != expected:
        raise ValueError(
            f"state {tuple(state.shape)}: expected the W - 1 inputs before x, {expected}"
        )


def convolutions(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    states: Sequence[Tensor],
    cu_seqlens: Tensor | None,
) -> tuple[list[tuple[Tensor, Tensor, Tensor | None]], Tensor]:
    """Return the channels, the weight and the bias of each convolution, and the channels left.

    The arguments are those of ``pdn.ops.short_convolutions``.

    Raises:
        ValueError: shapes that do not fit together.
    """
    sizes, n = [weight.shape[0] for weight in weights], len(weights)
    rest = x.shape[-1] - sum(sizes)
    if rest < 0 or len(biases) not in (0, n) or len(states) not in (0, n):
        raise ValueError(
            f"x {tuple(x.shape)}, weights {[tuple(w.shape) for w in weights]}, {len(biases)} "
            f"biases and {len(states)} states: expected [B, T, C], weights [C_i, W] of at most C "
            "channels together, and no bias and state or one for each"
        )
    *parts, left = x.split([*sizes, rest], -1)
    none = [None] * n
    each = list(zip(parts, weights, biases or none, strict=True))
    for own, state in zip(each, states or none, strict=True):
        check_convolution(*own, cu_seqlens, state)
    return each, left


def check_shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)}: expected the same [B, T, H, K]"
        )
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"v {tuple(v.shape)}: expected [B, T, HV, V] with B, T of q {tuple(q.shape)} and HV a "
            "multiple of its H"
        )
    check_documents(cu_seqlens)


def check_documents(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32):
        raise ValueError(
            f"cu_seqlens: expected int32 [N + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
