"""Which group a parameter belongs to, and what the configuration gives each group."""

from __future__ import annotations

from torch import nn

from pdn.optim.config import GroupsConfig, OptimConfig

GROUPS = tuple(GroupsConfig.model_fields)


def named_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Sort the parameters of ``model``, a LanguageModel, into the groups of ``GroupsConfig``.

    The rule, first match first:

    - ``vectors``: biases, and all parameters of a module that says ``weight_decay = False``
      (norms, A_log, dt_bias, mu, D, ...);
    - ``embeddings``: whatever else lies outside ``blocks``: the embedding, an untied head;
    - ``matrices``: weights of ``nn.Linear`` modules;
    - ``filters``: the rest, such as the weights of short convolutions.

    Returns:
        Group → parameter name → parameter, in the model's order; a group may be empty.
    """
    found: dict[str, dict[str, nn.Parameter]] = {group: {} for group in GROUPS}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            found[_group(prefix, module, name)][name] = parameter
    return found


def _group(prefix: str, module: nn.Module, name: str) -> str:
    if name.endswith("bias") or not getattr(module, "weight_decay", True):
        return "vectors"
    if "blocks" not in prefix.split("."):
        return "embeddings"
    return "matrices" if isinstance(module, nn.Linear) else "filters"


def group_options(config: OptimConfig, group: str, factor: float = 1.0) -> dict[str, float | str]:
    """Return the options of a torch parameter group: ``name``, ``peak_lr``, ``weight_decay``.

    Args:
        config: of the optimiser.
        group: one of ``GROUPS``.
        factor: of the learning rate, by which the weight decay is divided: ``pdn.models.width``.
    """
    options = getattr(config.groups, group)
    weight_decay = options.weight_decay
    if weight_decay is None:
        exempt = group == "vectors" and config.decay == "matrices"
        weight_decay = 0.0 if exempt else config.weight_decay
    return {
        "name": group,
        "peak_lr": config.lr * options.lr_scale * factor,
        "weight_decay": weight_decay / factor,
    }
