"""The gain: how much of the error, or of the value, a token writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pdn.config import Strict
from pdn.models.layers import Linear
from pdn.models.mixers.axes.axis import Axis
from pdn.models.mixers.axes.heads import Heads
from pdn.ops import SigmoidGain, accumulation_dtype


class BetaGainConfig(Strict):
    """Writes with ``range * sigmoid(b_proj(x))`` per head.

    Range 2 admits negative eigenvalues (arXiv 2411.12537).
    """

    kind: Literal["beta"]
    range: float = Field(gt=0, le=2)

    def num_params(self, d_model: int, heads: Heads) -> int:
        return d_model * heads.values

    def build(self, d_model: int, heads: Heads) -> Axis:
        return BetaGain(d_model, heads.values, self.range)


class LonghornGainConfig(Strict):
    """Writes with ``beta / (1 + beta |k|^2)``, the exact step of online least squares.

    See arXiv 2407.14207. With a preconditioner it is ``beta / (1 + beta k.Bk)``.
    """

    kind: Literal["longhorn"]

    def num_params(self, d_model: int, heads: Heads) -> int:
        return d_model * heads.values

    def build(self, d_model: int, heads: Heads) -> Axis:
        return NormGainModule("longhorn", d_model, heads.values)


class EflaGainConfig(Strict):
    """Writes with ``(1 - exp(-beta |k|^2)) / |k|^2``, the exact solution of the delta rule's flow.

    See arXiv 2512.12602.
    """

    kind: Literal["efla"]

    def num_params(self, d_model: int, heads: Heads) -> int:
        return d_model * heads.values

    def build(self, d_model: int, heads: Heads) -> Axis:
        return NormGainModule("efla", d_model, heads.values)


class NlmsGainConfig(Strict):
    """Writes with ``1 / |k|^2``: normalised least mean squares.

    As in test-time regression (arXiv 2501.12352).
    """

    kind: Literal["nlms"]

    def num_params(self, d_model: int, heads: Heads) -> int:
        return 0

    def build(self, d_model: int, heads: Heads) -> Axis:
        return NormGainModule("nlms", d_model, 0)


class NoGainConfig(Strict):
    kind: Literal["none"]

    def num_params(self, d_model: int, heads: Heads) -> int:
        return 0

    def build(self, d_model: int, heads: Heads) -> None:
        return None


GainConfig = Annotated[
    NoGainConfig | BetaGainConfig | LonghornGainConfig | EflaGainConfig | NlmsGainConfig,
    Field(discriminator="kind"),
]


class BetaGain(Axis):
    def __init__(self, d_model: int, num_heads: int, range: float = 1.0):
        super().__init__()
        self.range = range
        self.b_proj = Linear(d_model, num_heads)

    def projections(self) -> tuple[Linear, ...]:
        return (self.b_proj,)

    def forward(self, b: Tensor) -> SigmoidGain:
        return SigmoidGain(b, self.range)


NormGainKind = Literal["longhorn", "efla", "nlms"]


@dataclass(frozen=True)
class NormGain:
    """Makes a gain that depends on the size of the key. beta: [B, T, HV], None for nlms."""

    kind: NormGainKind
    beta: Tensor | None

    def step(self, square: Tensor, curvature: Tensor) -> Tensor:
        """Return the gain times ``square``: what a key of unit norm is written with.

        Args:
            square: k.k + 1e-6, [B, T, HV].
            curvature: k.k, or k.Bk with a preconditioner, [B, T, HV].
        """
        if self.beta is None:
            return torch.ones_like(square)
        if self.kind == "longhorn":
            return self.beta * square / (1 + self.beta * curvature)
        curvature = curvature.clamp(min=1e-12)
        return -torch.expm1(-self.beta * curvature) / curvature * square


class NormGainModule(Axis):
    def __init__(self, kind: NormGainKind, d_model: int, num_heads: int):
        super().__init__()
        self.kind: NormGainKind = kind
        self.b_proj = Linear(d_model, num_heads) if num_heads else None

    def projections(self) -> tuple[Linear, ...]:
        return () if self.b_proj is None else (self.b_proj,)

    def forward(self, b: Tensor | None = None) -> NormGain:
        return NormGain(self.kind, None if b is None else b.to(accumulation_dtype(b)).sigmoid())
