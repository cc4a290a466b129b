"""What evaluations return: rows of task, metric and value; and where they go: records, JSON and a
table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from pdn.evals.suites import Suite
from pdn.store.local import storage_errors, write_durably


class Row(NamedTuple):
    """``metric`` may be ``name@x``, a point of a curve over x."""

    task: str
    metric: str
    value: float


def record(rows: list[Row]) -> dict[str, float]:
    """Keys for metrics.jsonl: ``evaluation/<task>/<metric>``."""
    return {f"evaluation/{row.task}/{row.metric}": row.value for row in rows}


def averages(rows: list[Row], suite: Suite) -> list[Row]:
    """The suite's averages of which every task was evaluated, in percent if they are accuracies."""
    values = {(row.task, row.metric): row.value for row in rows}
    found = []
    for name, members in suite.averages.items():
        chosen = [values.get((task, metric)) for task, metric in members.items()]
        if all(value is not None for value in chosen):
            found.append(Row(name, "average", sum(chosen) / len(chosen)))
    return found


def write_json(file: Path, rows: list[Row], about: dict) -> None:
    """``about``, and the rows as a list of objects under ``results``. Raises StorageError where it
    cannot be written.
    """
    content = about | {"results": [row._asdict() for row in rows]}
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, (json.dumps(content, indent=1) + "\n").encode())


def table(rows: list[Row], title: str) -> Table:
    """Tasks below each other; a curve's points beside each other in one line."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("task")
    shown.add_column("metric")
    shown.add_column("value", justify="right")
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        metric, at, x = row.metric.partition("@")
        lines.setdefault((row.task, metric), []).append(
            f"{x}: {row.value:.4g}" if at else f"{row.value:.4f}"
        )
    for (task, metric), values in lines.items():
        shown.add_row(task, metric, "  ".join(values))
    return shown


def paper_table(rows: list[Row], suite: Suite, name: str) -> Table:
    """The paper's rows, and this model's where its tasks were evaluated."""
    columns = suite.paper.columns
    shown = Table(title="beside the paper (arXiv 2604.21100)", title_justify="left")
    shown.add_column("model")
    for column in columns:
        shown.add_column(column, justify="right")
    for model, numbers in suite.paper.rows.items():
        shown.add_row(model, *(f"{number:.2f}" for number in numbers))
    values = {f"{row.task}/{row.metric}": row.value for row in rows}
    own = []
    for column in columns.values():
        value = values.get(column.key)
        own.append("–" if value is None else f"{value * column.scale:.2f}")
    shown.add_row(name, *own, style="bold")
    return shown


def print_tables(rows: list[Row], suite: Suite | None, *, title: str, name: str) -> None:
    console = Console(highlight=False)
    console.print(table(rows, title))
    if suite is not None and suite.paper is not None:
        console.print(paper_table(rows, suite, name))
