"""The order: a keyed permutation and a mixture schedule, both pure functions of an index."""

import numpy as np
import pytest

from pdn.data.order import Schedule, permute
from pdn.errors import DataError


def test_every_window_comes_exactly_once_an_epoch():
    for n in [*range(1, 70), 1000, 4096, 65537]:
        assert np.array_equal(np.sort(permute(np.arange(n), n, "0/data/0")), np.arange(n)), n


def test_an_index_maps_alike_alone_and_in_a_batch():
    together = permute(np.arange(1000), 1000, "k")
    assert all(permute(np.array([i]), 1000, "k")[0] == together[i] for i in range(0, 1000, 37))


def test_seed_and_epoch_change_the_order():
    orders = [
        permute(np.arange(500), 500, key)
        for key in ("0/data/0", "1/data/0", "0/data/1", "0/other/0")
    ]
    for i, a in enumerate(orders):
        for b in orders[i + 1 :]:
            assert (a == b).mean() < 0.02  # one in 500 agrees by chance


def test_the_permutation_looks_random():
    """Check that neighbours land far apart, and parts of the domain are spread evenly.

    Each part of the domain gets its share of every part of the order.
    """
    n = 1 << 16
    found = permute(np.arange(n), n, "look")
    steps = np.abs(np.diff(found)) / n
    assert abs(steps.mean() - 1 / 3) < 0.01  # of a uniform permutation
    table = np.histogram2d(np.arange(n), found, bins=16)[0]
    chi2 = ((table - n / 256) ** 2 / (n / 256)).sum()
    assert 150 < chi2 < 310  # 225 degrees of freedom, four standard deviations


def test_a_permutation_of_10_to_the_12_needs_no_memory():
    found = permute(np.arange(10**12 - 1000, 10**12), 10**12, "big")
    assert len(np.unique(found)) == 1000 and found.min() >= 0 and found.max() < 10**12


WEIGHTS = [
    [1],
    [1, 1],
    [0.7, 0.2, 0.1],
    [0.5, 0.3, 0.15, 0.04, 0.01],
    [3, 1, 1, 1, 1, 1, 1],
    [0.9, 0.09, 0.01],
    [1, 1 / 3, 0.123457],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_prefix_holds_each_weight_within_one_sample(weights):
    schedule = Schedule({str(i): w for i, w in enumerate(weights)})
    shares = schedule.quota / schedule.period
    length = min(3 * schedule.period, 200_000)
    source, _ = schedule.locate(np.arange(length))
    for j in range(len(weights)):
        drift = np.cumsum(source == j) - shares[j] * np.arange(1, length + 1)
        assert np.abs(drift).max() < 1
    assert np.allclose(shares, np.array(weights) / sum(weights), atol=1 / 65536)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_each_source_is_read_in_its_own_order_without_gaps(weights):
    schedule = Schedule({str(i): w for i, w in enumerate(weights)})
    length = 2 * schedule.period + 5
    source, place = schedule.locate(np.arange(length))
    for j, count in enumerate(schedule.counts(length)):
        assert np.array_equal(place[source == j], np.arange(count))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(DataError, match=r"MIXTURE-WEIGHT.*'b'"):
        Schedule({"a": 1.0, "b": weight})
