"""The optimiser and its parameter groups."""

import torch
from torch import nn

from pdn.config import AdamWConfig


def build_optimizer(model: nn.Module, config: AdamWConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, never on biases or in modules that refuse it (norms, decays, mu, ...)."""
    decayed, plain = [], []
    for module in model.modules():
        exempt = not getattr(module, "weight_decay", True)
        for name, parameter in module.named_parameters(recurse=False):
            (plain if exempt or name == "bias" else decayed).append(parameter)
    groups = [dict(params=decayed, weight_decay=config.weight_decay), dict(params=plain, weight_decay=0.0)]
    fused = decayed[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
