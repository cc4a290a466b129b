"""The axes of the design space: decay, gain, preconditioner, output gate (arXiv 2604.21100, table
1).

Each axis is a discriminated union of small configs; each config counts its parameters and builds
its module. ``evaluate`` turns the block's input x [B, T, D] into the descriptors that ``pdn.ops``
takes, so that kernels can fuse the activations: a module has ``projections`` of x, and is called
with what they give.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pdn.config import Strict
from pdn.models.layers import Linear, assign, uniform
from pdn.ops import DiagonalPreconditioner, SigmoidGain, SoftplusDecay

DT_RANGE = (1e-3, 0.1)
DT_FLOOR = 1e-4


def init_dt_bias(parameter: Tensor, generator: torch.Generator) -> None:
    """softplus^-1(dt), dt log-uniform in [1e-3, 0.1], as in Mamba-2."""
    low, high = (math.log(x) for x in DT_RANGE)
    dt = uniform(parameter.shape, low, high, generator).exp().clamp(min=DT_FLOOR)
    assign(parameter, dt + torch.log(-torch.expm1(-dt)))


def init_A_log(parameter: Tensor, generator: torch.Generator, low: float) -> None:
    """log U(low, 16), with U at least 1e-4."""
    assign(parameter, uniform(parameter.shape, low, 16.0, generator).clamp(min=1e-4).log())


def evaluate(x: Tensor, *axes: nn.Module | None) -> list:
    """What each axis makes of x [B, T, D], None where there is no axis, with all projections of x
    as one product.

    They are narrow, most of them a number a head, and a product takes as long as reading x, or
    writing its gradient.
    """
    projections = [() if axis is None else axis.projections() for axis in axes]
    weights = [linear.weight for own in projections for linear in own]
    if not weights:
        return [None] * len(axes)
    parts = F.linear(x, torch.cat(weights)).split([len(weight) for weight in weights], -1)
    parts = [part.contiguous() for part in parts]
    results = []
    for axis, own in zip(axes, projections, strict=True):
        results.append(None if axis is None else axis(*parts[: len(own)]))
        parts = parts[len(own) :]
    return results


# ---------------------------------------------------------------- decay


class ScalarDecayConfig(Strict):
    """One log-decay a head: ``-exp(A_log) softplus(a_proj(x) + dt_bias)``."""

    kind: Literal["scalar"]

    def num_params(self, d_model: int, num_heads: int, head_dim: int) -> int:
        return d_model * num_heads + 2 * num_heads

    def build(self, d_model: int, num_heads: int, head_dim: int) -> nn.Module:
        return ScalarDecay(d_model, num_heads)


class DiagonalDecayConfig(Strict):
    """One log-decay a key channel, through a bottleneck of head_dim."""

    kind: Literal["diagonal"]

    def num_params(self, d_model: int, num_heads: int, head_dim: int) -> int:
        return (
            d_model * head_dim + head_dim * num_heads * head_dim + num_heads + num_heads * head_dim
        )

    def build(self, d_model: int, num_heads: int, head_dim: int) -> nn.Module:
        return DiagonalDecay(d_model, num_heads, head_dim)


class NoDecayConfig(Strict):
    kind: Literal["none"]

    def num_params(self, d_model: int, num_heads: int, head_dim: int) -> int:
        return 0

    def build(self, d_model: int, num_heads: int, head_dim: int) -> None:
        return None


DecayConfig = Annotated[
    NoDecayConfig | ScalarDecayConfig | DiagonalDecayConfig, Field(discriminator="kind")
]


class DecayParameters(nn.Module):
    """A_log [H] and dt_bias [H] or [H, K]: without weight decay."""

    weight_decay = False

    def __init__(self, num_heads: int, *per_head: int, A_min: float = 0.0):
        super().__init__()
        self.A_min = A_min
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads, *per_head))

    def forward(self, x: Tensor) -> SoftplusDecay:
        return SoftplusDecay(x, self.A_log, self.dt_bias)

    def reset_parameters(self, generator: torch.Generator) -> None:
        init_A_log(self.A_log, generator, self.A_min)
        init_dt_bias(self.dt_bias, generator)


class ScalarDecay(nn.Module):
    def __init__(self, d_model: int, num_heads: int):
        super().__init__()
        self.a_proj = Linear(d_model, num_heads)
        self.rates = DecayParameters(num_heads)

    def projections(self) -> tuple[Linear, ...]:
        return (self.a_proj,)

    def forward(self, a: Tensor) -> SoftplusDecay:
        return self.rates(a)


class DiagonalDecay(nn.Module):
    def __init__(self, d_model: int, num_heads: int, head_dim: int):
        super().__init__()
        self.f_down = Linear(d_model, head_dim)
        self.f_up = Linear(head_dim, num_heads * head_dim)
        self.rates = DecayParameters(num_heads, head_dim, A_min=1.0)

    def projections(self) -> tuple[Linear, ...]:
        return (self.f_down,)

    def forward(self, f: Tensor) -> SoftplusDecay:
        return self.rates(self.f_up(f).unflatten(-1, self.rates.dt_bias.shape))


# ---------------------------------------------------------------- gain


class BetaGainConfig(Strict):
    """``range * sigmoid(b_proj(x))`` per head; range 2 admits negative eigenvalues (arXiv
    2411.12537).
    """

    kind: Literal["beta"]
    range: float = Field(gt=0, le=2)

    def num_params(self, d_model: int, num_heads: int) -> int:
        return d_model * num_heads

    def build(self, d_model: int, num_heads: int) -> nn.Module:
        return BetaGain(d_model, num_heads, self.range)


class NoGainConfig(Strict):
    kind: Literal["none"]

    def num_params(self, d_model: int, num_heads: int) -> int:
        return 0

    def build(self, d_model: int, num_heads: int) -> None:
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


# ---------------------------------------------------------------- preconditioner


class DiagonalPreconditionerConfig(Strict):
    """The practical preconditioner, with a decay and a gain of its own (tying them to the main ones
    raises the loss).
    """

    kind: Literal["diagonal"]
    form: Literal["squash", "inverse"]
    bound: float = Field(ge=1, le=2)  # x of the paper; stable for beta * bound <= 2
    mu_init: float

    def num_params(self, d_model: int, num_heads: int) -> int:
        return 2 * d_model * num_heads + (3 if self.form == "squash" else 2) * num_heads

    def build(self, d_model: int, num_heads: int) -> nn.Module:
        return Preconditioner(self, d_model, num_heads)


class NoPreconditionerConfig(Strict):
    kind: Literal["none"]

    def num_params(self, d_model: int, num_heads: int) -> int:
        return 0

    def build(self, d_model: int, num_heads: int) -> None:
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


# ---------------------------------------------------------------- output gate


class SigmoidGateConfig(Strict):
    """``o * sigmoid(g_proj(x))`` after the norm, through a bottleneck of head_dim, with a bias (as
    in KDA).
    """

    kind: Literal["sigmoid"]

    def num_params(self, d_model: int, num_heads: int, head_dim: int) -> int:
        return d_model * head_dim + head_dim * num_heads * head_dim + num_heads * head_dim

    def build(self, d_model: int, num_heads: int, head_dim: int) -> nn.Module:
        return SigmoidGate(d_model, num_heads, head_dim)


class NoGateConfig(Strict):
    kind: Literal["none"]

    def num_params(self, d_model: int, num_heads: int, head_dim: int) -> int:
        return 0

    def build(self, d_model: int, num_heads: int, head_dim: int) -> None:
        return None


OutputGateConfig = Annotated[NoGateConfig | SigmoidGateConfig, Field(discriminator="kind")]


class SigmoidGate(nn.Module):
    def __init__(self, d_model: int, num_heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.g_down = Linear(d_model, head_dim)
        self.g_up = Linear(head_dim, num_heads * head_dim, bias=True)

    def projections(self) -> tuple[Linear, ...]:
        return (self.g_down,)

    def forward(self, g: Tensor) -> Tensor:
        """What the output [B, T, H, V] is multiplied with."""
        return F.sigmoid(self.g_up(g).unflatten(-1, (-1, self.head_dim)))
