"""Text from a model, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pdn.inference.decode import Decoder
from pdn.inference.sampling import Sampling
from pdn.models.language_model import LanguageModel

ROOM = 1024  # new tokens that attention's caches have room for at first


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
    """Yield the next token of every sequence, [B] int64 on the CPU, one after the other.

    Args:
        prompts: token ids of each sequence, of any lengths; none is padded, so that each continues
            as if it were alone.
        temperature, top_k, top_p: see ``Sampling``.
        eos_id: stop once every sequence has produced it; a finished sequence goes on yielding it.
            None: never stop early.
        seeds: of each sequence's random stream, needed unless the temperature is 0: a sequence's
            samples follow from its own seed, whatever is decoded beside it.
        prefill_tokens: tokens of all prompts together in a forward pass, which bounds the memory of
            long prompts.

    Raises:
        ValueError: no prompt or an empty one, ids that the model has no embedding for, or settings
            out of range.
    """
    _check_prompts(prompts, model.config.vocabulary)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected 0 or more")
    how = Sampling(temperature, top_k, top_p)
    how.check_seeds(seeds, len(prompts))
    decoder = Decoder(
        model,
        len(prompts),
        how=how,
        max_new_tokens=max_new_tokens,
        length=max(map(len, prompts)) + min(max_new_tokens, ROOM),
    )
    decoder.begin(range(len(prompts)), prompts, seeds=seeds, tokens_per_pass=prefill_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    for i in range(max_new_tokens):
        while any(len(row) <= i for row in found):
            left = max_new_tokens - min(map(len, found))
            for row, tokens in zip(found, decoder.burst(min(decoder.steps, left)), strict=True):
                row += tokens
        token = torch.tensor([row[i] for row in found])
        if eos_id is not None:
            token = torch.where(finished, eos_id, token)
            finished |= token == eos_id
        yield token
        if finished.all():
            return


def _check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Raise ValueError unless there are prompts of ids that are in the vocabulary.

    A GPU would end the process at such an id, and name none.
    """
    if not len(prompts):
        raise ValueError("0 prompts: expected at least one")
    for n, prompt in enumerate(prompts):
        ids = torch.as_tensor(prompt)
        if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
            raise ValueError(
                f"prompt {n}, {prompt!r:.60}: expected a sequence of at least one token id"
            )
        least, largest = int(ids.min()), int(ids.max())
        if least < 0 or largest >= vocabulary:
            raise ValueError(
                f"prompt {n}: found the id {least if least < 0 else largest}; expected ids of the "
                f"model's vocabulary, 0 to {vocabulary - 1}"
            )


def stream_text(tokens: Iterator[int], decode) -> Iterator[str]:
    """Yield the text of one sequence in pieces, as they become certain.

    A character cut between two tokens waits for its rest.

    decode: from a list of token ids to text.
    """
    context, fresh = [], []  # shown ones, kept so that words join as in running text; new ones
    for token in tokens:
        fresh.append(token)
        before, text = decode(context), decode(context + fresh)
        if len(text) > len(before) and not text.endswith("\ufffd"):
            yield text[len(before) :]
            context, fresh = fresh, []
    if fresh:
        yield decode(context + fresh)[len(decode(context)) :]
