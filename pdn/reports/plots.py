"""Pictures of runs, from their metrics.jsonl alone: losses, throughput, validation, and every
evaluation's curve.

A key ``name@x`` is one point of a curve over x (positions, lengths); any other evaluation is a
curve over tokens.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pdn.errors import ConfigError
from pdn.runs.records import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = list[dict]
COLUMNS = 3
SMOOTHING = 0.02  # of the training curve's length


def series(records: Records, key: str) -> tuple[list[float], list[float]]:
    """(tokens or steps, values) of a key; evaluations, which carry no token count, get that of
    their step.
    """
    per_step = next(
        (r["tokens"] / r["step"] for r in records if r.get("tokens") and r.get("step")), 1
    )
    points = {
        r["step"] * per_step: r[key] for r in records if isinstance(r.get(key), int | float)
    }  # evaluated again: the last
    return list(points), list(points.values())


def curve(records: Records, name: str) -> tuple[list[float], list[float]]:
    """(x, value) of the keys ``name@x`` in the last record that has any."""
    for record in reversed(records):
        points = {
            float(key.rpartition("@")[2]): y
            for key, y in record.items()
            if key.rpartition("@")[0] == name
        }
        if points:
            return sorted(points), [points[x] for x in sorted(points)]
    return [], []


def panels(runs: dict[str, Records]) -> list[tuple[str, str]]:
    """(kind, key) of every panel: the training's own series first, then what evaluations found.

    kind: series over tokens; curve over what stands behind the @; bars, for all shares that were
        evaluated once.
    """
    keys = {
        key
        for records in runs.values()
        for record in records
        for key, y in record.items()
        if isinstance(y, int | float)
    }
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
    curves = sorted({key.rpartition("@")[0] for key in keys if "@" in key})
    plain = plain_evaluations(runs)
    once = shares_evaluated_once(runs, plain)
    bars = [("bars", "")] if once else []
    rest = [("series", key) for key in plain if key not in once]
    return found + [("curve", name) for name in curves] + bars + rest


def plain_evaluations(runs: dict[str, Records]) -> list[str]:
    """Keys of evaluations that are no curve over anything but tokens."""
    keys = {
        key
        for records in runs.values()
        for record in records
        for key, y in record.items()
        if isinstance(y, int | float)
    }
    return sorted(key for key in keys if key.startswith("evaluation/") and "@" not in key)


def shares_evaluated_once(runs: dict[str, Records], keys: list[str]) -> list[str]:
    """Of the keys those with values between 0 and 1 and no more than one of them in any run."""
    values = {key: [series(records, key)[1] for records in runs.values()] for key in keys}
    return [
        k for k in keys if all(len(ys) <= 1 and all(0 <= y <= 1 for y in ys) for ys in values[k])
    ]


def draw(runs: dict[str, Records]) -> Figure:
    """One figure with a panel for each curve and a colour for each run."""
    pyplot = _pyplot()
    chosen = panels(runs)
    if not chosen:
        raise ConfigError(
            "METRICS",
            f"{', '.join(runs)}: nothing to draw in metrics.jsonl; expected losses or evaluations",
        )
    columns = min(COLUMNS, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 3.3 * rows + 0.5), squeeze=False
    )
    for axes, (kind, key) in zip(grid.flat, chosen, strict=False):
        _panel(axes, runs, kind, key)
    for axes in grid.flat[len(chosen) :]:
        axes.remove()
    handles = [
        pyplot.Line2D([], [], color=f"C{i % 10}", linestyle=_style(i)) for i in range(len(runs))
    ]
    figure.legend(handles, list(runs), loc="upper center", ncols=min(4, len(runs)), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 * math.ceil(len(runs) / 4) / (3.3 * rows + 0.5)))
    return figure


def _style(run: int) -> str:
    return ("-", "--", ":")[run // 10 % 3]


def _panel(axes: Axes, runs: dict[str, Records], kind: str, key: str) -> None:
    if kind == "bars":
        return _bars(axes, runs)
    points = [(series if kind == "series" else curve)(records, key) for records in runs.values()]
    places = {place for x, _ in points for place in x}
    if all(len(x) <= 1 for x, _ in points) and (kind == "series" or len(places) == 1):
        name = f"{key}@{places.pop():g}" if kind == "curve" else key
        return _one_value_each(axes, [y[0] if y else math.nan for _, y in points], name)
    for i, (x, y) in enumerate(points):
        style = dict(color=f"C{i % 10}", linestyle=_style(i))
        if key in ("loss", "tokens_per_second") and len(y) > 50:
            axes.plot(x, y, color=style["color"], alpha=0.25, linewidth=0.7)
            axes.plot(x, _smooth(y), linewidth=1.5, **style)
        elif x:
            axes.plot(
                x, y, marker="o" if len(x) <= 20 else None, markersize=3, linewidth=1.5, **style
            )
    axes.set_title(key.removeprefix("evaluation/"), fontsize=10)
    if kind == "curve":
        ticks = sorted({x for records in runs.values() for x in curve(records, key)[0]})
        _length_axis(axes, ticks, "tokens before it, up to" if "position" in key else "length")
    else:
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if key.endswith("tokens_per_second"):
        axes.set_ylim(bottom=0)
    if "accuracy" in key:
        axes.set_ylim(-0.02, 1.02)
    if key == "loss":
        _skip_first_steps(axes, runs)


def _one_value_each(axes: Axes, values: list[float], key: str) -> None:
    """A curve that would be a single point for every run."""
    bars = axes.barh(
        range(len(values)), values, color=[f"C{i % 10}" for i in range(len(values))], height=0.6
    )
    axes.bar_label(
        bars,
        [f"{value:.4g}" if math.isfinite(value) else "" for value in values],
        padding=3,
        fontsize=8,
    )
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.margins(x=0.2, y=0.3)
    axes.set_xlim((0, 1) if "accuracy" in key else (0, None))
    axes.set_title(key.removeprefix("evaluation/"), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Axes, runs: dict[str, Records]) -> None:
    keys = shares_evaluated_once(runs, plain_evaluations(runs))
    height = 0.8 / len(runs)
    for i, records in enumerate(runs.values()):
        values = [(series(records, key)[1] or [0.0])[0] for key in keys]
        places = [j + i * height for j in range(len(keys))]
        axes.barh(
            places, values, height=height, color=f"C{i % 10}", hatch=("", "//", "..")[i // 10 % 3]
        )
    names = [key.removeprefix("evaluation/") for key in keys]
    axes.set_yticks([j + 0.4 - height / 2 for j in range(len(keys))], names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title("evaluated once", fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)


def _skip_first_steps(axes: Axes, runs: dict[str, Records]) -> None:
    """The fall of the first steps would flatten everything that follows."""
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
    """Exponential average without the bias towards the first value."""
    keep = 1 - 1 / max(2.0, SMOOTHING * len(values))
    total = weight = 0.0
    found = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        found.append(total / max(weight, 1e-12))
    return found


def small_multiples(
    curves: dict[str, list[dict]],
    panels: list[tuple[str, str, str]],
    *,
    x: str,
    x_label: str,
    title: str,
) -> Figure:
    """Measurements side by side: a panel for each (title, y label, key), a line for each name over
    the key ``x``.
    """
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axes, (name, label, key) in zip(grid.flat, panels, strict=True):
        for i, (line, points) in enumerate(curves.items()):
            style = dict(color=f"C{i % 10}", linestyle=_style(i), marker="o", markersize=3)
            axes.plot([p[x] for p in points], [p[key] for p in points], label=line, **style)
        axes.set_title(name, fontsize=10)
        axes.set_ylabel(label)
        _length_axis(axes, sorted({p[x] for points in curves.values() for p in points}), x_label)
        axes.set_ylim(bottom=0)
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure


def _length_axis(axes: Axes, ticks: list[float], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def save_curves(directory: Path, file: Path) -> bool:
    """Draw the metrics of a run into ``file``; return False, and draw nothing, where it has none."""
    if not (directory / "metrics.jsonl").is_file():
        return False
    save(draw({directory.name: read_metrics(directory)}), file)
    return True


def save(figure: Figure, out: Path) -> None:
    """Write a .png, .svg or .pdf, or an .html that holds the picture as SVG."""
    kinds: dict[str, Callable[[], None]] = {
        **dict.fromkeys((".png", ".svg", ".pdf"), lambda: figure.savefig(out, dpi=130)),
        ".html": lambda: out.write_text(_html(figure)),
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
    return f"<!doctype html><meta charset='utf-8'><title>runs</title>\n{picture.getvalue()[picture.getvalue().index('<svg') :]}"


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
