"""A search over ranges of values, by Optuna's tree-structured Parzen estimator, one for each arm.

Optuna keeps nothing: what was asked is in ``search.jsonl`` of the sweep, what came of it in the
runs. A sweep that is launched again tells a new study all of it, and goes on; the same results
lead to the same suggestions.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdn.errors import ConfigError
from pdn.reports.stopping import Curves, stopped_reason
from pdn.reports.sweep import RATE, SEED, Best, Grid, Row, grid_of
from pdn.reports.trials import Trial, is_finished
from pdn.runs.records import read_lines
from pdn.store.local import storage_errors

RANGE = re.compile(r"(log|uniform|int)\(([^,()]+),([^,()]+)\)")
FILE = "search.jsonl"
EDGE = 0.05  # of a range, within which its best value is said to be at the edge


@dataclass(frozen=True)
class Space:
    """Bounds one key: log, uniform (float) or int, ends included."""

    kind: str
    low: float
    high: float

    def text(self, value: float) -> str:
        return str(int(value)) if self.kind == "int" else repr(float(value))

    def at_edge(self, value: float) -> bool:
        low, high, value = (
            math.log(x) if self.kind == "log" else x for x in (self.low, self.high, value)
        )
        return min(value - low, high - value) <= EDGE * (high - low)


def spaces_of(words: Sequence[str]) -> tuple[dict[str, Space], list[str]]:
    """Return the ranges among words such as ``optim.lr=log(1e-4,1e-2)``, and the other words.

    Raises:
        ConfigError: ends that are no numbers, or not in order; of ``log`` not above 0.
    """
    spaces, others = {}, []
    for word in words:
        key, _, value = word.partition("=")
        match = RANGE.fullmatch(value.replace(" ", ""))
        if match is None:
            others.append(word)
            continue
        kind = match[1]
        try:
            low, high = (int(end) if kind == "int" else float(end) for end in match.groups()[1:])
        except ValueError:
            low = high = 0
        if not low < high or (kind == "log" and low <= 0):
            raise ConfigError(
                "SWEEP", f"{word}: expected two ends in order, such as {key}=log(1e-4,1e-2)"
            )
        spaces[key] = Space(kind, low, high)
    return spaces, others


class Search:
    """Asks for trials of every arm until each has so many.

    Args:
        words: of the command line; listed values make arms, ranges are searched.
        tries: trials of an arm.
        slots: trials at a time.
        directory: of the runs.
        metric: key of the result; less is better.

    Attributes:
        trials: the values of each trial by its name, as of ``Grid``.
        failed: names of trials that failed in this sweep; shared with it.

    Raises:
        ConfigError: Optuna is not installed, no range, several seeds, or ``search.jsonl`` is of
            another search.
    """

    def __init__(
        self, words: Sequence[str], *, tries: int, slots: int, directory: Path, metric: str
    ):
        self.spaces, others = spaces_of(words)
        self.grid: Grid = grid_of(others)
        if not self.spaces or SEED in self.grid.axes:
            raise ConfigError(
                "SWEEP",
                f"tries = {tries}: expected a range, such as optim.lr=log(1e-4,1e-2), and one seed",
            )
        self.tries, self.slots, self.directory = tries, slots, directory
        self.trials: dict[str, dict[str, str]] = {}
        self.failed: Mapping[str, str] = {}
        self._curves = Curves(directory, metric)
        self._optuna = _optuna()
        self._studies: dict[str, Any] = {
            arm: self._optuna.create_study() for arm in self.grid.trials
        }
        self._open: dict[str, tuple[str, Any]] = {}  # arm and Optuna's trial by name
        for record in read_lines(directory / FILE):
            self._recall(record)

    def _recall(self, record: dict) -> None:
        arm, values = record["arm"], record["values"]
        if arm not in self._studies or values.keys() != self.spaces.keys():
            raise ConfigError(
                "SWEEP",
                f"{self.directory / FILE}: holds trials of another search ({arm}: "
                f"{', '.join(values)}); expected the same arms and ranges: give another directory "
                "with runs=",
            )
        study = self._studies[arm]
        study.enqueue_trial({key: float(text) for key, text in values.items()})
        with warnings.catch_warnings():  # a range may have become narrower
            warnings.simplefilter("ignore")
            asked = study.ask(self._distributions())
        self._add(record["trial"], arm, values, asked)

    def _add(self, name: str, arm: str, values: dict[str, str], asked: Any) -> None:
        self.trials[name] = {**self.grid.trials[arm], **values}
        self._open[name] = arm, asked

    def _distributions(self) -> dict[str, Any]:
        of = self._optuna.distributions
        return {
            key: of.IntDistribution(int(s.low), int(s.high))
            if s.kind == "int"
            else of.FloatDistribution(s.low, s.high, log=s.kind == "log")
            for key, s in self.spaces.items()
        }

    def groups(self) -> list[list[str]]:
        """Return the names of the trials of each arm."""
        return [self._names(arm) for arm in self._studies]

    def _names(self, arm: str) -> list[str]:
        return [name for name in self.trials if name.rpartition("-try")[0] == arm]

    def ready(self, finished: set[str]) -> list[Trial]:
        """Return all trials asked for so far, after asking for as many as there are slots."""
        self._tell()
        while len(self._open) < self.slots:
            arms = [arm for arm in self._studies if len(self._names(arm)) < self.tries]
            if not arms:
                break
            self._ask(min(arms, key=lambda arm: len(self._names(arm))))
        return [
            Trial(name, (*self.grid.words, *(f"{key}={value}" for key, value in own.items())))
            for name, own in self.trials.items()
        ]

    def _tell(self) -> None:
        """Tell Optuna what came of trials that have ended."""
        state = self._optuna.trial.TrialState
        for name, (arm, asked) in list(self._open.items()):
            curve = self._curves.of(name)
            known = {step: value for step, value in curve.items() if math.isfinite(value)}
            if is_finished(self.directory / name):
                told: dict = {"values": known[max(known)]} if known else {"state": state.FAIL}
            elif stopped_reason(self.directory, name) is not None:
                for step, value in known.items():
                    asked.report(value, step)
                told = {"state": state.PRUNED}
            elif name in self.failed:
                told = {"state": state.FAIL}
            else:
                continue
            del self._open[name]
            self._studies[arm].tell(asked, **told)

    def _ask(self, arm: str) -> None:
        study, number = self._studies[arm], len(self._names(arm)) + 1
        name = f"{arm}-try{number:03d}"
        # A seed for each, so that a sweep launched again does not draw what it drew before.
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Trials under way count as bad, so that several at a time are not alike.
            study.sampler = self._optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=max(3, self.tries // 4), constant_liar=True
            )
            asked = study.ask(self._distributions())
        values = {key: self.spaces[key].text(value) for key, value in asked.params.items()}
        self._add(name, arm, values, asked)
        file = self.directory / FILE
        with storage_errors(file), open(file, "a", encoding="utf-8") as stream:
            record = {"arm": arm, "trial": name, "values": values}
            stream.write(json.dumps(record) + "\n")

    def best(self, table: Sequence[Row], metric: str) -> list[tuple[str, Row, list[str]]]:
        """Return for each arm the row of its best finished trial, and the keys at an edge."""
        found = []
        for arm in self._studies:
            names = set(self._names(arm))
            rows = [
                row for row in table
                if row["trial"] in names and row["state"] == "finished"
                and isinstance(row[metric], float) and math.isfinite(float(str(row[metric])))
            ]  # fmt: skip
            if rows:
                row = min(rows, key=lambda row: float(str(row[metric])))
                edges = [k for k, s in self.spaces.items() if s.at_edge(float(str(row[k])))]
                found.append((arm, row, edges))
        return found

    def rates(self, table: Sequence[Row], metric: str) -> list[Best]:
        """Return what ``plot_rates`` draws; nothing unless rates are searched."""
        found = []
        for arm, best, edges in self.best(table, metric) if RATE in self.spaces else ():
            names = set(self._names(arm))
            results = {
                float(str(row[RATE])): float(str(row[metric]))
                for row in table
                if row["trial"] in names and row["state"] == "finished" and row[metric] is not None
            }
            rate = float(str(best[RATE]))
            found.append(Best(arm, rate, dict(sorted(results.items())), RATE in edges))
        return found


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise ConfigError(
            "SWEEP",
            "tries: found no optuna, which suggests the values; pip install 'pdn[search]', or list "
            "values instead of ranges",
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
