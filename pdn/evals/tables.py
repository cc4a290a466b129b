"""The results of an evaluation as text in a terminal, beside the paper's where a suite has them."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdn.evals.results import Row
from pdn.evals.suites import Suite


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
