"""The order of windows that continue each other: rows of segments, whatever reads them."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pdn.data.history import Law
from pdn.data.shards import read_manifest
from pdn.errors import ConfigError, DataError
from tests.data.corpus import mixture, open_mixture, open_shards, parse
from tests.data.test_phases import repeated

R = 4  # windows of a segment
CARRY = {"carry_windows": R, "carry_horizon": 2}


def law(**changes) -> Law:
    """Return a law of 3 rows, two windows of each a step."""
    kept = {"seq_len": 16, "global_batch_size": 6, "unit_tokens": 64, **CARRY}
    return Law(**kept | changes)


def steps_of(data, first: int, end: int, micro: int = 1):
    return [batch for batch, _ in data.steps(first, micro_batch_size=micro, stop_sample=end)]


def test_a_row_takes_the_windows_of_a_segment_one_after_the_other(shards, cache):
    data = open_shards(shards, cache, batch=6, **CARRY)
    data.enter(0, 0, law())
    rows = np.array(data.targets(np.arange(3 * R * 5)), dtype=object).reshape(5, R, 3, 4)
    for block in rows:
        assert (block[1:, :, 2] == block[:-1, :, 3]).all()  # begins where the one before ends
        assert all((first - 1) % (16 * R) == 0 for first in block[0, :, 2])
    assert [data.window(sample) for sample in range(0, 3 * R, 3)] == list(range(R))
    assert [data.segment_end(n) for n in (0, 6, 12, 18)] == [0, 12, 12, 24]


def test_windows_of_a_step_are_the_rows_next_ones_and_labels_join(shards, cache):
    data = open_shards(shards, cache, batch=6, **CARRY)
    data.enter(0, 0, law())
    first, second = (batch["tokens"].view(2, 3, 16) for batch in steps_of(data, 0, 12))
    whole = data.windows(np.arange(12))[:, :-1].reshape(4, 3, 16)
    assert (first.numpy() == whole[:2]).all() and (second.numpy() == whole[2:]).all()


def test_an_epoch_of_segments_reads_every_target_once(shards, more_shards, cache):
    data = open_shards(shards, cache, batch=6, **CARRY)
    segments = (read_manifest(shards).tokens - 1) // 64
    samples = -(-segments // 3) * 3 * R
    rows = [row for row in data.targets(np.arange(samples)) if row[1] == 0]
    assert sorted(row[2] for row in rows) == [1 + 16 * k for k in range(segments * R)]
    mixed = open_mixture(cache, mixture(shards, more_shards, weights=[0.7, 0.3]), batch=6, **CARRY)
    assert repeated(mixed.targets(np.arange(96))) == 0


@pytest.mark.parametrize("world", [3, 1])
def test_any_number_of_ranks_reads_the_same_rows_and_ledger(shards, cache, world):
    ranks = []
    for rank in range(world):
        data = open_shards(shards, cache, batch=12, rank=rank, world=world, **CARRY)
        data.enter(0, 0, law(global_batch_size=12))
        ranks.append((data, steps_of(data, 0, 24, micro=2)))
    data = ranks[0][0]
    one = open_shards(shards, cache, batch=12, **CARRY)
    whole = one.samples(np.arange(24), (2, 12))
    for step in range(2):
        parts = [found[step]["tokens"].reshape(2, -1, 16) for _, found in ranks]
        tokens = np.concatenate([part.numpy() for part in parts], 1).reshape(12, 16)
        assert (tokens == whole["tokens"][step]).all()
        digests = torch.cat([found[step]["sample_digests"].flatten() for _, found in ranks])
        assert (data.in_order(digests).numpy() == whole["sample_digests"][step]).all()


def test_the_ledgers_places_follow_each_other_within_a_segment_too(shards, more_shards, cache):
    data = open_mixture(cache, mixture(shards, more_shards, weights=[2, 1]), batch=6, **CARRY)
    data.enter(0, 0, law())
    reached = {"s0": 0, "s1": 0}
    for first in range(0, 48, 6):
        places = data.places(first, first + 6)
        assert sum(end - begin for begin, end in places.values()) == 6 * 16
        for name, (begin, end) in places.items():
            assert begin == reached[name]
            reached[name] = end
    rows = data.targets(np.arange(48))
    assert reached == {n: 16 * sum(row[0] == n for row in rows) for n in ("s0", "s1")}


def test_a_phase_after_it_begins_behind_every_segment_that_is_open(shards, cache):
    data = open_shards(shards, cache, batch=6, **CARRY)
    data.enter(0, 0, law())
    plain = law(carry_windows=1, carry_horizon=1)
    data.enter(3, 18, plain)  # two blocks of three segments are open, the second one by half
    assert data.history[-1]["begins"] == {"data": 6}
    assert data.history[-1]["skipped"] == {"data": 6 * 64 - 18 * 16}
    assert repeated(data.targets(np.arange(18)) + data.targets(np.arange(18, 40))) == 0


def test_a_history_that_is_recalled_gives_the_same_rows(shards, cache):
    of_rank = {"batch": 6, "rank": 1, "world": 3}
    data = open_shards(shards, cache, **of_rank, **CARRY)
    other = open_shards(shards, cache, **of_rank)  # the history says what is carried
    data.enter(0, 0, law())
    other.recall(data.history)
    assert other.targets(np.arange(6, 30)) == data.targets(np.arange(6, 30))
    assert other.window(6) == 2
    for found, expected in zip(steps_of(other, 6, 18), steps_of(data, 6, 18), strict=True):
        assert torch.equal(found["tokens"], expected["tokens"])


def test_what_carries_nothing_records_nothing_of_it(shards, cache):
    data = open_shards(shards, cache)
    recorded = data.record(law(carry_windows=1, carry_horizon=1))
    assert not {"carry_windows", "carry_rows"} & recorded.keys()
    keys = parse(cache, kind="shards", path="a", validation=None).identity()
    assert not {"carry_windows", "carry_horizon"} & keys.keys()


def test_segments_that_do_not_fit_are_refused(shards, cache):
    for bad in ({"carry_windows": 4, "carry_horizon": 3}, {"carry_horizon": 2}):
        with pytest.raises(ValidationError, match="carry_horizon = "):
            parse(cache, kind="shards", path=str(shards), validation=None, **bad)
    data = open_shards(shards, cache, batch=6, **CARRY)
    with pytest.raises(ConfigError, match="carry_windows = 4 windows"):
        data.enter(0, 0, law(unit_tokens=32))
    data.enter(0, 0, law())
    with pytest.raises(DataError, match="3 rows a rank"):
        steps_of(data, 0, 12, micro=2)
