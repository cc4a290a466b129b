"""Gated DeltaProduct (arXiv 2502.10297): several Householder steps a token.

It runs on the delta rule by interleaving the steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pdn.models.mixers.axes import BetaGain
from pdn.models.mixers.axes.gain import BetaGainConfig
from pdn.models.mixers.linear_recurrence import LinearRecurrence, RecurrenceConfig
from pdn.ops import delta_rule, materialise


class DeltaProductConfig(RecurrenceConfig):
    # narrower than the base's, which is sound as these are frozen; pyright cannot see that
    kind: Literal["delta_product"]  # pyright: ignore[reportIncompatibleVariableOverride]
    solve: Literal["online"]  # pyright: ignore[reportIncompatibleVariableOverride]
    num_householder: int = Field(ge=1)  # delta-rule steps a token

    @model_validator(mode="after")
    def _gated(self):
        if self.gain.kind != "beta" or self.preconditioner.kind == "learned":
            raise ValueError(
                f"gain.kind = {self.gain.kind} with preconditioner.kind = "
                f"{self.preconditioner.kind}: Gated DeltaProduct has the gain beta and no learned "
                "write key"
            )
        if self.decay.kind == "diagonal":
            raise ValueError("decay.kind = diagonal: Gated DeltaProduct has a scalar decay or none")
        if self.preconditioner.kind == "diagonal" and self.preconditioner.tied:
            raise ValueError("preconditioner.tied: Gated DeltaProduct keeps gates of its own")
        return self

    @property
    def inputs(self) -> dict[str, int]:
        """Return what is projected from the block's input, and how wide it is."""
        once = super().inputs
        return {name: width * (1 if name == "q" else self.num_householder)
                for name, width in once.items()}  # fmt: skip

    def num_params(self, d_model: int) -> int:
        heads = self.heads.values + self.preconditioner.num_heads(self.heads)
        return super().num_params(d_model) + (self.num_householder - 1) * d_model * heads

    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        products = 2 * self.num_householder + 1
        state = self.heads.values * self.head_dim * self.heads.value_dim
        return 2 * self.num_params(d_model) + 2 * products * state

    def build(self, d_model: int) -> DeltaProduct:
        return DeltaProduct(self, d_model)


class DeltaProduct(LinearRecurrence):
    def __init__(self, config: DeltaProductConfig, d_model: int):
        super().__init__(config, d_model)
        n, heads = config.num_householder, config.heads
        assert isinstance(config.gain, BetaGainConfig)  # ``DeltaProductConfig``
        self.num_householder = n
        self.gain = BetaGain(d_model, n * heads.values, config.gain.range)
        if self.preconditioner is not None:
            gains = n * config.preconditioner.num_heads(heads)
            self.preconditioner.gain = BetaGain(d_model, gains)

    def solve(
        self, q, k, v, decay, gain, preconditioner, *, cu_seqlens=None, state=None,
        return_state=False,
    ):  # fmt: skip
        """Run the delta rule over all steps of all tokens.

        Args:
            q: [B, T, H, K].
            k, v: [B, T, n H, K] and [B, T, n HV, V], the n steps of a token before its heads.
            decay, gain, preconditioner: what the axes' modules return.
            cu_seqlens, state, return_state: as of ``pdn.ops.delta_rule``, in tokens.
        """
        n = self.num_householder
        assert gain is not None  # ``DeltaProductConfig``
        if preconditioner is not None:
            preconditioner = replace(
                preconditioner,
                log_decay=self._first(materialise(preconditioner.log_decay)),
                beta=self._split(materialise(preconditioner.beta)),
            )
        # only the last step of a token is read, so the queries of the others are zero
        unread = q.new_zeros(*q.shape[:2], n - 1, *q.shape[2:])
        o, final = delta_rule(
            torch.cat([unread, q[:, :, None]], 2).flatten(1, 2),
            self._split(k), self._split(v),
            beta=self._split(materialise(gain)),
            log_decay=None if decay is None else self._first(materialise(decay)),
            write_k=preconditioner, qk_l2norm=self.config.qk_l2norm,
            cu_seqlens=None if cu_seqlens is None else cu_seqlens * n, state=state,
            return_state=return_state,
        )  # fmt: skip
        return o[:, n - 1 :: n], final

    def _split(self, x: Tensor) -> Tensor:
        """Reshape [B, T, n H, ...] to [B, T n, H, ...]."""
        return x.unflatten(2, (self.num_householder, -1)).flatten(1, 2)

    def _first(self, log_decay: Tensor) -> Tensor:
        """Place a token's decay at its first step: [B, T, H] to [B, T n, H]."""
        batch, time, heads = log_decay.shape
        rest = log_decay.new_zeros(batch, time, self.num_householder - 1, heads)
        return torch.cat([log_decay[:, :, None], rest], 2).flatten(1, 2)
