"""A grid of runs: its trials, its table while they run, and the best rate of each model."""

from __future__ import annotations

import csv
import io
import itertools
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pdn.errors import ConfigError
from pdn.reports.plots import line_panel
from pdn.reports.stopping import stopped_reason
from pdn.reports.trials import Trial
from pdn.runs.records import read_lines, read_object
from pdn.store.local import storage_errors, write_durably

RATE, SEED = "optim.lr", "seed"
OPENING, CLOSING = "[{(", ")}]"
Row = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Grid:
    """Forms the product of the values of some keys.

    Attributes:
        axes: key -> its values, as text, in the order of the command line.
        words: what all trials have in common.
    """

    axes: dict[str, list[str]]
    words: list[str]
    trials: dict[str, dict[str, str]] = field(init=False)  # name -> the trial's value of each axis

    def __post_init__(self):
        named = {
            "-".join(map(_label, self.axes, values)) or "run": dict(
                zip(self.axes, values, strict=True)
            )
            for values in itertools.product(*self.axes.values())
        }
        object.__setattr__(self, "trials", named)

    def groups(self) -> list[list[str]]:
        """Return the names of trials that differ in rate and seed only, a list for each arm."""
        found: dict[tuple, list[str]] = {}
        for name, own in self.trials.items():
            arm = tuple(value for key, value in own.items() if key not in (RATE, SEED))
            found.setdefault(arm, []).append(name)
        return list(found.values())

    def ready(self, finished: set[str]) -> list[Trial]:
        """Return all trials: none waits for another."""
        return self.as_trials()

    def as_trials(self) -> list[Trial]:
        """Return the trials, those of the first axis' first value first."""
        return [
            Trial(name, (*self.words, *(f"{key}={value}" for key, value in own.items())))
            for name, own in self.trials.items()
        ]


def grid_of(words: Sequence[str]) -> Grid:
    """Return the grid of words such as ``model=a,b`` and ``trainer.steps=10``.

    A comma within brackets parts no values. Of a key that comes again the later word counts.

    Raises:
        ConfigError: a word without ``=``, or a value given twice.
    """
    given: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError("SWEEP", f"{word!r}: expected key=value")
        given[key] = text
    axes: dict[str, list[str]] = {}
    common = []
    for key, text in given.items():
        word, values = f"{key}={text}", _split(text)
        if len(values) == 1:
            common.append(word)
            continue
        if len(set(values)) < len(values):
            raise ConfigError("SWEEP", f"{word}: a value twice; expected each once")
        axes[key] = values
    return Grid(axes, common)


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in OPENING) - (letter in CLOSING)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _label(key: str, value: str) -> str:
    """Name a value in a directory's name: a model by itself, others with the key's last part."""
    short = value if key == "model" else f"{key.rpartition('.')[2]}{value}"
    return re.sub(r"[^\w.+]", "_", short)


class Trials(Protocol):
    """Gives a table its trials: a grid, or a search."""

    @property
    def trials(self) -> dict[str, dict[str, str]]: ...


def rows(
    grid: Trials,
    directory: Path,
    metric: str,
    *,
    running: Collection[str] = (),
    failed: Mapping[str, str] | None = None,
) -> list[Row]:
    """Return where each trial stands.

    Args:
        grid: the trials.
        directory: of their runs.
        metric: key of the result. Of a finished run its value after the last step counts: where
            that evaluation failed, there is none, and ``reason`` says so.
        running: names of trials under way.
        failed: reasons by name of trials that failed in this sweep.

    Returns:
        For each trial ``trial``, its axes, ``state`` (waiting, running, finished, failed,
        interrupted, stopped early), ``step``, ``loss`` (the last), the metric, and ``reason``.
    """
    found: list[Row] = []
    for name, own in grid.trials.items():
        run = directory / name
        status, records = read_object(run / "status.json"), read_lines(run / "metrics.jsonl")
        state, reason = str(status.get("state", "waiting")), None
        if name in running:
            state = "running"
        elif state != "finished" and (stopped := stopped_reason(directory, name)) is not None:
            state, reason = "stopped early", stopped
        elif failed and name in failed:
            state, reason = "failed", failed[name]
        elif state == "failed":
            reason = str(status.get("reason"))
        elif state in ("running", "preempted", "stopped"):
            state = "interrupted"
        last = {key: _last(records, key) for key in ("loss", metric)}
        step = max((r["step"] for r in records if "loss" in r), default=None)
        if state == "finished" and step not in {r["step"] for r in records if metric in r}:
            last[metric], reason = None, f"{metric} was not measured after step {step}"
        found.append({"trial": name, **own, "state": state, "step": step, **last, "reason": reason})
    return found


def _last(records: Sequence[dict], key: str) -> float | None:
    values = [record[key] for record in records if isinstance(record.get(key), int | float)]
    return float(values[-1]) if values else None


def write_csv(table: Sequence[Row], file: Path) -> None:
    """Write the table, in the place of an older one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    with storage_errors(file):
        write_durably(file, text.getvalue().encode())


@dataclass(frozen=True)
class Best:
    """Names the best learning rate of one arm: one choice of all axes but rate and seed.

    Attributes:
        arm: its values, or ``all`` where the grid has no other axis.
        rate: whose mean over seeds is least.
        results: mean over seeds by rate, of the rates all of whose seeds are finished.
        at_edge: whether it is the least or the largest rate that was tried.
    """

    arm: str
    rate: float
    results: dict[float, float]
    at_edge: bool


def best_rates(table: Sequence[Row], grid: Grid, metric: str) -> list[Best]:
    """Return the best rate of each arm; none where the grid has one rate, or nothing finished.

    Args:
        table: of ``rows``.
        grid: the trials.
        metric: key of the result; less is better.
    """
    if RATE not in grid.axes:
        return []
    others = [key for key in grid.axes if key not in (RATE, SEED)]
    arms: dict[str, dict[float, list[float | None]]] = {}
    for row in table:
        arm = " ".join(str(row[key]) for key in others) or "all"
        value = row[metric] if row["state"] == "finished" else None
        by_rate = arms.setdefault(arm, {})
        by_rate.setdefault(float(str(row[RATE])), []).append(
            value if isinstance(value, float) else None
        )
    rates = [float(rate) for rate in grid.axes[RATE]]
    found = []
    for arm, by_rate in arms.items():
        means = {
            rate: statistics.fmean([v for v in values if v is not None])
            for rate, values in sorted(by_rate.items())
            if None not in values
        }
        if means:
            rate = min(means, key=lambda rate: means[rate])
            found.append(Best(arm, rate, means, rate in (min(rates), max(rates))))
    return found


def plot_rates(found: Sequence[Best], metric: str, out: Path) -> None:
    """Draw the mean result over the learning rate, a line an arm, its best rate marked."""
    line_panel(
        {best.arm: (list(best.results), list(best.results.values())) for best in found},
        {best.arm: (best.rate, best.results[best.rate]) for best in found},
        x_label=RATE,
        y_label=metric,
        out=out,
    )
