"""What a run has come to, told from its metrics when it ends."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pdn.errors import StorageError
from pdn.runs.records import read_lines
from pdn.wording import counted

_LAST_STEPS = 100  # of the speed and of the loss that are told


def summarise(run: Path) -> list[str]:
    """Return lines for people: steps, tokens, losses, speed, the best validation, where all lies.

    Args:
        run: the directory of a run; damaged lines of its metrics are passed over.
    """
    steps, validations = [], []
    for record in _whole_records(run / "metrics.jsonl"):
        if "loss" in record:
            steps.append(record)
        if "validation/loss" in record:
            validations.append(record)
    lines = []
    if steps:
        last = steps[-_LAST_STEPS:]
        counts = covered([record["step"] for record in steps])
        seconds = [_number(record.get("step_seconds")) for record in steps]
        spent = sum(x * count for x, count in zip(seconds, counts, strict=True))
        mean = statistics.fmean(_number(record["loss"]) for record in last)
        speed = statistics.median(_number(record.get("tokens_per_second")) for record in last)
        lines += [
            f"steps    {counted(steps[-1]['step'], 'step')}, {steps[-1].get('tokens', 0):,} "
            f"tokens, {duration(spent)} of training",
            f"loss     {_number(steps[0]['loss']):.4f} at step {steps[0]['step']}, "
            f"{mean:.4f} over the last {len(last)}",
            f"speed    {speed:,.0f} tokens/s",
        ]
    if validations:
        best = min(validations, key=lambda record: _number(record["validation/loss"]))
        end = validations[-1]
        lines.append(
            f"validation loss {_number(end['validation/loss']):.4f} at step {end['step']}, "
            f"best {_number(best['validation/loss']):.4f} at step {best['step']}"
        )
    lines.append(f"where    {run.absolute()}: checkpoints/, metrics.jsonl, config.yaml, run.log")
    return lines


def covered(steps: Sequence[int]) -> list[int]:
    """Return how many steps each of the logged ones stands for, ascending.

    Those since the one before; the first, which may be a branch's, for as many as the second.
    """
    gaps = [max(1, after - before) for before, after in pairwise(steps)]
    first = steps[:1] if not gaps else [min(max(1, steps[0]), gaps[0])]
    return [*first, *gaps]


def duration(seconds: float) -> str:
    """Write seconds as ``1 h 02 min``, ``3 min 20 s`` or ``12 s``."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def _whole_records(file: Path) -> list[dict]:
    try:
        return [record for record in read_lines(file) if "step" in record]
    except StorageError:  # a run that has ended well does not fail because of its summary
        return []


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
