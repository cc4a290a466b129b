"""Runs a plan of tasks on a model: our own probes, then lm-eval's tasks.

Used by scripts/evaluate.py and by the trainer.
"""

from __future__ import annotations

import contextlib
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pdn.data.codec import open_codec
from pdn.distributed.collectives import gather_or_raise
from pdn.errors import ConfigError, DataError, PdnError, Preempted, StorageError
from pdn.evals.probes.base import About, Subject
from pdn.evals.results import Row
from pdn.evals.suites import Loaded, Plan, averages
from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel

if TYPE_CHECKING:
    from lm_eval.api.task import Task

T = TypeVar("T")
RULER = ("niah", "ruler")  # how its tasks' names begin
OPTIONS = {"lengths", "text", "limit", "num_fewshot", "log_samples", "data_dir"}
RULER_LENGTHS = (512, 1024, 2048, 4096, 8192)


@dataclass
class Outcome:
    """Collects what a plan gave.

    Attributes:
        rows: of the tasks that could be evaluated.
        missing: what is said of each task whose data are not to be had.
        failed: what went wrong in each task that was begun, with the document where there is one.
        about: of each of lm-eval's tasks, the conditions: documents, shots, limit, version, ….
        samples: documents with their prompts and the model's answers.
    """

    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    about: dict[str, dict] = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)

    def check_complete(self) -> None:
        """Raise StorageError naming every missing task, or DataError naming every failed one."""
        if self.failed:
            raise DataError("EVAL-FAILED", _listed("tasks that failed", self.failed | self.missing))
        check_none_missing(self.missing)


def run(
    plan: Plan,
    subject: Subject,
    *,
    limit: int | None,
    shots: int | None = None,
    samples: int | None = 0,
    tell: Callable[[str], None] | None = None,
) -> Outcome:
    """Evaluate; collective over the ranks, all of which get the same.

    A task that fails leaves the others alone.

    Args:
        limit: documents of each of lm-eval's tasks; None takes all.
        shots: examples before each of their questions; None takes the task's own number.
        samples: documents of each of them to keep with prompts and answers; None keeps all.
        tell: called with lines about what is waited for.

    Raises:
        ConfigError: a task that the model cannot do, or whose package is missing.
        Preempted: the scorer's ``check`` says so.
    """
    loaded = _loaded(plan, subject, subject.lengths or RULER_LENGTHS, shots, tell)
    outcome = Outcome(missing=loaded.missing)
    for name, probe in plan.probes.items():
        found = attempt(lambda probe=probe: probe.run(subject), name, outcome.failed)
        condition = _condition_of(probe, subject)
        outcome.rows += [
            Row(name, metric, *estimate, condition) for metric, estimate in (found or {}).items()
        ]
    if loaded.tasks:
        _run_harness(loaded.tasks, subject, outcome, limit, shots, samples)
    outcome.samples += subject.samples
    if plan.suite is not None:
        outcome.rows += averages(outcome.rows, plan.suite)
    return outcome


def options_of(plan: Plan) -> set[str]:
    """Return which options of the command line the tasks of a plan read, of those in OPTIONS."""
    found = {option for probe in plan.probes.values() for option in probe.options()}
    if plan.harness:
        found |= {"limit", "num_fewshot", "log_samples", "data_dir"}
    if any(name.startswith(RULER) for name in plan.harness):
        found.add("lengths")
    return found


def _run_harness(
    tasks: dict[str, Task],
    subject: Subject,
    outcome: Outcome,
    limit: int | None,
    shots: int | None,
    samples: int | None,
) -> None:
    from pdn.evals.harness import Harness, run_task

    assert subject.tokenizer is not None and subject.eos_id is not None  # as the tasks demand
    codec = open_codec(subject.tokenizer, subject.eos_id)
    for scorer, chosen in zip(
        (subject.scorer, subject.scorer.whole()), _by_length(tasks), strict=True
    ):
        harness = Harness(scorer, codec, subject.eos_id, usual_length=subject.seq_len)
        for name, task in chosen.items():
            result = attempt(
                lambda name=name, task=task, harness=harness: run_task(
                    harness, name, task, limit=limit, shots=shots, samples=samples
                ),
                name,
                outcome.failed,
            )
            if result is not None:
                outcome.rows += result.rows
                outcome.about[name] = result.about
                outcome.samples += result.samples


def attempt(work: Callable[[], T], name: str, failed: dict[str, str]) -> T | None:
    """Return the result of ``work``, or None where it failed on any rank. Collective.

    For work whose failure must not end the run that asks for it.

    Args:
        work: called on every rank.
        name: of the task.
        failed: gets, on every rank, ``failed[name]`` with the reason.

    Raises:
        Preempted: it is no failure.
    """
    result, reason = None, None
    try:
        result = work()
    except Preempted:
        raise
    except Exception as error:
        reason = _reason(error)
    reasons = [said for said in gather_or_raise(lambda: reason) if said is not None]
    if reasons:
        failed[name] = f"{name}: {reasons[0].removeprefix(f'{name}: ')}"
        return None
    return result


def _reason(error: Exception) -> str:
    if isinstance(error, PdnError):
        return error.args[0]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]} ({Path(frame.filename).name}:{frame.lineno})"


def _condition_of(probe: object, subject: Subject) -> str:
    """Return what a probe's result depends on besides its own file.

    Lengths are left out: they stand in the metric.
    """
    takes_text = getattr(probe, "haystack", None) == "text"
    return f"text={subject.text.stem}" if takes_text and subject.text is not None else ""


def prepare(plan: Plan, about: About, tell: Callable[[str], None] | None = None) -> None:
    """Find out whether every task can be run, and load the data of lm-eval's. Collective.

    Loading fetches what is not cached; ``tell`` is called with lines about what is waited for.

    Raises:
        ConfigError: a task that the model cannot do, or a package is missing.
        StorageError: a task's data are not to be had.
    """
    loaded = _loaded(plan, about, RULER_LENGTHS[:1], tell=tell)
    if loaded.tasks:
        from pdn.evals.harness import check_room

        check_room(_by_length(loaded.tasks)[0], about.seq_len)
    check_none_missing(loaded.missing)


def _loaded(
    plan: Plan,
    about: About,
    lengths: Sequence[int],
    shots: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Loaded:
    """Return lm-eval's tasks with their data, once all that the model cannot do is refused.

    Args:
        lengths: of RULER's tasks.
        shots, tell: see ``run``.
    """
    for probe in plan.probes.values():
        probe.check(about)
    if not plan.harness:
        return Loaded({}, {})
    if about.tokenizer is None:
        raise ConfigError(
            "EVAL-SUBJECT",
            f"{', '.join(plan.harness)}: need a model of text; this one has no tokenizer",
        )
    if tell is not None:  # the imports alone take seconds
        tell(
            f"tasks    loading {len(plan.harness)} of lm-eval's ({', '.join(plan.harness)}); their "
            "data come from files, the Hugging Face cache or the hub"
        )
    from pdn.evals.tasks import load_tasks

    with _metadata(plan, about, lengths) as metadata:
        return load_tasks(plan, metadata, shots, tell)


def _by_length(tasks: dict[str, Task]) -> tuple[dict[str, Task], dict[str, Task]]:
    """Split tasks into those that see ``max_length`` tokens, and RULER's.

    RULER's tasks have lengths of their own.
    """
    rulers = {name for name in tasks if name.startswith(RULER)}
    return {n: t for n, t in tasks.items() if n not in rulers}, {
        n: t for n, t in tasks.items() if n in rulers
    }


def check_none_missing(missing: dict[str, str]) -> None:
    """Raise StorageError that names every missing task."""
    if missing:
        raise StorageError("EVAL-DATA", _listed("tasks that cannot be run", missing))


def _listed(what: str, reasons: dict[str, str]) -> str:
    return f"{what}: {len(reasons)}\n  " + "\n  ".join(reasons.values())


@contextlib.contextmanager
def _metadata(plan: Plan, about: About, lengths: Sequence[int]) -> Iterator[dict]:
    """Yield what RULER makes its questions of.

    That is the lengths, and a tokenizer that transformers loads, to count tokens.
    """
    if not any(name.startswith(RULER) for name in plan.harness):
        yield {}
        return
    from pdn.hub.tokenizer import save_tokenizer

    assert about.tokenizer is not None and about.eos_id is not None  # as its tasks demand
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), about.tokenizer, about.eos_id)
        yield {"tokenizer": folder, "max_seq_lengths": list(lengths)}


def whole_model(model: nn.Module, config: ModelConfig, device: torch.device) -> LanguageModel:
    """Return ``model`` if it is plain, else an unsharded, uncompiled copy in float32. Collective.

    With a model of its own each rank evaluates its share of the documents at its own pace.

    Args:
        model: of the trainer, possibly sharded or compiled.
        config: of the model.
        device: of the copy.
    """
    assert isinstance(model, LanguageModel)  # if it is sharded, of a class derived from it
    plain = not any(isinstance(p, DTensor) for p in model.parameters())
    if plain and not any(
        hasattr(block, "_compiled_call_impl") and block._compiled_call_impl
        for block in model.blocks
    ):
        return model
    with torch.device("meta"):
        copy = LanguageModel(config)
    copy.to_empty(device=device)
    with torch.no_grad():
        for target, source in zip(copy.parameters(), model.parameters(), strict=True):
            target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
    return copy.eval()
