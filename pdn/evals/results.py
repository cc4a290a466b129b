"""What evaluations return, rows of task, metric and value, and where they go.

That is records, JSON and a table.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdn.store.local import storage_errors, write_durably

if TYPE_CHECKING:
    from pdn.evals.suites import Suite


class Estimate(NamedTuple):
    """A metric's value, its standard error where one is known, and the number that it is of.

    The number counts documents, words or tokens.
    """

    value: float
    stderr: float | None = None
    n: int | None = None


class Row(NamedTuple):
    """One result.

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


def averages(rows: list[Row], suite: Suite) -> list[Row]:
    """Return the suite's averages of which every task was evaluated, under the conditions of any.

    Their standard error is that of the documents of these tasks, not of other tasks.
    """
    by_name = {(row.task, row.metric): row for row in rows}
    found = []
    for name, members in suite.averages.items():
        chosen = [by_name[member] for member in members.items() if member in by_name]
        if len(chosen) < len(members):
            continue
        errors = [row.stderr for row in chosen if row.stderr is not None]
        spread = math.hypot(*errors) / len(errors) if len(errors) == len(chosen) else None
        parts = dict.fromkeys(part for row in chosen for part in row.condition.split(",") if part)
        mean = statistics.fmean(row.value for row in chosen)
        found.append(Row(name, "average", mean, spread, condition=",".join(parts)))
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
    """Name, columns and rows of what loggers show of an evaluation: results, and samples if any."""
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


def table(rows: list[Row], title: str) -> Table:
    """Lay out tasks below each other, and a curve's points beside each other in one line."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("task", overflow="fold")
    shown.add_column("metric", overflow="fold")
    shown.add_column("value", justify="right")
    shown.add_column("n", justify="right")
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.label, row.metric.partition("@")[0]), []).append(row)
    for (task, metric), same in lines.items():
        counts = {row.n for row in same}
        n = f"{counts.pop():,}" if len(counts) == 1 and None not in counts else ""
        # Plain text, since rich would take a condition in brackets for markup.
        shown.add_row(Text(task), metric, "  ".join(map(_cell, same)), n)
    return shown


def _cell(row: Row) -> str:
    _, at, x = row.metric.partition("@")
    number = f"{row.value:.4g}" if at or abs(row.value) >= 1e5 else f"{row.value:.4f}"
    value = f"{x}: {number}" if at else number
    return value if row.stderr is None else f"{value} ± {row.stderr:.2g}"


def paper_table(rows: list[Row], suite: Suite, name: str) -> Table:
    """Lay out the paper's rows, and this model's where its tasks were evaluated.

    Args:
        rows: of the evaluation.
        suite: with the paper's columns.
        name: of the model.
    """
    assert suite.paper is not None
    columns = suite.paper.columns
    shown = Table(title="beside the paper (arXiv 2604.21100)", title_justify="left")
    shown.add_column("model")
    for column in columns:
        shown.add_column(column, justify="right")
    for model, numbers in suite.paper.rows.items():
        shown.add_row(model, *(f"{number:.2f}" for number in numbers))
    by_key = {f"{row.task}/{row.metric}": row for row in rows}
    own, conditions = [], {}
    for column in columns.values():
        row = by_key.get(column.key)
        own.append("–" if row is None else f"{row.value * column.scale:.2f}")
        conditions |= {row.condition: None} if row is not None and row.condition else {}
    label = " ".join([name, *(f"[{condition}]" for condition in conditions)])
    shown.add_row(Text(label), *own, style="bold")
    return shown


def print_tables(rows: list[Row], suite: Suite | None, *, title: str, name: str) -> None:
    console = Console(highlight=False)
    console.print(table(rows, title))
    if suite is not None and suite.paper is not None:
        console.print(paper_table(rows, suite, name))
