"""Thirteen models, one class: project -> axes -> op -> norm -> out (arXiv 2604.21100, table 1)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pdn.models.layers import Linear, RMSNorm, ShortConv
from pdn.models.mixers.axes import (
    DecayConfig,
    GainConfig,
    OutputGateConfig,
    PreconditionerConfig,
    evaluate,
)
from pdn.models.mixers.base import MixerConfig, TokenMixer
from pdn.ops import (
    DiagonalPreconditioner,
    RecurrentState,
    SigmoidGain,
    SoftplusDecay,
    delta_rule,
    linear_attention,
)


class LinearRecurrenceConfig(MixerConfig):
    """A point of the design space."""

    kind: Literal["linear_recurrence"]
    solve: Literal["online", "offline"]  # the delta rule, or linear attention
    num_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)  # of keys and values
    conv_size: int = Field(ge=1)
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
        check_stability(self.gain, self.preconditioner, self.solve)
        return self

    def num_params(self, d_model: int) -> int:
        width = self.num_heads * self.head_dim
        return (
            4 * d_model * width
            + 3 * width * self.conv_size
            + self.head_dim
            + self.decay.num_params(d_model, self.num_heads, self.head_dim)
            + self.gain.num_params(d_model, self.num_heads)
            + self.preconditioner.num_params(d_model, self.num_heads)
            + self.output_gate.num_params(d_model, self.num_heads, self.head_dim)
        )

    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        products = 3 if self.solve == "online" else 2  # S^T k, k (x) v, S^T q
        return 2 * self.num_params(d_model) + 2 * products * self.num_heads * self.head_dim**2

    def build(self, d_model: int) -> LinearRecurrence:
        return LinearRecurrence(self, d_model)


def check_stability(gain, preconditioner, solve: str = "online") -> None:
    """The online solve is stable while beta * bound <= 2."""
    if solve == "online" and preconditioner.kind == "diagonal":
        if gain.range > 1:
            raise ValueError(
                f"gain.range = {gain.range} together with a preconditioner: the recurrence is then "
                "no longer stable; "
                "expected gain.range <= 1 or preconditioner.kind = none"
            )
        if preconditioner.form != "squash":
            raise ValueError(
                "preconditioner.form = inverse is unbounded, for solve = offline only; expected "
                "form = squash"
            )


class MixerState(NamedTuple):
    """conv: the last conv_size - 1 inputs of each convolution, [B, W - 1, C]; recurrent: S and A."""

    conv: tuple[Tensor, ...]
    recurrent: RecurrentState


class LinearRecurrence(TokenMixer):
    def __init__(self, config: LinearRecurrenceConfig, d_model: int):
        super().__init__()
        self.config = config
        heads, head_dim, width = (
            config.num_heads,
            config.head_dim,
            config.num_heads * config.head_dim,
        )
        self.q_proj, self.k_proj, self.v_proj = (Linear(d_model, width) for _ in range(3))
        self.q_conv, self.k_conv, self.v_conv = (
            ShortConv(width, config.conv_size) for _ in range(3)
        )
        self.decay = config.decay.build(d_model, heads, head_dim)
        self.gain = config.gain.build(d_model, heads)
        self.preconditioner = config.preconditioner.build(d_model, heads)
        self.o_norm = RMSNorm(head_dim, config.norm_eps)
        self.output_gate = config.output_gate.build(d_model, heads, head_dim)
        self.o_proj = Linear(width, d_model)

    def forward(self, x, *, cu_seqlens=None, state: MixerState | None = None):
        conv = (None, None, None) if state is None else state.conv
        projections = (
            (self.q_proj, self.q_conv),
            (self.k_proj, self.k_conv),
            (self.v_proj, self.v_conv),
        )
        qkv = [
            c(p(x), cu_seqlens=cu_seqlens, state=tail)
            for (p, c), tail in zip(projections, conv, strict=True)
        ]
        q, k, v = (y.unflatten(-1, (-1, self.config.head_dim)) for y, _ in qkv)
        *axes, gate = evaluate(x, self.decay, self.gain, self.preconditioner, self.output_gate)
        o, recurrent = self.solve(
            q,
            k,
            v,
            *axes,
            cu_seqlens=cu_seqlens,
            state=state and state.recurrent,
            return_state=state is not None,
        )
        o = self.o_norm(o)
        if gate is not None:
            o = o * gate
        return self.o_proj(o.flatten(-2)), state and MixerState(
            tuple(tail for _, tail in qkv), recurrent
        )

    def solve(
        self, q: Tensor, k: Tensor, v: Tensor, decay: SoftplusDecay | None, gain: SigmoidGain | None,
        preconditioner: DiagonalPreconditioner | None, **options,
    ) -> tuple[Tensor, RecurrentState | None]:  # fmt: skip
        """o [B, T, H, V] of q, k [B, T, H, K], v [B, T, H, V] and the axes; options: as of
        ``pdn.ops.delta_rule``.
        """
        options |= dict(beta=gain, log_decay=decay, qk_l2norm=self.config.qk_l2norm)
        if self.config.solve == "online":
            return delta_rule(q, k, v, write_k=preconditioner, **options)
        return linear_attention(q, k, v, preconditioner=preconditioner, **options)

    def init_state(self, batch_size, device, dtype):
        heads, head_dim = self.config.num_heads, self.config.head_dim
        conv = tuple(
            c.init_state(batch_size, device, dtype) for c in (self.q_conv, self.k_conv, self.v_conv)
        )
        return MixerState(
            conv,
            init_recurrent_state(
                batch_size, heads, head_dim, head_dim, self.preconditioner, device, dtype
            ),
        )

    def reset_parameters(self, generator):
        pass  # every parameter belongs to a submodule


def init_recurrent_state(
    batch_size, heads, key_size, value_size, preconditioner: nn.Module | None, device, dtype
):
    """Zeros, in float32 (float64 for float64 activations)."""
    options = dict(device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    A = None if preconditioner is None else torch.zeros(batch_size, heads, key_size, **options)
    return RecurrentState(torch.zeros(batch_size, heads, key_size, value_size, **options), A)
