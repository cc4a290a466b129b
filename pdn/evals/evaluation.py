"""Runs a plan of tasks on a model: our own probes, then lm-eval's tasks. Used by scripts/evaluate.py and by the trainer."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.distributed.tensor import DTensor

from pdn.config import ModelConfig
from pdn.errors import ConfigError, StorageError
from pdn.evals.probes.base import About, Subject
from pdn.evals.results import Row, averages
from pdn.evals.suites import Plan
from pdn.model import LanguageModel

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
    check_probes(plan, subject)
    rows = [Row(name, *found) for name, probe in plan.probes.items() for found in probe.run(subject).items()]
    missing = {}
    if plan.harness:
        from pdn.evals.harness import Harness, run_tasks
        from pdn.evals.tasks import load_tasks

        tokenizer = _tokenizer_for(plan, subject.tokenizer)
        with _metadata(plan, tokenizer, subject.eos_id, subject.lengths or RULER_LENGTHS) as metadata:
            loaded = load_tasks(plan, plan.harness, metadata)
        missing = loaded.missing
        codec = Tokenizer.from_file(str(tokenizer))
        for scorer, ruler in ((subject.scorer, False), (subject.scorer.whole(), True)):  # whose lengths are its own
            chosen = {name: task for name, task in loaded.tasks.items() if name.startswith(RULER) == ruler}
            if chosen:
                rows += run_tasks(Harness(scorer, codec, subject.eos_id), chosen, limit=limit)
    return Outcome(rows + (averages(rows, plan.suite) if plan.suite is not None else []), missing)


def prepare(plan: Plan, about: About) -> None:
    """Find out whether every task can be run, and load, and so fetch, the data that lm-eval's need. Collective.

    Raises:
        ConfigError: a task that the model cannot do, or a package is missing.
        StorageError: a task's data are not to be had.
    """
    check_probes(plan, about)
    if plan.harness:
        from pdn.evals.harness import check_room
        from pdn.evals.tasks import load_tasks

        with _metadata(plan, _tokenizer_for(plan, about.tokenizer), about.eos_id, RULER_LENGTHS[:1]) as metadata:
            loaded = load_tasks(plan, plan.harness, metadata)
        check_none_missing(loaded.missing)
        check_room({name: task for name, task in loaded.tasks.items() if not name.startswith(RULER)}, about.seq_len)


def check_probes(plan: Plan, about: About) -> None:
    """Raise ConfigError if the model cannot do one of our own tests."""
    for probe in plan.probes.values():
        probe.check(about)


def check_none_missing(missing: dict[str, str]) -> None:
    """Raise StorageError that names every missing task."""
    if missing:
        raise StorageError("EVAL-DATA", f"tasks that cannot be run: {len(missing)}\n  " + "\n  ".join(missing.values()))


def _tokenizer_for(plan: Plan, tokenizer: Path | None) -> Path:
    if tokenizer is None:
        raise ConfigError("EVAL-SUBJECT", f"{', '.join(plan.harness)}: need a model of text; this one has no tokenizer")
    return tokenizer


@contextlib.contextmanager
def _metadata(plan: Plan, tokenizer: Path, eos_id: int, lengths: Sequence[int]) -> Iterator[dict]:
    """What RULER makes its questions of: the lengths, and a tokenizer that transformers loads, to count tokens."""
    if not any(name.startswith(RULER) for name in plan.harness):
        yield {}
        return
    from pdn.hub.tokenizer import save_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), tokenizer, eos_id)
        yield {"tokenizer": folder, "max_seq_lengths": list(lengths)}


def whole_model(model: nn.Module, config: ModelConfig, device: torch.device) -> LanguageModel:
    """``model`` itself if it is plain; else an unsharded, uncompiled copy in float32 on this rank. Collective.

    With a model of its own each rank evaluates its share of the documents at its own pace.
    """
    plain = not any(isinstance(p, DTensor) for p in model.parameters())
    if plain and not any(hasattr(block, "_compiled_call_impl") and block._compiled_call_impl for block in model.blocks):
        return model
    with torch.device("meta"):
        copy = LanguageModel(config)
    copy.to_empty(device=device)
    with torch.no_grad():
        for target, source in zip(copy.parameters(), model.parameters(), strict=True):
            target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
    return copy.eval()
