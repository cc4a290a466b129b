"""The output gate: what the normalised output is multiplied with."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pdn.config import Strict
from pdn.models.layers import Linear
from pdn.models.mixers.axes.axis import Axis
from pdn.models.mixers.axes.heads import Heads

ACTIVATIONS = {"sigmoid": F.sigmoid, "swish": F.silu}


class GateConfig(Strict):
    """Multiplies o by ``activation(g(x))`` after the norm, for each channel of each value head.

    rank low: g goes through a bottleneck of the size of a value head, with a bias (KDA); full: one
    matrix without bias (Gated DeltaNet, Comba).
    """

    kind: Literal["sigmoid", "swish"]
    rank: Literal["low", "full"] = "low"

    def num_params(self, d_model: int, heads: Heads) -> int:
        if self.rank == "full":
            return d_model * heads.value_width
        return heads.value_dim * (d_model + heads.value_width) + heads.value_width

    def build(self, d_model: int, heads: Heads) -> Axis:
        return (LowRankGate if self.rank == "low" else FullRankGate)(self.kind, d_model, heads)


class NoGateConfig(Strict):
    kind: Literal["none"]

    def num_params(self, d_model: int, heads: Heads) -> int:
        return 0

    def build(self, d_model: int, heads: Heads) -> None:
        return None


OutputGateConfig = Annotated[NoGateConfig | GateConfig, Field(discriminator="kind")]


class LowRankGate(Axis):
    def __init__(self, kind: str, d_model: int, heads: Heads):
        super().__init__()
        self.activation, self.value_dim = ACTIVATIONS[kind], heads.value_dim
        self.g_down = Linear(d_model, heads.value_dim)
        self.g_up = Linear(heads.value_dim, heads.value_width, bias=True, grows=False)

    def projections(self) -> tuple[Linear, ...]:
        return (self.g_down,)

    def forward(self, g: Tensor) -> Tensor:
        """Return what the output [B, T, HV, V] is multiplied with."""
        return self.activation(self.g_up(g).unflatten(-1, (-1, self.value_dim)))


class FullRankGate(Axis):
    wide = True  # takes x itself: see ``evaluate``

    def __init__(self, kind: str, d_model: int, heads: Heads):
        super().__init__()
        self.activation, self.value_dim = ACTIVATIONS[kind], heads.value_dim
        self.g_proj = Linear(d_model, heads.value_width)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the output [B, T, HV, V] is multiplied with."""
        return self.activation(self.g_proj(x).unflatten(-1, (-1, self.value_dim)))
