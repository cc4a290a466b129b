"""From a model on the meta device to one that trains on any number of ranks. Knows ``model.blocks``
and nothing of mixers.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from pdn.distributed.config import ParallelConfig
from pdn.errors import ConfigError

# Blocks whose weights are gathered and whose gradients are reduced at once. Every such group takes
# the host some 2 ms a step, which two GPUs wait for: docs/training.md.
BLOCKS_TOGETHER = 4


@dataclass(frozen=True)
class World:
    """This process among its peers. One process without torchrun has no process group."""

    rank: int
    size: int
    device: torch.device
    owns_group: bool = field(default=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape and device, concatenated in rank order, on every
        rank; collective.
        """
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def close(self) -> None:
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def join_world(device: str, timeout: float, *, sharded: bool = False) -> World:
    """Join the process group that torchrun describes; a single process has none unless it is
    ``sharded``.

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
        alone = dict(store=dist.HashStore(), rank=0, world_size=1) if size == 1 else {}
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **alone)
    return World(rank, size, this, owns)


def build_mesh(config: ParallelConfig, world: World) -> DeviceMesh | None:
    """[shards] or [replicas, shards] over all ranks; None for a single process, which needs no
    sharding.
    """
    kind = config.kind
    if kind == "auto":
        kind = "single" if world.size == 1 else "fsdp"
    if kind == "single":
        return None
    if kind == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    replicas = {"ddp": world.size, "hsdp": config.replicas}[kind]
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def parallelise(model: nn.Module, config: ParallelConfig, world: World, *, seed: int) -> nn.Module:
    """Checkpoint, compile, shard, allocate and initialise ``model``, in this order.

    model: a LanguageModel on the meta device. Parameters, their gradients and the reductions are
        float32.
    """
    mesh = build_mesh(config, world)
    compile_blocks = (
        config.compile if isinstance(config.compile, bool) else world.device.type == "cuda"
    )
    for i, block in enumerate(model.blocks):
        if config.activation_checkpointing == "full" or (
            config.activation_checkpointing == "selective" and i % 2 == 0
        ):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compile_blocks:
            block.compile()
    if mesh is not None:
        _shard(model, config, mesh)
    model.to_empty(device="cpu" if config.cpu_offload else world.device)
    model.init_weights(seed)
    return model


def _shard(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> None:
    # Without a cast of the parameters: FSDP would cast A_log, dt_bias, mu and the norms too.
    # Autocast lowers the products and nothing else, on one device as on many, for the price of
    # gathering float32.
    options = dict(
        mesh=mesh,
        offload_policy=CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        if config.cpu_offload
        else OffloadPolicy(),
    )
    blocks = list(model.blocks)
    for first in range(0, len(blocks), BLOCKS_TOGETHER):
        fully_shard(
            blocks[first : first + BLOCKS_TOGETHER],
            reshard_after_forward=config.reshard_after_forward,
            **options,
        )
    fully_shard(model, reshard_after_forward=False, **options)
    for module in (*model.blocks, model):
        # Sums, not means: the loss is already divided by the tokens of all ranks together.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of ``model`` to a global norm of at most ``max_norm``; returns the norm
    before. Collective.

    As ``torch.nn.utils.clip_grad_norm_``, on the local parts: DTensor's dispatch takes the host
        longer than the GPU computes.
    """
    sharded = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradients = [local_part(gradient) for gradient in sharded]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(sharded[0], DTensor):
        mesh = sharded[0].device_mesh
        square = norm.square().to(mesh.device_type)  # from the host, where gradients may be
        dist.all_reduce(square, group=mesh.get_group("shard"))
        norm = square.sqrt().to(norm.device)
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def compute_in(device: torch.device, bf16: bool) -> torch.autocast:
    """The precision of forward passes: products in bfloat16, if asked; parameters and sums stay
    float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def last_micro_batch(model: nn.Module, last: bool, *, keep_gathered: bool) -> None:
    """Communicate once a step, however many micro-batches it has: reduce gradients in the last
    backward pass only.

    keep_gathered: weights that are not freed after the forward pass stay for the next micro-batch
        too, instead of being gathered for each.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or not keep_gathered)
