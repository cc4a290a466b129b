"""What runs recorded by layer and head, as maps: rows of places, columns of steps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pdn.runs.directory import TELEMETRY
from pdn.runs.records import read_lines

LARGEST = 1e300  # a value of which many can be added up
MAX_COLUMNS = 120  # measurements of telemetry that a map shows; of more, neighbours are averaged
MAX_POINTS = 1500  # points of a curve; a longer one is averaged
# Where an alarm is marked: the map of what raised it
ALARMED = {
    "alarm/decay": "half_life_p90",
    "alarm/preconditioner": "saturated",
    "alarm/state": "S_norm",
    "alarm/write": "write_max",
}
ALARM = re.compile(r"layer (\d+), head (\d+): ")


def thinned(steps: Sequence[int], values: Sequence[float]) -> list[list[float]]:
    """Average as many neighbours as leave MAX_POINTS, and place them at the last of their steps."""
    size = math.ceil(len(steps) / MAX_POINTS) or 1
    groups = range(0, len(steps), size)
    return [
        [steps[min(i + size, len(steps)) - 1] for i in groups],
        [_short(sum(values[i : i + size]) / len(values[i : i + size])) for i in groups],
    ]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def telemetry(path: Path, records: Sequence[dict]) -> dict[str, dict]:
    """Return the maps of ``telemetry.jsonl`` by quantity.

    Of each the rows (layer and head), the steps, the values, one list a row, and the places of
    alarms. Layers without a quantity have no row; a value that was not finite is None.
    """
    found: dict[str, dict[tuple[int, int], tuple[list[int], list]]] = {}
    for line in read_lines(path / TELEMETRY):
        for quantity, layer, head, value in _values(line.get("maps")):
            steps, values = found.setdefault(quantity, {}).setdefault((layer, head), ([], []))
            steps.append(line.get("step", 0))
            values.append(value)
    alarms = _alarms(records)
    maps = {}
    for quantity, rows in found.items():
        places = sorted(rows)
        thin = {place: _columns(*rows[place]) for place in places}
        maps[quantity] = {
            "rows": [f"{layer}.{head}" for layer, head in places],
            "steps": thin[places[0]][0],
            "values": [thin[place][1] for place in places],
            "alarms": [
                [step, place] for key, step, place in alarms if ALARMED.get(key) == quantity
            ],
        }
    return maps


def _values(maps: object) -> Iterator[tuple[str, int, int, float | None]]:
    """Yield quantity, layer, head and value of a line; what is no number, or damaged, is None."""
    for quantity, layers in maps.items() if isinstance(maps, dict) else ():
        for layer, heads in enumerate(layers if isinstance(layers, list) else ()):
            for head, value in enumerate(heads if isinstance(heads, list) else ()):
                usable = isinstance(value, int | float) and abs(value) < LARGEST
                yield quantity, layer, head, value if usable else None


def _columns(steps: Sequence[int], values: Sequence[float | None]) -> list[list]:
    """Average as many neighbours as leave MAX_COLUMNS; None where one of them is."""
    size = math.ceil(len(steps) / MAX_COLUMNS) or 1
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    whole = [[value for value in group if value is not None] for group in groups]
    means = [
        _short(sum(found) / len(found)) if len(found) == len(group) else None
        for group, found in zip(groups, whole, strict=True)
    ]
    return [[steps[min(i + size, len(steps)) - 1] for i in range(0, len(steps), size)], means]


def _alarms(records: Sequence[dict]) -> list[tuple[str, int, str]]:
    """Return kind, step and ``layer.head`` of every alarm of telemetry."""
    return [
        (key, record["step"], f"{layer}.{head}")
        for record in records
        for key, text in record.items()
        if key in ALARMED
        for layer, head in ALARM.findall(str(text))
    ]
