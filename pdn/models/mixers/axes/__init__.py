"""The axes of the design space: decay, gain, preconditioner, output gate.

See arXiv 2604.21100, table 1. Each axis is a discriminated union of small configs; each config
counts its parameters and builds its module. ``evaluate`` turns the block's input x [B, T, D] into
the descriptors that ``pdn.ops`` takes, so that kernels can fuse the activations: a module has
``projections`` of x, and is called with what they give.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdn.models.mixers.axes.decay import DecayConfig, init_A_log, init_dt_bias
from pdn.models.mixers.axes.gain import BetaGain, GainConfig
from pdn.models.mixers.axes.heads import Heads
from pdn.models.mixers.axes.output_gate import OutputGateConfig
from pdn.models.mixers.axes.preconditioner import PreconditionerConfig, with_main_gates

__all__ = [
    "BetaGain",
    "DecayConfig",
    "GainConfig",
    "Heads",
    "OutputGateConfig",
    "PreconditionerConfig",
    "evaluate",
    "init_A_log",
    "init_dt_bias",
    "with_main_gates",
]


def evaluate(x: Tensor, *axes: nn.Module | None) -> list:
    """Return what each axis makes of x [B, T, D], None where there is no axis.

    All projections of x are one product. They are narrow, most of them a number a head, and a
    product takes as long as reading x, or writing its gradient. An axis whose projection is as wide
    as x has no part in it: it is ``wide`` and takes x itself.
    """
    projections = [
        () if axis is None or getattr(axis, "wide", False) else axis.projections() for axis in axes
    ]
    weights = [linear.weight for own in projections for linear in own]
    parts = []
    if weights:
        parts = F.linear(x, torch.cat(weights)).split([len(weight) for weight in weights], -1)
        parts = [part.contiguous() for part in parts]
    results = []
    for axis, own in zip(axes, projections, strict=True):
        if axis is None:
            results.append(None)
        elif getattr(axis, "wide", False):
            results.append(axis(x))
        else:
            results.append(axis(*parts[: len(own)]))
            parts = parts[len(own) :]
    return results
