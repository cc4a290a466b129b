"""What evaluations return, rows of task, metric and value, and how they are recorded."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pdn.store.local import storage_errors, write_durably


class Estimate(NamedTuple):
    """Holds a metric's value, its standard error if one is known, and the number that it is of.

    The number counts documents, words or tokens.
    """

    value: float
    stderr: float | None = None
    n: int | None = None


class Row(NamedTuple):
    """Holds one result.

    metric: may be ``name@x``, a point of a curve over x.
    stderr, n: see ``Estimate``.
    condition: what makes the result another one than the task's usual, e.g. ``limit=200,shots=5``;
        empty if nothing does.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    n: int | None = None
    condition: str = ""

    @property
    def label(self) -> str:
        return f"{self.task}[{self.condition}]" if self.condition else self.task


def mean_of(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values with its standard error."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), spread, len(values))


def record(rows: list[Row]) -> dict[str, float]:
    """Return keys for metrics.jsonl: ``evaluation/<task>/<metric>``.

    A condition makes it ``<task>[<condition>]``; a known standard error adds ``…/<metric>_stderr``.
    """
    found = {}
    for row in rows:
        key = f"evaluation/{row.label}/{row.metric}"
        found[key] = row.value
        if row.stderr is not None:
            name, at, x = row.metric.partition("@")
            found[f"evaluation/{row.label}/{name}_stderr{at}{x}"] = row.stderr
    return found


def write_json(file: Path, rows: list[Row], about: dict) -> None:
    """Write ``about``, and the rows as a list of objects under ``results``.

    Args:
        file: to be written.
        rows: of the evaluation.
        about: further keys of the file.

    Raises:
        StorageError: it cannot be written.
    """
    content = about | {"results": [row._asdict() for row in rows]}
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, (json.dumps(content, indent=1) + "\n").encode())


def tables(rows: list[Row], samples: list[dict]) -> list[tuple[str, list[str], list[list]]]:
    """Return name, columns and rows of what loggers show: results, and samples if any."""
    columns = ["task", "metric", "value", "stderr", "n"]
    found = [[row.label, row.metric, row.value, row.stderr, row.n] for row in rows]
    shown = [("evaluation/results", columns, found)]
    if samples:
        columns = ["task", "document", "asked", "answered", "target", "metrics"]
        keys = ("task", "doc_id", "arguments", "filtered_resps", "target", "metrics")
        found = [[str(sample[key]) for key in keys] for sample in samples]
        shown.append(("evaluation/samples", columns, found))
    return shown


def write_samples(results: Path, samples: list[dict]) -> Path:
    """Write prompts and answers as JSON lines beside the results' file; raise as ``write_json``."""
    file = results.with_name(f"{results.stem}.samples.jsonl")
    lines = (json.dumps(sample, default=str, ensure_ascii=False) + "\n" for sample in samples)
    with storage_errors(file):
        write_durably(file, "".join(lines).encode())
    return file
