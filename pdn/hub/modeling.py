"""A Hugging Face class around LanguageModel, for models that no released library can load.

``import pdn.hub.modeling`` registers it, after which ``AutoModelForCausalLM.from_pretrained`` loads
the folder. It runs no code from the folder.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, cast

import torch
from torch import Size, Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import Cache

# Arguments of transformers' protocol that ``forward`` has no use for, with the values that ask for
# nothing. Every other value is refused.
WITHOUT_EFFECT = {"output_attentions": (None, False), "output_hidden_states": (None, False)}


class PdnConfig(PreTrainedConfig):
    """Keeps the dump of a ModelConfig in transformers' configuration, as ``pdn``."""

    model_type = "pdn"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, pdn: dict | None = None, **kwargs):
        self.pdn = pdn or {}
        self.num_hidden_layers = self.pdn.get("num_layers", 0)
        self.hidden_size = self.pdn.get("d_model", 0)
        self.vocab_size = self.pdn.get("vocab_size", 0)
        # what ``pdn`` says holds: without the key transformers ties nothing
        tied = {"tie_word_embeddings": self.pdn.get("tie_embeddings", False)}
        super().__init__(**kwargs | tied)


class PdnCache:
    """Keeps the states of all layers, and how many tokens they have seen."""

    is_compileable = False

    def __init__(self, state: list, seen: int):
        self.state, self.seen = state, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = tree_map(lambda x: None if x is None else x[beam_idx], self.state)


class PdnForCausalLM(PreTrainedModel, GenerationMixin):
    """Wraps a causal language model for transformers, without padding on the left.

    Sequences have one length, or, without a cache, are padded on the right with the padding's
    logits ignored. Arguments of transformers' protocol are honoured or refused by name.
    """

    config_class = PdnConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012
    _is_stateful = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch, see forward

    def __init__(self, config: PdnConfig):
        super().__init__(config)
        self.model = LanguageModel(ModelConfig.model_validate(config.pdn))
        if self.model.config.tie_embeddings:
            self.lm_head = nn.Linear(config.pdn["d_model"], config.pdn["vocab_size"], bias=False)
        else:
            self._tied_weights_keys = {}
        # Decays, norms and the preconditioner's parameters, whatever dtype is asked for.
        self._keep_in_fp32_modules_strict = [
            f"model.{name}"
            for name, module in self.model.named_modules()
            if name and not getattr(module, "weight_decay", True)
        ]
        self.post_init()
        # ``from_pretrained`` makes it on the meta device, and then takes weights from the folder.
        if not self.model.norm.weight.is_meta:
            self.model.init_weights(int(torch.randint(2**31, ())))

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the constructor has, by a seed from torch's generator."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head if self.model.head is None else self.model.head

    # transformers says nn.Embedding here, and any module of ``get_input_embeddings``
    def resize_token_embeddings(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, new_num_tokens: int | None = None, *args, **kwargs
    ) -> nn.Module:
        """Return the embedding as it is; raise NotImplementedError for another size."""
        asked, step = new_num_tokens, kwargs.get("pad_to_multiple_of", args[0] if args else None)
        if step is not None:
            asked = -(-(asked or self.config.vocab_size) // step) * step
        if asked is not None and asked != self.config.vocab_size:
            raise NotImplementedError(
                f"resize_token_embeddings to {asked}: the vocabulary has "
                f"{self.config.vocab_size} entries, and PdnForCausalLM keeps it; use ids below that"
            )
        return self.get_input_embeddings()

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
        **kwargs,
    ) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            gradient_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``.
            every_n_layers: 1 recomputes every block, 2 every second one, ….
            offload: to host memory; not supported.

        Raises:
            ValueError: ``offload``, or ``use_reentrant=True``.
            TypeError: another argument.
        """
        _refuse(kwargs)
        options = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        if options["use_reentrant"] or offload:
            raise ValueError(f"{offload=}, {options}: expected offload=False, use_reentrant=False")
        self.gradient_checkpointing_disable()
        for block in self.model.blocks[::every_n_layers]:
            block.forward = functools.partial(_recompute_in_training, block, options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        for block in self.model.blocks:
            block.__dict__.pop("forward", None)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return "forward" in self.model.blocks[0].__dict__

    # transformers refuses ``inputs_embeds`` by name where this has no argument of that name
    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids, past_key_values=None, attention_mask=None, position_ids=None, **kwargs
    ):
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if seen >= input_ids.shape[1]:
            raise ValueError(
                f"past_key_values: has seen {seen} tokens of {input_ids.shape[1]}; expected a "
                "cache of fewer, which input_ids begin with"
            )
        asked = {name: kwargs[name] for name in WITHOUT_EFFECT if name in kwargs}
        if (
            position_ids is not None
        ):  # transformers' own, or the caller's, which may be of documents
            asked["position_ids"] = position_ids[:, seen - input_ids.shape[1] :]
        return asked | {
            "input_ids": input_ids[:, seen:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": True,
            "logits_to_keep": 1,
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PdnCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Compute logits [B, T, vocab], and the loss of ``labels``.

        The labels are shifted by one here, as transformers has it.

        Args:
            attention_mask: [B, T] or [B, seen + T]; zeros only on the right, and none with a cache.
            position_ids: [B, T]; a position 0 within a row begins another document, which sees
                nothing of the one before.
            past_key_values: of an earlier call; it is advanced in place and returned.
            use_cache: whether to return a cache.
            logits_to_keep: the last positions, or their indices, to give logits of; 0: all.
            num_items_in_batch: labels that the loss is divided by, of all micro-batches together;
                None: those of this call.

        Raises:
            ValueError, TypeError: an argument that cannot be honoured, by name.
        """
        _refuse(kwargs)
        cached = bool(use_cache) or past_key_values is not None
        state, seen = None, 0
        if past_key_values is not None:
            if not isinstance(past_key_values, PdnCache):
                raise TypeError(
                    f"past_key_values: found a {type(past_key_values).__name__}; expected the "
                    "PdnCache of an earlier call, or None"
                )
            state, seen = past_key_values.state, past_key_values.seen
        elif cached:
            state = self.model.init_state(len(input_ids))
        _check_mask(attention_mask, input_ids.shape, seen, cached)
        documents = _documents(position_ids, input_ids.shape, seen)
        if documents is not None and cached:
            raise ValueError(
                "position_ids: found several documents in a row; expected one with a cache"
            )
        hidden, state = self.model.hidden(input_ids, cu_seqlens=documents, state=state)
        kept = hidden
        if labels is None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            last = isinstance(logits_to_keep, int)
            kept = hidden[:, slice(-logits_to_keep, None) if last else logits_to_keep]
        # A call, which an adapter may have been put around; a tied head has the embedding's weight.
        logits = self.get_output_embeddings()(kept)
        loss = None
        if labels is not None:
            # transformers' loss sums, and divides by num_items_in_batch where that is given.
            loss = self.loss_function(
                logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        cache = past_key_values
        if cached:
            cache = cache or PdnCache([], 0)
            cache.state, cache.seen = state, seen + input_ids.shape[1]
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            # transformers says its own class, and asks for no more than ours has
            past_key_values=cast("Cache | None", cache),
        )
        return output.to_tuple() if return_dict is False else output


def _recompute_in_training(block: nn.Module, options: dict, *args, **kwargs):
    forward = functools.partial(type(block).forward, block)
    if block.training and torch.is_grad_enabled() and kwargs.get("state") is None:
        return checkpoint(forward, *args, **options, **kwargs)
    return forward(*args, **kwargs)


def _refuse(kwargs: dict) -> None:
    """Raise TypeError for what transformers' protocol has and this class has not."""
    for name, value in kwargs.items():
        if not any(value is harmless for harmless in WITHOUT_EFFECT.get(name, (None,))):
            raise TypeError(
                f"{name}: PdnForCausalLM does not support it; expected a call without it"
            )


def _check_mask(mask: Tensor | None, shape: Size, seen: int, cached: bool) -> None:
    """Raise ValueError for a mask that means more than padding on the right without a cache.

    Args:
        mask: as given.
        shape: of the input, [B, T].
        seen: tokens in the cache.
        cached: whether a cache is read or returned.
    """
    if mask is None:
        return
    rows, length = shape
    shapes = [(rows, length), (rows, seen + length)]
    if (
        not isinstance(mask, Tensor)
        or tuple(mask.shape) not in shapes
        or not bool(((mask == 0) | (mask == 1)).all())
    ):
        raise ValueError(
            f"attention_mask: expected a tensor {list(shapes[-1])} of zeros and ones, or none; "
            "documents in a row are told apart by position_ids"
        )
    mask = mask.int()
    if bool((mask.diff(dim=1) > 0).any() | (mask[:, 0] == 0).any()):
        raise ValueError(
            "attention_mask has padding on the left; expected it on the right, or prompts of "
            "one length"
        )
    if cached and not bool(mask.all()):
        raise ValueError(
            "attention_mask has padding, which would enter the states of a cache; expected prompts "
            "of one length, or use_cache=False"
        )


def _documents(positions: Tensor | None, shape: Size, seen: int) -> Tensor | None:
    """Return where documents begin on the flattened axis, [N + 1] int32; None if none do.

    They begin where positions begin again in mid-row.

    Raises:
        ValueError: positions that neither count on by one nor begin again at 0.
    """
    if positions is None:
        return None
    rows, length = shape
    if tuple(positions.shape) not in [(rows, length), (1, length)]:
        raise ValueError(
            f"position_ids: found the shape {list(positions.shape)}; expected {[rows, length]}, or "
            f"{[1, length]} for all rows"
        )
    positions = positions.expand(rows, -1)
    begins = positions == 0
    steady = (positions.diff(dim=1) == 1) | begins[:, 1:]
    if not bool(steady.all()) or not bool((positions[:, 0] == seen).all()):
        raise ValueError(
            f"position_ids: expected each row to count on from {seen} by one, and to begin again "
            "at 0 where another document begins"
        )
    if not bool(begins[:, 1:].any()):
        return None
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([positions.numel()])]).to(torch.int32)


AutoConfig.register("pdn", PdnConfig)
AutoModelForCausalLM.register(PdnConfig, PdnForCausalLM)
