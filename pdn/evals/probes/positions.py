"""Loss by position within long documents, with one state throughout or one that is reset.

What does a token gain from what lies further back than the model was trained on?
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pdn.distributed.collectives import gather_or_raise
from pdn.distributed.fsdp import compute_in
from pdn.errors import ConfigError
from pdn.evals.probes.base import CONTINUOUS, About, Probe, Subject
from pdn.evals.results import Estimate


class PositionsProbe(Probe):
    """Measures the loss by position in windows of validation text within one document each."""

    kind: Literal["positions"]
    length: int = Field(ge=2)  # tokens of a window
    reset: int = Field(ge=1)  # tokens after which the state starts from zero, for comparison
    first_end: int = Field(ge=1)  # of the buckets of positions, each of which ends twice as late
    max_tokens: int = Field(ge=1)  # of validation text in which such windows are looked for

    @model_validator(mode="after")
    def _whole_parts(self):
        if self.length % self.reset:
            raise ValueError(
                f"reset = {self.reset} does not divide length = {self.length}; expected whole parts"
            )
        return self

    @property
    def ends(self) -> list[int]:
        """Return the ends of the buckets of positions, ascending, the last one ``length``."""
        ends = [min(self.first_end, self.length)]
        while ends[-1] < self.length:
            ends.append(min(2 * ends[-1], self.length))
        return ends

    def options(self) -> set[str]:
        return set()  # its lengths are one question, and stand in its file

    def check(self, about: About) -> None:
        if about.validation is None or about.tokenizer is None:
            raise ConfigError(
                "EVAL-SUBJECT",
                "positions: needs the text that the run was validated on; expected run=runs/<name>",
            )
        found = gather_or_raise(lambda: sum(1 for _ in self._windows(about)))
        self._require(sum(found))

    def run(self, subject: Subject) -> dict[str, Estimate]:
        """Return ``loss@n`` and ``reset_loss@n`` for each bucket that ends before position n.

        The tokens are the same: in ``loss`` one state goes through all of their window, in
        ``reset_loss`` it starts from zero every ``reset`` tokens. Without ``@`` the mean over all
        positions.
        """
        parts = gather_or_raise(lambda: self._sums(subject))
        count = sum(windows for windows, _ in parts)
        self._require(count)
        sums = torch.stack([sums for _, sums in parts]).sum(0)  # [2, length]
        found = {}
        for name, by_position in zip(("loss", "reset_loss"), sums, strict=True):
            tokens = count * self.length
            found[name] = Estimate(by_position.sum().item() / tokens, n=tokens)
            for start, end in itertools.pairwise([0, *self.ends]):
                tokens = count * (end - start)
                mean = by_position[start:end].sum().item() / tokens
                found[f"{name}@{end}"] = Estimate(mean, n=tokens)
        return found

    @torch.no_grad()
    def _sums(self, subject: Subject) -> tuple[int, Tensor]:
        """Return this rank's windows, and their losses [2, length], summed over them."""
        scorer = subject.scorer
        sums = torch.zeros(2, self.length, dtype=torch.float64, device=scorer.device)
        windows = 0
        batch_size = max(1, scorer.batch_size * subject.seq_len // self.length)
        source = self._windows(subject)
        while some := list(itertools.islice(source, batch_size)):
            scorer.alive()
            scorer.check()
            tokens, labels = (torch.stack(x).to(scorer.device) for x in zip(*some, strict=True))
            for row, length in enumerate((self.length, self.reset)):
                with compute_in(scorer.device, scorer.bf16):
                    found = scorer.model(tokens.view(-1, length), labels=labels.view(-1, length))
                sums[row] += found.losses.double().view(-1, self.length).sum(0)
            windows += len(tokens)
        return windows, sums.cpu()

    def _windows(self, about: About) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's tokens and labels [length] of windows within one document each."""
        assert about.validation is not None  # as it was checked
        changes = CONTINUOUS | {"seq_len": self.length}
        most = max(1, self.max_tokens // self.length)
        for batch in about.validation(changes, 1, most):
            for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
                # the end of the document may be the last label, but no token that others follow
                if (tokens != about.eos_id).all() and (labels >= 0).all():
                    yield tokens, labels

    def _require(self, windows: int) -> None:
        if windows == 0:
            raise ConfigError(
                "EVAL-LENGTH",
                f"positions: found no window of {self.length:,} tokens within one document in the "
                f"first {self.max_tokens:,} tokens of validation text; expected longer documents, "
                "more of them, or a smaller length in configs/eval/tasks/positions.yaml",
            )
