"""Comba (arXiv 2506.02475) on the delta rule: a scaled read key, and a query corrected by it."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from pdn.models.layers import assign
from pdn.models.mixers.linear_recurrence import LinearRecurrence, RecurrenceConfig
from pdn.ops import (
    RecurrentState,
    SoftplusDecay,
    accumulation_dtype,
    delta_rule,
    diagonal_preconditioner,
    materialise,
)
from pdn.ops.chunkwise import MIN_LOG_DECAY
from pdn.ops.reference import expand_heads, l2norm


class CombaConfig(RecurrenceConfig):
    """Configures Comba: the delta rule with a read key and feedback to the query.

    form: ``published`` erases from the state as it was before its decay, and normalises q, k and
    the read key p after p = d k and q - D p are formed (flash-linear-attention's layer);
    ``decayed`` erases from the decayed state and normalises q and k first. Only the second stays
    stable with a preconditioner. Runs from before there was a choice are of the second.
    """

    # narrower than the base's, which is sound as these are frozen; pyright cannot see that
    kind: Literal["comba"]  # pyright: ignore[reportIncompatibleVariableOverride]
    form: Literal["published", "decayed"] = "decayed"
    solve: Literal["online"]  # pyright: ignore[reportIncompatibleVariableOverride]
    qk_l2norm: Literal[True]  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="after")
    def _gated(self):
        if self.gain.kind != "beta" or self.preconditioner.kind == "learned":
            raise ValueError(
                f"gain.kind = {self.gain.kind} with preconditioner.kind = "
                f"{self.preconditioner.kind}: Comba has the gain beta and no learned write key"
            )
        if self.decay.kind != "scalar":
            raise ValueError(f"decay.kind = {self.decay.kind}: Comba has a scalar decay")
        if self.form == "published" and self.preconditioner.kind != "none":
            raise ValueError(
                "form = published together with a preconditioner: the recurrence is then no longer "
                "stable; expected form = decayed or preconditioner.kind = none"
            )
        p = self.preconditioner
        if p.kind == "diagonal" and (p.factor != "none" or p.form != "squash"):
            raise ValueError(
                f"preconditioner.form = {p.form}, factor = {p.factor}: Comba's read key is not its "
                "write key; expected form = squash and factor = none"
            )
        return self

    def num_params(self, d_model: int) -> int:
        return super().num_params(d_model) + 2 * self.num_heads

    def build(self, d_model: int) -> Comba:
        return Comba(self, d_model)


class Feedback(nn.Module):
    """Scales the read key by the sigmoid of decay [H], and takes D [H] times it from the query."""

    weight_decay = False

    def __init__(self, num_heads: int):
        super().__init__()
        self.decay, self.D = (nn.Parameter(torch.empty(num_heads)) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Map q, k [B, T, H, K] to ``q - D d k`` and ``d k``."""
        p = self.decay.to(k.dtype).sigmoid()[:, None] * k
        return q - self.D.to(q.dtype)[:, None] * p, p

    def reset_parameters(self, generator: torch.Generator) -> None:
        for parameter in (self.decay, self.D):
            assign(parameter, torch.ones(parameter.shape, device=generator.device))


class Comba(LinearRecurrence):
    def __init__(self, config: CombaConfig, d_model: int):
        super().__init__(config, d_model)
        self.form = config.form
        self.feedback = Feedback(config.num_heads)

    def solve(self, q, k, v, decay, gain, preconditioner, **options):
        dtype = accumulation_dtype(v)
        assert gain is not None  # ``CombaConfig``
        if self.form == "published":
            tensors, log_decay = self._published(
                q.to(dtype), k.to(dtype), v.shape[2], decay, per_channel=q.is_cuda
            )
            A = None
        else:
            tensors, A = self._decayed(q.to(dtype), k.to(dtype), preconditioner, options)
            log_decay = decay
        q, p, write_k = (y.to(v.dtype) for y in tensors)
        o, final = delta_rule(q, p, v, write_k=write_k, beta=gain, log_decay=log_decay, **options)
        return o, final and RecurrentState(final.S, A)

    def _published(
        self, q: Tensor, k: Tensor, heads: int, decay: Tensor | SoftplusDecay | None,
        *, per_channel: bool,
    ):  # fmt: skip
        """Return q, the erase key, the write key and the log-decay.

        The op erases with a key what it reads from the decayed state; a key that is larger by
        exp(-log_decay) reads what was there before. On a GPU the decay goes in as one of each
        channel: the kernels for a decay of each head invert the triangle of keys without it, which
        the enlarged keys overflow.
        """
        assert decay is not None  # ``CombaConfig``
        log_decay = materialise(decay).clamp(min=MIN_LOG_DECAY)
        q, p = self.feedback(q, k)
        q, k, p = (expand_heads(l2norm(y), heads) for y in (q, k, p))
        p = p * (-log_decay).exp()[..., None]
        if per_channel:
            log_decay = log_decay[..., None].expand(p.shape)
        return (q, p, k), log_decay

    def _decayed(self, q: Tensor, k: Tensor, preconditioner, options):
        """Return q, the erase key and the write key, and the preconditioner's A."""
        q, k = l2norm(q), l2norm(k)
        write_k, A = k, None
        if preconditioner is not None:
            state = options["state"]
            B, A = diagonal_preconditioner(
                k, preconditioner, A=state and state.A, cu_seqlens=options["cu_seqlens"]
            )
            write_k = B * expand_heads(k, B.shape[2])
        return (*self.feedback(q, k), write_k), A
