"""How the next token is chosen: on the device, and from a random stream for each sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdn.ops.decoding import draw

LOWEST = 1e-30  # what float32 can divide by; any lower temperature takes the most likely as well


@dataclass(frozen=True)
class Sampling:
    """Holds the settings of ``sample``.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: only the k most likely; None keeps all.
        top_p: the smallest set of tokens that together have at least this probability (arXiv
            1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        temperature, top_k, top_p = self.temperature, self.top_k, self.top_p
        if not temperature >= 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
            raise ValueError(
                f"{temperature=}, {top_k=}, {top_p=}: expected temperature >= 0, top_k >= 1 or "
                "None, 0 < top_p <= 1"
            )

    def check_seeds(self, seeds: Sequence[int] | None, prompts: int) -> None:
        """Raise ValueError unless there is a seed for each prompt, where they are needed."""
        if self.temperature > 0 and (seeds is None or len(seeds) != prompts):
            raise ValueError(
                f"temperature={self.temperature}, {0 if seeds is None else len(seeds)} seeds: "
                f"expected one for each of {prompts} prompts"
            )


def sample(logits: Tensor, how: Sampling, uniform: Tensor | None) -> Tensor:
    """Choose one token [B] int64 from logits [B, vocab], without waiting for the device.

    Args:
        logits: of any float dtype.
        how: the settings.
        uniform: a number in [0, 1) for each row, float64 [B], at which the inverse of its
            distribution is taken; unused at temperature 0. A row's token depends on nothing else
            of the batch.
    """
    if how.temperature == 0:
        return logits.argmax(-1)
    assert uniform is not None
    temperature = max(how.temperature, LOWEST)
    return draw(logits, uniform, temperature=temperature, top_k=how.top_k, top_p=how.top_p)


def stream_seed(*parts: int | str | None) -> int:
    """Derive the seed of one sequence's random stream from what identifies it.

    parts: such as the run's seed, the document and the number of the repeat.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Draw ``count`` numbers in [0, 1) of each stream, float64 [len(seeds), count], on the CPU."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=g) for g in generators])
