"""Associative recall beyond the training length, for models trained on ``data=mqar``.

Source: arXiv 2312.04927.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pdn.errors import ConfigError
from pdn.evals.probes.base import About, Probe, Subject
from pdn.evals.results import Estimate
from pdn.evals.validation import evaluate


class MqarProbe(Probe):
    """Evaluates held-out examples with as many pairs as in training, at multiples of its length."""

    kind: Literal["mqar"]
    multiples: list[int] = Field(min_length=1)  # of the training length
    examples: int = Field(ge=1)  # at each length

    def check(self, about: About) -> None:
        if about.validation is None or about.tokenizer is not None:
            raise ConfigError(
                "EVAL-SUBJECT",
                "mqar: needs a model that was trained on it; expected a run with data=mqar (see "
                "configs/data)",
            )
        for length in self._lengths(about):
            about.validation(self._changes(length), 1, 1)

    def _lengths(self, about: About) -> tuple[int, ...]:
        return about.lengths or tuple(multiple * about.seq_len for multiple in self.multiples)

    def _changes(self, length: int) -> dict[str, int]:
        return {"seq_len": length, "validation_examples": self.examples}

    def run(self, subject: Subject) -> dict[str, Estimate]:
        """Return ``accuracy@L``: how often the likeliest token is the value of the key."""
        assert subject.validation is not None  # as it was checked
        scorer, found = subject.scorer, {}
        for length in self._lengths(subject):
            batches = subject.validation(self._changes(length), scorer.batch_size, self.examples)
            result = evaluate(
                scorer.model,
                batches,
                scorer.world,
                bf16=scorer.bf16,
                accuracy=True,
                alive=scorer.alive,
            )
            count = int(result["tokens"])
            found[f"accuracy@{length}"] = Estimate(result["accuracy"], n=count)
        return found
