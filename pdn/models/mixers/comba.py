"""Comba (arXiv 2506.02475) on the delta rule: a scaled read key, and a query corrected by it."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from pdn.models.layers import assign
from pdn.models.mixers.linear_recurrence import LinearRecurrence, LinearRecurrenceConfig
from pdn.ops import RecurrentState, accumulation_dtype, delta_rule, diagonal_preconditioner
from pdn.ops.reference import expand_heads


class CombaConfig(LinearRecurrenceConfig):
    kind: Literal["comba"]
    solve: Literal["online"]
    qk_l2norm: Literal[True]

    @model_validator(mode="after")
    def _gated(self):
        if self.decay.kind != "scalar":
            raise ValueError(f"decay.kind = {self.decay.kind}: Comba has a scalar decay")
        return self

    def num_params(self, d_model: int) -> int:
        return super().num_params(d_model) + 2 * self.num_heads

    def build(self, d_model: int) -> Comba:
        return Comba(self, d_model)


class Feedback(nn.Module):
    """decay [H], whose sigmoid scales the read key, and D [H], how much of it the query loses."""

    weight_decay = False

    def __init__(self, num_heads: int):
        super().__init__()
        self.decay, self.D = (nn.Parameter(torch.empty(num_heads)) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised q, k [B, T, H, K] to ``q - D d k`` and ``d k``."""
        p = self.decay.to(k.dtype).sigmoid()[:, None] * k
        return q - self.D.to(q.dtype)[:, None] * p, p

    def reset_parameters(self, generator: torch.Generator) -> None:
        for parameter in (self.decay, self.D):
            assign(parameter, torch.ones(parameter.shape, device=generator.device))


class Comba(LinearRecurrence):
    def __init__(self, config: CombaConfig, d_model: int):
        super().__init__(config, d_model)
        self.feedback = Feedback(config.num_heads)

    def solve(self, q, k, v, decay, gain, preconditioner, *, cu_seqlens, state, return_state):
        dtype = accumulation_dtype(v)
        q, k = (
            y.to(dtype) * (y.to(dtype).square().sum(-1, keepdim=True) + 1e-6).rsqrt()
            for y in (q, k)
        )
        write_k, A = k, None
        if preconditioner is not None:
            B, A = diagonal_preconditioner(
                k, preconditioner, A=state and state.A, cu_seqlens=cu_seqlens
            )
            write_k = B * expand_heads(k, B.shape[2])
        q, p = self.feedback(q, k)
        q, p, write_k = (y.to(v.dtype) for y in (q, p, write_k))
        o, final = delta_rule(
            q, p, v, write_k=write_k, beta=gain, log_decay=decay,
            cu_seqlens=cu_seqlens, state=state, return_state=return_state,
        )  # fmt: skip
        return o, final and RecurrentState(final.S, A)
