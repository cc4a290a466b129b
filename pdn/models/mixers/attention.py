"""Causal softmax attention with rotary positions: the transformer baseline, and the attention
layers of hybrids.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pdn.models.layers import Linear, document_positions, rotary, rotary_table
from pdn.models.mixers.base import MixerConfig, TokenMixer
from pdn.ops.chunkwise import document_ids


class AttentionConfig(MixerConfig):
    kind: Literal["attention"]
    num_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    rope_base: float = Field(gt=1)

    @model_validator(mode="after")
    def _rotary_halves(self):
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: rotary positions need an even head_dim")
        return self

    def num_params(self, d_model: int) -> int:
        return 4 * d_model * self.num_heads * self.head_dim

    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        return (
            2 * self.num_params(d_model) + 2 * seq_len * self.num_heads * self.head_dim
        )  # q.k and p.v, half masked

    def build(self, d_model: int) -> Attention:
        return Attention(self, d_model)


class KVCache(NamedTuple):
    """Rotated keys and values of all tokens so far, [B, T, H, K]: grows with the sequence."""

    k: Tensor
    v: Tensor


class Attention(TokenMixer):
    def __init__(self, config: AttentionConfig, d_model: int):
        super().__init__()
        self.config = config
        width = config.num_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Linear(d_model, width) for _ in range(3))
        self.o_proj = Linear(width, d_model)

    def forward(self, x, *, cu_seqlens=None, state: KVCache | None = None):
        batch, time, _ = x.shape
        q, k, v = (
            p(x).unflatten(-1, (-1, self.config.head_dim))
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        past = 0 if state is None else state.k.shape[1]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        table = rotary_table(
            past + time, self.config.head_dim // 2, self.config.rope_base, x.device, dtype
        )
        table = (
            table[None, past:]
            if cu_seqlens is None
            else table[document_positions(cu_seqlens, batch, time)]
        )
        q, k = rotary(q, table), rotary(k, table)
        if state is not None:
            k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
            state = KVCache(k, v)
        mask = self._mask(cu_seqlens, batch, time, past, x.device)
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
        )
        return self.o_proj(o.transpose(1, 2).flatten(-2)), state

    @staticmethod
    def _mask(cu_seqlens, batch, time, past, device) -> Tensor | None:
        """None where plain causal attention is right."""
        if cu_seqlens is None and past == 0:
            return None
        causal = torch.ones(time, past + time, dtype=torch.bool, device=device).tril(past)
        if cu_seqlens is None:
            return causal
        ids = document_ids(cu_seqlens, batch, time)
        return (causal & (ids[:, :, None] == ids[:, None, :]))[:, None]

    def init_state(self, batch_size, device, dtype):
        empty = torch.zeros(
            batch_size, 0, self.config.num_heads, self.config.head_dim, device=device, dtype=dtype
        )
        return KVCache(empty, empty)

    def reset_parameters(self, generator):
        pass  # every parameter belongs to a submodule
