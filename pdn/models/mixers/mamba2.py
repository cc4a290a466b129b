"""Mamba-2 (arXiv 2405.21060) on the shared op.

It has shared B/C heads, a joint convolution, the D skip and a gated norm.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pdn.models.layers import Linear, RMSNorm, ShortConv, assign, uniform
from pdn.models.mixers.axes import (
    Heads,
    PreconditionerConfig,
    evaluate,
    init_A_log,
    init_dt_bias,
)
from pdn.models.mixers.base import MixerConfig, TokenMixer
from pdn.models.mixers.linear_recurrence import MixerState, init_recurrent_state
from pdn.ops import accumulation_dtype, linear_attention


class Mamba2Config(MixerConfig):
    """Configures Mamba-2, whose d_inner = num_heads * head_dim is normally expand * d_model."""

    kind: Literal["mamba2"]
    num_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)  # of the values
    state_size: int = Field(ge=1)  # of B and C, the keys and queries
    num_groups: int = Field(ge=1)  # of heads that share B and C
    conv_size: int = Field(ge=1)
    norm_eps: float = Field(gt=0)
    preconditioner: PreconditionerConfig

    @model_validator(mode="after")
    def _whole_groups(self):
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"num_groups = {self.num_groups} does not divide num_heads = {self.num_heads}"
            )
        return self

    @model_validator(mode="after")
    def _preconditioned_query(self):
        p = self.preconditioner
        if p.kind == "learned":
            raise ValueError("preconditioner.kind = learned: Mamba-2 has no write key of its own")
        if p.kind == "diagonal" and (p.tied or p.factor != "none" or p.form == "sherman_morrison"):
            raise ValueError(
                f"preconditioner.tied = {p.tied}, factor = {p.factor}, form = {p.form}: the query "
                "of Mamba-2 has none of these; expected false, none, and squash or inverse"
            )
        return self

    @property
    def heads(self) -> Heads:
        """Return numbers and sizes of the heads.

        A preconditioner has gates for each of them, though those of a group share B.
        """
        return Heads(self.num_heads, self.num_heads, self.state_size, self.head_dim)

    @property
    def d_inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        return self.d_inner + 2 * self.num_groups * self.state_size

    def num_params(self, d_model: int) -> int:
        return (
            d_model * (self.d_inner + self.conv_channels + self.num_heads)
            + self.conv_channels * (self.conv_size + 1)
            + 3 * self.num_heads
            + self.d_inner
            + self.d_inner * d_model
            + self.preconditioner.num_params(d_model, self.heads)
        )

    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        return 2 * self.num_params(d_model) + 4 * self.d_inner * self.state_size

    def build(self, d_model: int) -> Mamba2:
        return Mamba2(self, d_model)


class SSMParameters(nn.Module):
    """Holds A_log, dt_bias, D [H]: without weight decay."""

    weight_decay = False

    def __init__(self, num_heads: int):
        super().__init__()
        self.A_log, self.dt_bias, self.D = (nn.Parameter(torch.empty(num_heads)) for _ in range(3))

    def forward(self, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map the raw steps [B, T, H] to Delta and log-decay [B, T, H], and D [H]."""
        dtype = accumulation_dtype(dt)
        delta = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        return delta, -self.A_log.to(dtype).exp() * delta, self.D

    def reset_parameters(self, generator: torch.Generator) -> None:
        init_A_log(self.A_log, generator, low=1.0)
        init_dt_bias(self.dt_bias, generator)
        assign(self.D, torch.ones(self.D.shape, device=generator.device))


class Mamba2(TokenMixer):
    def __init__(self, config: Mamba2Config, d_model: int):
        super().__init__()
        self.config = config
        self.in_proj = Linear(d_model, config.d_inner + config.conv_channels + config.num_heads)
        self.conv = ShortConv(config.conv_channels, config.conv_size, bias=True)
        self.ssm = SSMParameters(config.num_heads)
        self.preconditioner = config.preconditioner.build(d_model, config.heads)
        self.norm = RMSNorm(config.d_inner, config.norm_eps)
        self.out_proj = Linear(config.d_inner, d_model)

    def forward(self, x, *, cu_seqlens=None, state: MixerState | None = None):
        c = self.config
        z, xBC, dt = self.in_proj(x).split([c.d_inner, c.conv_channels, c.num_heads], -1)
        xBC, tail = self.conv(
            xBC, cu_seqlens=cu_seqlens, state=None if state is None else state.conv[0]
        )
        v, k, q = xBC.split(
            [c.d_inner, c.num_groups * c.state_size, c.num_groups * c.state_size], -1
        )
        v = v.unflatten(-1, (c.num_heads, c.head_dim))
        k, q = (y.unflatten(-1, (c.num_groups, c.state_size)) for y in (k, q))
        delta, log_decay, D = self.ssm(dt)
        [preconditioner] = evaluate(x, self.preconditioner)
        o, recurrent = linear_attention(
            q, k, v, beta=delta, log_decay=log_decay, preconditioner=preconditioner, scale=1.0,
            cu_seqlens=cu_seqlens,
            state=state and state.recurrent, return_state=state is not None,
        )  # fmt: skip
        o = o + (D[:, None] * v.to(D.dtype)).to(v.dtype)
        y = self.norm(o.flatten(-2) * F.silu(z))
        return self.out_proj(y), recurrent and MixerState((tail,), recurrent)

    def init_state(self, batch_size, device, dtype):
        c = self.config
        recurrent = init_recurrent_state(
            batch_size, c.heads, c.preconditioner.num_heads(c.heads), device, dtype
        )
        return MixerState((self.conv.init_state(batch_size, device, dtype),), recurrent)

    def reset_parameters(self, generator):
        pass  # every parameter belongs to a submodule

    def reset_as_released(self, generator, num_layers):
        """Draw out_proj from U(-b, b) with b = 1 / sqrt(d_inner num_layers).

        That is the kaiming draw of flash-linear-attention, rescaled for the residual stream's sum
        of layers.
        """
        bound = (self.config.d_inner * num_layers) ** -0.5
        assign(self.out_proj.weight, uniform(self.out_proj.weight.shape, -bound, bound, generator))
