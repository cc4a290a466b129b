"""Take learning rates to wider models, by muP (arXiv 2203.03466), heads kept, and to deeper ones.

A model of width ``d_model`` whose ``base_width`` is b is trained with the rates that were found at
``d_model = b``, with as many heads as the width holds of one size. With f = b / d_model:

- the weight of a linear map whose inputs grow with the width: initialised with variance 0.02^2 f,
  its learning rate is f times the group's;
- the norm before the head: initialised at f, its learning rate times f. To Adam that is the same
  as to multiply the logits by f, the rule for the readout, tied to the embedding or not, and
  needs nothing in the forward pass, in exports or when decoding;
- all else stays as it is: the embedding and an untied head, the second map of a bottleneck of
  fixed size, biases, norms, convolutions, decays, gains' biases, mu and what else a head has.

A model of ``num_layers`` whose ``base_depth`` is b is trained with the rates that were found with b
layers (CompleteP, arXiv 2505.01618): what each mixer and MLP adds to the residual is multiplied by
b / num_layers. To Adam that is the same as to multiply the initial values and the learning rate of
its last map by it, so that nothing changes in the forward pass, in exports or when decoding.

The weight decay of what has a factor is divided by it, so that its product with the rate, the
share that a step takes away, is that of the base.

Adam's eps follows the gradients (CompleteP, equation 40): it is multiplied by f, and inside blocks
by base_depth / num_layers. Not so where a factor of the initial values has taken the place of one
in the forward pass, which divides the gradient by it: the norm before the head has no f, the last
maps have no factor of the depth.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pdn.models.config import ModelConfig
from pdn.models.layers import Linear, RMSNorm, SwiGLU
from pdn.models.mixers.base import TokenMixer

LAST_MAPS = ("o_proj", "out_proj")  # of mixers, which write to the residual


def set_width_factors(blocks: Iterable[nn.Module], norm: RMSNorm, factor: float) -> None:
    """Tell the layers of a model how its width scales them, before they are initialised.

    Args:
        blocks: of the model.
        norm: the one before the head.
        factor: base width over width.
    """
    norm.width_factor = factor
    for block in blocks:
        for module in block.modules():
            if isinstance(module, Linear) and module.grows:
                module.width_factor = factor


def set_depth_factors(mixer: TokenMixer, mlp: SwiGLU | None, factor: float) -> None:
    """Tell the last maps of a block's mixer and MLP how the model's depth scales them, likewise.

    Args:
        mixer, mlp: of any block.
        factor: base depth over depth.

    Raises:
        ValueError: the mixer has no last map of a known name.
    """
    children = dict(mixer.named_children())
    last = [children[name] for name in LAST_MAPS if name in children]
    if len(last) != 1 or not isinstance(last[0], Linear):
        raise ValueError(
            f"model.base_depth: {type(mixer).__name__} has no last map named "
            f"{' or '.join(LAST_MAPS)}; expected model.base_depth = null"
        )
    last[0].depth_factor = factor
    if mlp is not None:
        mlp.down_proj.depth_factor = factor


def lr_factors(model: nn.Module) -> dict[str, float]:
    """Return the factor of the learning rate of each parameter that has one, by name.

    Args:
        model: a LanguageModel, sharded or not.
    """
    return {
        f"{prefix}.weight": factor
        for prefix, module in model.named_modules()
        if (factor := getattr(module, "width_factor", 1.0) * getattr(module, "depth_factor", 1.0))
        != 1.0
    }


def eps_factors(model: nn.Module, config: ModelConfig) -> dict[str, float]:
    """Return the factor of Adam's eps of each parameter, by name.

    Args:
        model: a LanguageModel, sharded or not.
        config: of the model.
    """
    width = 1.0 if config.base_width is None else config.base_width / config.d_model
    depth = 1.0 if config.base_depth is None else config.base_depth / config.num_layers
    found = {}
    for prefix, module in model.named_modules():
        in_depth = 1.0
        if "blocks" in prefix.split("."):
            in_depth = depth / getattr(module, "depth_factor", 1.0)
        for name, _ in module.named_parameters(prefix, recurse=False):
            found[name] = 1.0 if prefix == "norm" else width * in_depth
    return found
