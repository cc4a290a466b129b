"""Runs a plan of tasks on a model: our own probes, then lm-eval's tasks. Used by
scripts/evaluate.py and by the trainer.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pdn.data.codec import open_codec
from pdn.errors import ConfigError, StorageError
from pdn.evals.probes.base import About, Subject
from pdn.evals.results import Row, averages
from pdn.evals.suites import Loaded, Plan
from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel

if TYPE_CHECKING:
    from lm_eval.api.task import Task

RULER = ("niah", "ruler")  # how its tasks' names begin
RULER_LENGTHS = (512, 1024, 2048, 4096, 8192)


class Outcome(NamedTuple):
    """missing: what is said of each task whose data are not to be had."""

    rows: list[Row]
    missing: dict[str, str]


def run(plan: Plan, subject: Subject, *, limit: int | None) -> Outcome:
    """Evaluate; collective over the ranks, all of which get the same.

    limit: documents of each of lm-eval's tasks; None takes all.

    Raises:
        ConfigError: a task that the model cannot do, or whose package is missing.
    """
    loaded = _loaded(plan, subject, subject.lengths or RULER_LENGTHS, subject.scorer.max_length)
    rows = [
        Row(name, *found)
        for name, probe in plan.probes.items()
        for found in probe.run(subject).items()
    ]
    if loaded.tasks:
        from pdn.evals.harness import Harness, run_tasks

        codec = open_codec(subject.tokenizer, subject.eos_id)
        for scorer, tasks in zip(
            (subject.scorer, subject.scorer.whole()), _by_length(loaded.tasks), strict=True
        ):
            if tasks:
                rows += run_tasks(Harness(scorer, codec, subject.eos_id), tasks, limit=limit)
    return Outcome(
        rows + (averages(rows, plan.suite) if plan.suite is not None else []), loaded.missing
    )


def prepare(plan: Plan, about: About) -> None:
    """Find out whether every task can be run, and load, and so fetch, the data that lm-eval's need.
    Collective.

    Raises:
        ConfigError: a task that the model cannot do, or a package is missing.
        StorageError: a task's data are not to be had.
    """
    check_none_missing(_loaded(plan, about, RULER_LENGTHS[:1], about.seq_len).missing)


def _loaded(plan: Plan, about: About, lengths: Sequence[int], max_length: int) -> Loaded:
    """lm-eval's tasks with their data, once all that the model cannot do is refused; lengths: of
    RULER's.
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
    from pdn.evals.harness import check_room
    from pdn.evals.tasks import load_tasks

    with _metadata(plan, about, lengths) as metadata:
        loaded = load_tasks(plan, metadata)
    check_room(_by_length(loaded.tasks)[0], max_length)
    return loaded


def _by_length(tasks: dict[str, Task]) -> tuple[dict[str, Task], dict[str, Task]]:
    """Those that see ``max_length`` tokens, and RULER's, whose lengths are their own."""
    rulers = {name for name in tasks if name.startswith(RULER)}
    return {n: t for n, t in tasks.items() if n not in rulers}, {
        n: t for n, t in tasks.items() if n in rulers
    }


def check_none_missing(missing: dict[str, str]) -> None:
    """Raise StorageError that names every missing task."""
    if missing:
        raise StorageError(
            "EVAL-DATA",
            f"tasks that cannot be run: {len(missing)}\n  " + "\n  ".join(missing.values()),
        )


@contextlib.contextmanager
def _metadata(plan: Plan, about: About, lengths: Sequence[int]) -> Iterator[dict]:
    """What RULER makes its questions of: the lengths, and a tokenizer that transformers loads, to
    count tokens.
    """
    if not any(name.startswith(RULER) for name in plan.harness):
        yield {}
        return
    from pdn.hub.tokenizer import save_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), about.tokenizer, about.eos_id)
        yield {"tokenizer": folder, "max_seq_lengths": list(lengths)}


def whole_model(model: nn.Module, config: ModelConfig, device: torch.device) -> LanguageModel:
    """``model`` itself if it is plain; else an unsharded, uncompiled copy in float32 on this rank.
    Collective.

    With a model of its own each rank evaluates its share of the documents at its own pace.
    """
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
