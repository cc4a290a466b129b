"""Batches: the same tokens in the same step however the work is divided, from any state."""

import numpy as np
import pytest
import torch

from pdn.data.ledger import EMPTY, roll
from pdn.data.pack import IGNORE
from pdn.data.shards import read_manifest
from pdn.errors import DataError, DataStorageError
from tests.data.corpus import documents, make_shards, mixture, open_mixture, open_shards

KEYS = ("tokens", "labels", "cu_seqlens", "sample_digests")


def everything(data, start, stop, micro=2):
    return list(data.steps(start, micro_batch_size=micro, stop_sample=stop))


def same(a, b):
    return (
        a[1] == b[1]
        and a[0].keys() == b[0].keys()
        and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    )


def restore_everywhere(cache, sources, states):
    """Open a run of 500 samples, each a step, anew at each of `states`.

    All that is left is compared with the run itself.
    """
    keys = {"batch": 1, "seq_len": 64}
    run = everything(open_mixture(cache, sources, **keys), 0, 500, micro=1)
    assert len(run) == 500
    good = 0
    for k in states:
        data = open_mixture(cache, sources, **keys)
        rest = everything(data, run[k - 1][1] if k else 0, 500, micro=1)
        data.close()
        good += len(rest) == 500 - k and all(map(same, rest, run[k:]))
    return good


def test_restoring_at_some_states_gives_the_remaining_run(shards, more_shards, cache):
    sources = mixture(shards, more_shards, weights=[0.7, 0.3])
    assert min(open_mixture(cache, sources, batch=1, seq_len=64).epochs(500).values()) > 2
    assert restore_everywhere(cache, sources, range(0, 500, 41)) == 13


@pytest.mark.slow
def test_restoring_at_every_state_gives_the_remaining_run(shards, more_shards, cache):
    sources = mixture(shards, more_shards, weights=[0.7, 0.3])
    assert restore_everywhere(cache, sources, range(500)) == 500


def global_batches(cache, sources, world, accumulation, workers, steps, batch=96):
    """Return tokens of each global batch and the ledger's hash, put together from all ranks."""
    micro = batch // world // accumulation
    ranks = [
        everything(
            open_mixture(cache, sources, batch=batch, rank=r, world=world, workers=workers),
            0,
            steps * batch,
            micro,
        )
        for r in range(world)
    ]
    tokens, ledger = [], EMPTY
    for parts in zip(*ranks):
        assert parts[0][0]["tokens"].shape[:2] == (accumulation, micro)
        tokens.append(torch.cat([p[0]["tokens"].flatten(0, 1) for p in parts]))
        ledger = roll(ledger, torch.cat([p[0]["sample_digests"].flatten() for p in parts]))
    return torch.stack(tokens), ledger


def compare_divisions(cache, sources, cases, steps):
    tokens, ledger = global_batches(cache, sources, 1, 1, 0, steps)
    agree = 0
    for world, accumulation, workers in cases:
        other, other_ledger = global_batches(cache, sources, world, accumulation, workers, steps)
        agree += torch.equal(tokens, other) and ledger == other_ledger
    return agree


def test_world_size_accumulation_and_workers_do_not_change_the_batches(shards, more_shards, cache):
    sources = mixture(shards, more_shards, weights=[0.6, 0.4])
    cases = [(2, 1, 0), (3, 4, 2), (4, 2, 1), (8, 3, 4), (1, 4, 3)]
    assert compare_divisions(cache, sources, cases, steps=4) == len(cases)


@pytest.mark.slow
def test_every_division_of_the_work_gives_the_same_batches(shards, more_shards, cache):
    sources = mixture(shards, more_shards, weights=[0.6, 0.4])
    cases = [
        (w, a, n)
        for w in (1, 2, 3, 4, 8)
        for a in (1, 2, 3, 4)
        for n in range(5)
        if 96 % (w * a) == 0
    ]
    assert compare_divisions(cache, sources, cases, steps=10) == len(cases)


def test_an_epoch_reads_every_window_once(shards, cache):
    data = open_shards(shards, cache, batch=1)
    n = (read_manifest(shards).tokens - 1) // 16
    seen = [int(b["sample_digests"]) for b, _ in everything(data, 0, 2 * n, micro=1)]
    assert sorted(seen[:n]) == sorted(seen[n:]) and seen[:n] != seen[n:]
    assert len(set(seen)) > 0.95 * n  # windows of equal tokens are possible, and rare


def test_windows_across_shards_are_the_concatenated_stream(shards, cache):
    data = open_shards(shards, cache)
    stream = np.concatenate([np.fromfile(f, "<u2") for f in sorted(shards.glob("*.bin"))])
    rows = {tuple(r) for r in data.windows(np.arange(data._sources[0].count(16))).tolist()}
    assert {tuple(stream[i : i + 17].tolist()) for i in range(0, len(stream) - 16, 16)} == rows


def test_isolation_marks_documents_and_leaves_the_tokens_alone(shards, cache):
    apart = everything(open_shards(shards, cache), 0, 64)
    joined = everything(open_shards(shards, cache, document_isolation=False), 0, 64)
    assert "cu_seqlens" not in joined[0][0]
    masked = 0
    for (a, _), (b, _) in zip(apart, joined):
        assert torch.equal(a["tokens"], b["tokens"]) and torch.equal(
            a["sample_digests"], b["sample_digests"]
        )
        differs = a["labels"] != b["labels"]
        assert torch.equal(differs, a["tokens"] == 0) and (a["labels"][differs] == IGNORE).all()
        assert a["cu_seqlens"].dtype == torch.int32 and a["cu_seqlens"].shape == (
            2,
            2 * (1 + 15 // 4) + 1,
        )
        masked += int(differs.sum())
    assert masked > 0


def test_another_seed_is_another_order_with_another_fingerprint(shards, cache):
    a, b = open_shards(shards, cache, seed=0), open_shards(shards, cache, seed=1)
    assert not torch.equal(everything(a, 0, 4)[0][0]["tokens"], everything(b, 0, 4)[0][0]["tokens"])
    assert {k for k in a.fingerprint if a.fingerprint[k] != b.fingerprint[k]} == {"seed"}


def test_the_fingerprint_names_what_changed(shards, more_shards, cache, tmp_path):
    def fingerprint(**keys):
        return open_mixture(
            cache, mixture(shards, more_shards, weights=[1, 1]), batch=4, **keys
        ).fingerprint

    base = fingerprint()
    other_weights = open_mixture(
        cache, mixture(shards, more_shards, weights=[2, 1]), batch=4
    ).fingerprint
    other_data = open_mixture(
        cache,
        mixture(shards, make_shards(tmp_path, documents(60, seed=5)), weights=[1, 1]),
        batch=4,
    ).fingerprint

    def changed(other):
        return {k for k in base if base[k] != other[k]}

    assert changed(fingerprint(seq_len=8)) == {"seq_len"}
    assert changed(other_weights) == {"s0.share", "s1.share"}
    assert changed(other_data) == {"s1.content", "s1.tokens"}


def test_repeating_beyond_max_epochs_is_refused_before_the_first_step(shards, cache):
    data = open_shards(shards, cache, max_epochs=1.0)
    n = data._sources[0].count(16)
    with pytest.raises(DataError, match=r"E-DATA-EPOCHS\].*2\.\d\d times.*max_epochs allows 1"):
        next(data.steps(0, micro_batch_size=2, stop_sample=2 * n + 4))
    assert sum(1 for _ in data.steps(0, micro_batch_size=4, stop_sample=n - n % 4)) == n // 4


def test_without_a_stop_the_run_ends_at_max_epochs(shards, cache):
    data = open_shards(shards, cache, max_epochs=1.0)
    steps = 0
    with pytest.raises(DataError, match="E-DATA-EPOCHS"):
        for _ in data.steps(0, micro_batch_size=4, stop_sample=None):
            steps += 1
    assert steps == data._sources[0].count(16) // 4


def test_batches_that_do_not_divide_are_refused_with_the_nearest_valid(shards, cache):
    with pytest.raises(DataError, match=r"global batch 10 .* 4 .*nearest valid: 8"):
        open_shards(shards, cache, batch=10, rank=0, world=4)
    with pytest.raises(DataError, match=r"micro-batch of 5; nearest valid: 4"):
        next(open_shards(shards, cache, batch=8).steps(0, micro_batch_size=5, stop_sample=8))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_gives_every_rank_as_many_batches_and_every_token_once(
    shards, more_shards, cache, world
):
    batches = []
    for rank in range(world):
        data = open_shards(
            shards,
            cache,
            batch=6,
            rank=rank,
            world=world,
            validation=str(more_shards),
            document_isolation=False,
        )
        batches.append(list(data.validation(batch_size=4, max_samples=None)))
        assert batches[-1][0]["labels"].shape == (4, 16)
    assert len({len(b) for b in batches}) == 1
    labels = torch.cat(
        [torch.cat([b[i]["labels"] for b in batches]) for i in range(len(batches[0]))]
    )
    stream = np.concatenate([np.fromfile(f, "<u2") for f in sorted(more_shards.glob("*.bin"))])
    assert labels[labels != IGNORE].tolist() == stream[1:].tolist()


def test_validation_takes_the_same_first_samples(shards, more_shards, cache):
    data = open_shards(shards, cache, validation=str(more_shards))
    few = list(data.validation(batch_size=4, max_samples=6))
    assert [int((b["labels"] != IGNORE).any(1).sum()) for b in few] == [4, 2]
    assert torch.equal(
        few[0]["tokens"], next(data.validation(batch_size=4, max_samples=None))["tokens"]
    )
    assert list(open_shards(shards, cache).validation(batch_size=4, max_samples=None)) == []


def test_a_hanging_disk_is_reported_within_the_timeout(shards, cache, monkeypatch):
    import threading

    data = open_shards(shards, cache, workers=1, timeout_seconds=0.3)
    hang = threading.Event()
    monkeypatch.setattr(data, "windows", lambda samples: hang.wait(20))
    with pytest.raises(DataStorageError, match="DATA-STALLED"):
        next(data.steps(0, micro_batch_size=2, stop_sample=8))
    hang.set()


def test_describe_compares_planned_with_available_tokens(shards, cache):
    data = open_shards(shards, cache)
    tokens = read_manifest(shards).tokens
    assert f"{tokens:,} tokens" in data.describe()
    assert "planned 1,600 tokens = " in data.describe(planned_samples=100)
    assert data.tokens_available == tokens
    limited = open_shards(shards, cache, max_epochs=3.0).describe(planned_samples=100)
    unlimited = open_shards(shards, cache, max_epochs=None).describe(planned_samples=100)
    assert "epochs (at most 3)" in limited and "at most" not in unlimited
