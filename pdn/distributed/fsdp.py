"""From a model on the meta device to one that trains on any number of ranks.

Knows ``model.blocks`` and nothing of mixers.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from pdn.distributed.config import ParallelConfig
from pdn.distributed.world import World, join_world

if TYPE_CHECKING:
    from pdn.models.language_model import LanguageModel

__all__ = [
    "World",
    "build_mesh",
    "clip_factor",
    "clip_gradients",
    "compute_in",
    "gradient_norm",
    "join_world",
    "last_micro_batch",
    "local_part",
    "parallelise",
    "reshard",
    "scale_all",
]

# Blocks whose weights are gathered and whose gradients are reduced at once. Every such group takes
# the host some 2 ms a step, which two GPUs wait for: docs/training.md.
BLOCKS_TOGETHER = 4

GRAPHS_OF_A_BLOCK = 64


def build_mesh(config: ParallelConfig, world: World) -> DeviceMesh | None:
    """Return a mesh [shard] or [replicate, shard] over all ranks, axes named so.

    Ranks that share a sequence lie on its axis shard, or all on replicate where each has the whole
    model: on both, gradients are sums over its pieces.
    None for a single process, unless the configuration asks for a mesh of it.
    """
    dims = config.dims(world.size)
    if world.size == 1 and not config.needs_mesh:
        return None
    if dims.copies == 1:
        return init_device_mesh(
            world.device.type, (dims.parameter_ranks,), mesh_dim_names=("shard",)
        )
    shape = (dims.copies, dims.parameter_ranks)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def parallelise(
    model: LanguageModel, config: ParallelConfig, world: World, *, seed: int
) -> LanguageModel:
    """Checkpoint, compile, shard, allocate and initialise ``model``, in this order.

    Args:
        model: on the meta device. Parameters, their gradients and the reductions are float32.
        config: the layout, and what is done to save memory or time.
        world: this process among its peers.
        seed: of the parameters.

    Returns:
        ``model`` itself.
    """
    mesh = build_mesh(config, world)
    compile_blocks = (
        config.compile if isinstance(config.compile, bool) else world.device.type == "cuda"
    )
    if compile_blocks:
        # Blocks of one class share the limit of 8, beyond which they would run uncompiled: mixers,
        # lengths, with documents or states, with and without gradients are a graph each.
        torch._dynamo.config.recompile_limit = GRAPHS_OF_A_BLOCK
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


def _shard(model: LanguageModel, config: ParallelConfig, mesh: DeviceMesh) -> None:
    # Without a cast of the parameters: FSDP would cast A_log, dt_bias, mu and the norms too.
    # Autocast lowers the products and nothing else, on one device as on many, for the price of
    # gathering float32.
    shard = functools.partial(
        fully_shard,
        mesh=mesh,
        offload_policy=CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        if config.cpu_offload
        else OffloadPolicy(),
    )
    blocks: list[nn.Module] = list(model.blocks)
    for first in range(0, len(blocks), BLOCKS_TOGETHER):
        together = blocks[first : first + BLOCKS_TOGETHER]
        shard(together, reshard_after_forward=config.reshard_after_forward)
    shard(model, reshard_after_forward=False)
    for module in (*blocks, model):
        assert isinstance(module, FSDPModule)
        # Sums, not means: the loss is already divided by the tokens of all ranks together.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Have FSDP keep its parameters in their sharded form; an evaluation leaves some gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def scale_all(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply every tensor by a scalar tensor, in place, in as few launches as torch can."""
    # torch has no public name for it.
    torch._foreach_mul_(tensors, factor)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """Return the global norm of the gradients of ``model``, without waiting for it. Collective.

    It is a float32 scalar beside the gradients, as of ``torch.nn.utils.get_total_norm``, but of the
    local parts: DTensor's dispatch takes the host longer than the GPU computes.
    """
    sharded = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([local_part(gradient) for gradient in sharded])
    if isinstance(sharded[0], DTensor):
        mesh = sharded[0].device_mesh
        square = norm.square().to(mesh.device_type)  # from the host, where gradients may be
        dist.all_reduce(square, group=mesh.get_group("shard"))
        norm = square.sqrt().to(norm.device)
    return norm


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what gradients of that norm are multiplied by to have at most ``max_norm``."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most ``max_norm``; return the norm before.

    Collective.
    """
    norm = gradient_norm(model)
    gradients = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    scale_all(gradients, clip_factor(norm, max_norm))
    return norm


def compute_in(device: torch.device, bf16: bool) -> torch.autocast:
    """Return the precision of forward passes: products in bfloat16, if asked.

    Parameters and sums stay float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def last_micro_batch(model: nn.Module, last: bool, *, keep_gathered: bool) -> None:
    """Reduce gradients in the last backward pass only: once a step, whatever its micro-batches.

    Args:
        model: as ``parallelise`` returned it.
        last: whether the step's last micro-batch follows.
        keep_gathered: weights that are not freed after the forward pass stay for the next
            micro-batch too, instead of being gathered for each.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or not keep_gathered)
