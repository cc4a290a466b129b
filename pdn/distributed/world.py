"""This process among its peers: which one it is, and for what."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pdn.distributed.context import ContextRanks, context_ranks
from pdn.distributed.dims import ParallelDims
from pdn.errors import ConfigError


@dataclass(frozen=True)
class World:
    """Describes this process among its peers; one without torchrun has no process group.

    Attributes:
        world_rank, size: of this process among all, and how many they are: who writes files.
        batch_rank, batch_ranks: which share of the samples this process sees, of how many.
        loss_group: the ranks whose losses and token counts add up; None for all of them.
        dims: how the ranks are laid out; None where every rank has samples of its own.
        context: the ranks that share this one's sequences.
    """

    world_rank: int
    size: int
    device: torch.device
    owns_group: bool = field(default=False, repr=False)
    dims: ParallelDims | None = None
    context: ContextRanks = field(default_factory=ContextRanks)

    @property
    def is_main(self) -> bool:
        """Say whether this process speaks and writes for all."""
        return self.world_rank == 0

    @property
    def batch_rank(self) -> int:
        """Return which share of the samples this process sees."""
        return self.world_rank if self.dims is None else self.dims.batch_rank(self.world_rank)

    @property
    def batch_ranks(self) -> int:
        """Count the shares that the samples are in."""
        return self.size if self.dims is None else self.dims.batch_ranks

    @property
    def loss_group(self) -> dist.ProcessGroup | None:
        """Return the ranks whose losses and token counts add up; None: all of them."""
        # All ranks, also where pieces of one sequence lie on several: each counts its own tokens.
        return None

    def laid_out(self, dims: ParallelDims) -> World:
        """Return the same process with its ranks laid out as ``dims``. Collective."""
        return replace(self, dims=dims, context=context_ranks(dims, self.device))

    def each_alone(self) -> World:
        """Return the same process, each rank with whole samples of its own."""
        return replace(self, dims=None, context=ContextRanks())

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ``loss_group``, in place; collective."""
        if self.size > 1:
            dist.all_reduce(x, group=self.loss_group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return the tensors of all batch ranks, concatenated in order, on every rank; collective.

        They have one shape and device.
        """
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts[:: self.size // self.batch_ranks])

    def close(self) -> None:
        """Leave the process group, if ``join_world`` made it."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def join_world(device: str, timeout: float, *, sharded: bool = False) -> World:
    """Join the process group that torchrun describes.

    A single process has none unless it is ``sharded``.

    Args:
        device: auto (a GPU if there is one), cpu or cuda.
        timeout: seconds that a collective may take before the process group gives up.
        sharded: the model will be on a mesh, which needs a process group even of one process.

    Raises:
        ConfigError: CUDA asked for and absent, or more ranks on this node than it has GPUs.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ConfigError(
            "DEVICE", "device = cuda: this machine has no usable CUDA device; expected cpu or auto"
        )
    use_cuda = cuda and device != "cpu"
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                "DEVICE",
                f"local rank {local_rank}: this node has {torch.cuda.device_count()} GPUs; "
                f"expected --nproc-per-node at most {torch.cuda.device_count()}",
            )
        torch.cuda.set_device(local_rank)
    this = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    owns = (size > 1 or sharded) and not dist.is_initialized()
    if owns:
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        alone: dict[str, Any] = {}
        if size == 1:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  (documented so)
            alone = dict(store=store, rank=0, world_size=1)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **alone)
    return World(rank, size, this, owns)
