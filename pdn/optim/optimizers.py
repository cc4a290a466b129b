"""From a configuration to the optimisers of a model."""

from __future__ import annotations

import torch

from pdn.models.language_model import LanguageModel
from pdn.models.width import eps_factors, lr_factors
from pdn.optim.adamw import LocalAdamW
from pdn.optim.config import MuonConfig, OptimConfig
from pdn.optim.container import OptimizerContainer
from pdn.optim.groups import group_options, named_groups
from pdn.optim.muon import ShardedMuon


def build_optimizer(model: LanguageModel, config: OptimConfig) -> OptimizerContainer:
    """Return the optimisers of ``model``, sharded or not, or on the meta device.

    Every group has its own peak learning rate and weight decay; ``set_lr_fraction`` scales them.
    """
    of_lr, of_eps = lr_factors(model), eps_factors(model, model.config)
    groups = []
    for group, found in named_groups(model).items():
        factors = {name: (of_lr.get(name, 1.0), of_eps[name]) for name in found}
        for pair in sorted(set(factors.values())):
            mine = [found[name] for name in found if factors[name] == pair]
            options = group_options(config, group, pair[0])
            if pair[1] != 1:
                options["eps"] = config.eps * pair[1]
            groups.append(dict(params=mine, lr=options["peak_lr"], **options))
    if config.kind == "adamw":
        return OptimizerContainer(model, [_adamw(groups, config)], ema=config.ema)
    matrices = [group for group in groups if group["name"] == "matrices"]
    others = [group for group in groups if group["name"] != "matrices"]
    optimizers = [_muon(matrices, config)] if matrices else []
    return OptimizerContainer(model, [*optimizers, _adamw(others, config)], ema=config.ema)


def _adamw(groups: list[dict], config: OptimConfig) -> LocalAdamW:
    fused = groups[0]["params"][0].device.type == "cuda"
    return LocalAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _muon(groups: list[dict], config: MuonConfig) -> ShardedMuon:
    return ShardedMuon(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        adjust_lr_fn=config.adjust_lr,
        ns_dtype=getattr(torch, config.ns_dtype),
    )
