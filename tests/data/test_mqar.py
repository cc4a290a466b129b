"""MQAR: the published layout, and examples that are pure functions of seed and number."""

import numpy as np
import pytest
import torch

from pdn.data import open_data
from pdn.data.mqar import VALIDATION, examples
from tests.data.corpus import LOADING

KEYS = {k: v for k, v in LOADING.items() if "isolation" not in k and k != "validation_sets"}
MQAR = {
    **KEYS,
    "kind": "mqar",
    "seq_len": 64,
    "num_pairs": 8,
    "vocab_size": 128,
    "power_a": 0.01,
    "random_filler": False,
    "train_examples": 48,
    "validation_examples": 10,
}


def config(**keys):
    from pydantic import TypeAdapter

    from pdn.data.config import DataConfig

    return TypeAdapter(DataConfig).validate_python({**MQAR, **keys})


def open_mqar(batch=8, rank=0, world=1, seed=0, **keys):
    return open_data(
        config(**keys), global_batch_size=batch, seed=seed, rank=rank, world_size=world
    )


@pytest.mark.parametrize("random_filler", [False, True])
def test_each_key_is_asked_once_and_labelled_with_its_value(random_filler):
    tokens, labels = examples(np.arange(200), config(random_filler=random_filler), seed=0)
    for row, label in zip(tokens, labels):
        keys, values = row[0:16:2], row[1:16:2]
        assert len(set(keys)) == len(set(values)) == 8
        assert keys.min() >= 1 and keys.max() < 64 and values.min() >= 64 and values.max() < 128
        asked = np.flatnonzero(label != -100)
        assert len(asked) == 8 and asked.min() >= 16 and (asked % 2 == 0).all()
        value = dict(zip(keys.tolist(), values.tolist()))
        assert (
            sorted(row[asked]) == sorted(keys)
            and [value[k] for k in row[asked].tolist()] == label[asked].tolist()
        )
        if not random_filler:
            assert (np.delete(row[16:], asked - 16) == 0).all()


def test_queries_follow_the_power_law():
    """Compare with the law of the first two slots.

    The first slot is drawn first with probability 1 / Σ j^(a−1), the second with that times
    2^(a−1).
    """
    tokens, _ = examples(np.arange(20_000), config(num_pairs=1, seq_len=42), seed=0)
    slots = np.array([np.flatnonzero(row[2:] == row[0])[0] // 2 for row in tokens])
    expected = np.arange(1, 21) ** -0.99 / (np.arange(1, 21) ** -0.99).sum()
    found = np.bincount(slots, minlength=20) / len(slots)
    assert np.abs(found - expected).max() < 0.015  # 4 standard deviations of the largest


def test_keys_are_uniform():
    tokens, _ = examples(np.arange(20_000), config(), seed=0)
    counts = np.bincount(tokens[:, 0:16:2].ravel(), minlength=64)[1:64]
    assert counts.min() > 0.9 * counts.mean() and counts.max() < 1.1 * counts.mean()


def test_an_example_depends_on_seed_and_number_only():
    many, _ = examples(np.arange(100), config(), seed=3)
    assert all(
        np.array_equal(examples(np.array([i]), config(), seed=3)[0][0], many[i])
        for i in (0, 17, 99)
    )
    assert not np.array_equal(examples(np.arange(100), config(), seed=4)[0], many)
    assert not np.array_equal(examples(VALIDATION + np.arange(100), config(), seed=3)[0], many)


def test_an_epoch_holds_each_example_once_in_another_order():
    steps = [
        b["tokens"].flatten(0, 1)
        for b, _ in open_mqar().steps(0, micro_batch_size=4, stop_sample=96)
    ]
    first, second = torch.cat(steps[:6]), torch.cat(steps[6:])
    assert sorted(first.tolist()) == sorted(second.tolist()) and not torch.equal(first, second)


def test_ranks_and_states_give_the_same_batches():
    whole = list(open_mqar().steps(0, micro_batch_size=8, stop_sample=64))
    parts = [
        list(open_mqar(rank=r, world=2, workers=2).steps(16, micro_batch_size=2, stop_sample=64))
        for r in range(2)
    ]
    for (a, n), (b, m), (c, _) in zip(whole[2:], *parts):
        assert n == m
        for key in ("tokens", "labels", "sample_digests"):
            assert torch.equal(
                a[key].flatten(0, 1), torch.cat([b[key].flatten(0, 1), c[key].flatten(0, 1)])
            )


def test_validation_has_other_examples_and_is_padded_with_ignored_labels():
    data = open_mqar()
    batches = list(data.validation(batch_size=4, max_samples=None))
    trained = torch.cat(
        [b["tokens"].flatten(0, 1) for b, _ in data.steps(0, micro_batch_size=8, stop_sample=48)]
    )
    assert not set(map(tuple, trained.tolist())) & set(
        map(tuple, torch.cat([b["tokens"] for b in batches]).tolist())
    )
    assert [int((b["labels"] != -100).any(1).sum()) for b in batches] == [4, 4, 2]


@pytest.mark.parametrize(
    ("key", "value"), [("seq_len", 63), ("seq_len", 30), ("vocab_size", 64), ("num_pairs", 0)]
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=key if key != "seq_len" else "seq_len"):
        config(**{key: value})
