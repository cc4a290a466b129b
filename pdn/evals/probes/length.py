"""Perplexity at multiples of the training length: does the state hold up where it has never been trained?"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from pdn.errors import ConfigError
from pdn.evals.probes.base import About, Probe, Subject
from pdn.evals.validation import evaluate

CONTINUOUS = {"document_isolation": False}  # the state runs on through the documents of a window


class LengthProbe(Probe):
    """Validation text in windows of ever more tokens; the same text at every length, but for what is left over."""

    kind: Literal["length"]
    multiples: list[int] = Field(min_length=1)  # of the training length
    max_tokens: int = Field(ge=1)  # of validation text

    def check(self, about: About) -> None:
        if about.validation is None or about.tokenizer is None:
            raise ConfigError("EVAL-SUBJECT", "length: needs the text that the run was validated on; expected run=runs/<name>")

    def run(self, subject: Subject) -> dict[str, float]:
        """``loss@L``, ``perplexity@L`` over windows of L tokens, and ``tail_loss@L``: of each window's last training length."""
        lengths = subject.lengths or tuple(multiple * subject.seq_len for multiple in self.multiples)
        available = self._available(subject)
        text = min(self.max_tokens, available) // max(lengths) * max(lengths)
        if text == 0:
            raise ConfigError(
                "EVAL-LENGTH",
                f"length: {available:,} tokens of validation text; expected at least {max(lengths):,}, the longest "
                "window: give more text, or lengths= with shorter ones",
            )
        found = {}
        for length in lengths:
            found |= self._at(subject, length, text // length)
        return found

    def _at(self, subject: Subject, length: int, windows: int) -> dict[str, float]:
        scorer = subject.scorer
        batch_size = max(1, scorer.batch_size * subject.seq_len // length)
        batches = subject.validation(CONTINUOUS | {"seq_len": length}, batch_size, windows)
        ends = [length - subject.seq_len, length] if length > subject.seq_len else [length]
        result = evaluate(scorer.model, batches, scorer.world, bf16=scorer.bf16, ends=ends)
        found = {key: result[key] for key in ("loss", "perplexity")} | {"tail_loss": result[f"loss_by_position@{length}"]}
        return {f"{key}@{length}": value for key, value in found.items()}

    def _available(self, subject: Subject) -> int:
        """Tokens of the validation text, in whole training windows of all ranks."""
        world = subject.scorer.world
        batches = subject.validation({}, subject.scorer.batch_size, math.ceil(self.max_tokens / subject.seq_len))
        counted = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
        return int(world.sum(torch.tensor([counted], device=world.device)).item())
