"""Pictures of runs, from their metrics.jsonl alone.

Losses, throughput, validation, and every evaluation's curve. A key ``name@x`` is one point of a
curve over x (positions, lengths); any other evaluation is a curve over tokens.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdn.errors import ConfigError
from pdn.logging.progress import engineering
from pdn.runs.records import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = list[dict]
COLUMNS = 3
SMOOTHING = 0.02  # of the training curve's length
PANEL_INCHES = 3.3
LABEL_SHARE = 0.16  # share of an axis' length for the label of a tick


def series(records: Records, key: str) -> tuple[list[float], list[float]]:
    """Return (tokens or steps, values) of a key.

    Evaluations, which carry no token count, get that of their step.
    """
    steps, tokens = tokens_seen(records)
    # where a step was evaluated again, the last value counts
    points = {r["step"]: r[key] for r in records if isinstance(r.get(key), int | float)}
    at = list(points) if len(steps) < 2 else np.interp(list(points), steps, tokens).tolist()
    return at, list(points.values())


def tokens_seen(records: Records) -> tuple[list[int], list[float]]:
    """Return steps, and the tokens trained on by then; (0, 0) comes first.

    Steps of different phases may take different numbers of them.
    """
    known = {0: 0.0} | {r["step"]: r["tokens"] for r in records if r.get("tokens")}
    steps = sorted(known)
    last = max((r["step"] for r in records), default=0)
    if last > steps[-1] > 0:  # the last steps were not logged
        before, end = steps[-2:]
        each = (known[end] - known[before]) / (end - before)
        known[last] = known[end] + each * (last - end)
        steps.append(last)
    return steps, [known[step] for step in steps]


def curve(records: Records, name: str) -> tuple[list[float], list[float]]:
    """Return (x, value) of the keys ``name@x`` in the last record that has any."""
    for record in reversed(records):
        points = {
            float(key.rpartition("@")[2]): y
            for key, y in record.items()
            if key.rpartition("@")[0] == name and is_place(key) and isinstance(y, int | float)
        }
        if points:
            return sorted(points), [points[x] for x in sorted(points)]
    return [], []


def is_place(key: str) -> bool:
    """Return whether a number stands behind the @ of ``key``."""
    try:
        return math.isfinite(float(key.rpartition("@")[2]))
    except ValueError:
        return False


def panels(runs: dict[str, Records]) -> list[tuple[str, str]]:
    """Return (kind, key) of every panel: first the training's own series, then the evaluations'.

    kind: series over tokens; curve over what stands behind the @; shares, for all that were
    evaluated once, in one wide panel at the end.
    """
    keys = _keys(runs)
    order = [
        "loss",
        "validation/loss",
        "validation/bits_per_byte",
        "validation/accuracy",
        "tokens_per_second",
    ]
    order[2:2] = sorted(
        key
        for key in keys
        if key.startswith("validation/") and key.endswith("/loss") and key not in order
    )
    found = [("series", key) for key in order if key in keys]
    if "loss" not in keys and not any(key.startswith("validation/") for key in keys):
        found = []
    curves = sorted({key.rpartition("@")[0] for key in keys if "@" in key and is_place(key)})
    plain = plain_evaluations(runs)
    once = shares_evaluated_once(runs, plain)
    rest = [("series", key) for key in plain if key not in once]
    shares = [("shares", "")] if once else []
    return found + [("curve", name) for name in curves] + rest + shares


def _keys(runs: dict[str, Records]) -> set[str]:
    """Return what was measured, without standard errors and counts of what failed."""
    return {
        key
        for records in runs.values()
        for record in records
        for key, y in record.items()
        if isinstance(y, int | float) and not key.partition("@")[0].endswith(("_stderr", "/failed"))
    }


def plain_evaluations(runs: dict[str, Records]) -> list[str]:
    """Return keys of evaluations that are no curve over anything but tokens."""
    return sorted(key for key in _keys(runs) if key.startswith("evaluation/") and "@" not in key)


def shares_evaluated_once(runs: dict[str, Records], keys: list[str]) -> list[str]:
    """Return the keys with values between 0 and 1 and no more than one of them in any run."""
    values = {key: [series(records, key)[1] for records in runs.values()] for key in keys}
    return [
        k for k in keys if all(len(ys) <= 1 and all(0 <= y <= 1 for y in ys) for ys in values[k])
    ]


def draw(runs: dict[str, Records]) -> Figure:
    """Draw one figure with a panel for each curve and a colour for each run."""
    pyplot = _pyplot()
    chosen = panels(runs)
    if not chosen:
        raise ConfigError(
            "METRICS",
            f"{', '.join(runs)}: nothing to draw in metrics.jsonl; expected losses or evaluations",
        )
    narrow = [panel for panel in chosen if panel[0] != "shares"]
    columns = max(1, min(COLUMNS, len(narrow)))
    rows = math.ceil(len(narrow) / columns)
    once = shares_evaluated_once(runs, plain_evaluations(runs)) if len(narrow) < len(chosen) else []
    width = max(4.6 * columns, 9.0 if once else 6.5)  # the names of tasks stand beside the panel
    heights = [PANEL_INCHES] * rows
    heights += [0.8 + len(once) * (0.16 + 0.09 * len(runs))] if once else []
    legend = _legend_columns(runs, width)
    legend_inches = 0.25 * math.ceil(len(runs) / legend) + 0.15
    figure = pyplot.figure(figsize=(width, sum(heights) + legend_inches), layout="constrained")
    # Parts of their own: the long names beside the wide panel do not move the narrow ones.
    parts = [PANEL_INCHES * rows] * bool(narrow) + heights[rows:]
    places = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=parts)[:, 0]
    for number, (kind, key) in enumerate(narrow, 1):
        _panel(places[0].add_subplot(rows, columns, number), runs, kind, key)
    if once:
        _shares(places[-1].add_subplot(), runs, once)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_line(i)) for i in range(len(runs))]
    figure.legend(handles, list(runs), loc="outside upper center", ncols=legend, frameon=False)
    return figure


def _legend_columns(runs: dict[str, Records], width: float) -> int:
    """Return how many of the names fit beside each other; a character takes about 0.1 inch."""
    return max(1, min(len(runs), int(width / (0.1 * max(map(len, runs)) + 0.5))))


def _line(run: int, **more: Any) -> dict[str, Any]:
    """Return the look of a run's line: ten colours, each whole, dashed or dotted."""
    return {"color": f"C{run % 10}", "linestyle": ("-", "--", ":")[run // 10 % 3], **more}


def _panel(axes: Axes, runs: dict[str, Records], kind: str, key: str) -> None:
    points = [(series if kind == "series" else curve)(records, key) for records in runs.values()]
    places = {place for x, _ in points for place in x}
    if all(len(x) <= 1 for x, _ in points) and (kind == "series" or len(places) == 1):
        name = f"{key}@{places.pop():g}" if kind == "curve" else key
        return _one_value_each(axes, runs, [y[0] if y else math.nan for _, y in points], name)
    for i, (records, (x, y)) in enumerate(zip(runs.values(), points, strict=True)):
        style = _line(i)
        if key in ("loss", "tokens_per_second") and len(y) > 50:
            axes.plot(x, y, color=style["color"], alpha=0.25, linewidth=0.7)
            axes.plot(x, _smooth(y), linewidth=1.5, **style)
        elif x:
            marker = "o" if len(x) <= 20 else None
            errors = curve(records, f"{key}_stderr")[1] if kind == "curve" else []
            errors = errors if len(errors) == len(y) else None
            axes.errorbar(
                x, y, errors, marker=marker, markersize=3, linewidth=1.5, capsize=2, **style
            )
    axes.set_title(key.removeprefix("evaluation/"), fontsize=10)
    if kind == "curve":
        ticks = sorted({x for records in runs.values() for x in curve(records, key)[0]})
        length_axis(axes, ticks, "tokens before it, up to" if "position" in key else "length")
    else:
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(lambda value, _: engineering(value) if value else "0")
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if key.endswith("tokens_per_second"):
        axes.yaxis.set_major_formatter(lambda value, _: engineering(value) if value else "0")
        axes.set_ylim(bottom=0)
    if "accuracy" in key:
        axes.set_ylim(-0.02, 1.02)
    if key == "loss":
        _skip_first_steps(axes, runs)


def _one_value_each(axes: Axes, runs: dict[str, Records], values: list[float], key: str) -> None:
    """Draw a curve that would be a single point for every run as a list.

    The points stand below each other, with their numbers.
    """
    name, at, x = key.partition("@")
    errors = [_last(records, f"{name}_stderr{at}{x}") for records in runs.values()]
    for i, (value, error) in enumerate(zip(values, errors, strict=True)):
        if math.isfinite(value):
            axes.errorbar(value, i, xerr=error, fmt="o", color=f"C{i % 10}", capsize=3)
            said = _number(value) + (f" ± {error:.2g}" if error else "")
            axes.annotate(
                said, (value, i), (0, 6), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_yticks([])
    axes.set_ylim(len(values) - 0.3, -0.9)
    axes.margins(x=0.3)
    axes.locator_params(axis="x", nbins=4)
    axes.ticklabel_format(axis="x", useOffset=False, style="plain")
    axes.set_title(key.removeprefix("evaluation/"), fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.5g}"


def _last(records: Records, key: str) -> float | None:
    values = series(records, key)[1]
    return values[-1] if values else None


def _shares(axes: Axes, runs: dict[str, Records], keys: list[str]) -> None:
    """Draw a line for each key, a point with its standard error for each run."""
    step = 0.7 / len(runs)
    for i, records in enumerate(runs.values()):
        for line, key in enumerate(keys):
            value = _last(records, key)
            if value is not None:
                place = line + (i - (len(runs) - 1) / 2) * step
                axes.errorbar(
                    value, place, xerr=_last(records, f"{key}_stderr"), fmt="os^D"[i // 10 % 4],
                    color=f"C{i % 10}", markersize=3.5, capsize=2, linewidth=1,
                )  # fmt: skip
    axes.set_yticks(range(len(keys)), [key.removeprefix("evaluation/") for key in keys], fontsize=8)
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.set_xlim(-0.01, 1.01)
    axes.set_title("evaluated once, with standard errors", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _skip_first_steps(axes: Axes, runs: dict[str, Records]) -> None:
    """Limit the axis: the fall of the first steps would flatten everything that follows."""
    values = [series(records, "loss")[1] for records in runs.values()]
    later = [
        y
        for ys in values
        for y in (ys[len(ys) // 20 :] if len(ys) > 50 else ys)
        if math.isfinite(y)
    ]
    if later:
        margin = 0.05 * (max(later) - min(later)) or 0.1
        axes.set_ylim(min(later) - margin, max(later) + margin)


def _smooth(values: list[float]) -> list[float]:
    """Return the exponential average without the bias towards the first value."""
    keep = 1 - 1 / max(2.0, SMOOTHING * len(values))
    total = weight = 0.0
    found = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        # a gap where there is none: a line through it would tell of steps that went well
        found.append(total / weight if math.isfinite(value) else math.nan)
    return found


def small_multiples(
    curves: dict[str, list[dict]],
    panels: list[tuple[str, str, str]],
    *,
    x: str,
    x_label: str,
    title: str,
) -> Figure:
    """Draw measurements side by side: a panel for each key, a line for each name.

    Args:
        curves: records by name.
        panels: (title, y label, key) of each.
        x: key of the horizontal axis.
        x_label: of that axis.
        title: of the figure.
    """
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axes, (name, label, key) in zip(grid.flat, panels, strict=True):
        for i, (line, points) in enumerate(curves.items()):
            style = _line(i, marker="o", markersize=3)
            axes.plot([p[x] for p in points], [p[key] for p in points], label=line, **style)
        axes.set_title(name, fontsize=10)
        axes.set_ylabel(label)
        length_axis(axes, sorted({p[x] for points in curves.values() for p in points}), x_label)
        axes.set_ylim(bottom=0)
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure


def log_log(
    x: list[int], lines: dict[str, list[float]], x_label: str, y_label: str, title: str
) -> Figure:
    """Draw lines by name over the values of x, both axes logarithmic."""
    figure, axes = _pyplot().subplots(figsize=(6.4, 4.2))
    for i, (name, values) in enumerate(lines.items()):
        style = _line(i, marker="o", markersize=3)
        axes.loglog(x, values, label=name, **style)
    axes.set_xticks(x, map(str, x))
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))  # pyright: ignore[reportCallIssue]
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure


def line_panel(
    lines: dict[str, tuple[list[float], list[float]]],
    marks: dict[str, tuple[float, float]],
    *,
    x_label: str,
    y_label: str,
    out: Path,
) -> None:
    """Draw lines over a logarithmic axis, one point of each marked.

    Args:
        lines: x and y by name.
        marks: the point that is marked, by name.
        x_label, y_label: of the axes.
        out: see ``save``.
    """
    figure, axes = _pyplot().subplots(figsize=(5.2, 3.8))
    for i, (name, (x, y)) in enumerate(lines.items()):
        style = _line(i)
        axes.plot(x, y, label=name, marker="o", markersize=3, **style)
        axes.plot(*marks[name], marker="*", markersize=13, color=f"C{i % 10}")
    axes.set_xscale("log")
    shown = _spread(sorted({value for x, _ in lines.values() for value in x}))
    axes.set_xticks(shown, [f"{value:g}" for value in shown])
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    save(figure, out)


def subplots(rows: int, columns: int, *, size: tuple[float, float]) -> tuple[Figure, list]:
    """Return a figure of ``size`` inches, and its axes by row and column."""
    figure, grid = _pyplot().subplots(rows, columns, figsize=size, squeeze=False)
    return figure, grid.tolist()


def length_axis(axes: Axes, ticks: Sequence[float], label: str) -> None:
    """Have the x axis show lengths, logarithmic where all are positive.

    Args:
        axes: to change.
        ticks: ascending; those whose labels would touch are left out.
        label: of the axis.
    """
    if all(tick > 0 for tick in ticks):
        axes.set_xscale("log", base=2)
        shown = _spread(ticks)
        axes.set_xticks(shown, [f"{x:g}" for x in shown], fontsize=8)
        axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _spread(ticks: Sequence[float]) -> Sequence[float]:
    """Select ascending ticks on a logarithmic axis whose labels do not touch.

    The last tick is always among them.
    """
    if len(ticks) < 2:
        return ticks
    room = LABEL_SHARE * math.log(ticks[-1] / ticks[0])
    kept = [ticks[-1]]
    for tick in reversed(ticks[:-1]):
        if math.log(kept[0] / tick) >= room:
            kept.insert(0, tick)
    return kept


def save_curves(directory: Path, file: Path) -> bool:
    """Draw the metrics of a run into ``file``.

    Returns False, and draws nothing, where it has none.
    """
    if not (directory / "metrics.jsonl").is_file():
        return False
    save(draw({directory.name: read_metrics(directory)}), file)
    return True


def save(figure: Figure, out: Path) -> None:
    """Write a .png, .svg or .pdf, or an .html that holds the picture as SVG."""
    kinds: dict[str, Callable[[], object]] = {
        **dict.fromkeys((".png", ".svg", ".pdf"), lambda: figure.savefig(out, dpi=130)),
        ".html": lambda: out.write_text(_html(figure), encoding="utf-8"),
    }
    if out.suffix not in kinds:
        raise ConfigError("PLOT", f"out={out}: expected a name that ends in {', '.join(kinds)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        kinds[out.suffix]()
    except OSError as error:
        raise ConfigError(
            "PLOT", f"out={out}: {error.strerror}; expected a place that can be written"
        ) from None
    finally:
        _pyplot().close(figure)


def _html(figure: Figure) -> str:
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()[picture.getvalue().index("<svg") :]
    return f"<!doctype html><meta charset='utf-8'><title>runs</title>\n{svg}"


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "PLOTS",
            "matplotlib is not installed; expected it for pictures: pip install 'pdn[plots]'",
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
