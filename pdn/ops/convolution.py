"""The short convolution in PyTorch: depthwise and causal over time, then SiLU. Letters: B batch, T
time, C channels, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pdn.ops.chunkwise import document_ids
from pdn.ops.types import accumulation_dtype


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """See ``pdn.ops.short_convolution``."""
    time, width = x.shape[1], weight.shape[1]
    dtype = accumulation_dtype(x)
    weight = weight.to(dtype)
    past = F.pad(x, (0, 0, width - 1, 0)) if state is None else torch.cat([state, x], 1)
    ids = None
    if cu_seqlens is not None:
        ids = document_ids(cu_seqlens, *x.shape[:2])
        # what is before a row, the state or zeros, is of the row's first document
        ids = torch.cat([ids[:, :1].expand(-1, width - 1), ids], 1)
    y = x.to(dtype) * weight[:, -1]
    for lag in range(1, width):
        start = width - 1 - lag
        shifted = past[:, start : start + time]
        if ids is not None:
            shifted = shifted * (ids[:, start : start + time] == ids[:, width - 1 :])[..., None]
        y = y + shifted.to(dtype) * weight[:, -1 - lag]
    if bias is not None:
        y = y + bias.to(dtype)
    if state is None:
        return F.silu(y).to(x.dtype), None
    tail = past[:, time:]
    if ids is not None:
        tail = tail.masked_fill((ids[:, time:] != ids[:, -1:])[..., None], 0)
    return F.silu(y).to(x.dtype), tail
