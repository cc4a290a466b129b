"""Trials of a sweep that are stopped early, because others do better at the same step.

A trial is compared with those of its group only: other rates of the same model. What is stopped
has saved, is on record with its reason, and never counts as finished; a sweep by another rule, or
without one, goes on with it.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from pdn.runs.records import read_object
from pdn.store.local import storage_errors, write_durably
from pdn.wording import counted

Curve = dict[int, float]  # step -> value of the metric; less is better
Kind = Literal["median", "halving"]
LEAST = 3  # others that a trial is compared with; of halving, trials at a rung
FACTOR = 3  # halving keeps one in so many at each rung, and the next rung is so many times as far


def verdicts(
    curves: Mapping[str, Curve], candidates: Collection[str], kind: Kind, after: int
) -> dict[str, str]:
    """Return which trials of one group to stop, and why.

    Args:
        curves: of all its trials that have values, stopped ones included.
        candidates: names of those under way.
        kind: ``median`` stops a trial whose best value so far is worse than the median of what at
            least ``LEAST`` others had reached by the same step. ``halving`` has rungs at ``after``,
            ``FACTOR`` times as far, and so on, and stops a trial that is not among the best one in
            ``FACTOR`` of at least ``LEAST`` at the last rung that it has reached.
        after: steps before which nothing is stopped.
    """
    found = {}
    for name in candidates:
        curve = {step: value for step, value in curves.get(name, {}).items() if step >= after}
        if not curve:
            continue
        if not math.isfinite(curve[max(curve)]):
            found[name] = f"step {max(curve)}: {curve[max(curve)]}"
            continue
        rule = _below_median if kind == "median" else _below_the_best
        reason = rule(name, curves, after)
        if reason is not None:
            found[name] = reason
    return found


def _below_median(name: str, curves: Mapping[str, Curve], after: int) -> str | None:
    step = max(curves[name])
    mine = _best(curves[name], step)
    others = [
        _best(curve, step)
        for other, curve in curves.items()
        if other != name and curve and max(curve) >= step
    ]
    if len(others) < LEAST or mine <= (median := statistics.median(others)):
        return None
    return f"step {step}: {mine:.5g}; the median of {len(others)} others is {median:.5g}"


def _best(curve: Curve, step: int) -> float:
    values = [v for s, v in curve.items() if s <= step and math.isfinite(v)]
    return min(values, default=math.inf)


def _below_the_best(name: str, curves: Mapping[str, Curve], after: int) -> str | None:
    rung = after
    while rung * FACTOR <= max(curves[name]):
        rung *= FACTOR
    at = {other: _first_from(curve, rung) for other, curve in curves.items()}
    reached = sorted(value for value in at.values() if value is not None)
    mine = at[name]
    if mine is None or len(reached) < LEAST:
        return None
    kept = math.ceil(len(reached) / FACTOR)
    if mine <= reached[kept - 1]:
        return None
    return (
        f"rung {rung}: {mine:.5g}; the best {kept} of {len(reached)} have {reached[kept - 1]:.5g}"
    )


def _first_from(curve: Curve, step: int) -> float | None:
    """Return the first value from a step on; infinite if that is not finite."""
    reached = [s for s in curve if s >= step]
    if not reached:
        return None
    value = curve[min(reached)]
    return value if math.isfinite(value) else math.inf


class Curves:
    """Follows a metric in the metrics.jsonl of runs; reads only what is new.

    Args:
        directory: of the runs.
        metric: key of the values.
    """

    def __init__(self, directory: Path, metric: str):
        self.directory, self.metric = directory, metric
        self._read: dict[str, tuple[int, int, Curve]] = {}  # file's inode, bytes read, values

    def of(self, name: str) -> Curve:
        """Return the values of a run by step; of a step that came twice the last one."""
        try:
            with open(self.directory / name / "metrics.jsonl", "rb") as file:
                inode, place, curve = self._read.get(name, (0, 0, {}))
                status = os.fstat(file.fileno())
                if status.st_ino != inode or status.st_size < place:  # the run went back
                    place, curve = 0, {}
                file.seek(place)
                whole = file.read()
        except FileNotFoundError:
            return {}
        whole = whole[: whole.rfind(b"\n") + 1]
        key = json.dumps(self.metric).encode()
        for line in whole.splitlines():
            if key in line:
                self._add(curve, line)
        self._read[name] = (status.st_ino, place + len(whole), curve)
        return curve

    def _add(self, curve: Curve, line: bytes) -> None:
        try:
            record = json.loads(line)
            curve[int(record["step"])] = float(record[self.metric])
        except (ValueError, KeyError, TypeError):
            return


class EarlyStopping:
    """Decides over the trials of a sweep.

    Args:
        kind, after: see ``verdicts``.
        directory: of the runs.
        metric: key of the result; less is better.
    """

    def __init__(self, kind: Kind, after: int, directory: Path, metric: str):
        self.kind: Kind = kind
        self.after, self.directory = after, directory
        self.rule = f"{kind} after {counted(after, 'step')} of {metric}"
        self._curves = Curves(directory, metric)

    def check(self, groups: Collection[Collection[str]], running: Collection[str]) -> dict:
        """Return the names of running trials to stop, with their reasons, and put them on record.

        Args:
            groups: names of trials that are compared with each other.
            running: names of those under way.
        """
        found: dict[str, str] = {}
        for group in groups:
            mine = [name for name in group if name in running]
            if mine:
                curves = {name: curve for name in group if (curve := self._curves.of(name))}
                found |= verdicts(curves, mine, self.kind, self.after)
        for name, reason in found.items():
            file = _record(self.directory, name)
            with storage_errors(file):
                text = json.dumps({"rule": self.rule, "reason": reason})
                write_durably(file, text.encode())
        return found

    def recorded(self, name: str) -> str | None:
        """Return why this rule stopped a trial in an earlier sweep; None if it did not."""
        record = read_object(_record(self.directory, name))
        return str(record.get("reason")) if record.get("rule") == self.rule else None


def stopped_reason(directory: Path, name: str) -> str | None:
    """Return why a trial was stopped, and by which rule; None if it was not."""
    record = read_object(_record(directory, name))
    return f"{record.get('reason')} ({record.get('rule')})" if record else None


def forget(directory: Path, name: str) -> None:
    """Drop the record of a trial that goes on."""
    _record(directory, name).unlink(missing_ok=True)


def _record(directory: Path, name: str) -> Path:
    return directory / f"{name}.stopped.json"
