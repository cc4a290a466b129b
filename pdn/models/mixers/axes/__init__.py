"""The axes of the design space: decay, gain, preconditioner, output gate.

See arXiv 2604.21100, table 1. Each axis is a discriminated union of small configs; each config
counts its parameters and builds its module. ``evaluate`` turns the block's input x [B, T, D] into
the descriptors that ``pdn.ops`` takes, so that kernels can fuse the activations: a module has
``projections`` of x, and is called with what they give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pdn.models.layers import Linear, is_plain
from pdn.models.mixers.axes.axis import Axis
from pdn.models.mixers.axes.decay import DecayConfig, init_A_log, init_dt_bias
from pdn.models.mixers.axes.gain import BetaGain, GainConfig
from pdn.models.mixers.axes.heads import Heads
from pdn.models.mixers.axes.output_gate import OutputGateConfig
from pdn.models.mixers.axes.preconditioner import PreconditionerConfig, with_main_gates

__all__ = [
    "Axis",
    "BetaGain",
    "DecayConfig",
    "GainConfig",
    "Heads",
    "OutputGateConfig",
    "PreconditionerConfig",
    "evaluate",
    "init_A_log",
    "init_dt_bias",
    "narrow_projections",
    "project",
    "with_main_gates",
]

# Rows of 128 bytes in 16 bits. Wider than WIDE, the compiler pads others to that by itself, and
# copies them for operators of our own.
ALIGNED, WIDE = 64, 1024


def narrow_projections(*axes: Axis | None) -> list[Linear]:
    """List the projections of x that the axes take together.

    They are narrow, most of them a number a head. An axis whose projection is as wide as x has none
    here: it is ``wide`` and takes x itself.
    """
    return [linear for axis in axes for linear in _narrow(axis)]


def _narrow(axis: Axis | None) -> Sequence[Linear]:
    return () if axis is None else axis.projections()


def project(x: Tensor, linears: Sequence[Linear]) -> Tensor:
    """Compute what several linear maps without bias make of x, side by side, as one product.

    A narrow product takes as long as reading x, or writing its gradient; and the gradients of x by
    several products have to be summed. A step of decoding on a CPU takes as long as reading the
    weights, and joining them would read and write them once more: there they stay several. So do
    those that something was put around, each of which is called.

    Returns:
        [B, T, sum of their sizes]; if that is more than ``WIDE``, zeros may fill it up to a
        multiple of ``ALIGNED``.
    """
    if not all(is_plain(linear, Linear) for linear in linears):
        return torch.cat([linear(x) for linear in linears], -1)
    weights = [linear.weight for linear in linears]
    if x.device.type == "cpu" and x.shape[1] == 1:
        return torch.cat([F.linear(x, weight) for weight in weights], -1)
    rows = sum(map(len, weights))
    if rows > WIDE and rows % ALIGNED:
        weights.append(weights[0].new_zeros(-rows % ALIGNED, weights[0].shape[1]))
    return F.linear(x, torch.cat(weights))


def evaluate(x: Tensor, *axes: Axis | None, projected: Tensor | None = None) -> list:
    """Return what each axis makes of x [B, T, D], None where there is no axis.

    Args:
        x: the mixer's input.
        axes: modules.
        projected: what ``project`` made of x for ``narrow_projections`` of the axes; computed here
            by default.
    """
    linears = narrow_projections(*axes)
    parts: Sequence[Tensor] = ()
    if linears:
        projected = project(x, linears) if projected is None else projected
        sizes = [linear.out_features for linear in linears]
        parts = projected[..., : sum(sizes)].split(sizes, -1)
        parts = [part.contiguous() for part in parts]
    results = []
    for axis in axes:
        own = len(_narrow(axis))
        if axis is None:
            results.append(None)
        elif axis.wide:
            results.append(axis(x))
        else:
            results.append(axis(*parts[:own]))
        parts = parts[own:]
    return results
