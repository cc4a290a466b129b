"""Decoding from the recurrent state: constant memory and constant time a token, whatever the length."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pdn.model import LanguageModel


def sample(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token [B] from logits [B, vocab].

    temperature: 0 takes the most likely token. top_k: only the k most likely. top_p: the smallest set of tokens that
    together have at least this probability (arXiv 1904.09751).
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
        logits = torch.full_like(logits, float("-inf")).scatter(-1, index, ordered.masked_fill(before >= top_p, float("-inf")))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk: int = 2048,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, [B] int64, one after the other.

    Args:
        prompt: [B, T] int64, T >= 1; all sequences of one length.
        eos_id: stop once every sequence has produced it; a finished sequence goes on yielding it. None: never stop early.
        prefill_chunk: tokens of the prompt per forward pass, which bounds the memory of a long prompt.

    Raises:
        ValueError: an empty prompt, or sampling settings out of range.
    """
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt {tuple(prompt.shape)}: expected [B, T] with at least one token")
    if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError(f"{temperature=}, {top_k=}, {top_p=}: expected temperature >= 0, top_k >= 1 or None, 0 < top_p <= 1")
    model.eval()
    state = model.init_state(prompt.shape[0])
    for part in prompt.split(prefill_chunk, 1):
        output = model(part, state=state)
        state = output.state
    finished = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    for i in range(max_new_tokens):
        token = sample(output.logits[:, -1], temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if eos_id is not None:
            token = torch.where(finished, eos_id, token)
            finished |= token == eos_id
        yield token
        if i == max_new_tokens - 1 or (eos_id is not None and bool(finished.all())):
            return
        output = model(token[:, None], state=state)
        state = output.state


def stream_text(tokens: Iterator[int], decode) -> Iterator[str]:
    """Text pieces of one sequence as they become certain: a character cut between two tokens waits for its rest.

    decode: from a list of token ids to text.
    """
    context, fresh = [], []  # tokens already shown, kept so that the tokenizer joins words as in running text; and new ones
    for token in tokens:
        fresh.append(token)
        before, text = decode(context), decode(context + fresh)
        if len(text) > len(before) and not text.endswith("\ufffd"):
            yield text[len(before) :]
            context, fresh = fresh, []
    if fresh:
        yield decode(context + fresh)[len(decode(context)) :]
