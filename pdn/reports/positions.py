"""Loss by position: the lines of a study's ``positions``, their table and their picture.

A line is a metric ``<key>@<position>`` of one arm, its mean over the seeds. The others of a panel
are compared with its first, seed by seed: the interval is Student's t over these pairs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pdn.errors import ConfigError
from pdn.reports.evidence import Line, Study, final_results, paired
from pdn.reports.plots import length_axis, subplots
from pdn.reports.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """Holds one line of a panel.

    Attributes:
        ends: positions, ascending: each value is of the tokens from the end before up to this one.
        means: nats a token, means over the seeds.
        differences: from the panel's first line, None for that one and below two pairs.
    """

    ends: list[int]
    means: list[float]
    differences: list[Interval | None]


def curves_of(study: Study, records: Sequence[dict]) -> dict[str, dict[str, Curve]]:
    """Return the curves by panel and name; lines that no run has yet are left out.

    Raises:
        ConfigError: see ``final_results``.
    """
    found: dict[str, dict[str, Curve]] = {}
    for panel, lines in (study.positions or {}).items():
        first: dict[int, dict[int, float]] = {}
        for name, line in lines.items():
            points = _points(study, records, line)
            first = first or points
            if not points:
                continue
            found.setdefault(panel, {})[name] = Curve(
                list(points),
                [statistics.fmean(of_seed.values()) for of_seed in points.values()],
                [
                    None if points is first else paired(first.get(end, {}), of_seed)
                    for end, of_seed in points.items()
                ],
            )
    return found


def _points(study: Study, records: Sequence[dict], line: Line) -> dict[int, dict[int, float]]:
    """Return the results of a line by position and seed."""
    runs = [record for record in records if record["arm"] == line.arm]
    ends = {
        int(key.rpartition("@")[2])
        for record in runs
        for key in record["evaluations"]
        if key.rpartition("@")[0] == line.key
    }
    found = {
        end: final_results(study, records, f"{line.key}@{end}", arms=[line.arm]).get(line.arm, {})
        for end in sorted(ends)
    }
    return {end: of_seed for end, of_seed in found.items() if of_seed}


def table(study: Study, records: Sequence[dict], panel: str) -> str:
    """Return a table of a panel: means over the seeds, and differences from its first line.

    Raises:
        ConfigError: there is no such panel.
    """
    _one_of(panel, study.positions or {}, "panel")
    curves = curves_of(study, records).get(panel)
    if not curves:
        return "not run"
    ends = sorted({end for curve in curves.values() for end in curve.ends})
    lines = [
        "| up to position | " + " | ".join(f"{end:,}" for end in ends) + " |",
        "|---" * (len(ends) + 1) + "|",
    ]
    first, *others = curves
    base = dict(zip(curves[first].ends, curves[first].means, strict=True))
    lines.append(f"| {first} | " + " | ".join(_value(base.get(end)) for end in ends) + " |")
    for name in others:
        differences = dict(zip(curves[name].ends, curves[name].differences, strict=True))
        cells = [_difference(differences.get(end)) for end in ends]
        lines.append(f"| {name}, minus that | {' | '.join(cells)} |")
    return "\n".join(lines)


def means(study: Study, records: Sequence[dict], panel: str) -> str:
    """Return a table of a panel: means over the seeds, and the least and largest seed's value.

    Raises:
        ConfigError: there is no such panel.
    """
    lines = _one_of(panel, study.positions or {}, "panel")
    points = {name: _points(study, records, line) for name, line in lines.items()}
    ends = sorted({end for of_line in points.values() for end in of_line})
    if not ends:
        return "not run"
    rows = [
        f"| {study.position_label} | " + " | ".join(f"{end:,}" for end in ends) + " |",
        "|---" * (len(ends) + 1) + "|",
    ]
    for name, of_line in points.items():
        cells = [_spread(list(of_line.get(end, {}).values())) for end in ends]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.fmean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def between(
    study: Study, records: Sequence[dict], panel: str, end: int, other: str, base: str
) -> str:
    """Return the difference of two lines at one position, with half its interval.

    Args:
        study, records: what was run.
        panel: its name.
        end: of the bucket of positions.
        other, base: names of lines; other minus base is returned.

    Raises:
        ConfigError: there is no such panel or line.
    """
    lines = _one_of(panel, study.positions or {}, "panel")
    there, here = (
        _points(study, records, _one_of(name, lines, "line")).get(end, {}) for name in (base, other)
    )
    return _difference(paired(there, here))


def _one_of(name: str, known: dict[str, T], kind: str) -> T:
    if name not in known:
        raise ConfigError("EVIDENCE", f"no {kind} {name!r}; {kind}s: {', '.join(known) or 'none'}")
    return known[name]


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _difference(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    half = interval.high - interval.mean
    return f"{interval.mean:+.3f} ± {half:.3f}".replace("-", "−")


def draw(study: Study, records: Sequence[dict]) -> Figure:
    """Draw a column for each panel: losses above, differences with their intervals below."""
    panels = curves_of(study, records)
    figure, grid = subplots(2, len(panels), size=(4.8 * len(panels), 7.2))
    lines = (study.positions or {}).values()
    names = list(dict.fromkeys(name for of_panel in lines for name in of_panel))
    for column, (panel, curves) in enumerate(panels.items()):
        for name, curve in curves.items():
            _draw_curve(grid[0][column], grid[1][column], curve, name, f"C{names.index(name) % 10}")
        first = next(iter(curves))
        grid[0][column].set_title(panel, fontsize=10)
        grid[0][column].legend(frameon=False, fontsize=8)
        grid[1][column].axhline(0, color="black", linewidth=0.8)
        ticks = sorted({end for curve in curves.values() for end in curve.ends})
        for axes in (grid[0][column], grid[1][column]):
            length_axis(axes, ticks, study.position_label)
        if column == 0:
            grid[0][0].set_ylabel(f"{study.value_label}, mean over seeds", fontsize=9)
            grid[1][0].set_ylabel(f"minus {first}, 95 % interval", fontsize=9)
    figure.suptitle(study.title, fontsize=10)
    figure.tight_layout()
    return figure


def _draw_curve(above: Axes, below: Axes, curve: Curve, name: str, colour: str) -> None:
    above.plot(curve.ends, curve.means, marker="o", markersize=3, color=colour, label=name)
    known = [(end, i) for end, i in zip(curve.ends, curve.differences, strict=True) if i]
    if not known or not all(math.isfinite(i.mean) for _, i in known):
        return
    ends = [end for end, _ in known]
    below.plot(ends, [i.mean for _, i in known], marker="o", markersize=3, color=colour)
    below.fill_between(
        ends, [i.low for _, i in known], [i.high for _, i in known], color=colour, alpha=0.2
    )
