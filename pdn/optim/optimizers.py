"""The optimiser and its parameter groups."""

import torch
from torch import nn

from pdn.distributed.fsdp import local_part
from pdn.optim.config import AdamWConfig


class LocalAdamW(torch.optim.AdamW):
    """AdamW on the local parts of sharded parameters, whose state stays sharded as they are.

    The update is elementwise, and through DTensor's dispatch it takes the host longer than the GPU.
    """

    def _init_group(self, group, *lists):
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local_part, tensors)
        return has_complex


def build_optimizer(model: nn.Module, config: AdamWConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, never on biases or in modules that refuse it (norms,
    decays, mu, ...).
    """
    decayed, plain = [], []
    for module in model.modules():
        exempt = not getattr(module, "weight_decay", True)
        for name, parameter in module.named_parameters(recurse=False):
            (plain if exempt or name == "bias" else decayed).append(parameter)
    groups = [
        dict(params=decayed, weight_decay=config.weight_decay),
        dict(params=plain, weight_decay=0.0),
    ]
    fused = decayed[0].device.type == "cuda"
    return LocalAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
