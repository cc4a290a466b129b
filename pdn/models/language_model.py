"""The language model: embedding, blocks of any pattern of mixers, norm, head."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pdn.models.config import ModelConfig
from pdn.models.layers import Embedding, Linear, RMSNorm, SwiGLU, linear_cross_entropy
from pdn.models.mixers.base import TokenMixer
from pdn.models.width import set_depth_factors, set_width_factors
from pdn.ops.types import autocast_dtype


class Output(NamedTuple):
    """Holds logits [B, T, vocab] without labels; with labels the losses.

    These are the differentiable sum of all losses, the cross entropies [B, T] and the z-losses
    [B, T], None without a coefficient.
    """

    logits: Tensor | None
    loss_sum: Tensor | None
    losses: Tensor | None
    state: list[Any] | None
    z_losses: Tensor | None = None


class Block(nn.Module):
    """Adds a token mixer to x, then a SwiGLU, each of them reading its norm of x.

    There is no SwiGLU if ``intermediate_size`` is 0.
    """

    def __init__(self, config: ModelConfig, mixer_name: str):
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer: TokenMixer = config.mixers[mixer_name].build(config.d_model)
        self.mlp: SwiGLU | None
        if config.intermediate_size:
            self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
            self.mlp = SwiGLU(config.d_model, config.intermediate_size)
        else:
            self.mlp = None

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: Any = None
    ) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.mixer_norm(x), cu_seqlens=cu_seqlens, state=state)
        x = x + y
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state


class LanguageModel(nn.Module):
    """Predicts the next token: embedding, blocks, norm and head.

    Parameters are uninitialised until ``init_weights``, so that the model can be built on the meta
    device.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocabulary, config.d_model)
        # A ModuleList, which forgets the class of its modules.
        blocks = nn.ModuleList(Block(config, name) for name in config.layers)
        self.blocks = cast("Sequence[Block]", blocks)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = Linear(config.d_model, config.vocabulary)
        if config.base_width is not None:
            set_width_factors(self.blocks, self.norm, config.base_width / config.d_model)
        if config.base_depth is not None:
            for block in self.blocks:
                set_depth_factors(block.mixer, block.mlp, config.base_depth / config.num_layers)

    @property
    def head_weight(self) -> Tensor:
        """Return the output head, [vocab, D]: the embedding itself where the two are tied.

        Raises:
            ValueError: something that is no ``Linear`` stands in the place of the head.
        """
        if self.head is None:
            return self.embedding.weight
        if not isinstance(self.head, Linear):
            raise ValueError(
                f"head: found a {type(self.head).__name__}; expected pdn's Linear, whose weight is "
                "read: merge adapters into it, or leave the head out of what they adapt"
            )
        return self.head.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: list[Any] | None = None,
        z_loss: float = 0.0,
    ) -> Output:
        """Compute logits, or with labels the losses.

        Args:
            tokens, labels: [B, T] int64; a negative label, such as -100, is not counted.
            cu_seqlens: [N + 1] int32, document boundaries on the flattened B * T axis (see
                ``pdn.ops.delta_rule``).
            state: one entry a block, from ``init_state`` or an earlier Output; the tokens continue
                those sequences, with ``cu_seqlens`` the first document of each row. Attention takes
                one of the two only.
            z_loss: see ``linear_cross_entropy``; for training, validation leaves it out.
        """
        x, state = self.hidden(tokens, cu_seqlens=cu_seqlens, state=state)
        if labels is None:
            weight = self.embedding.weight
            logits = nn.functional.linear(x, weight) if self.head is None else self.head(x)
            return Output(logits, None, None, state)
        loss_sum, losses, z_losses = linear_cross_entropy(x, self.head_weight, labels, z_loss)
        return Output(None, loss_sum, losses, state, z_losses)

    def hidden(
        self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, state: list[Any] | None = None
    ) -> tuple[Tensor, list[Any] | None]:
        """Return what the head reads, [B, T, D], and the new state.

        For callers that need logits at some positions only. Not of a sharded model. Arguments as of
        ``forward``.
        """
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(
                f"state: found {len(state)} entries; expected one for each of {len(self.blocks)} "
                "blocks, as init_state returns them"
            )
        x = self.embedding(tokens)
        if self.config.residual_dtype == "auto":
            x = x.to(autocast_dtype(x.device) or x.dtype)
        states = []
        for block, block_state in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, block_state = block(x, cu_seqlens=cu_seqlens, state=block_state)
            states.append(block_state)
        return self.norm(x), states if state is not None else None

    def init_state(self, batch_size: int) -> list[Any]:
        """Return the state before any token, of constant size for every mixer but attention."""
        weight = self.embedding.weight
        dtype = autocast_dtype(weight.device) or weight.dtype
        return [block.mixer.init_state(batch_size, weight.device, dtype) for block in self.blocks]

    def init_weights(self, seed: int) -> None:
        """Initialise every parameter from (seed, module name).

        The values do not depend on the number of ranks that share a parameter.
        """
        init_weights(self, seed)
        if self.config.init == "released":
            for i, block in enumerate(self.blocks):
                device = next(block.parameters()).device
                digest = hashlib.sha256(f"{seed}/released/{i}".encode()).digest()
                generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:6], "big"))
                block.mixer.reset_as_released(generator, len(self.blocks))


def init_weights(model: nn.Module, seed: int) -> None:
    """Initialise every parameter of a model or mixer by itself, from (seed, module name)."""
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None)
        own = next(module.parameters(recurse=False), None)
        if reset is not None and own is not None:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            reset(torch.Generator(own.device).manual_seed(int.from_bytes(digest[:6], "big")))
