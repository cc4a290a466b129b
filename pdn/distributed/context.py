"""Ranks that share sequences: which piece of each this one has, and its peers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from pdn.distributed.dims import ParallelDims
from pdn.ops import context


@dataclass(frozen=True)
class ContextRanks:
    """Describes the ranks that share this one's sequences; by default it has whole ones.

    Attributes:
        group: their process group.
        index, count: which piece of a sequence this rank has, of how many.
    """

    group: Any = None
    index: int = 0
    count: int = 1

    def piece_of(self, x: Tensor) -> Tensor:
        """Return this rank's piece of x [..., T], on the last axis."""
        time = x.shape[-1] // self.count
        return x[..., self.index * time : (self.index + 1) * time]

    @contextlib.contextmanager
    def split(self, tokens: Tensor, cu_seqlens: Tensor | None) -> Iterator[Tensor | None]:
        """Have the model take ``tokens`` for pieces of sequences, forward and backward.

        Args:
            tokens: [B, T], of this rank's pieces.
            cu_seqlens: documents of the whole sequences, if any.

        Yields:
            The documents of the pieces.
        """
        if self.count == 1:
            yield cu_seqlens
            return
        batch, time = tokens.shape
        piece = context.Piece(self.group, self.index, self.count, batch, time, cu_seqlens)
        with context.split(piece):
            yield piece.documents


def context_ranks(dims: ParallelDims, device: torch.device) -> ContextRanks:
    """Return the ranks that share this one's sequences. Collective, of all ranks."""
    if dims.context == 1:
        return ContextRanks()
    shape = (dims.batch_ranks, dims.context)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("batch", "context"))["context"]
    return ContextRanks(mesh.get_group(), mesh.get_local_rank(), dims.context)
