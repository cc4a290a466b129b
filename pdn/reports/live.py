"""The table of a sweep on a terminal, kept up to date below the lines that the sweep says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pdn.reports.sweep import Row

ORDER = ("running", "failed", "interrupted", "stopped early", "finished", "waiting")
STYLES = {"running": "bold", "failed": "red", "interrupted": "yellow", "stopped early": "yellow"}
ROOM = 8  # lines of a terminal that are left to what the sweep says, and to the table's head


class LiveTable:
    """Shows where each trial stands while a sweep runs; rich draws nothing on what is no terminal.

    Use it as a context manager: the table goes when it ends, in favour of the sweep's own summary.

    Args:
        metric: key of the result.
        console: None: the one of standard output.
    """

    def __init__(self, metric: str, console: Console | None = None):
        self.metric, self.console = metric, console or Console()
        self._live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        """Print a line, above the table where there is one."""
        self.console.print(Text(line), soft_wrap=True)

    def show(self, rows: Sequence[Row]) -> None:
        """Draw the table anew, of as many trials as have room: running ones first, then failed."""
        self._live.update(self._drawn(rows), refresh=True)

    def _drawn(self, rows: Sequence[Row]) -> Group:
        table = Table(box=None, pad_edge=False)
        for name in ("trial", "state", "step", "loss", self.metric, ""):
            number = name in ("step", "loss", self.metric)
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        ranked = sorted(rows, key=lambda row: self._rank(row))
        shown = ranked[: max(3, self.console.height - ROOM)]
        for row in shown:
            state = str(row["state"])
            cells = [str(row["trial"]), state, *(_number(row[k]) for k in ("step", "loss"))]
            cells += [_number(row[self.metric]), str(row["reason"] or "")]
            table.add_row(*map(Text, cells), style=STYLES.get(state, ""))
        counts = Counter(str(row["state"]) for row in rows)
        said = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
        left = len(rows) - len(shown)
        return Group(table, Text(said + (f"; {left} not shown" if left else "")))

    def _rank(self, row: Row) -> tuple[int, float]:
        value = row[self.metric]
        return ORDER.index(str(row["state"])), value if isinstance(value, float) else float("inf")


def _number(value: str | int | float | None) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
