"""The preconditioner: which channels of the key, or of the query, count how much."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pdn.config import Strict
from pdn.models.layers import Linear, assign
from pdn.models.mixers.axes.decay import ScalarDecay
from pdn.models.mixers.axes.gain import BetaGain
from pdn.models.mixers.axes.heads import Heads
from pdn.ops import DiagonalPreconditioner


class DiagonalPreconditionerConfig(Strict):
    """The practical preconditioner, with a decay and a gain of its own (tying them to the main ones
    raises the loss).
    """

    kind: Literal["diagonal"]
    form: Literal["squash", "inverse"]
    bound: float = Field(ge=1, le=2)  # x of the paper; stable for beta * bound <= 2
    mu_init: float
    # gates and centre for each key head (the released PGDN) or value head (the released PKDA)
    per_head_of: Literal["keys", "values"] = "keys"

    def num_heads(self, heads: Heads) -> int:
        """How many heads have a curvature A of their own."""
        return heads.keys if self.per_head_of == "keys" else heads.values

    def num_params(self, d_model: int, heads: Heads) -> int:
        n = self.num_heads(heads)
        return 2 * d_model * n + (3 if self.form == "squash" else 2) * n

    def build(self, d_model: int, heads: Heads) -> nn.Module:
        return Preconditioner(self, d_model, self.num_heads(heads))


class NoPreconditionerConfig(Strict):
    kind: Literal["none"]

    def num_heads(self, heads: Heads) -> int:
        return 0

    def num_params(self, d_model: int, heads: Heads) -> int:
        return 0

    def build(self, d_model: int, heads: Heads) -> None:
        return None


PreconditionerConfig = Annotated[
    NoPreconditionerConfig | DiagonalPreconditionerConfig, Field(discriminator="kind")
]


class Center(nn.Module):
    """mu [H], the centre of log A in the squashed preconditioner."""

    weight_decay = False

    def __init__(self, num_heads: int, init: float):
        super().__init__()
        self.init = init
        self.mu = nn.Parameter(torch.empty(num_heads))

    def forward(self) -> Tensor:
        return self.mu

    def reset_parameters(self, generator: torch.Generator) -> None:
        assign(self.mu, torch.full(self.mu.shape, self.init, device=generator.device))


class Preconditioner(nn.Module):
    def __init__(self, config: DiagonalPreconditionerConfig, d_model: int, num_heads: int):
        super().__init__()
        self.config = config
        self.decay = ScalarDecay(d_model, num_heads)
        self.gain = BetaGain(d_model, num_heads)
        self.center = Center(num_heads, config.mu_init) if config.form == "squash" else None

    def projections(self) -> tuple[Linear, ...]:
        return *self.decay.projections(), *self.gain.projections()

    def forward(self, a: Tensor, b: Tensor) -> DiagonalPreconditioner:
        mu = None if self.center is None else self.center()
        return DiagonalPreconditioner(
            self.decay(a), self.gain(b), mu, self.config.bound, form=self.config.form
        )
