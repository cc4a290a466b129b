"""Whether the best learning rate goes over to other widths: a declared grid, and its numbers.

Every model is trained at every width and rate, with the rules of ``model.base_width`` and, at some
widths, without. The result of a run is its mean training loss over the last tenth of its steps: all
runs take the same samples in the same order, and none twice. The best rate of a width is the vertex
of the parabola, in the logarithm of the rate, through the lowest result and its two neighbours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, model_validator

from pdn.config import Strict
from pdn.reports.evidence import (
    Seeds,
    Study,
    Words,
    read_declared,
    read_study,
    require_same_order,
)
from pdn.reports.trials import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAIN = "plain"  # ends the arm of a width without the rules
Width = Annotated[int, Field(ge=1)]


class Transfer(Strict):
    """Asks for a grid of rates over models and widths."""

    title: str
    words: Words  # of train.py, common to all trials
    models: Annotated[dict[str, Words], Field(min_length=1)]
    widths: Annotated[list[Width], Field(min_length=2)]  # d_model, ascending
    head_dim: Width
    base_width: Width  # one of widths
    plain: list[Width]  # others that are also trained without the rules, most urgent first
    # peak learning rates, ascending by one ratio; the most urgent are in the middle
    rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3)]
    extend: Annotated[int, Field(ge=0)]  # rates that an arm may add whose best one is at an edge
    seeds: Seeds  # the first has the whole grid, the others the three rates around its best one
    data_seed: int  # one order of the data for all of them

    @model_validator(mode="after")
    def _fits(self):
        if self.widths != sorted(set(self.widths)) or self.rates != sorted(set(self.rates)):
            raise ValueError(
                f"widths = {self.widths}, rates = {self.rates}: expected ascending ones"
            )
        if self.base_width not in self.widths:
            raise ValueError(f"base_width = {self.base_width}: expected one of {self.widths}")
        wrong = [w for w in self.widths if w % self.head_dim]
        wrong += [w for w in self.plain if w not in self.widths or w == self.base_width]
        if wrong:
            raise ValueError(
                f"width {wrong[0]}: expected multiples of head_dim = {self.head_dim}, and of plain "
                "those of widths but base_width"
            )
        return self

    def arm(self, model: str, width: int, *, rules: bool) -> str:
        """Name what is trained; at the base width the rules change nothing."""
        plain = not rules and width != self.base_width
        return f"{model}-d{width}" + (f"-{PLAIN}" if plain else "")

    def arm_of(self, trial: str) -> str:
        """Name the arm that a trial's name begins with."""
        return trial.rpartition("-lr")[0]

    def lacks_result(self, record: dict) -> str | None:
        """Return None: every finished run has losses."""
        return None

    def stages(self) -> list[dict[str, Words]]:
        """Return the words of every arm, most urgent first.

        They are both ends with the rules, the first of plain, the widths between, the others.
        """
        stages = [
            ([self.widths[0], self.widths[-1]], True),
            (self.plain[:1], False),
            (self.widths[1:-1], True),
            (self.plain[1:], False),
        ]
        return [
            {
                self.arm(model, width, rules=rules): [*words, *self._shape(width, rules)]
                for width in widths
                for model, words in self.models.items()
            }
            for widths, rules in stages
        ]

    def _shape(self, width: int, rules: bool) -> Words:
        return [
            f"model.d_model={width}",
            f"model.num_heads={width // self.head_dim}",
            f"model.head_dim={self.head_dim}",
            f"model.intermediate_size={3 * width}",
            f"model.base_width={self.base_width if rules else 'null'}",
        ]

    def due(self, records: Sequence[dict]) -> list[Trial]:
        """List all trials, most urgent first, as far as they are known from what is recorded.

        Of a stage the rates in the middle come first, so that there is a parabola early.
        """
        middle = (len(self.rates) - 1) / 2
        by_urgency = sorted(range(len(self.rates)), key=lambda i: abs(i - middle))
        added, grids, repeated = [], [], []
        for stage in self.stages():
            grids += [
                self._trial(words, arm, self.rates[i], self.seeds[0])
                for i in by_urgency
                for arm, words in stage.items()
            ]
            for arm, words in stage.items():
                curve = curve_of(self, records, arm)
                added += [
                    self._trial(words, arm, rate, self.seeds[0]) for rate in self._added(curve)
                ]
                repeated += [
                    self._trial(words, arm, rate, seed)
                    for seed in self.seeds[1:]
                    for rate in self._around_best(curve)
                ]
        return added + grids + repeated

    def _trial(self, words: Words, arm: str, rate: float, seed: int) -> Trial:
        all_words = [
            *self.words,
            *words,
            f"optim.lr={rate!r}",
            f"seed={seed}",
            f"data.seed={self.data_seed}",
        ]
        return Trial(f"{arm}-lr{rate:g}-seed{seed}", tuple(all_words))

    def _added(self, curve: dict[float, float]) -> list[float]:
        """Return the rates beyond the grid that an arm has, and its next one."""
        beyond = [rate for rate in curve if rate not in self.rates]
        found = parabola(curve)
        if found is not None and found.edge and self._is_whole(curve):
            ratio = self.rates[1] / self.rates[0]
            if len(beyond) < self.extend:
                beyond.append(float(f"{found.rate * ratio**found.edge:.6g}"))
        return beyond

    def _is_whole(self, curve: dict[float, float]) -> bool:
        return all(rate in curve for rate in self.rates)

    def _around_best(self, curve: dict[float, float]) -> list[float]:
        found = parabola(curve)
        if found is None or found.edge or not self._is_whole(curve):
            return []
        rates = list(curve)
        at = rates.index(found.tried)
        return rates[at - 1 : at + 2]


def read_any(path: Path) -> Study | Transfer:
    """Read the study or the grid of rates, which has widths, that a YAML file declares.

    Raises:
        ConfigError: as ``read_study``.
    """
    is_grid = path.is_file() and "\nwidths:" in path.read_text(encoding="utf-8")
    return read_declared(path, Transfer) if is_grid else read_study(path)


# ------------------------------------------------------------ numbers


@dataclass(frozen=True)
class Best:
    """Holds the best rate of a curve, and the loss there."""

    rate: float
    loss: float
    tried: float  # the best rate among those that were run
    edge: int  # −1: it is the lowest that was tried, 1: the highest, 0: between others


def final_loss(record: dict) -> float:
    """Return the mean training loss of the last tenth; infinite if it is not finite."""
    points = record["train_loss"]
    value = statistics.fmean(points[-max(1, len(points) // 10) :])
    return value if math.isfinite(value) else math.inf


def curve_of(
    study: Transfer, records: Sequence[dict], arm: str, seed: int | None = None
) -> dict[float, float]:
    """Return the final loss of an arm by rate, ascending.

    Args:
        study: that the records are of.
        records: of its finished runs.
        arm: its name.
        seed: of the runs; None: the first one's, which has the whole grid.
    """
    seed = study.seeds[0] if seed is None else seed
    found = {r["lr"]: final_loss(r) for r in records if r["arm"] == arm and r["seed"] == seed}
    return dict(sorted(found.items()))


def parabola(curve: dict[float, float]) -> Best | None:
    """Return the vertex of the parabola through the lowest point and its neighbours, over log rate.

    Args:
        curve: loss by rate, ascending. Neighbours that have diverged give the lowest point itself.

    Returns:
        None for a curve without a finite loss. At an edge the lowest point itself.
    """
    rates, losses = list(curve), list(curve.values())
    if not any(map(math.isfinite, losses)):
        return None
    i = losses.index(min(losses))
    if i in (0, len(rates) - 1):
        return Best(rates[i], losses[i], rates[i], 1 if i else -1)
    near = losses[i - 1 : i + 2]
    if not all(map(math.isfinite, near)) or near[0] == near[1] == near[2]:
        return Best(rates[i], losses[i], rates[i], 0)
    x = np.log2(rates[i - 1 : i + 2]) - math.log2(rates[i])
    square, slope, constant = np.polyfit(x, near, 2)
    at = -slope / (2 * square)
    return Best(rates[i] * 2 ** float(at), float(constant + slope * at / 2), rates[i], 0)


@dataclass(frozen=True)
class RecordedTransfer:
    """Keeps a grid of rates and what its runs found."""

    name: str
    study: Transfer
    records: list[dict]

    @cached_property
    def curves(self) -> dict[str, dict[float, float]]:
        """Return the final loss of every arm by rate, of the first seed."""
        require_same_order(self.records)
        arms = dict.fromkeys(r["arm"] for r in self.records)
        return {arm: curve_of(self.study, self.records, arm) for arm in arms}

    def best(self, model: str, width: int, *, rules: bool, seed: int | None = None) -> Best | None:
        """Return the best rate of a model at a width; None if it was not run, or is not bracketed.

        Fewer than three rates are no curve.
        """
        arm = self.study.arm(model, width, rules=rules)
        curve = curve_of(self.study, self.records, arm, seed)
        return parabola(curve) if len(curve) >= 3 else None

    def shift(self, model: str, width: int, *, rules: bool) -> list[float]:
        """Return, for each seed that has both, the octaves from the narrowest model's best rate.

        Best rates at an edge are bounds, and have no shift.
        """
        found = []
        for seed in self.study.seeds:
            base = self.best(model, self.study.widths[0], rules=rules, seed=seed)
            there = self.best(model, width, rules=rules, seed=seed)
            if base and there and not base.edge and not there.edge:
                found.append(math.log2(there.rate / base.rate))
        return found

    def price(self, model: str, width: int, *, rules: bool) -> float | None:
        """Return what a width loses by the rate that was the best one tried at the narrowest.

        In nats against the best one that was tried at this width; None if it was not run.
        """
        base = self.best(model, self.study.widths[0], rules=rules)
        curve = self.curves.get(self.study.arm(model, width, rules=rules), {})
        if base is None or base.tried not in curve:
            return None
        return curve[base.tried] - min(curve.values())


# ------------------------------------------------------------ placeholders


def _octaves(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _rate(best: Best | None) -> str:
    if best is None:
        return "–"
    return {-1: "≤ ", 0: "", 1: "≥ "}[best.edge] + f"{best.rate:.2g}"


def rates_by_width(found: RecordedTransfer) -> str:
    """Return a table: best rates by width, octaves from the narrowest, losses, and the price."""
    study = found.study
    widest = study.widths[-1]
    heads = [f"rate {width}" for width in study.widths]
    heads += [f"octaves to {width}" for width in study.widths[1:]]
    heads += [f"loss {width}" for width in study.widths]
    heads.append(f"lost at {widest}")
    lines = ["| model | rules | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for model in study.models:
        for rules in (True, False):
            best = {w: found.best(model, w, rules=rules) for w in study.widths}
            if not rules and not any(best[w] for w in study.widths if w != study.base_width):
                continue
            cells = [_rate(best[w]) for w in study.widths]
            cells += [_shift_cell(found.shift(model, w, rules=rules)) for w in study.widths[1:]]
            cells += [f"{b.loss:.3f}" if b else "–" for b in best.values()]
            price = found.price(model, widest, rules=rules)
            cells.append("–" if price is None else f"{price:.3f}")
            lines.append(f"| {model} | {'on' if rules else 'off'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shift_cell(shifts: Sequence[float]) -> str:
    if not shifts:
        return "–"
    mean = _octaves(statistics.fmean(shifts))
    if len(shifts) == 1:
        return mean
    return f"{mean} ({_octaves(min(shifts))} to {_octaves(max(shifts))}, n = {len(shifts)})"


def picture(found: RecordedTransfer) -> str:
    """Return the link to the picture, which is drawn as soon as something was run."""
    return f"![loss over rate](evidence/{found.name}.png)" if found.records else ""


def shift(found: RecordedTransfer, rules: str) -> str:
    """Return the mean over models of how far the best rate moves to the widest, in octaves.

    Args:
        found: the grid's records.
        rules: ``on`` or ``off``.
    """
    widest = found.study.widths[-1]
    by_model = {m: found.shift(m, widest, rules=rules == "on") for m in found.study.models}
    means = [statistics.fmean(values) for values in by_model.values() if values]
    if not means:
        return "not run"
    span = f"{_octaves(min(means))} to {_octaves(max(means))}" if len(means) > 1 else "one model"
    of = len(found.study.models)
    return f"{_octaves(statistics.fmean(means))} octaves ({span}; {len(means)} of {of} models)"


def price(found: RecordedTransfer, rules: str) -> str:
    """Return what the widest models lose by the narrowest's rate, mean over models, in nats.

    Args:
        found: the grid's records.
        rules: ``on`` or ``off``.
    """
    widest = found.study.widths[-1]
    all_prices = [found.price(m, widest, rules=rules == "on") for m in found.study.models]
    prices = [value for value in all_prices if value is not None and math.isfinite(value)]
    if not prices:
        return "not run"
    return f"{statistics.fmean(prices):.3f} nats ({min(prices):.3f} to {max(prices):.3f})"


PLACEHOLDERS: dict[str, Callable[..., str]] = {
    function.__name__: function for function in (rates_by_width, picture, shift, price)
}


# ------------------------------------------------------------ the picture


def draw(found: RecordedTransfer) -> Figure:
    """Draw loss over rate for each model, a line a width; the rules on above, off below.

    There is nothing below where no width but the base width was trained without them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    study = found.study
    models = list(study.models)
    others = (study.arm(m, w, rules=False) for m in models for w in study.widths)
    plain = any(arm in found.curves for arm in others if arm.endswith(PLAIN))
    figure, rows = pyplot.subplots(
        1 + plain, len(models), figsize=(3.4 * len(models), 3 * (1 + plain)),
        sharex=True, sharey="col", squeeze=False,
    )  # fmt: skip
    for rules, row in zip((True, False), rows, strict=False):
        for axes, model in zip(row, models, strict=True):
            _draw_curves(axes, found, model, rules=rules)
            axes.set_title(f"{model}, {'with' if rules else 'without'} muP", fontsize=10)
        row[0].set_ylabel("training loss, last tenth")
    for axes in rows[-1]:
        axes.set_xlabel("peak learning rate")
    rows[0][0].legend(frameon=False, fontsize=8, title="d_model", title_fontsize=8)
    figure.suptitle(found.study.title, fontsize=10)
    figure.tight_layout()
    return figure


def _draw_curves(axes: Axes, found: RecordedTransfer, model: str, *, rules: bool) -> None:
    for i, width in enumerate(found.study.widths):
        curve = found.curves.get(found.study.arm(model, width, rules=rules), {})
        shown = {rate: loss for rate, loss in curve.items() if math.isfinite(loss)}
        axes.plot(
            list(shown), list(shown.values()), "o-",
            color=f"C{i}", linewidth=1, markersize=4, label=str(width),
        )  # fmt: skip
        best = found.best(model, width, rules=rules)
        if best is not None and not best.edge:
            axes.plot([best.rate], [best.loss], "|", color=f"C{i}", markersize=14)
    axes.set_xscale("log", base=2)
    rates = sorted({rate for curve in found.curves.values() for rate in curve})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=7)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
