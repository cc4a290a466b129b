"""The decay: how fast the state forgets."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pdn.config import Strict
from pdn.models.layers import Linear, assign, uniform
from pdn.models.mixers.axes.axis import Axis
from pdn.models.mixers.axes.heads import Heads
from pdn.ops import SoftplusDecay, accumulation_dtype

DT_RANGE = (1e-3, 0.1)
DT_FLOOR = 1e-4


def init_dt_bias(
    parameter: Tensor, generator: torch.Generator, order: Tensor | None = None
) -> None:
    """Initialise to softplus^-1(dt), dt log-uniform in [1e-3, 0.1], as in Mamba-2.

    Args:
        parameter: [H] or [H, K], set in place.
        generator: of the values.
        order: see ``_draw``.
    """
    low, high = (math.log(x) for x in DT_RANGE)
    dt = _draw(parameter.shape, low, high, generator, order).exp().clamp(min=DT_FLOOR)
    assign(parameter, dt + torch.log(-torch.expm1(-dt)))


def init_A_log(
    parameter: Tensor, generator: torch.Generator, low: float, order: Tensor | None = None
) -> None:
    """Initialise to log U(low, 16), with U at least 1e-4.

    Args:
        parameter: [H], set in place.
        generator: of the values.
        low: lower end of the range of A.
        order: see ``_draw``.
    """
    assign(parameter, _draw(parameter.shape, low, 16.0, generator, order).clamp(min=1e-4).log())


def _draw(
    shape: torch.Size, low: float, high: float, generator: torch.Generator, order: Tensor | None
) -> Tensor:
    """Draw values of this shape from a range.

    Args:
        shape: of the result.
        low, high: ends of the range.
        generator: of the values.
        order: [H], a permutation of 0 to H - 1: each value comes from an H-th of the range of its
            own, the lowest where this is 0. None: each comes from all of the range.
    """
    if order is None:
        return uniform(shape, low, high, generator)
    return low + (high - low) / len(order) * (order + uniform(shape, 0.0, 1.0, generator))


class ScalarDecayConfig(Strict):
    """Gives a head one log-decay: ``-exp(A_log) softplus(a_proj(x) + dt_bias)``.

    Drawn head by head, the few heads of a small layer may all remember long, or all forget soon.
    ``spread`` has them start stratified: of both A and dt each head has an H-th of the range of its
    own, the same one of both, so that a layer begins with short memories and with long ones.
    """

    kind: Literal["scalar"]
    spread: bool = False

    def num_params(self, d_model: int, heads: Heads) -> int:
        return d_model * heads.values + 2 * heads.values

    def build(self, d_model: int, heads: Heads) -> Axis:
        return ScalarDecay(d_model, heads.values, self.spread)


class DiagonalDecayConfig(Strict):
    """Gives each key channel a log-decay, by a bottleneck as wide as a value head (as in KDA)."""

    kind: Literal["diagonal"]

    def num_params(self, d_model: int, heads: Heads) -> int:
        channels = heads.values * heads.key_dim
        return heads.value_dim * (d_model + channels) + heads.values + channels

    def build(self, d_model: int, heads: Heads) -> Axis:
        return DiagonalDecay(d_model, heads)


class LogSigmoidDecayConfig(Strict):
    """Gives each key channel a log-decay, ``logsigmoid(f(x)) / normaliser``.

    f goes through a bottleneck and has a bias, as in the released gated linear attention.
    """

    kind: Literal["logsigmoid"]
    rank: int = Field(ge=1)  # of the bottleneck
    normaliser: float = Field(gt=0)

    def num_params(self, d_model: int, heads: Heads) -> int:
        channels = heads.values * heads.key_dim
        return self.rank * (d_model + channels) + channels

    def build(self, d_model: int, heads: Heads) -> Axis:
        return LogSigmoidDecay(self, d_model, heads)


class FixedDecayConfig(Strict):
    """Gives a head one decay that is not learned, as in RetNet (arXiv 2307.08621).

    It is ``1 - 2^(-5 - h)`` of head h = 0, 1, ….
    """

    kind: Literal["fixed"]

    def num_params(self, d_model: int, heads: Heads) -> int:
        return 0

    def build(self, d_model: int, heads: Heads) -> Axis:
        return FixedDecay(heads.values)


class NoDecayConfig(Strict):
    kind: Literal["none"]

    def num_params(self, d_model: int, heads: Heads) -> int:
        return 0

    def build(self, d_model: int, heads: Heads) -> None:
        return None


DecayConfig = Annotated[
    NoDecayConfig
    | FixedDecayConfig
    | ScalarDecayConfig
    | DiagonalDecayConfig
    | LogSigmoidDecayConfig,
    Field(discriminator="kind"),
]


class DecayParameters(nn.Module):
    """Holds A_log [H] and dt_bias [H] or [H, K]: without weight decay."""

    weight_decay = False

    def __init__(self, num_heads: int, *per_head: int, A_min: float = 0.0, spread: bool = False):
        super().__init__()
        self.A_min, self.spread = A_min, spread
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads, *per_head))

    def forward(self, x: Tensor) -> SoftplusDecay:
        return SoftplusDecay(x, self.A_log, self.dt_bias)

    def reset_parameters(self, generator: torch.Generator) -> None:
        order = None
        if self.spread:
            order = torch.randperm(len(self.A_log), generator=generator, device=generator.device)
        init_A_log(self.A_log, generator, self.A_min, order)
        init_dt_bias(self.dt_bias, generator, order)


class ScalarDecay(Axis):
    def __init__(self, d_model: int, num_heads: int, spread: bool = False):
        super().__init__()
        self.a_proj = Linear(d_model, num_heads)
        self.rates = DecayParameters(num_heads, spread=spread)

    def projections(self) -> tuple[Linear, ...]:
        return (self.a_proj,)

    def forward(self, a: Tensor) -> SoftplusDecay:
        return self.rates(a)


class DiagonalDecay(Axis):
    def __init__(self, d_model: int, heads: Heads):
        super().__init__()
        self.f_down = Linear(d_model, heads.value_dim)
        self.f_up = Linear(heads.value_dim, heads.values * heads.key_dim, grows=False)
        self.rates = DecayParameters(heads.values, heads.key_dim, A_min=1.0)

    def projections(self) -> tuple[Linear, ...]:
        return (self.f_down,)

    def forward(self, f: Tensor) -> SoftplusDecay:
        return self.rates(self.f_up(f).unflatten(-1, self.rates.dt_bias.shape))


class LogSigmoidDecay(Axis):
    def __init__(self, config: LogSigmoidDecayConfig, d_model: int, heads: Heads):
        super().__init__()
        self.normaliser, self.shape = config.normaliser, (heads.values, heads.key_dim)
        self.f_down = Linear(d_model, config.rank)
        self.f_up = Linear(config.rank, heads.values * heads.key_dim, bias=True, grows=False)

    def projections(self) -> tuple[Linear, ...]:
        return (self.f_down,)

    def forward(self, f: Tensor) -> Tensor:
        f = self.f_up(f).unflatten(-1, self.shape)
        return F.logsigmoid(f.to(accumulation_dtype(f))) / self.normaliser


class FixedDecay(Axis):
    wide = True  # takes x itself, for its shape: see ``evaluate``

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x)
        exponents = torch.arange(5, 5 + self.num_heads, device=x.device, dtype=dtype)
        return torch.log1p(-torch.exp2(-exponents)).expand(*x.shape[:2], self.num_heads)
