"""The order of the samples when length, batch or mixture change: no target twice in an epoch."""

from itertools import chain, pairwise

import numpy as np
import pytest

from pdn.data import open_data
from pdn.data.history import Law, tokens_of
from pdn.data.order import permute
from pdn.data.phases import part_of
from pdn.data.shards import read_manifest
from pdn.errors import ConfigError, DataError
from tests.data.corpus import (
    STREAM,
    documents,
    mixture,
    open_mixture,
    open_shards,
    parse,
    tokenizer,
)

UNIT = {"unit_tokens": 64, "pool_units": 4}


def law(**changes) -> Law:
    return Law(**{"seq_len": 16, "global_batch_size": 4, **UNIT, **changes})


def walk(data, phases, micro=2):
    """Take phases of (steps, law); return the targets of each, as ``TrainingData.targets`` does."""
    step = sample = 0
    found = []
    for steps, each in phases:
        data.enter(step, sample, each)
        taken = []
        end = sample + steps * each.global_batch_size
        for _, after in data.steps(sample, micro_batch_size=micro, stop_sample=end):
            taken += data.targets(np.arange(sample, after))
            sample = after
        step += steps
        found.append(taken)
    return found


def joined(parts) -> list:
    return list(chain.from_iterable(parts))


def repeated(rows) -> int:
    """Count the targets that are trained on twice within an epoch."""
    spans: dict[tuple, list] = {}
    for source, epoch, first, end in rows:
        spans.setdefault((source, epoch), []).append((first, end))
    return sum(
        max(0, before[1] - after[0])
        for group in spans.values()
        for before, after in pairwise(sorted(group))
    )


def test_without_units_the_order_is_a_permutation_of_the_windows(shards, cache):
    """Pin the order of the runs that were begun before there were units."""
    data = open_shards(shards, cache, seed=3)
    n = (read_manifest(shards).tokens - 1) // 16
    samples = np.arange(2 * n)
    expected = [
        place * 16
        for epoch in (0, 1)
        for place in permute(np.arange(n), n, f"3/data/{epoch}").tolist()
    ]
    assert [first - 1 for _, _, first, _ in data.targets(samples)] == expected
    stream = np.concatenate([np.fromfile(f, "<u2") for f in sorted(shards.glob("*.bin"))])
    rows = data.windows(samples[:8])
    assert [row.tolist() for row in rows] == [stream[i : i + 17].tolist() for i in expected[:8]]


def test_an_epoch_of_units_and_pools_reads_every_target_once(shards, cache):
    data = open_shards(shards, cache, **UNIT)
    n = (read_manifest(shards).tokens - 1) // 64 * 4
    for first in (0, n):
        rows = data.targets(np.arange(first, first + n))
        assert {row[1] for row in rows} == {first // n}
        assert sorted(row[2] for row in rows) == [1 + 16 * k for k in range(n)]


def test_windows_of_a_unit_do_not_follow_each_other_in_a_pool(shards, cache):
    rows = open_shards(shards, cache, **UNIT).targets(np.arange(16))
    neighbours = sum(after[2] == before[3] for before, after in pairwise(rows))
    assert len({(row[2] - 1) // 64 for row in rows}) == 4 and neighbours < 8


LENGTHS = [(5, {}), (3, {"seq_len": 64}), (4, {"seq_len": 32, "global_batch_size": 2}), (6, {})]


def test_lengths_that_change_use_no_target_twice(shards, more_shards, cache):
    data = open_mixture(cache, mixture(shards, more_shards, weights=[0.7, 0.3]), batch=4, **UNIT)
    weights = [{}, {"weights": {"s1": 1.0}}, {}, {"weights": {"s0": 0.5, "s1": 0.5}}]
    plan = [(n, law(**a, **b)) for (n, a), b in zip(LENGTHS, weights)]
    rows = joined(walk(data, plan))
    assert repeated(rows) == 0 and len(rows) == 5 * 4 + 3 * 4 + 4 * 2 + 6 * 4
    assert tokens_of(data.history, 18) == sum(end - first for _, _, first, end in rows)
    # the same windows, cut anew without units, would
    plain = open_mixture(cache, mixture(shards, more_shards, weights=[0.7, 0.3]), batch=4)
    long = open_mixture(
        cache, mixture(shards, more_shards, weights=[0.7, 0.3]), batch=4, seq_len=64
    )
    assert repeated(plain.targets(np.arange(40)) + long.targets(np.arange(40, 60))) > 0


def test_a_phase_begins_at_the_first_unopened_pool_and_says_what_it_skips(shards, cache):
    data = open_shards(shards, cache, **UNIT)
    walk(data, [(5, law()), (1, law(seq_len=64))])
    first, second = data.history
    assert first["begins"] == {"data": 0}
    # 20 windows of 16 tokens open two pools of 4 x 64
    assert second["begins"] == {"data": 8} and second["skipped"] == {"data": 8 * 64 - 20 * 16}
    assert second["order_first"] == 20


def test_another_batch_goes_on_in_the_same_order(shards, cache):
    data = open_shards(shards, cache, **UNIT)
    rows = joined(walk(data, [(3, law()), (2, law(global_batch_size=8)), (1, law(lr_scale=0.5))]))
    assert rows == open_shards(shards, cache, **UNIT).targets(np.arange(32))
    assert [entry["order_first"] for entry in data.history] == [0, 0, 0]


def test_a_history_that_is_recalled_gives_the_same_rest(shards, more_shards, cache):
    def opened():
        return open_mixture(cache, mixture(shards, more_shards, weights=[2, 1]), batch=4, **UNIT)

    plan = [(3, law()), (3, law(seq_len=32)), (3, law(weights={"s1": 1.0}))]
    whole, other = opened(), opened()
    rows = walk(whole, plan)
    for known in range(3):
        other.recall(whole.history[: known + 1])
        first = whole.history[known]["first_sample"]
        assert other.targets(np.arange(first, first + 12)) == rows[known]
        if known < 2:
            entry = whole.history[known + 1]
            other.enter(entry["first_step"], entry["first_sample"], plan[known + 1][1])
            assert other.history == whole.history[: known + 2]


def test_the_ledgers_places_are_the_windows_in_order(shards, more_shards, cache):
    data = open_mixture(cache, mixture(shards, more_shards, weights=[3, 1]), batch=4, **UNIT)
    data.enter(0, 0, law())
    assert data.places(0, 4) == {"s0": [0, 48], "s1": [0, 16]}
    data.enter(2, 8, law(seq_len=64))
    assert data.places(8, 12) == {"s0": [256, 256 + 192], "s1": [256, 320]}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            {"seq_len": 24},
            r"seq_len = 24 does not divide .*unit_tokens = 64.*16, 32.*unit_tokens=192",
        ),
        ({"seq_len": 24, "unit_tokens": 24}, r"data\.unit_tokens = 24, and 64 until now"),
        ({"pool_units": 2}, r"data\.pool_units = 2, and 4 until now"),
    ],
)
def test_a_length_that_would_repeat_tokens_is_refused(change, found, shards, cache):
    data = open_shards(shards, cache, **UNIT)
    data.enter(0, 0, law())
    with pytest.raises(ConfigError, match=found):
        data.enter(3, 12, law(**change))
    assert len(data.history) == 1


def test_repeat_allow_starts_the_next_epoch_and_records_it(shards, cache):
    data = open_shards(shards, cache, **UNIT, repeat="allow", max_epochs=1.0)
    with pytest.raises(DataError, match="E-DATA-EPOCHS"):
        walk(data, [(5, law()), (2, law(seq_len=24, unit_tokens=24))])
    data = open_shards(shards, cache, **UNIT, repeat="allow")
    rows = walk(data, [(5, law()), (2, law(seq_len=24, unit_tokens=24))])
    assert {row[1] for row in rows[0]} == {0} and {row[1] for row in rows[1]} == {1}
    assert repeated(rows[0] + rows[1]) == 0 and data.history[1]["skipped"]["data"] > 0


def test_a_source_comes_again_under_its_name_only(shards, more_shards, cache):
    data = open_shards(shards, cache, **UNIT)
    walk(data, [(5, law())])
    other = open_mixture(cache, mixture(more_shards, shards, weights=[1, 1]), batch=4, **UNIT)
    other.recall(data.history)
    with pytest.raises(ConfigError, match=r"sources\.s1: holds the text .* as data.*call it data"):
        other.enter(5, 20, law())
    sources = mixture(more_shards, shards, weights=[1, 1])
    sources["sources"] = {"new": sources["sources"]["s0"], "data": sources["sources"]["s1"]}
    other = open_mixture(cache, sources, batch=4, **UNIT)
    other.recall(data.history)
    other.enter(5, 20, law())
    assert other.history[1]["begins"] == {"new": 0, "data": 8}


def test_a_source_that_pauses_goes_on_where_it_was(shards, more_shards, cache):
    data, between = open_shards(shards, cache, **UNIT), open_shards(more_shards, cache, **UNIT)
    first = walk(data, [(5, law())])
    between.recall(data.history)
    between.enter(5, 20, law())
    assert between.history[1]["begins"] == {"data": 0}  # another text of that name
    data.recall(between.history)
    data.enter(7, 28, law())
    assert data.history[2]["begins"] == {"data": 8}
    assert repeated(first[0] + data.targets(np.arange(28, 48))) == 0


def test_a_plan_is_checked_without_being_taken(shards, cache):
    data = open_shards(shards, cache, **UNIT)
    ahead = data.ahead([(0, 0, law()), (5, 20, law(seq_len=64))])
    assert len(ahead.history) == 2 and data.history == ()
    n = (read_manifest(shards).tokens - 1) // 64
    assert ahead.epochs(22) == {"data": (8 + 2) / n}
    assert "planned 448 tokens" in ahead.describe(22)


def test_a_stream_goes_on_with_the_next_block(tmp_path, cache):
    text, file = tmp_path / "text", tokenizer()
    text.mkdir()
    (text / "a.txt").write_text("\n".join(documents(80)))
    (tmp_path / "tokenizer.json").write_bytes(file.content)
    keys = {**STREAM, "path": str(text), "tokenizer": str(tmp_path / "tokenizer.json")}
    keys |= {"unit_tokens": 64, "validation_documents": 0}
    config = parse(tmp_path / "cache", **keys)
    data = open_data(config, global_batch_size=4, seed=0)
    try:
        rows = joined(walk(data, [(3, law(pool_units=1)), (3, law(seq_len=64, pool_units=1))]))
        assert repeated(rows) == 0
        assert data.history[1]["begins"]["data"] == data._sources[0]._block_bounds(64)[1]
    finally:
        data.close()


def test_the_parts_of_a_source_are_told_from_those_of_one_whose_name_goes_on():
    fingerprint = {"seed": 0, "web.share": "1/2", "web.tokens": 3, "web.de.tokens": 5}
    assert part_of(fingerprint, "web") == {"share": "1/2", "tokens": 3}
    assert part_of(fingerprint, "web.de") == {"tokens": 5}
