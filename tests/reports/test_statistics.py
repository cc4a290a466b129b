"""Intervals over seeds: they cover as often as they say, and say what an experiment can see."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pdn.reports import statistics
from pdn.reports.statistics import (
    Interval,
    crossed_interval,
    detectable_effect,
    pairs_needed,
    sequence_interval,
    t_interval,
    t_quantile,
    verdict,
)

# From tables of Student's t
QUANTILES = [
    (0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 4, 2.7764), (0.975, 9, 2.2622),
    (0.975, 30, 2.0423), (0.975, 1000, 1.9623), (0.8, 100_000_000, 0.8416),
    (0.8, 1, 1.3764), (0.8, 4, 0.9410), (0.995, 2, 9.9248), (0.95, 7, 1.8946),
]  # fmt: skip


@pytest.mark.parametrize(("p", "degrees", "expected"), QUANTILES)
def test_quantiles_are_those_of_the_tables(p, degrees, expected):
    assert t_quantile(p, degrees) == pytest.approx(expected, abs=1e-4)
    assert t_quantile(1 - p, degrees) == pytest.approx(-expected, abs=1e-4)


@pytest.mark.parametrize("p", [0.8, 0.975, 0.995])
def test_quantiles_of_many_degrees_go_on_where_those_of_few_end(p, monkeypatch):
    of_many = t_quantile(p, 501)
    monkeypatch.setattr(statistics, "MANY_DEGREES", 501)
    t_quantile.cache_clear()
    assert of_many == pytest.approx(t_quantile(p, 501), abs=1e-7)


def percentile_bootstrap(values: list[float]) -> Interval:
    """Compute what the t interval stands in for.

    500 resamples of the values, their 2.5 and 97.5 percentiles.
    """
    means = np.random.default_rng(0).choice(values, (500, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(np.mean(values)), low, high, float(np.std(values, ddof=1)), len(values))


# Validation losses of one small PGDN under 40 initialisation seeds, in one order of samples
OF_RUNS = (
    4.8075, 4.6530, 4.4568, 4.4884, 4.4457, 4.6144, 4.5010, 4.4263, 4.5128, 4.5033,
    4.7046, 4.6872, 4.6159, 4.4275, 4.5568, 4.6482, 4.4066, 4.4985, 4.6465, 4.6076,
    4.4945, 4.6059, 4.5242, 4.7711, 4.6073, 4.5667, 4.7467, 4.4984, 4.5718, 4.5715,
    4.5474, 4.6594, 4.8711, 4.5112, 4.6323, 4.5523, 4.5483, 4.4693, 4.5247, 4.6083,
)  # fmt: skip


def false_positive_rate(
    nulls: Sequence[float],
    n: int,
    *,
    draws: int,
    seed: int,
    interval: Callable[[Sequence[float]], Interval] = t_interval,
) -> float:
    """Compute the share of resampled null comparisons whose interval excludes zero.

    Args:
        nulls: results of one configuration under different initialisation seeds, at least ``2 n``
            of them.
        n: pairs of a comparison; each is drawn without replacement from ``nulls``.
        draws: number of comparisons.
        seed: of the resampling.
        interval: the procedure under test.
    """
    pool = np.asarray(nulls, dtype=float)
    generator = np.random.default_rng(seed)
    found = 0
    for _ in range(draws):
        chosen = generator.permutation(pool)[: 2 * n]
        found += interval((chosen[:n] - chosen[n:]).tolist()).excludes_zero
    return found / draws


NULLS = {
    "runs": lambda generator: OF_RUNS,
    "normal": lambda generator: generator.normal(size=200),
    "skewed": lambda generator: generator.lognormal(size=200),
    "two groups": lambda generator: generator.normal(size=200) + 8 * (generator.random(200) < 0.3),
}


@pytest.mark.parametrize("shape", NULLS)
@pytest.mark.parametrize("n", [3, 5, 10])
def test_nulls_are_called_a_difference_at_most_six_times_in_a_hundred(shape, n):
    nulls = NULLS[shape](np.random.default_rng(0))
    assert false_positive_rate(nulls, n, draws=4000, seed=1) <= 0.06


def test_a_percentile_bootstrap_over_five_seeds_would_fail_that():
    nulls = NULLS["normal"](np.random.default_rng(0))
    rate = false_positive_rate(nulls, 5, draws=1000, seed=1, interval=percentile_bootstrap)
    assert rate > 0.12


def test_an_interval_covers_the_true_mean_95_times_in_a_hundred():
    generator = np.random.default_rng(0)
    found = [t_interval(generator.normal(0.3, 2.0, size=4)) for _ in range(2000)]
    assert np.mean([i.low <= 0.3 <= i.high for i in found]) == pytest.approx(0.95, abs=0.015)


def test_intervals_over_text_and_over_both_cover_as_often_as_they_say():
    """Over text for given runs; over both it is rather too wide, never too narrow."""
    generator, tokens = np.random.default_rng(0), [7] * 40
    over_text, over_both = [], []
    for _ in range(1500):
        of_seeds = 0.03 * generator.normal(size=(4, 1))
        text = 0.3 * generator.normal(size=(1, 40)) + 0.2 * generator.normal(size=(4, 40))
        found = 0.5 + of_seeds + text
        by_text = sequence_interval(7 * found.mean(0), tokens)
        crossed = crossed_interval(t_interval(found.mean(1)), by_text)
        over_text.append(by_text.low <= 0.5 + of_seeds.mean() <= by_text.high)
        over_both.append(crossed.low <= 0.5 <= crossed.high)
    assert np.mean(over_text) == pytest.approx(0.95, abs=0.015)
    assert 0.94 <= np.mean(over_both) <= 0.99


def test_sequences_count_by_their_tokens():
    found = sequence_interval([2.0, 30.0], [1, 9])
    assert found.mean == pytest.approx(3.2)
    with pytest.raises(ValueError, match="at least two"):
        sequence_interval([1.0], [1])


def test_the_detectable_effect_is_found_four_times_in_five():
    generator = np.random.default_rng(0)
    for n in (5, 10):
        effect = detectable_effect(1.0, n)
        found = [t_interval(generator.normal(effect, 1.0, size=n)).low > 0 for _ in range(2000)]
        assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_the_pairs_needed_are_the_fewest_that_detect_the_effect():
    pairs = pairs_needed(0.03, 0.017)
    assert detectable_effect(0.03, pairs) <= 0.017 < detectable_effect(0.03, pairs - 1)
    assert pairs_needed(0.03, 0.0) is None
    assert pairs_needed(1.0, 1e-6) is None
    assert pairs_needed(0.001, 10.0) == 2


def test_a_verdict_needs_an_interval_without_zero():
    assert verdict(Interval(-1.0, -2.0, -0.1, 1.0, 5)) == "better"
    assert verdict(Interval(1.0, 0.1, 2.0, 1.0, 5)) == "worse"
    assert verdict(Interval(-1.0, -2.0, 0.1, 1.0, 5)) == "undecided"
    assert verdict(Interval(1.0, 0.1, 2.0, 1.0, 5), lower_is_better=False) == "better"


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_too_few_or_infinite_values_have_no_interval(values):
    with pytest.raises(ValueError, match="at least two finite values"):
        t_interval(values)
