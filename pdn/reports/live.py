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
NUMBERS = ("step", "loss")
TRIAL = 16  # characters of a trial's name that are worth more than the numbers of its last step
REASON = 12  # characters below which a reason says nothing
GAP = 2  # between columns


class _Terminal(Console):
    """Prints to standard output, and leaves it to the script what a reader that has gone means."""

    def on_broken_pipe(self) -> None:
        raise  # what rich has caught where it calls this


class LiveTable:
    """Shows where each trial stands while a sweep runs; rich draws nothing on what is no terminal.

    Use it as a context manager: the table goes when it ends, in favour of the sweep's own summary.

    Args:
        metric: key of the result.
        console: None: the one of standard output.
    """

    def __init__(self, metric: str, console: Console | None = None):
        self.metric, self.console = metric, console or _Terminal()
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
        ranked = sorted(rows, key=lambda row: self._rank(row))
        shown = ranked[: max(3, self.console.height - ROOM)]
        cells = [
            {"trial": str(row["trial"]), "state": str(row["state"]), "": str(row["reason"] or "")}
            | {key: _number(row[key]) for key in (*NUMBERS, self.metric)}
            for row in shown
        ]
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
        widths = self._widths(cells)
        for name, width in widths.items():
            number = name in (*NUMBERS, self.metric)
            justify = "right" if number else "left"
            table.add_column(Text(name), justify=justify, no_wrap=True, width=width)
        for row in cells:
            texts = [_cut(row[name], width) for name, width in widths.items()]
            table.add_row(*map(Text, texts), style=STYLES.get(row["state"], ""))
        counts = Counter(str(row["state"]) for row in rows)
        said = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
        left = len(rows) - len(shown)
        return Group(table, Text(said + (f"; {left} not shown" if left else "")))

    def _widths(self, cells: Sequence[dict[str, str]]) -> dict[str, int]:
        """Return the columns that have room, and how wide they are.

        State and result come first, then the beginning and end of names, then the last step's
        numbers, whole names, and reasons, which take what is left.
        """

        def content(name: str) -> int:
            return max([len(row[name]) for row in cells], default=0)

        wide = content("trial")
        found = {"trial": max(5, min(wide, TRIAL)), "state": max(5, content("state"))}
        found |= {name: max(len(name), content(name)) for name in (*NUMBERS, self.metric)}
        room = self.console.width - sum(found.values()) - GAP * (len(found) - 1)
        for name in NUMBERS if room < 0 else ():
            room += found.pop(name) + GAP
        if room < 0:  # the key's own name, which the cut one still begins
            found[self.metric] = max(content(self.metric), found[self.metric] + room, 5)
        found["trial"] += max(0, min(wide - found["trial"], room))
        room = self.console.width - sum(found.values()) - GAP * len(found)
        if content("") and room >= REASON:
            found[""] = min(room, content(""))
        return found

    def _rank(self, row: Row) -> tuple[int, float]:
        value = row[self.metric]
        return ORDER.index(str(row["state"])), value if isinstance(value, float) else float("inf")


def _number(value: str | int | float | None) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _cut(text: str, width: int) -> str:
    """Leave out the middle of what is longer: names of trials differ at their ends."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"
