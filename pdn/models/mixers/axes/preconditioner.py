"""The preconditioner: which channels of the key, or of the query, count how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pdn.config import Strict
from pdn.models.layers import Linear, assign
from pdn.models.mixers.axes.axis import Axis
from pdn.models.mixers.axes.decay import ScalarDecay
from pdn.models.mixers.axes.gain import BetaGain
from pdn.models.mixers.axes.heads import Heads
from pdn.ops import DiagonalPreconditioner, SigmoidGain, SoftplusDecay, accumulation_dtype
from pdn.ops.reference import l2norm


class DiagonalPreconditionerConfig(Strict):
    """Asks for the practical preconditioner, with its own decay and gain, or for an ablation.

    ``pdn.ops.DiagonalPreconditioner`` has the formulas.
    """

    kind: Literal["diagonal"]
    form: Literal["squash", "inverse", "sherman_morrison"]
    bound: float = Field(ge=1, le=2)  # x of the paper; stable for beta * bound <= 2
    mu_init: float
    # gates and centre for each key head (the released PGDN) or value head (the released PKDA)
    per_head_of: Literal["keys", "values"] = "keys"
    squash: Literal["softsign", "tanh"] = "softsign"
    interval: Literal["both", "upper", "lower"] = "both"  # (1/x, x), (1, x), (1/x, 1)
    factor: Literal["none", "inverse", "one_plus", "share"] = "none"
    tied: bool = False  # its decay and gain are those of the main recurrence

    @model_validator(mode="after")
    def _one_ablation_of_a_form(self):
        ablated = (self.squash, self.interval, self.factor) != ("softsign", "both", "none")
        if self.form != "squash" and ablated:
            raise ValueError(
                f"form = {self.form} with squash = {self.squash}, interval = {self.interval}, "
                f"factor = {self.factor}: these are of form = squash; expected softsign, both, none"
            )
        return self

    def num_heads(self, heads: Heads) -> int:
        """Count the heads that have a curvature A of their own."""
        return heads.keys if self.per_head_of == "keys" else heads.values

    def num_params(self, d_model: int, heads: Heads) -> int:
        n = self.num_heads(heads)
        gates = 0 if self.tied else 2 * (d_model + 1) * n
        return gates + (n if self.form == "squash" else 0)

    def build(self, d_model: int, heads: Heads) -> Axis:
        return Preconditioner(self, d_model, self.num_heads(heads))


class LearnedWriteKeyConfig(Strict):
    """Learns the write key, in place of computing it from the curvature.

    It makes the transition diagonal plus low rank, which the paper names as future work.

    form scale: ``a k`` with a in (1/bound, bound) of each channel, through a bottleneck of the size
    of a key head, so stable as the preconditioner is; projection: ``l2norm(W x)``, which is not
    known to be stable.
    """

    kind: Literal["learned"]
    form: Literal["scale", "projection"]
    bound: float = Field(ge=1, le=2)  # of scale

    def num_heads(self, heads: Heads) -> int:
        return 0

    def num_params(self, d_model: int, heads: Heads) -> int:
        if self.form == "projection":
            return d_model * heads.key_width
        return heads.key_dim * (d_model + heads.key_width)

    def build(self, d_model: int, heads: Heads) -> Axis:
        if self.form == "projection":
            return WriteKeyProjection(d_model, heads)
        return WriteKeyScale(self.bound, d_model, heads)


class NoPreconditionerConfig(Strict):
    kind: Literal["none"]

    def num_heads(self, heads: Heads) -> int:
        return 0

    def num_params(self, d_model: int, heads: Heads) -> int:
        return 0

    def build(self, d_model: int, heads: Heads) -> None:
        return None


PreconditionerConfig = Annotated[
    NoPreconditionerConfig | DiagonalPreconditionerConfig | LearnedWriteKeyConfig,
    Field(discriminator="kind"),
]


class Center(nn.Module):
    """Holds mu [H], the centre of log A in the squashed preconditioner."""

    weight_decay = False

    def __init__(self, num_heads: int, init: float):
        super().__init__()
        self.init = init
        self.mu = nn.Parameter(torch.empty(num_heads))

    def forward(self) -> Tensor:
        return self.mu

    def reset_parameters(self, generator: torch.Generator) -> None:
        assign(self.mu, torch.full(self.mu.shape, self.init, device=generator.device))


class Preconditioner(Axis):
    def __init__(self, config: DiagonalPreconditionerConfig, d_model: int, num_heads: int):
        super().__init__()
        self.config = config
        self.decay = None if config.tied else ScalarDecay(d_model, num_heads)
        self.gain = None if config.tied else BetaGain(d_model, num_heads)
        self.center = Center(num_heads, config.mu_init) if config.form == "squash" else None

    def projections(self) -> tuple[Linear, ...]:
        if self.decay is None or self.gain is None:
            return ()
        return *self.decay.projections(), *self.gain.projections()

    def forward(
        self, a: Tensor | None = None, b: Tensor | None = None
    ) -> DiagonalPreconditioner | TiedPreconditioner:
        """Return the op's descriptor, without gates if they are the main recurrence's.

        Args:
            a, b: what the projections give.
        """
        mu = None if self.center is None else self.center()
        if self.decay is None or self.gain is None:
            return TiedPreconditioner(self.config, mu)
        return _descriptor(self.config, self.decay(a), self.gain(b), mu)


@dataclass(frozen=True)
class TiedPreconditioner:
    """Lacks gates, which it gets from ``with_main_gates``. mu: [H], of the squash."""

    config: DiagonalPreconditionerConfig
    mu: Tensor | None


def _descriptor(
    config: DiagonalPreconditionerConfig, log_decay: SoftplusDecay, beta: SigmoidGain,
    mu: Tensor | None,
) -> DiagonalPreconditioner:  # fmt: skip
    return DiagonalPreconditioner(
        log_decay,
        beta,
        mu,
        config.bound,
        form="squash" if config.form == "squash" else "inverse",
        squash=config.squash,
        interval=config.interval,
        factor="one_plus" if config.form == "sherman_morrison" else config.factor,
    )


T = TypeVar("T")


def with_main_gates(
    preconditioner: T | TiedPreconditioner, decay: SoftplusDecay, gain: SigmoidGain
) -> T | DiagonalPreconditioner:
    """Give the preconditioner the main recurrence's gates where it is tied to them.

    Args:
        preconditioner: what the axis gives; any other than a tied one is returned as it is.
        decay, gain: of the main recurrence.
    """
    if not isinstance(preconditioner, TiedPreconditioner):
        return preconditioner
    return _descriptor(preconditioner.config, decay, gain, preconditioner.mu)


@dataclass(frozen=True)
class LearnedWriteKey:
    """Makes the write key: by a factor of the read key, or by a key in its place.

    x: [B, T, H, K], what the read key is multiplied with if it ``is_factor``, else what takes its
        place.
    """

    x: Tensor
    is_factor: bool

    def of(self, k: Tensor) -> Tensor:
        """Return the write key to a read key, as it is normalised, [B, T, H, K]."""
        x = self.x.to(k.dtype)
        return x * k if self.is_factor else l2norm(x)


class WriteKeyScale(Axis):
    def __init__(self, bound: float, d_model: int, heads: Heads):
        super().__init__()
        self.log_bound, self.key_dim = math.log(bound), heads.key_dim
        self.w_down = Linear(d_model, heads.key_dim)
        self.w_up = Linear(heads.key_dim, heads.key_width, grows=False)

    def projections(self) -> tuple[Linear, ...]:
        return (self.w_down,)

    def forward(self, w: Tensor) -> LearnedWriteKey:
        w = self.w_up(w).unflatten(-1, (-1, self.key_dim))
        factor = (self.log_bound * w.to(accumulation_dtype(w)).tanh()).exp()
        return LearnedWriteKey(factor, is_factor=True)


class WriteKeyProjection(Axis):
    wide = True  # takes x itself: see ``evaluate``

    def __init__(self, d_model: int, heads: Heads):
        super().__init__()
        self.key_dim = heads.key_dim
        self.w_proj = Linear(d_model, heads.key_width)

    def forward(self, x: Tensor) -> LearnedWriteKey:
        key = self.w_proj(x).unflatten(-1, (-1, self.key_dim))
        return LearnedWriteKey(key, is_factor=False)
