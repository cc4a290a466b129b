"""What a probe gets to see, and the form of its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from pdn.config import Strict
from pdn.evals.results import Estimate
from pdn.evals.scoring import Scorer
from pdn.models.config import ModelConfig

# changes of the data: the state runs on through a window, whatever documents it holds
CONTINUOUS = {"document_isolation": False}


@dataclass(frozen=True, kw_only=True)
class About:
    """Describes a model under evaluation before there is one.

    Attributes:
        config: its configuration.
        tokenizer: path of its tokenizer.json, or None if it was not trained on text.
        eos_id: the token that ends a document.
        seq_len: tokens of a training sequence.
        lengths: asked for on the command line instead of a probe's own; None keeps those.
        text: path of a text to hide needles in, or None.
        validation: ``validation(changes, batch_size, max_samples)``: this rank's validation batches
            of the run's data with these keys of its config changed; None where the data are not at
            hand.
        seed: of the run, for what a probe trains; 0 where it is not known.
    """

    config: ModelConfig
    tokenizer: Path | None
    eos_id: int | None
    seq_len: int
    lengths: tuple[int, ...] | None = None
    text: Path | None = None
    validation: Callable[[dict, int, int | None], Iterator[dict[str, Tensor]]] | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Subject(About):
    """Adds the model itself, which every rank has, and a place for samples.

    Attributes:
        samples: where probes put what was asked and answered, in the form of ``Outcome.samples``.
    """

    scorer: Scorer
    samples: list[dict] = field(default_factory=list)


class Probe(Strict):
    def options(self) -> set[str]:
        """Return which of ``lengths`` and ``text`` of the command line it reads."""
        return {"lengths"}

    def check(self, about: About) -> None:
        """Raise ConfigError where the subject does not fit. Collective.

        Called before hours of training, or of other tasks.
        """
        raise NotImplementedError

    def run(self, subject: Subject) -> dict[str, Estimate]:
        """Evaluate; every rank calls it and gets the same result, by metric.

        Raises ConfigError: see ``check``.
        """
        raise NotImplementedError
