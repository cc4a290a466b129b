"""The gain: how much of the error, or of the value, a token writes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from pdn.config import Strict
from pdn.models.layers import Linear
from pdn.models.mixers.axes.heads import Heads
from pdn.ops import SigmoidGain


class BetaGainConfig(Strict):
    """``range * sigmoid(b_proj(x))`` per head; range 2 admits negative eigenvalues (arXiv
    2411.12537).
    """

    kind: Literal["beta"]
    range: float = Field(gt=0, le=2)

    def num_params(self, d_model: int, heads: Heads) -> int:
        return d_model * heads.values

    def build(self, d_model: int, heads: Heads) -> nn.Module:
        return BetaGain(d_model, heads.values, self.range)


class NoGainConfig(Strict):
    kind: Literal["none"]

    def num_params(self, d_model: int, heads: Heads) -> int:
        return 0

    def build(self, d_model: int, heads: Heads) -> None:
        return None


GainConfig = Annotated[NoGainConfig | BetaGainConfig, Field(discriminator="kind")]


class BetaGain(nn.Module):
    def __init__(self, d_model: int, num_heads: int, range: float = 1.0):
        super().__init__()
        self.range = range
        self.b_proj = Linear(d_model, num_heads)

    def projections(self) -> tuple[Linear, ...]:
        return (self.b_proj,)

    def forward(self, b: Tensor) -> SigmoidGain:
        return SigmoidGain(b, self.range)
