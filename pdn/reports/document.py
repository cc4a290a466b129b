"""The document of evidence: a template whose numbers are computed from the records of studies.

Each study also has a picture. ``docs/evidence/evidence.md.in`` holds the text. ``{{ name arguments
}}`` in it stands for a number, an interval or a table; the functions below with the decorator
``placeholder`` are the names. Nothing else in the document is measured.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pdn.errors import ConfigError
from pdn.reports import positions, transfer
from pdn.reports.evidence import (
    Study,
    best_rates,
    final_results,
    paired,
    read_records,
    result,
    search_table,
)
from pdn.reports.statistics import (
    Interval,
    detectable_effect,
    pairs_needed,
    rank_correlation,
    t_interval,
    verdict,
)
from pdn.reports.transfer import RecordedTransfer, read_any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLACEHOLDER = re.compile(r"\{\{ *([^{}]+?) *\}\}")
PAPER_EFFECT = 0.017  # nats: GDN minus PGDN, training loss at 340M parameters and 15B tokens


@dataclass(frozen=True)
class RecordedStudy:
    """Keeps a study and what its runs found."""

    name: str
    study: Study
    records: list[dict]

    @cached_property
    def results(self) -> dict[str, dict[int, float]]:
        return final_results(self.study, self.records)

    def difference(self, other: str, base: str) -> Interval | None:
        """Return other minus base over their common seeds, None below two of them."""
        for arm in (other, base):
            if arm not in self.study.arms:
                raise ConfigError(
                    "EVIDENCE", f"{self.name}: no arm {arm!r}; arms: {', '.join(self.study.arms)}"
                )
        return paired(self.results.get(base, {}), self.results.get(other, {}))


def open_study(docs: Path, name: str) -> RecordedStudy | RecordedTransfer:
    """Read a study, or a grid of rates, and its records from ``docs/evidence``."""
    folder = docs / "evidence"
    study, records = read_any(folder / f"{name}.yaml"), read_records(folder / f"{name}.jsonl")
    if isinstance(study, Study):
        return RecordedStudy(name, study, records)
    return RecordedTransfer(name, study, records)


def render(docs: Path) -> str:
    """Compute the whole document from the template and the records.

    Raises:
        ConfigError: the template names a placeholder, a study or an arm that does not exist.
    """
    studies: dict[str, RecordedStudy | RecordedTransfer] = {}

    def fill(match: re.Match) -> str:
        name, *words = match.group(1).split()
        if name == "pooled" and words:
            return pooled([(compared(a), b, c) for a, b, c in (w.split(":") for w in words)])
        names = ["cost", *PLACEHOLDERS, *transfer.PLACEHOLDERS]
        if name not in names or not words:
            raise ConfigError(
                "EVIDENCE",
                f"{match.group(0)}: expected <name> <study> ..., name one of {', '.join(names)}; "
                "or pooled <study>:<arm>:<baseline> ...",
            )
        study, *arguments = words
        if name == "cost":
            return cost(study_named(study))
        if name in transfer.PLACEHOLDERS:
            return transfer.PLACEHOLDERS[name](grid(study), *arguments)
        return PLACEHOLDERS[name](compared(study), *arguments)

    def study_named(name: str) -> RecordedStudy | RecordedTransfer:
        if name not in studies:
            studies[name] = open_study(docs, name)
        return studies[name]

    def compared(name: str) -> RecordedStudy:
        found = study_named(name)
        if not isinstance(found, RecordedStudy):
            raise ConfigError("EVIDENCE", f"{name}: a grid of rates; expected a study with arms")
        return found

    def grid(name: str) -> RecordedTransfer:
        found = study_named(name)
        if not isinstance(found, RecordedTransfer):
            raise ConfigError("EVIDENCE", f"{name}: a study; expected a grid of rates with widths")
        return found

    return PLACEHOLDER.sub(fill, (docs / "evidence" / "evidence.md.in").read_text(encoding="utf-8"))


def write(docs: Path) -> list[str]:
    """Write ``docs/evidence.md`` and a picture of every comparison; return the paths."""
    from pdn.reports.plots import save

    out = docs / "evidence.md"
    out.write_text(render(docs), encoding="utf-8")
    written = [str(out)]
    for file in sorted((docs / "evidence").glob("*.yaml")):
        found = open_study(docs, file.stem)
        figure = None
        if isinstance(found, RecordedTransfer):
            figure = transfer.draw(found) if found.records else None
        elif has_pairs(found):
            by_position = found.study.positions is not None
            figure = positions.draw(found.study, found.records) if by_position else draw(found)
        if figure is not None:
            save(figure, file.with_suffix(".png"))
            written.append(str(file.with_suffix(".png")))
    return written


def has_pairs(found: RecordedStudy) -> bool:
    """Say whether any arm can be compared with the baseline, and so whether there is a picture."""
    return any(found.difference(arm, found.study.baseline) for arm in found.study.arms)


def stale_files(docs: Path) -> list[str]:
    """Return the document's name if it is not what the records give."""
    file = docs / "evidence.md"
    return [] if file.exists() and file.read_text(encoding="utf-8") == render(docs) else [str(file)]


# ------------------------------------------------------------ placeholders

PLACEHOLDERS: dict[str, Callable[..., str]] = {}


def placeholder(function: Callable[..., str]) -> Callable[..., str]:
    """Register a function of (RecordedStudy, *words) under its name."""
    PLACEHOLDERS[function.__name__] = function
    return function


def signed(value: float, digits: int = 4) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _with_bounds(interval: Interval) -> str:
    return f"{signed(interval.mean)} [{signed(interval.low)}, {signed(interval.high)}]"


@placeholder
def diff(found: RecordedStudy, other: str, base: str) -> str:
    """Return other minus base with its interval, in the study's unit.

    Args:
        found: the study's records.
        other, base: names of arms.
    """
    interval = found.difference(other, base)
    if interval is None:
        return "not run"
    return f"{_with_bounds(interval)}, n = {interval.n}"


def pooled(comparisons: Sequence[tuple[RecordedStudy, str, str]]) -> str:
    """Return the mean difference over the pairs of several studies, each pair counted alike.

    Args:
        comparisons: study, arm, and the arm that it is compared with.
    """
    differences = []
    for found, other, base in comparisons:
        found.difference(other, base)  # refuses unknown arms
        a, b = found.results.get(other, {}), found.results.get(base, {})
        differences += [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if len(differences) < 2:
        return "not run"
    interval = t_interval(differences)
    return f"{_with_bounds(interval)}, n = {interval.n}"


@placeholder
def says(found: RecordedStudy, other: str, base: str) -> str:
    """Return whether other is better than base, worse, or undecided.

    Args:
        found: the study's records.
        other, base: names of arms.
    """
    interval = found.difference(other, base)
    return "not run" if interval is None else verdict(interval)


@placeholder
def needed(found: RecordedStudy, other: str, base: str, effect: str = str(PAPER_EFFECT)) -> str:
    """Return the pairs of seeds that would find a difference of ``effect`` with probability 0.8.

    Args:
        found: the study's records.
        other, base: names of arms.
        effect: in the metric's unit, as text.
    """
    interval = found.difference(other, base)
    if interval is None:
        return "unknown"
    pairs = pairs_needed(interval.sd, float(effect))
    return "more than 10,000" if pairs is None else f"{pairs:,}"


def cost(found: RecordedStudy | RecordedTransfer) -> str:
    """Say how much was run: trials, tokens of each, parameters, sum of their training time."""
    if not found.records:
        return "nothing was run"
    tokens = sorted({r["tokens"] for r in found.records})
    sizes = sorted({r["parameters"] for r in found.records})
    minutes = sum(r["train_seconds"] for r in found.records) / 60
    devices = ", ".join(sorted({r["device"] for r in found.records}))
    return (
        f"{len(found.records)} runs of {'/'.join(f'{t / 1e6:.1f}M' for t in tokens)} tokens, "
        f"{sizes[0] / 1e6:.2f}M to {sizes[-1] / 1e6:.2f}M parameters, on {devices} ({minutes:.0f} "
        "minutes, summed over runs that shared it)"
    )


@placeholder
def inside(found: RecordedStudy, arm: str, key: str, when: str = "end") -> str:
    """Return a statistic of the recurrences, mean over layers and the comparison's seeds.

    Args:
        found: the study's records.
        arm: its name.
        key: of the statistic.
        when: ``start`` or ``end`` of training.
    """
    records = {"start": "internals_at_start", "end": "internals"}[when]
    values = [
        row[key]
        for r in found.records
        if r["arm"] == arm and r["seed"] in found.study.seeds
        for row in r.get(records, [])
        if key in row
    ]
    return f"{statistics.fmean(values):.3g}".replace("-", "−") if values else "unknown"


@placeholder
def correlation(found: RecordedStudy, key: str, layer: str) -> str:
    """Return the rank correlation, over all compared runs, of a run's result with a statistic.

    Args:
        found: the study's records.
        key: of the statistic, after training.
        layer: its number.
    """
    best = best_rates(found.study, found.records)
    points = [
        (row[key], result(r, found.study.metric))
        for r in found.records
        if r["seed"] in found.study.seeds and r["lr"] == best.get(found.study.searcher(r["arm"]))
        for row in r.get("internals", [])
        if row["layer"] == int(layer) and key in row
    ]
    if len(points) < 3:
        return "unknown"
    return f"{signed(rank_correlation(*zip(*points, strict=True)), 2)} ({len(points)} runs)"


@placeholder
def seed_spread(found: RecordedStudy, arm: str) -> str:
    """Return the standard deviation over seeds of one arm's result, and its range."""
    values = list(found.results.get(arm, {}).values())
    if len(values) < 2:
        return "unknown"
    span = f"{min(values):.3f} to {max(values):.3f}"
    return f"{statistics.stdev(values):.3f} ({span}, n = {len(values)})"


@placeholder
def search(found: RecordedStudy) -> str:
    """Return a table of the learning-rate search, the best of each arm in bold."""
    table, best = search_table(found.study, found.records), best_rates(found.study, found.records)
    rates = sorted({rate for row in table.values() for rate in row})
    lines = [
        "| arm | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for arm in (arm for arm in found.study.arms if arm in table):
        cells = [_cell(table[arm].get(rate), bold=rate == best.get(arm)) for rate in rates]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


@placeholder
def search_at(found: RecordedStudy, key: str, *steps: str) -> str:
    """Return a table of the search's runs: a metric after some steps, one seed.

    Args:
        found: the study's records.
        key: of metrics.jsonl.
        steps: after which.
    """
    seed = found.study.search_seeds[0]
    rows = [r for r in found.records if r["seed"] == seed and key in r["evaluations"]]
    lines = [
        "| arm | lr | " + " | ".join(f"step {int(step):,}" for step in steps) + " |",
        "|---" * (2 + len(steps)) + "|",
    ]
    for arm in found.study.arms:
        for r in sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["lr"]):
            values = dict(map(tuple, r["evaluations"][key]))
            cells = [f"{values[int(s)]:.3f}" if int(s) in values else "–" for s in steps]
            lines.append(f"| {arm} | {r['lr']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


@placeholder
def plot(found: RecordedStudy) -> str:
    """Return the picture of the study, which ``write`` draws, as soon as there is one."""
    if not has_pairs(found):
        return "No picture yet: not run."
    return f"![{found.study.title}](evidence/{found.name}.png)"


@placeholder
def by_position(found: RecordedStudy, panel: str) -> str:
    """Return a table of loss by position, in one panel of the study's picture.

    Args:
        found: the study's records.
        panel: its name.
    """
    return positions.table(found.study, found.records, panel)


@placeholder
def by_length(found: RecordedStudy, panel: str) -> str:
    """Return a table of the means of one panel's lines, each with its least and largest seed.

    Args:
        found: the study's records.
        panel: its name.
    """
    return positions.means(found.study, found.records, panel)


@placeholder
def between(found: RecordedStudy, panel: str, end: str, *lines: str) -> str:
    """Return the difference of two lines of a panel at one position, with half its interval.

    Args:
        found: the study's records.
        panel: its name.
        end: of the bucket of positions.
        lines: words of ``<line> - <line>``.
    """
    other, _, base = " ".join(lines).partition(" - ")
    return positions.between(found.study, found.records, panel, int(end), other, base)


def _cell(value: float | None, *, bold: bool) -> str:
    text = "–" if value is None else f"{value:.4f}" if math.isfinite(value) else "diverged"
    return f"**{text}**" if bold else text


@placeholder
def table(found: RecordedStudy) -> str:
    """Return a table of the comparison: every arm against the baseline, at its own best rate."""
    base, best = found.study.baseline, best_rates(found.study, found.records)
    lines = [
        f"| arm | lr | seeds | mean | minus {base}, 95 % interval | verdict | detectable so |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, results in found.results.items():
        rate, mean = best[found.study.searcher(arm)], statistics.fmean(results.values())
        start = f"| {arm} | {rate:g} | {len(results)} | {mean:.4f} |"
        interval = None if arm == base else found.difference(arm, base)
        if interval is None:
            lines.append(f"{start} {'–' if arm == base else 'fewer than two pairs'} | – | – |")
            continue
        effect = detectable_effect(interval.sd, interval.n)
        lines.append(f"{start} {_with_bounds(interval)} | {verdict(interval)} | {effect:.3f} |")
    return "\n".join(lines)


@placeholder
def by_seed(found: RecordedStudy, key: str = "", step: str = "") -> str:
    """Return a table of every arm's result for every seed, or of a metric after a step."""
    values = {arm: dict(results) for arm, results in found.results.items()}
    for r in found.records if key else ():
        if r["seed"] in values[r["arm"]]:
            after = dict(map(tuple, r["evaluations"].get(key, [])))
            values[r["arm"]][r["seed"]] = after.get(int(step), math.nan)
    seeds = sorted({seed for of_arm in values.values() for seed in of_arm})
    if not seeds:
        return "By seed: not run."
    lines = [
        "| arm | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---" * (len(seeds) + 1) + "|",
    ]
    for arm, of_arm in values.items():
        cells = [of_arm.get(seed, math.nan) for seed in seeds]
        lines.append(f"| {arm} | {' | '.join('–' if c != c else f'{c:.3f}' for c in cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------ the picture


def draw(found: RecordedStudy) -> Figure:
    """Draw learning-rate search, differences with intervals, and validation losses over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4))
    _draw_search(left, found)
    _draw_differences(middle, found)
    _draw_curves(right, found)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(found.study.title, fontsize=10)
    figure.tight_layout()
    return figure


def _colour(found: RecordedStudy, arm: str) -> str:
    return f"C{list(found.study.arms).index(arm) % 10}"


def _draw_search(axes: Axes, found: RecordedStudy) -> None:
    for arm, row in search_table(found.study, found.records).items():
        axes.plot(list(row), list(row.values()), marker="o", color=_colour(found, arm), label=arm)
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_title(f"search: {found.study.metric}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _draw_differences(axes: Axes, found: RecordedStudy) -> None:
    base = found.results.get(found.study.baseline, {})
    arms = [arm for arm in found.results if arm != found.study.baseline]
    for row, arm in enumerate(arms):
        results, colour = found.results[arm], _colour(found, arm)
        pairs = [results[seed] - base[seed] for seed in results if seed in base]
        axes.plot(pairs, [row + 0.15] * len(pairs), "o", color=colour, markersize=4, alpha=0.6)
        interval = found.difference(arm, found.study.baseline)
        if interval is not None:
            half = interval.high - interval.mean
            axes.errorbar([interval.mean], [row - 0.1], xerr=half, fmt="s", color=colour, capsize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(arms)), arms, fontsize=8)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(f"minus {found.study.baseline}, nats; squares: mean, 95 % interval")
    axes.set_title("pairs of seeds (left is better)", fontsize=10)


def _draw_curves(axes: Axes, found: RecordedStudy) -> None:
    best = best_rates(found.study, found.records)
    seen = set()
    for r in found.records:
        arm = r["arm"]
        if r["seed"] not in found.study.seeds or r["lr"] != best.get(found.study.searcher(arm)):
            continue
        points = r["evaluations"].get(found.study.metric, [])
        tokens = [step * r["tokens"] / r["steps"] / 1e6 for step, _ in points]
        label = None if arm in seen else arm
        seen.add(arm)
        axes.plot(
            tokens, [y for _, y in points], color=_colour(found, arm), linewidth=1, label=label
        )
    axes.set_xlabel("million tokens")
    axes.set_title(f"{found.study.metric}, a line for each seed", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
