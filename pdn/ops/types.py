"""What the ops take besides tensors: recurrent state, and gates given by their raw projections.

A gate may be passed either as a tensor that is already activated or as one of the descriptors
below, which hold the raw projection and the parameters of the activation. Kernels fuse the
activation; the PyTorch backends call ``materialise()``. Letters: B batch, T time, H heads, K key
size, V value size, N sequences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, Literal, NamedTuple, ParamSpec, TypedDict, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")

# Keeps a function out of compiled graphs, as torch.compiler.disable does. That one imports the
# compiler here and now, which takes a second of every start; this one when it is first called.
uncompiled = _disable_dynamo


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64 input, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return what autocast computes in on a device; None where it is off, or unknown (meta)."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(
    op: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Have an op choose its own precision.

    Autocast would lower the float32 products of a recurrence to bfloat16.
    """

    @functools.wraps(op)
    def wrapped(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if x.is_meta:
            return op(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return op(x, *args, **kwargs)

    return wrapped


class RecurrentState(NamedTuple):
    """Carries a recurrence from one call to the next.

    S: [B, H, K, V] (or [N, H, K, V] with ``cu_seqlens``), the associative memory, float32 (float64
        in float64).
    A: [B, H, K], the preconditioner's curvature accumulator, or None without a preconditioner.
    """

    S: Tensor
    A: Tensor | None = None


@dataclass(frozen=True)
class SoftplusDecay:
    """Computes a log-decay ``-exp(A_log) * softplus(x + dt_bias)``, always <= 0.

    x: [B, T, H] for a scalar decay per head, or [B, T, H, K] for a diagonal one; raw projection,
        any dtype.
    A_log: [H].  dt_bias: [H], or [H, K] for a diagonal decay.
    """

    x: Tensor
    A_log: Tensor
    dt_bias: Tensor

    def materialise(self) -> Tensor:
        dtype = accumulation_dtype(self.x)
        rate = self.A_log.to(dtype).exp()
        if self.x.ndim == 4:
            rate = rate[:, None]
        return -rate * F.softplus(self.x.to(dtype) + self.dt_bias.to(dtype))


@dataclass(frozen=True)
class SigmoidGain:
    """Computes a gain ``range * sigmoid(x)``.

    It lies in (0, 1), or in (0, 2) to allow negative eigenvalues (arXiv 2411.12537).

    x: [B, T, H], raw projection.
    """

    x: Tensor
    range: float = 1.0

    def materialise(self) -> Tensor:
        return self.range * self.x.to(accumulation_dtype(self.x)).sigmoid()


_WORDS = {
    "form": ("squash", "inverse"),
    "squash": ("softsign", "tanh"),
    "interval": ("both", "upper", "lower"),
    "factor": ("none", "inverse", "one_plus", "share"),
}


@dataclass(frozen=True)
class DiagonalPreconditioner:
    """Describes the diagonal preconditioner of *Preconditioned DeltaNet*.

    See arXiv 2604.21100, section 4.

    ``A_t = exp(log_decay_t) A_{t-1} + beta_t k_t^2``, then, for ``form="squash"``,
    ``r = log(A + eps) - mu``, ``B = exp(-log(bound) * r / (1 + |r|))``, which lies in (1/bound,
    bound);
    for ``form="inverse"``, ``B = 1 / (A + eps)`` (the ablation of the offline solve).

    log_decay: [B, T, H] or SoftplusDecay.  beta: [B, T, H] or SigmoidGain.  mu: [H] (unused by
        "inverse").
    bound: x of the paper, 1 <= bound <= 2; 1 is exactly the recurrence without preconditioner.
    squash, interval: the paper's ablations of ``r / (1 + |r|)`` and of (1/bound, bound): "upper" is
        (1, bound), "lower" (1/bound, 1).
    factor: the paper's ablations that scale the write key ``B k`` by a number a head: "inverse" by
        1 / k.Bk, "one_plus" by 1 / (1 + k.Bk), "share" by 1 / (alpha + beta k.Bk) of the main
        recurrence's decay and gain. The diagonal Sherman-Morrison form is form "inverse" with
        "one_plus".
    """

    log_decay: Tensor | SoftplusDecay
    beta: Tensor | SigmoidGain
    mu: Tensor | None
    bound: float = 1.5
    eps: float = 1e-6
    form: Literal["squash", "inverse"] = "squash"
    squash: Literal["softsign", "tanh"] = "softsign"
    interval: Literal["both", "upper", "lower"] = "both"
    factor: Literal["none", "inverse", "one_plus", "share"] = "none"

    @property
    def is_plain(self) -> bool:
        """Return whether there are no ablations: what backends compute themselves."""
        return (self.squash, self.interval, self.factor) == ("softsign", "both", "none")

    def __post_init__(self):
        if self.form == "squash":
            if not 1.0 <= self.bound <= 2.0:
                raise ValueError(
                    f"bound = {self.bound} is outside [1, 2]: the recurrence is stable for beta * "
                    "bound <= 2 only"
                )
            if self.mu is None:
                raise ValueError('mu is required for form="squash"')
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r}: expected one of {', '.join(words)}"
                )

    def rescaling(self, A: Tensor) -> Tensor:
        """Return B from A, both [..., H, K]."""
        if self.form == "inverse":
            return 1.0 / (A + self.eps)
        assert self.mu is not None  # ``__post_init__``
        r = (A + self.eps).log() - self.mu.to(A.dtype)[:, None]
        if self.is_plain:
            return torch.exp(-math.log(self.bound) * r / (1 + r.abs()))
        s = r.tanh() if self.squash == "tanh" else r / (1 + r.abs())
        if self.interval != "both":
            s = (s - 1) / 2 if self.interval == "upper" else (s + 1) / 2
        return torch.exp(-math.log(self.bound) * s)

    def scale_of(self, k: Tensor, B: Tensor, decay: Tensor | None, gain: Tensor) -> Tensor:
        """Return what ``factor`` multiplies the write key with, [B, T, H, 1].

        k, B: [B, T, H, K].  decay: the main recurrence's log-decay [B, T, H], None for none.
        gain: [B, T, H].
        """
        curvature = (k * B * k).sum(-1, keepdim=True)
        if self.factor == "inverse":
            return 1 / curvature.clamp(min=self.eps)
        if self.factor == "one_plus":
            return 1 / (1 + curvature)
        alpha = 1.0 if decay is None else decay.exp()[..., None]
        return 1 / (alpha + gain[..., None] * curvature).clamp(min=self.eps)


@overload
def materialise(x: Tensor | SoftplusDecay | SigmoidGain) -> Tensor: ...
@overload
def materialise(x: Tensor | SoftplusDecay | SigmoidGain | None) -> Tensor | None: ...
def materialise(x: Tensor | SoftplusDecay | SigmoidGain | None) -> Tensor | None:
    """Return the activated tensor of a gate, whichever way it was given."""
    return x.materialise() if isinstance(x, (SoftplusDecay, SigmoidGain)) else x


class CallOptions(TypedDict):
    """Types the arguments that both ops of ``pdn.ops`` hand to a backend, besides q, k and v."""

    log_decay: Tensor | SoftplusDecay | None
    scale: float | None
    qk_l2norm: bool
    state: RecurrentState | None
    return_state: bool
    cu_seqlens: Tensor | None


class DeltaRuleOptions(CallOptions):
    """Adds the arguments of ``delta_rule``."""

    beta: Tensor | SigmoidGain
    write_k: Tensor | DiagonalPreconditioner | None


class LinearAttentionOptions(CallOptions):
    """Adds the arguments of ``linear_attention``."""

    beta: Tensor | SigmoidGain | None
    preconditioner: DiagonalPreconditioner | None


def axes_of(
    log_decay: Tensor | SoftplusDecay | None, write: Tensor | DiagonalPreconditioner | None
) -> tuple[str, str]:
    """Return the ``decay`` and ``write`` of a call, words of ``pdn.ops.recurrences``.

    write: its ``write_k`` or ``preconditioner`` argument.
    """
    raw = log_decay.x if isinstance(log_decay, SoftplusDecay) else log_decay
    decay = "none" if raw is None else "scalar" if raw.ndim == 3 else "diagonal"
    return decay, "key" if write is None else "tensor" if isinstance(write, Tensor) else write.form
