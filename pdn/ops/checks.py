"""What the shapes of a call have to be."""

from __future__ import annotations

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
