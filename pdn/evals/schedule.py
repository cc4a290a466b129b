"""What a run evaluates, and after which steps: its validation sets, and tasks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from pdn.config import Every
from pdn.distributed.world import World
from pdn.errors import DataError
from pdn.evals.config import EvalConfig
from pdn.evals.evaluation import attempt
from pdn.evals.in_loop import TaskEvaluation
from pdn.evals.results import record as task_record
from pdn.evals.results import tables
from pdn.evals.sequences import SequenceLosses
from pdn.evals.token_bytes import token_bytes
from pdn.evals.validation import evaluate
from pdn.models.config import ModelConfig
from pdn.optim.average import WeightAverage
from pdn.runs import faults
from pdn.runs.triggers import Trigger


@dataclass(frozen=True)
class Pulse:
    """Holds what an evaluation calls while it goes on.

    Attributes:
        beat: before each validation set, and before the tasks.
        alive: before each batch.
        check: before each batch of tasks; what it raises, an error with an ``exit_code``, every
            rank raises.
    """

    beat: Callable[[], None]
    alive: Callable[[], None]
    check: Callable[[], None]


class Report(NamedTuple):
    """Holds what an evaluation found."""

    keys: dict[str, float]  # for metrics.jsonl
    lines: list[str]  # that say the same
    tables: list  # for loggers


class Evaluations:
    """Runs the evaluations of one launch when they are due.

    Construction finds out whether all tasks, packages and data are there.

    Args:
        config, model_config: with the vocabulary settled.
        data: of the run, opened.
        seq_len: tokens of a training window.
        seed: of the run.
        validation: see ``About.validation``.
        resuming: whether there is progress to continue.
        trigger: makes one of an interval.
        keep: takes the losses of single sequences, ``{"step": …, "sets": {name: …}}``, of the
            main rank; see ``SequenceLosses.result``.
    """

    def __init__(
        self,
        config: EvalConfig,
        model_config: ModelConfig,
        world: World,
        data,
        *,
        seq_len: int,
        seed: int,
        validation: Callable,
        bf16: bool,
        trigger: Callable[[Every | None], Trigger],
        keep: Callable[[dict], None],
        resuming: bool = False,
    ):
        self._keep = keep
        self.config, self.world, self.data, self.bf16 = config, world, data, bf16
        self._validates, self._runs_tasks = trigger(config.every), trigger(config.tasks_every)
        tokenizer = data.tokenizer_path
        self._token_bytes = (
            None if tokenizer is None else token_bytes(tokenizer, model_config.vocabulary)
        )
        self._tasks = TaskEvaluation(
            config, model_config, world.each_alone(),
            tokenizer=tokenizer, eos_id=data.eos_id, seq_len=seq_len, bf16=bf16,
            validation=validation, seed=seed,
            resuming=resuming,
        )  # fmt: skip

    def tasks_due(self, step: int, last: bool) -> bool:
        """Return whether tasks are due after ``step``."""
        if step == 0 or self._tasks.plan is None:
            return False
        return last or self._runs_tasks.due(step)

    def missing(self, step: int, last: bool, logged: Collection[str]) -> tuple[bool, bool]:
        """Return whether validation and tasks are due after ``step`` and not in ``logged``.

        Args:
            step: the last one that was done; 0: none yet.
            last: whether it is the launch's last step.
            logged: keys of the records of this step.
        """
        validates = (
            self.config.every is not None and (last or self._validates.due(step))
            if step
            else self.config.at_start
        )
        return (
            validates and not any(key.startswith("validation/") for key in logged),
            self.tasks_due(step, last) and not any(key.startswith("evaluation/") for key in logged),
        )

    def due(
        self, model: nn.Module, step: int, last: bool, logged: Collection[str],
        *, average: WeightAverage | None, pulse: Pulse,
    ) -> Iterator[Report]:  # fmt: skip
        """Evaluate what the configuration asks for after ``step``. Collective.

        Args:
            last: whether it is the launch's last step.
            logged: keys of records that exist already; what they are of is left out.
            average: of the model's weights; validated beside them, where it exists.
            pulse: what is called meanwhile.

        Yields:
            What validation found, then what the tasks did. ``validation/failed`` and
            ``evaluation/failed`` count what failed. Keys of the average begin with ``ema/``.

        Raises:
            DataError: an evaluation failed, and ``eval.on_error`` is stop.
        """
        validates, does_tasks = self.missing(step, last, logged)
        if validates:
            yield from self._validation(model, step, average, pulse)
        if does_tasks:
            yield from self._task_results(model, pulse)

    def _validation(
        self, model: nn.Module, step: int, average: WeightAverage | None, pulse: Pulse
    ) -> Iterator[Report]:
        validation = _Validation(self, step, pulse)
        validation.run(model)
        if self.world.is_main:
            self._keep({"step": step, "sets": dict(validation.sequences)})
        if average is not None and average.exists:
            with average.in_place(model):
                validation.run(model, "ema/")
        found, failed = validation.results, validation.failed
        keys = {f"{set_}/{key}": value for set_, one in found.items() for key, value in one.items()}
        keys |= {"validation/failed": len(failed)} if failed else {}
        lines = [_line(set_, result) for set_, result in found.items()]
        yield Report(keys or {"validation/tokens": 0}, lines + self._said(failed), [])
        self._stop_if_failed(failed)

    def _task_results(self, model: nn.Module, pulse: Pulse) -> Iterator[Report]:
        pulse.beat()
        failed: dict[str, str] = {}
        outcome = attempt(lambda: self._tasks.run(model, pulse.alive, pulse.check), "tasks", failed)
        rows = outcome.rows if outcome is not None else []
        failed |= outcome.failed | outcome.missing if outcome is not None else {}
        keys = task_record(rows) | ({"evaluation/failed": len(failed)} if failed else {})
        shown = ["  ".join(f"{row.label} {row.metric} {row.value:.4g}" for row in rows)]
        samples = outcome.samples if outcome is not None else []
        yield Report(keys, (shown if rows else []) + self._said(failed), tables(rows, samples))
        self._stop_if_failed(failed)

    def _said(self, failed: dict[str, str]) -> list[str]:
        goes_on = self.config.on_error == "continue"
        after = "; training goes on (eval.on_error=continue)" if goes_on else ""
        return [f"evaluation failed: {reason}{after}" for reason in failed.values()]

    def _stop_if_failed(self, failed: dict[str, str]) -> None:
        if failed and self.config.on_error == "stop":
            raise DataError("EVAL-FAILED", "; ".join(failed.values()) + " (eval.on_error=stop)")

    def validate(
        self, model: nn.Module, name: str | None, step: int, alive: Callable[[], None]
    ) -> tuple[dict[str, float], dict[str, list] | None]:
        """Return the means over a validation set, and its single sequences' losses. Collective.

        Args:
            model: with the weights to validate.
            name: of the set; None: the data's own.
            step: after which this is.
            alive: called before each batch.
        """
        sequences = SequenceLosses()
        found = evaluate(
            model,
            self._batches(name, step),
            self.world,
            bf16=self.bf16,
            token_bytes=self._token_bytes,
            accuracy=self.data.tokenizer_path is None,
            alive=alive,
            windows=self.data.windows_carried,
            eos_id=self.data.eos_id,
            sequences=sequences,
        )
        return found, sequences.result()

    def _batches(self, name: str | None, step: int) -> Iterator[dict]:
        faults.strike("eval", step)
        yield from self.data.validation(
            batch_size=self.config.batch_size,
            max_samples=self.config.max_samples,
            name=name,
            spread=True,
            carried=True,
        )


class _Validation:
    """Validates on every set after one step, and collects what that gives.

    Attributes:
        results: of each set that has tokens, by the prefix of its keys: ``validation``,
            ``validation/<name>``, and with the averaged weights ``ema/…``.
        sequences: of the same sets, the losses of their sequences.
        failed: what went wrong, by the same prefixes.
    """

    def __init__(self, evaluations: Evaluations, step: int, pulse: Pulse):
        self._evaluations, self._step, self._pulse = evaluations, step, pulse
        self.results: dict[str, dict[str, float]] = {}
        self.sequences: dict[str, dict[str, list] | None] = {}
        self.failed: dict[str, str] = {}

    def run(self, model: nn.Module, weights: str = "") -> None:
        """Validate on every set; ``weights`` precedes the prefixes. Collective."""
        for name in (None, *self._evaluations.data.validation_sets):
            self._pulse.beat()
            prefix = f"{weights}validation" if name is None else f"{weights}validation/{name}"
            found = attempt(
                lambda name=name: self._evaluations.validate(
                    model, name, self._step, self._pulse.alive
                ),
                prefix,
                self.failed,
            )
            if found is not None and found[0]["tokens"]:
                self.results[prefix], self.sequences[prefix] = found


def _line(prefix: str, result: dict[str, float]) -> str:
    measure = "accuracy" if "accuracy" in result else "perplexity"
    digits = 4 if measure == "accuracy" else 2
    return (
        f"{prefix.replace('/', ' ')} loss {result['loss']:.4f}  {measure} "
        f"{result[measure]:.{digits}f}  ({result['tokens']:,} tokens)"
    )
