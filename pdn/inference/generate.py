"""Decoding from the recurrent state: constant memory and constant time a token, whatever the
length; ragged batches are exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pdn.models.language_model import LanguageModel


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
    uniform: Tensor | None,
) -> Tensor:
    """Choose one token [B] from logits [B, vocab].

    Args:
        temperature: 0 takes the most likely token.
        top_k: only the k most likely; None keeps all.
        top_p: the smallest set of tokens that together have at least this probability
            (arXiv 1904.09751).
        uniform: a number in [0, 1) for each row, float64 [B], at which the inverse of its
            distribution is taken; unused at temperature 0. A row's token depends on nothing else
            of the batch.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = torch.full_like(logits, float("-inf")).scatter(
            -1, index, ordered.masked_fill(before >= top_p, float("-inf"))
        )
    cumulative = logits.double().softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return chosen[:, 0].clamp(max=logits.shape[-1] - 1)


def stream_seed(*parts: int | str) -> int:
    """Derive the seed of one sequence's random stream from what identifies it, such as the run's
    seed, the document and the number of the repeat.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """``count`` numbers in [0, 1) of each stream, float64 [len(seeds), count] on the CPU."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=g) for g in generators])


class _Group(NamedTuple):
    """Sequences that decode together. rows: their numbers; logits [b, vocab] of the next token;
    state of b sequences.
    """

    rows: list[int]
    logits: Tensor
    state: list[Any]


def _prefill(
    model: LanguageModel, prompts: Sequence[Sequence[int]], tokens_per_pass: int
) -> list[_Group]:
    """Read prompts of any lengths without padding: all rows advance to the shortest end, which
    leaves, and so on.

    States of constant size then join into one group; attention's caches only with those of the same
    length.
    """
    device = model.embedding.weight.device
    rows = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    state, done, groups = model.init_state(len(rows)), 0, []
    for length in sorted({len(prompt) for prompt in prompts}):
        tokens = torch.tensor([prompts[row][done:length] for row in rows], device=device)
        for part in tokens.split(max(1, tokens_per_pass // len(rows)), 1):
            hidden, state = model.hidden(part, state=state)
        ended = sum(len(prompts[row]) == length for row in rows)
        leave, stay = slice(ended), slice(ended, None)
        groups.append(
            _Group(
                rows[leave],
                F.linear(hidden[leave, -1], model.head_weight),
                _map_state(lambda x, s=leave: x[s], state),
            )
        )
        rows, state, done = rows[stay], _map_state(lambda x, s=stay: x[s], state), length
    alike: dict[Any, list[_Group]] = {}
    for group in groups:
        alike.setdefault(
            tuple(x.shape[1:] for x in tree_leaves(group.state) if x is not None), []
        ).append(group)
    return [_joined(parts) for parts in alike.values()]


def _joined(groups: list[_Group]) -> _Group:
    rows = [row for group in groups for row in group.rows]
    state = _map_state(lambda *parts: torch.cat(parts), *(group.state for group in groups))
    return _Group(rows, torch.cat([group.logits for group in groups]), state)


def _map_state(change, *states: list[Any]) -> list[Any]:
    return tree_map(lambda *leaves: None if leaves[0] is None else change(*leaves), *states)


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_id: int | None = None,
    seeds: Sequence[int] | None = None,
    prefill_tokens: int = 8192,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, [B] int64, one after the other.

    Args:
        prompts: token ids of each sequence, of any lengths; none is padded, so that each continues
            as if it were alone.
        eos_id: stop once every sequence has produced it; a finished sequence goes on yielding it.
            None: never stop early.
        seeds: of each sequence's random stream, needed unless the temperature is 0: a sequence's
            samples follow from its own seed, whatever is decoded beside it.
        prefill_tokens: tokens of all prompts together in a forward pass, which bounds the memory of
            long prompts.

    Raises:
        ValueError: no prompt or an empty one, or sampling settings out of range.
    """
    if not len(prompts) or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError(
            f"{len(prompts)} prompts, lengths {[len(p) for p in prompts][:8]}: expected at least "
            "one token in each"
        )
    if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"{temperature=}, {top_k=}, {top_p=}: expected temperature >= 0, top_k >= 1 or None, 0 "
            "< top_p <= 1"
        )
    if temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError(
            f"{temperature=}, {0 if seeds is None else len(seeds)} seeds: expected one for each of "
            f"{len(prompts)} prompts"
        )
    model.eval()
    groups = _prefill(model, prompts, prefill_tokens)
    order = (
        torch.tensor([row for group in groups for row in group.rows])
        .argsort()
        .to(groups[0].logits.device)
    )
    uniforms = None
    if temperature > 0:
        uniforms = _uniforms(seeds, max_new_tokens).to(order.device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=order.device)
    for i in range(max_new_tokens):
        logits = torch.cat([group.logits for group in groups])[order]
        token = sample(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            uniform=None if uniforms is None else uniforms[:, i],
        )
        if eos_id is not None:
            token = torch.where(finished, eos_id, token)
            finished |= token == eos_id
        yield token
        if i == max_new_tokens - 1 or (eos_id is not None and bool(finished.all())):
            return
        groups = [_step(model, group, token) for group in groups]


def _step(model: LanguageModel, group: _Group, token: Tensor) -> _Group:
    output = model(token[group.rows][:, None], state=group.state)
    return _Group(group.rows, output.logits[:, -1], output.state)


def stream_text(tokens: Iterator[int], decode) -> Iterator[str]:
    """Text pieces of one sequence as they become certain: a character cut between two tokens waits
    for its rest.

    decode: from a list of token ids to text.
    """
    context, fresh = (
        [],
        [],
    )  # tokens already shown, kept so that the tokenizer joins words as in running text; and new ones
    for token in tokens:
        fresh.append(token)
        before, text = decode(context), decode(context + fresh)
        if len(text) > len(before) and not text.endswith("\ufffd"):
            yield text[len(before) :]
            context, fresh = fresh, []
    if fresh:
        yield decode(context + fresh)[len(decode(context)) :]
