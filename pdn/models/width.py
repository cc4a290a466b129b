"""Take the learning rate of a narrow model to a wide one: muP (arXiv 2203.03466), heads kept.

A model of width ``d_model`` whose ``base_width`` is b is trained with the rates that were found at
``d_model = b``, with as many heads as the width holds of one size. With f = b / d_model:

- the weight of a linear map whose inputs grow with the width: initialised with variance 0.02^2 f,
  its learning rate is f times the group's;
- the norm before the head: initialised at f, its learning rate times f. To Adam that is the same
  as to multiply the logits by f, the rule for the readout, tied to the embedding or not, and
  needs nothing in the forward pass, in exports or when decoding;
- all else stays as it is: the embedding and an untied head, the second map of a bottleneck of
  fixed size, biases, norms, convolutions, decays, gains' biases, mu and what else a head has.

The weight decay of what has a factor is divided by it, so that its product with the rate, the
share that a step takes away, is that of the base. Adam's eps is not scaled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from pdn.models.layers import Linear

if TYPE_CHECKING:
    from pdn.models.language_model import LanguageModel


def set_width_factors(model: LanguageModel, factor: float) -> None:
    """Tell the layers of a model how its width scales them, before they are initialised.

    Args:
        model: of any width.
        factor: base width over width.
    """
    growing = [
        module
        for block in model.blocks
        for module in block.modules()
        if isinstance(module, Linear) and module.grows
    ]
    for module in [*growing, model.norm]:
        module.width_factor = factor


def lr_factors(model: nn.Module) -> dict[str, float]:
    """Return the factor of the learning rate of each parameter that has one, by name.

    Args:
        model: a LanguageModel, sharded or not.
    """
    return {
        f"{prefix}.weight": module.width_factor
        for prefix, module in model.named_modules()
        if getattr(module, "width_factor", 1.0) != 1.0
    }
