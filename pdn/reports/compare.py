"""Two models over pairs of seeds: the difference with its interval, and the verdict.

It also says what it would take to see more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pdn.errors import ConfigError
from pdn.logging.progress import engineering
from pdn.models.config import ModelConfig
from pdn.reports.evidence import paired, require_same_order, result
from pdn.reports.statistics import (
    Interval,
    crossed_interval,
    detectable_effect,
    pairs_needed,
    sequence_interval,
    verdict,
)
from pdn.wording import counted

# relative difference in parameters or FLOPs below which two models count as matched
SAME_SIZE = 0.01
MOST_SEQUENCES = 100_000_000  # of validation that are said to be needed
SIZE_STEP = 8  # of an MLP that is matched; products of other widths are slow
# keys that two runs of a pair must share, besides the order of their samples
REQUIRED = ("steps", "tokens", "data_seed")


@dataclass(frozen=True)
class BySequence:
    """Holds what the losses of single sequences tell, of the mean over the seeds.

    Attributes:
        paired: the interval of other minus base over other sequences, these runs as they are.
        narrowed: how many times as wide it would be without the pairing.
        crossed: the interval over other seeds and sequences; None below two pairs of seeds.
        tokens: of a sequence on average.
    """

    paired: Interval
    narrowed: float
    crossed: Interval | None
    tokens: float


@dataclass(frozen=True)
class Comparison:
    """Holds the result of ``compare``.

    Attributes:
        base, other: results by seed, of the seeds that both have; lower is better.
        interval: of other minus base; None below two pairs.
        sizes: other over base, of ``parameters`` and ``flops_per_token``.
        sequences: what pairs of validation sequences tell; None if the runs kept none.
    """

    base: dict[int, float]
    other: dict[int, float]
    interval: Interval | None
    sizes: dict[str, float]
    sequences: BySequence | None = None


def matched_size(
    base: ModelConfig, other: ModelConfig, *, what: Literal["parameters", "flops"], seq_len: int
) -> int:
    """Return the ``intermediate_size`` with which ``other`` has what ``base`` has, as nearly.

    It is a multiple of ``SIZE_STEP``; vocabulary and everything else stay.

    Args:
        base: its size is the aim.
        other: its MLPs are made larger or smaller.
        what: parameters, or FLOPs of training on one token.
        seq_len: tokens of a sequence, for the FLOPs.

    Raises:
        ConfigError: ``other`` has no MLP, or cannot be made as small.
    """
    if not other.intermediate_size:
        raise ConfigError(
            "COMPARE",
            f"{other.name} has no MLP, so nothing can be matched; expected match=null",
        )

    def count(model: ModelConfig) -> int:
        # both have the data's vocabulary, whatever it is
        model = model.model_copy(update={"vocab_size": model.vocab_size or 256})
        return model.num_params() if what == "parameters" else model.flops_per_token(seq_len)

    def of_size(size: int) -> int:
        return count(other.model_copy(update={"intermediate_size": size}))

    per_step = of_size(2 * SIZE_STEP) - of_size(SIZE_STEP)  # the count is linear in the size
    steps = 1 + round((count(base) - of_size(SIZE_STEP)) / per_step)
    if steps < 1:
        raise ConfigError(
            "COMPARE",
            f"{other.name}: without any MLP it has more {what} than {base.name}; expected a "
            "smaller model, or match=null",
        )
    return steps * SIZE_STEP


def compare(base: Sequence[dict], other: Sequence[dict], metric: str) -> Comparison:
    """Pair the records of two models by seed.

    Args:
        base, other: records as ``evidence.record_of`` makes them, one for each seed.
        metric: key of their evaluations; its value after the last step counts.

    Raises:
        ConfigError: a seed twice in one model, no common seed, a run without the metric, or runs
            that did not see the same samples in the same order.
    """
    sides = [_by_seed(records) for records in (base, other)]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds:
        found = " and ".join(str(sorted(side)) for side in sides)
        raise ConfigError(
            "COMPARE", f"seeds {found} have none in common; expected runs of the same seeds"
        )
    chosen = [side[seed] for side in sides for seed in seeds]
    for key in REQUIRED:
        if len({record[key] for record in chosen}) > 1:
            values = ", ".join(f"{r['trial']}: {r[key]}" for r in chosen)
            raise ConfigError(
                "COMPARE", f"{key} differs ({values}); expected the same for every run"
            )
    require_same_order(chosen)
    for record in chosen:
        if metric not in record["evaluations"]:
            keys = ", ".join(record["evaluations"])
            raise ConfigError("COMPARE", f"{record['trial']}: no {metric}; expected one of {keys}")
    results = [{seed: result(side[seed], metric) for seed in seeds} for side in sides]
    for values, side in zip(results, sides, strict=True):
        for seed, value in values.items():
            if not math.isfinite(value):
                raise ConfigError(
                    "COMPARE",
                    f"{side[seed]['trial']}: {metric} is not finite; leave that seed out of both",
                )
    first, second = (side[seeds[0]] for side in sides)
    sizes = {key: second[key] / first[key] for key in ("parameters", "flops_per_token")}
    of_base, of_other = results
    interval = paired(of_base, of_other)
    kept = [[side[seed].get("sequences") for seed in seeds] for side in sides]
    return Comparison(of_base, of_other, interval, sizes, _sequences(kept[0], kept[1], interval))


Kept = dict[str, tuple[float, int]] | None  # a run's sequences: loss in nats and tokens by name


def _sequences(base: list[Kept], other: list[Kept], seeds: Interval | None) -> BySequence | None:
    """Pair the sequences of runs, a list over seeds each; None unless all have the same ones."""
    first = base[0]
    if first is None or len(first) < 2 or (seeds is None and len(base) > 1):
        return None
    names = list(first)
    tokens = [float(first[name][1]) for name in names]
    losses = []
    for side in (base, other):
        of_runs = []
        for run in side:
            if run is None or run.keys() != first.keys():
                return None
            of_runs.append([run[name][0] for name in names])
        losses.append(np.array(of_runs).mean(0))
    if not np.isfinite(losses).all():
        return None
    by_text = sequence_interval(losses[1] - losses[0], tokens)
    alone = [sequence_interval(side, tokens).sd for side in losses]
    narrowed = math.hypot(*alone) / by_text.sd if by_text.sd else math.inf
    crossed = seeds and crossed_interval(seeds, by_text)
    return BySequence(by_text, narrowed, crossed, float(np.mean(tokens)))


def _by_seed(records: Sequence[dict]) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for record in records:
        if record["seed"] in found:
            names = f"{found[record['seed']]['trial']} and {record['trial']}"
            raise ConfigError(
                "COMPARE", f"{names} both have seed {record['seed']}; expected one run a seed"
            )
        found[record["seed"]] = record
    return found


def lines(
    comparison: Comparison, *, base: str, other: str, metric: str, effect: float
) -> list[str]:
    """Put what ``compare`` found into text.

    Args:
        comparison: what it found.
        base, other: names of the models.
        metric: its key.
        effect: the difference that a reader wants to be able to see, in the metric's unit.
    """
    text = [f"seed  {base:>12}  {other:>12}  difference"]
    for seed, value in comparison.base.items():
        against = comparison.other[seed]
        text.append(f"{seed:>4}  {value:>12.5f}  {against:>12.5f}  {against - value:+.5f}")
    for key, ratio in comparison.sizes.items():
        if abs(ratio - 1) > SAME_SIZE:
            text.append(f"not matched: {other} has {ratio:.3f} times the {key} of {base}")
    interval = comparison.interval
    if interval is None:
        text += _of_sequences(comparison.sequences, metric, effect)
        return [*text, f"{metric}: one pair has no interval; expected at least two seeds"]
    text.append(
        f"{metric}, {other} minus {base}: {interval.mean:+.5f}, 95 % interval "
        f"[{interval.low:+.5f}, {interval.high:+.5f}], n = {interval.n} pairs, standard deviation "
        f"of a pair {interval.sd:.5f}"
    )
    text += _of_sequences(comparison.sequences, metric, effect)
    word = verdict(interval)
    text.append(f"verdict: {other} is {word}" if word != "undecided" else "verdict: undecided")
    pairs = pairs_needed(interval.sd, effect)
    text.append(
        f"a difference of {detectable_effect(interval.sd, interval.n):.5f} would be found with "
        f"probability 0.8 by {interval.n} pairs; one of {effect:g} needs "
        f"{'more than 10,000' if pairs is None else pairs}"
    )
    return text


def _of_sequences(found: BySequence | None, metric: str, effect: float) -> list[str]:
    if found is None:
        reason = "the runs kept no losses of the same sequences after their last step"
        return [f"paired sequences: none; {reason}"] if metric.endswith("/loss") else []
    i = found.paired
    needed = pairs_needed(i.sd, effect, most=MOST_SEQUENCES)
    text = [
        f"over other text, these runs as they are: {i.mean:+.5f} [{i.low:+.5f}, {i.high:+.5f}], "
        f"{i.n} sequences resampled in pairs, {found.narrowed:.1f} times narrower than unpaired",
        f"  so one of {effect:g} between these runs needs "
        + (
            f"more than {MOST_SEQUENCES:,} sequences"
            if needed is None
            else f"{counted(needed, 'sequence')}, {engineering(needed * found.tokens)} tokens"
        ),
    ]
    if (both := found.crossed) is not None:
        text.append(
            f"over other seeds and other text: {both.mean:+.5f} [{both.low:+.5f}, {both.high:+.5f}]"
        )
    return text
