"""Perplexity at multiples of the training length.

Does the state hold up where it has never been trained?
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

from pydantic import Field

from pdn.distributed.collectives import gather_or_raise
from pdn.errors import ConfigError
from pdn.evals.probes.base import CONTINUOUS, About, Probe, Subject
from pdn.evals.results import Estimate
from pdn.evals.validation import evaluate

COUNTED_AT_ONCE = 1 << 16  # tokens


class LengthProbe(Probe):
    """Measures the loss of validation text in windows of ever more tokens.

    The text is the same at every length, but for what is left over.
    """

    kind: Literal["length"]
    multiples: list[int] = Field(min_length=1)  # of the training length
    max_tokens: int = Field(ge=1)  # of validation text

    def check(self, about: About) -> None:
        if about.validation is None or about.tokenizer is None:
            raise ConfigError(
                "EVAL-SUBJECT",
                "length: needs the text that the run was validated on; expected run=runs/<name>",
            )
        self._text(about)
        longest = self._changes(max(self._lengths(about)))
        # check that the data can be opened in such windows
        validation = about.validation
        gather_or_raise(lambda: sum(1 for _ in validation(longest, 1, 1)))

    def run(self, subject: Subject) -> dict[str, Estimate]:
        """Return ``loss@L``, ``perplexity@L`` and ``tail_loss@L`` over windows of L tokens.

        The tail is each window's last training length. Of the longest windows also
        ``position_loss@L``, of the tokens behind the next smaller length and up to L: does a token
        gain from what lies further back?
        """
        text, found = self._text(subject), {}
        for length in self._lengths(subject):
            found |= self._at(subject, length, text // length)
        return found

    def _lengths(self, about: About) -> tuple[int, ...]:
        return about.lengths or tuple(multiple * about.seq_len for multiple in self.multiples)

    def _changes(self, length: int) -> dict:
        return CONTINUOUS | {"seq_len": length}

    def _text(self, about: About) -> int:
        """Return the tokens to read at every length: whole windows of the longest. Collective.

        Raises ConfigError if there is none.
        """
        longest, available = max(self._lengths(about)), self._available(about)
        text = min(self.max_tokens, available) // longest * longest
        if text == 0:
            raise ConfigError(
                "EVAL-LENGTH",
                f"length: found {available:,} tokens of validation text (max_tokens = "
                f"{self.max_tokens:,}); expected at least {longest:,}, the longest window: give "
                "more validation text, smaller multiples in configs/eval/tasks/length.yaml, a "
                "smaller data.seq_len, or, to scripts/evaluate.py, lengths=",
            )
        return text

    def _at(self, subject: Subject, length: int, windows: int) -> dict[str, Estimate]:
        scorer, lengths = subject.scorer, sorted({*self._lengths(subject)})
        batch_size = max(1, scorer.batch_size * subject.seq_len // length)
        assert subject.validation is not None  # as it was checked
        batches = subject.validation(self._changes(length), batch_size, windows)
        ends = {length - subject.seq_len, length} if length > subject.seq_len else {length}
        positions = lengths if length == lengths[-1] and len(lengths) > 1 else []
        result = evaluate(
            scorer.model, batches, scorer.world, bf16=scorer.bf16,
            ends=sorted({*ends, *positions}), alive=scorer.alive,
        )  # fmt: skip
        by_position = {
            end: result[f"loss_by_position@{end}"] for end in sorted({*ends, *positions})
        }
        found = {key: result[key] for key in ("loss", "perplexity")}
        start = max(0, length - subject.seq_len)
        found["tail_loss"] = _mean_between(by_position, start, length)
        found = {f"{key}@{length}": value for key, value in found.items()}
        for before, end in itertools.pairwise([0, *positions]):
            found[f"position_loss@{end}"] = _mean_between(by_position, before, end)
        return {key: Estimate(value, n=int(result["tokens"])) for key, value in found.items()}

    def _available(self, about: About) -> int:
        """Count the tokens of the validation text of all ranks, as far as they are of use."""
        assert about.validation is not None
        batches = about.validation(
            {}, max(1, COUNTED_AT_ONCE // about.seq_len), math.ceil(self.max_tokens / about.seq_len)
        )
        return sum(
            gather_or_raise(lambda: sum(int((batch["labels"] >= 0).sum()) for batch in batches))
        )


def _mean_between(by_position: dict[int, float], before: int, end: int) -> float:
    """Return the mean loss of tokens behind ``before`` and up to ``end``, both ends of buckets.

    Windows are full, so that every position counts equally.
    """
    starts = itertools.pairwise([0, *by_position])
    widths = {stop: stop - start for start, stop in starts if before < stop <= end}
    return sum(width * by_position[stop] for stop, width in widths.items()) / (end - before)
