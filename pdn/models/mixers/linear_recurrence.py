"""Thirteen models, one class: project -> axes -> op -> norm -> out (arXiv 2604.21100, table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pdn.models.layers import Linear, RMSNorm, ShortConv, is_plain
from pdn.models.mixers.axes import (
    DecayConfig,
    GainConfig,
    Heads,
    OutputGateConfig,
    PreconditionerConfig,
    evaluate,
    narrow_projections,
    project,
    with_main_gates,
)
from pdn.models.mixers.base import MixerConfig, TokenMixer
from pdn.models.mixers.compatible import check_preconditioner
from pdn.models.mixers.feature_maps import (
    FEATURE_MAPS,
    FeatureMapKind,
    ProductFeatureMap,
    feature_map_params,
)
from pdn.models.mixers.online import solve_online
from pdn.ops import (
    DiagonalPreconditioner,
    RecurrentState,
    SigmoidGain,
    SoftplusDecay,
    linear_attention,
    short_convolutions,
)

_CHUNK = 64  # tokens that the kernels take at once: CHUNK of pdn.ops.triton.common


class RecurrenceConfig(MixerConfig):
    """Describes a point of the design space, also for Comba and DeltaProduct, which add to it.

    A key with a default came later than the others: it is what runs from before it computed.
    """

    kind: str
    solve: Literal["online", "offline"]  # the delta rule, or linear attention
    num_heads: int = Field(ge=1)  # of queries and keys
    # a multiple of num_heads; null: the same
    num_value_heads: int | None = Field(default=None, ge=1)
    head_dim: int = Field(ge=1)  # of queries and keys
    expand_v: float = Field(default=1.0, gt=0)  # size of a value head / head_dim
    conv_size: int = Field(ge=0)  # taps; 0: no convolutions
    activation: Literal["silu", "none"] = "silu"  # of q, k and v, after the convolutions
    feature_map: FeatureMapKind = "none"  # of q and k after that
    norm_eps: float = Field(gt=0)
    qk_l2norm: bool
    decay: DecayConfig
    gain: GainConfig
    preconditioner: PreconditionerConfig
    output_gate: OutputGateConfig

    @model_validator(mode="after")
    def _compatible(self):
        if self.solve == "online" and self.gain.kind == "none":
            raise ValueError(
                "gain.kind = none: the online solve (delta rule) needs a gain; expected gain.kind "
                "= beta"
            )
        if self.heads.values % self.num_heads:
            raise ValueError(
                f"num_value_heads = {self.num_value_heads} is not a multiple of num_heads = "
                f"{self.num_heads}; expected whole groups of value heads"
            )
        if self.heads.value_dim != self.head_dim * self.expand_v:
            raise ValueError(
                f"expand_v = {self.expand_v} times head_dim = {self.head_dim} is no whole number"
            )
        if self.conv_size and self.activation == "none":
            raise ValueError(
                "activation = none: the convolutions end with SiLU; expected activation = silu or "
                "conv_size = 0"
            )
        if self.solve == "offline" and self.gain.kind not in ("none", "beta"):
            raise ValueError(
                f"gain.kind = {self.gain.kind}: the offline solve (linear attention) has the gains "
                "none and beta"
            )
        check_preconditioner(self)
        return self

    @property
    def heads(self) -> Heads:
        """Return numbers and sizes of the heads."""
        values = self.num_heads if self.num_value_heads is None else self.num_value_heads
        return Heads(self.num_heads, values, self.head_dim, round(self.head_dim * self.expand_v))

    @property
    def inputs(self) -> dict[str, int]:
        """Return what is projected from the block's input, and how wide it is."""
        return {"q": self.heads.key_width, "k": self.heads.key_width, "v": self.heads.value_width}

    def num_params(self, d_model: int) -> int:
        heads = self.heads
        width = sum(self.inputs.values())
        return (
            d_model * (width + heads.value_width)
            + width * self.conv_size
            + 2 * feature_map_params(self.feature_map, self.head_dim)
            + heads.value_dim
            + self.decay.num_params(d_model, heads)
            + self.gain.num_params(d_model, heads)
            + self.preconditioner.num_params(d_model, heads)
            + self.output_gate.num_params(d_model, heads)
        )

    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        products = 3 if self.solve == "online" else 2  # S^T k, k (x) v, S^T q
        state = self.heads.values * self.head_dim * self.heads.value_dim
        return 2 * self.num_params(d_model) + 2 * products * state

    def activation_bytes(self, width: int) -> float | None:
        scalar = self.decay.kind in ("none", "scalar")
        plain = self.feature_map == "none" and self.output_gate.kind == "none"
        preconditioned = self.preconditioner.kind == "diagonal"
        if type(self) is not LinearRecurrenceConfig or not (scalar and plain):
            return None
        if not preconditioned and self.preconditioner.kind != "none":
            return None
        heads, K, V = self.heads, self.head_dim, self.heads.value_dim
        inputs = sum(self.inputs.values()) * (2 if self.conv_size else 1)  # before and after
        # of the recurrence, a value head: o and its norm, states, P; T and x of the delta rule
        online = _CHUNK + V if self.solve == "online" else 0
        numbers = inputs + heads.values * (2 * V + K * V / _CHUNK + _CHUNK + online)
        scalars = 8 * heads.values  # of the gates' table and the norm
        if preconditioned:  # the key it is applied to, and curvatures: of chunks, of 8 tokens
            numbers += heads.values * K
            scalars += heads.values * (K / _CHUNK + K / 8 + 5)
        return width * numbers + 4 * scalars

    def build(self, d_model: int) -> LinearRecurrence:
        return LinearRecurrence(self, d_model)


class LinearRecurrenceConfig(RecurrenceConfig):
    """Describes a point of the design space."""

    # narrower than the base's, which is sound as it is frozen; pyright cannot see that
    kind: Literal["linear_recurrence"]  # pyright: ignore[reportIncompatibleVariableOverride]


class MixerState(NamedTuple):
    """Holds the state of the convolutions and of the recurrence.

    conv: the last conv_size - 1 inputs of each convolution, [B, W - 1, C]; recurrent: S and A.
    """

    conv: tuple[Tensor, ...]
    recurrent: RecurrentState


class LinearRecurrence(TokenMixer):
    def __init__(self, config: RecurrenceConfig, d_model: int):
        super().__init__()
        self.config = config
        heads, self.inputs = config.heads, config.inputs
        for name, width in self.inputs.items():
            setattr(self, f"{name}_proj", Linear(d_model, width))
        for name, width in self.inputs.items() if config.conv_size else ():
            setattr(self, f"{name}_conv", ShortConv(width, config.conv_size))
        if config.feature_map == "product":
            self.q_map, self.k_map = (ProductFeatureMap(heads.key_dim) for _ in range(2))
        self.decay = config.decay.build(d_model, heads)
        self.gain = config.gain.build(d_model, heads)
        self.preconditioner = config.preconditioner.build(d_model, heads)
        self.o_norm = RMSNorm(heads.value_dim, config.norm_eps)
        self.output_gate = config.output_gate.build(d_model, heads)
        self.o_proj = Linear(heads.value_width, d_model)

    def forward(self, x, *, cu_seqlens=None, state: MixerState | None = None):
        axes = self.decay, self.gain, self.preconditioner, self.output_gate
        (q, k, v), projected, tails = self._inputs(
            x, narrow_projections(*axes), cu_seqlens, None if state is None else state.conv
        )
        decay, gain, preconditioner, gate = evaluate(x, *axes, projected=projected)
        preconditioner = with_main_gates(preconditioner, decay, gain)
        o, recurrent = self.solve(
            q,
            k,
            v,
            decay,
            gain,
            preconditioner,
            cu_seqlens=cu_seqlens,
            state=state and state.recurrent,
            return_state=state is not None,
        )
        o = self.o_norm(o)
        if gate is not None:
            o = o * gate
        return self.o_proj(o.flatten(-2)), recurrent and MixerState(tails, recurrent)

    def _inputs(
        self,
        x: Tensor,
        narrow: Sequence[Linear],
        cu_seqlens: Tensor | None,
        conv: tuple[Tensor, ...] | None,
    ) -> tuple[list[Tensor], Tensor | None, tuple[Tensor, ...]]:
        """Compute the inputs of the recurrence, and the axes' projections where it costs nothing.

        Args:
            x: [B, T, D].
            narrow: the projections of the axes.
            cu_seqlens: as of ``forward``.
            conv: states of the convolutions.

        Returns:
            q, k [B, T, H, K] and v [B, T, HV, V]; what ``narrow`` makes of x, or None; the
            convolutions' new states.
        """
        config = self.config
        own = [getattr(self, f"{name}_proj") for name in self.inputs]
        projected, tails = None, ()
        if config.conv_size:
            parts, projected, tails = self._convolved(project(x, [*own, *narrow]), cu_seqlens, conv)
        else:
            parts = [proj(x) for proj in own]
            if config.activation == "silu":
                parts = [F.silu(part) for part in parts]
        sizes = [config.heads.value_dim if name == "v" else config.head_dim for name in self.inputs]
        q, k, v = (part.unflatten(-1, (-1, size)) for part, size in zip(parts, sizes, strict=True))
        return [self._featured(q, "q_map"), self._featured(k, "k_map"), v], projected, tails

    def _convolved(
        self, joint: Tensor, cu_seqlens: Tensor | None, conv: tuple[Tensor, ...] | None
    ) -> tuple[list[Tensor], Tensor | None, tuple[Tensor, ...]]:
        """Convolve what belongs to the inputs; return them, the rest of ``joint``, and states."""
        own = [getattr(self, f"{name}_conv") for name in self.inputs]
        if not all(is_plain(one, ShortConv) for one in own):
            return self._convolved_one_by_one(own, joint, cu_seqlens, conv)
        weights = [one.weight for one in own]
        found, tails = short_convolutions(joint, weights, cu_seqlens=cu_seqlens, states=conv or ())
        parts, rest = found[: len(weights)], found[len(weights) :]
        return parts, rest[0] if rest else None, tuple(tails)

    def _convolved_one_by_one(
        self, own: list[nn.Module], joint: Tensor, cu_seqlens: Tensor | None,
        conv: tuple[Tensor, ...] | None,
    ) -> tuple[list[Tensor], Tensor | None, tuple[Tensor, ...]]:  # fmt: skip
        """Do as ``_convolved`` by calls of the convolutions, which something was put around."""
        widths = list(self.inputs.values())
        *parts, rest = joint.split([*widths, joint.shape[-1] - sum(widths)], -1)
        states = conv or [None] * len(own)
        found = [
            one(part, cu_seqlens=cu_seqlens, state=state)
            for one, part, state in zip(own, parts, states, strict=True)
        ]
        tails = tuple(tail for _, tail in found if tail is not None)
        return [y for y, _ in found], rest if rest.shape[-1] else None, tails

    def _featured(self, x: Tensor, own: str) -> Tensor:
        """Apply the feature map of q or k; ``own`` names its parameters, if it has any."""
        kind = self.config.feature_map
        return getattr(self, own)(x) if kind == "product" else FEATURE_MAPS[kind](x)

    def solve(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | SoftplusDecay | None,
        gain: SigmoidGain | None, preconditioner: DiagonalPreconditioner | None,
        *, cu_seqlens: Tensor | None = None, state: RecurrentState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, RecurrentState | None]:  # fmt: skip
        """Compute o, of the shape of v, from q, k, v and the axes.

        Args:
            q, k, v: [B, T, H, K], [B, T, H, K] and [B, T, HV, V].
            decay, gain, preconditioner: what the axes' modules return.
            cu_seqlens, state, return_state: as of ``pdn.ops.delta_rule``.
        """
        options: dict[str, Any] = dict(
            cu_seqlens=cu_seqlens, state=state, return_state=return_state, log_decay=decay,
            qk_l2norm=self.config.qk_l2norm,
        )  # fmt: skip
        if self.config.solve == "online":
            return solve_online(q, k, v, gain, preconditioner, **options)
        return linear_attention(q, k, v, beta=gain, preconditioner=preconditioner, **options)

    def init_state(self, batch_size, device, dtype):
        heads, conv = self.config.heads, ()
        if self.config.conv_size:
            conv = tuple(
                getattr(self, f"{name}_conv").init_state(batch_size, device, dtype)
                for name in self.inputs
            )
        return MixerState(
            conv,
            init_recurrent_state(
                batch_size, heads, self.config.preconditioner.num_heads(heads), device, dtype
            ),
        )

    def reset_parameters(self, generator):
        pass  # every parameter belongs to a submodule


def init_recurrent_state(batch_size: int, heads: Heads, curvature_heads: int, device, dtype):
    """Return a state of zeros in float32 (float64 for float64 activations).

    Args:
        batch_size: sequences.
        heads: numbers and sizes of the heads.
        curvature_heads: heads of A; 0: no A.
        device: of the state.
        dtype: of the activations.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options: dict[str, Any] = dict(device=device, dtype=wide)
    A = None
    if curvature_heads:
        A = torch.zeros(batch_size, curvature_heads, heads.key_dim, **options)
    S = torch.zeros(batch_size, heads.values, heads.key_dim, heads.value_dim, **options)
    return RecurrentState(S, A)
