"""Causal softmax attention: the transformer baseline, and the attention layers of hybrids."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pdn.models.layers import Linear, RMSNorm, document_positions, rotary, rotary_table
from pdn.models.mixers.axes import Heads
from pdn.models.mixers.axes.output_gate import FullRankGate
from pdn.models.mixers.base import MixerConfig, TokenMixer
from pdn.ops import context
from pdn.ops.chunkwise import document_ids


class AttentionConfig(MixerConfig):
    """Attends by softmax over all earlier tokens, or a window of them.

    A key with a default came later than the others: it is what runs from before it computed.
    """

    kind: Literal["attention"]
    num_heads: int = Field(ge=1)  # of queries
    num_kv_heads: int | None = Field(default=None, ge=1)  # divides num_heads; null: the same
    head_dim: int = Field(ge=2)
    positions: Literal["rope", "nope"] = "rope"
    rope_base: float = Field(gt=1)
    window: int | None = Field(default=None, ge=1)  # tokens, this one included; null: all of them
    qk_norm: bool = False  # RMSNorm of each query and key, before the rotation
    qk_norm_eps: float = Field(default=1e-5, gt=0)
    output_gate: Literal["none", "sigmoid"] = "none"  # of every channel, full rank

    @model_validator(mode="after")
    def _whole_heads(self):
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: rotary positions need an even head_dim")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}; "
                "expected whole groups of query heads"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """Return the number of heads of keys and values, each read by as many heads of queries."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def num_params(self, d_model: int) -> int:
        gates = self.num_heads if self.output_gate != "none" else 0
        maps = d_model * self.head_dim * (2 * self.num_heads + 2 * self.kv_heads + gates)
        return maps + (2 * self.head_dim if self.qk_norm else 0)

    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        # q.k and p.v over the mean number of tokens in reach
        reach = min(self.window or seq_len, seq_len)
        mean = reach - reach * reach / (2 * seq_len)
        return 2 * self.num_params(d_model) + round(4 * mean * self.num_heads * self.head_dim)

    def activation_bytes(self, width: int) -> float | None:
        if self.window is not None or self.qk_norm or self.output_gate != "none":
            return None
        # q, k and v as attention reads them, o, o as its projection reads it, and the normalisers
        numbers = self.head_dim * (3 * self.num_heads + 2 * self.kv_heads)
        return width * numbers + 4 * self.num_heads

    def build(self, d_model: int) -> Attention:
        return Attention(self, d_model)


class KVCache(NamedTuple):
    """Keeps keys and values of the earlier tokens, [B, T, HKV, K].

    Without a window they are all of them and the keys rotated. With one they are those that the
    next token can reach, and the keys as they were before the rotation: only distances matter, and
    positions that count from the cache's first token stay small.
    """

    k: Tensor
    v: Tensor


class Attention(TokenMixer):
    def __init__(self, config: AttentionConfig, d_model: int):
        super().__init__()
        self.config = config
        width, kv_width = (n * config.head_dim for n in (config.num_heads, config.kv_heads))
        self.q_proj = Linear(d_model, width)
        self.k_proj, self.v_proj = (Linear(d_model, kv_width) for _ in range(2))
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(config.head_dim, config.qk_norm_eps) for _ in range(2)
            )
        if config.output_gate != "none":
            heads = Heads(config.kv_heads, config.num_heads, config.head_dim, config.head_dim)
            self.output_gate = FullRankGate(config.output_gate, d_model, heads)
        self.o_proj = Linear(width, d_model)

    def forward(self, x, *, cu_seqlens=None, state: KVCache | None = None):
        if state is not None and cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens beside a state: attention's cache does not keep whose documents its "
                "tokens are of; expected one of the two"
            )
        batch, time, _ = x.shape
        config, window = self.config, self.config.window
        q, k, v = (
            p(x).unflatten(-1, (-1, config.head_dim))
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        past = 0 if state is None else state.k.shape[1]
        piece, whole = context.current(), time
        if piece is not None:
            # The tokens before are on other ranks, and so are the documents' borders.
            past, whole, cu_seqlens = piece.start, piece.count * time, piece.cu_seqlens
        if state is not None and window is not None:  # cached as they were before the rotation
            k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
            kept = slice(max(0, past + time - window + 1), None)
            state = KVCache(k[:, kept], v[:, kept])
        if config.positions == "rope":
            table = self._table(past + time, cu_seqlens, batch, whole, x)
            q = rotary(q, table[:, past : past + time])
            k = rotary(k, table[:, past + time - k.shape[1] : past + time])
        if state is not None and window is None:
            k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
            state = KVCache(k, v)
        if piece is not None:
            k, v = context.gather(torch.cat([k, v], -1), piece)[:, : past + time].chunk(2, -1)
        mask = self._mask(cu_seqlens, batch, time, past, x.device, whole)
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            **({"enable_gqa": True} if config.kv_heads != config.num_heads else {}),
        ).transpose(1, 2)
        if config.output_gate != "none":
            o = o * self.output_gate(x)
        return self.o_proj(o.flatten(-2)), state

    def _table(self, length: int, cu_seqlens: Tensor | None, batch: int, time: int, x: Tensor):
        """Return cos and sin at the positions of the tokens, [1 or B, at least length, 2, K / 2].

        Args:
            length: tokens from the sequence's first to the last one here.
            cu_seqlens: documents of the whole sequences, of ``time`` tokens.
            batch: sequences.
            time: tokens of each.
            x: what the device and the dtype are of.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        half = self.config.head_dim // 2
        table = rotary_table(length, half, self.config.rope_base, x.device, dtype)
        if cu_seqlens is None:
            return table[None]
        return table[document_positions(cu_seqlens, batch, time)[:, :length]]

    def _mask(self, cu_seqlens, batch, time, past, device, whole) -> Tensor | None:
        """Return the attention mask, None where plain causal attention is right.

        ``past`` tokens are before the ``time`` ones here; ``cu_seqlens`` is of ``whole`` tokens.
        """
        window = self.config.window
        reaches_all = window is None or window >= past + time
        if cu_seqlens is None and past == 0 and reaches_all:
            return None
        mask = torch.ones(time, past + time, dtype=torch.bool, device=device).tril(past)
        if window is not None and not reaches_all:
            mask = mask.triu(past - window + 1)
        if cu_seqlens is None:
            return mask
        ids = document_ids(cu_seqlens, batch, whole)[:, : past + time]
        return (mask & (ids[:, past:, None] == ids[:, None, :]))[:, None]

    def init_state(self, batch_size, device, dtype):
        config = self.config
        empty = torch.zeros(
            batch_size, 0, config.kv_heads, config.head_dim, device=device, dtype=dtype
        )
        return KVCache(empty, empty)

    def reset_parameters(self, generator):
        pass  # every parameter belongs to a submodule
