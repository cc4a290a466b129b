"""The state of a model between windows: what ``LanguageModel.forward`` takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map

from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel

# One entry a block, of tensors [B, ...] and None
State = Any


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Return a state of the same form, with ``function`` of every tensor."""
    return tree_map(lambda x: None if x is None else function(x), state)


def named_tensors(state: State) -> dict[str, Tensor]:
    """Return the tensors of a state by block and place, such as ``3.recurrent.S``; live."""
    found = tree_flatten_with_path(state)[0]
    return {
        ".".join(str(getattr(key, "name", getattr(key, "idx", key))) for key in path): tensor
        for path, tensor in found
        if tensor is not None
    }


def leaves_of(state: State) -> list[Tensor]:
    """Return the tensors of a state, always in the same order."""
    return list(named_tensors(state).values())


def clear_rows(state: State, rows: Tensor) -> State:
    """Return the state with zeros, from which a sequence starts, in ``rows`` [B] bool."""
    return map_state(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0), state)


def ended(state: State, tokens: Tensor, eos_id: int) -> State:
    """Return the state for the next window: zero in rows whose document ends with this one.

    Args:
        state: after the window, [B, ...].
        tokens: [B, T], of the window.
        eos_id: what ends a document.
    """
    return clear_rows(state, tokens[:, -1] == eos_id)


def bytes_of_row(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the state of one sequence; nothing is allocated.

    Args:
        config: of the model; of attention layers, whose states grow, nothing is counted.
        dtype: of the activations, which the convolutions keep.
    """
    settled = config.model_copy(update={"vocab_size": config.vocab_size or 2})
    meta = torch.device("meta")
    with meta:
        model = LanguageModel(settled)
    state = [block.mixer.init_state(1, meta, dtype) for block in model.blocks]
    return sum(x.numel() * x.element_size() for x in leaves_of(state))
