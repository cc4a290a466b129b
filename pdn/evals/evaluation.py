"""Runs a plan of tasks on a model: our own probes, then lm-eval's tasks. Used by scripts/evaluate.py and by the trainer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pdn.config import ModelConfig
from pdn.errors import ConfigError
from pdn.evals.probes.base import Subject
from pdn.evals.results import Row, averages
from pdn.evals.suites import Plan
from pdn.model import LanguageModel

RULER = ("niah", "ruler")  # how its tasks' names begin
RULER_LENGTHS = (512, 1024, 2048, 4096, 8192)


def run(plan: Plan, subject: Subject, *, limit: int | None) -> list[Row]:
    """Evaluate; collective over the ranks, all of which get the same rows.

    limit: documents of each of lm-eval's tasks; None takes all.

    Raises:
        ConfigError: a task that the model cannot do.
        StorageError: a task's data cannot be fetched.
    """
    rows = [Row(name, *found) for name, probe in plan.probes.items() for found in probe.run(subject).items()]
    if plan.harness:
        rows += _run_harness(plan, subject, limit)
    return rows + (averages(rows, plan.suite) if plan.suite is not None else [])


def prepare(plan: Plan) -> None:
    """Load, and so fetch, the data of every task that lm-eval brings; RULER's are made from the tokenizer later.

    Raises:
        StorageError: a task's data cannot be fetched.
    """
    if plan.harness:
        from pdn.evals.harness import load_tasks, opened_tasks

        names = [name for name in plan.harness if not name.startswith(RULER)]
        with opened_tasks(names, plan.local, {}) as manager:
            load_tasks(manager, names)


def _run_harness(plan: Plan, subject: Subject, limit: int | None) -> list[Row]:
    if subject.tokenizer is None:
        raise ConfigError("EVAL-SUBJECT", f"{', '.join(plan.harness)}: need a model of text; this one has no tokenizer")
    from tokenizers import Tokenizer

    from pdn.evals.harness import Harness, run_tasks
    from pdn.hub.tokenizer import save_tokenizer

    harness = Harness(subject.scorer, Tokenizer.from_file(str(subject.tokenizer)), subject.eos_id)
    options = dict(local=plan.local, limit=limit)
    if not any(name.startswith(RULER) for name in plan.harness):
        return run_tasks(harness, plan.harness, metadata={}, **options)
    with tempfile.TemporaryDirectory() as folder:  # RULER counts tokens with a tokenizer that transformers loads
        save_tokenizer(Path(folder), subject.tokenizer, subject.eos_id)
        metadata = {"tokenizer": folder, "max_seq_lengths": list(subject.lengths or RULER_LENGTHS)}
        return run_tasks(harness, plan.harness, metadata=metadata, **options)


def check_tokenizer(tokenizer: Path, config: ModelConfig) -> None:
    """Raise ConfigError unless every id of the tokenizer has an embedding."""
    from tokenizers import Tokenizer

    largest = max(Tokenizer.from_file(str(tokenizer)).get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise ConfigError(
            "TOKENIZER-MODEL",
            f"{tokenizer}: ids up to {largest}, but {config.name} has a vocabulary of {config.vocab_size}; expected the "
            "tokenizer that it was trained with",
        )


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
