"""Windows to batches: labels, boundaries, digests."""

import itertools

import numpy as np
import pytest

from pdn.data.ledger import EMPTY, roll
from pdn.data.pack import IGNORE, boundary_slots, digests, document_boundaries, pack

EOS = 0


def test_labels_are_the_next_tokens():
    tokens, labels = pack(np.arange(1, 11).reshape(2, 5), EOS, isolate=False)
    assert tokens.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]] and labels.tolist() == [
        [2, 3, 4, 5],
        [7, 8, 9, 10],
    ]


def test_a_target_of_another_document_is_ignored_under_isolation():
    windows = np.array([[5, 6, EOS, 7, 8]])
    assert pack(windows, EOS, isolate=True)[1].tolist() == [[6, EOS, IGNORE, 8]]
    assert pack(windows, EOS, isolate=False)[1].tolist() == [[6, EOS, 7, 8]]


def test_changing_the_labels_of_a_single_window_leaves_its_tokens():
    tokens, labels = pack(np.array([[5, 0, 7, 8]], dtype=np.uint32), eos_id=0, isolate=True)
    assert tokens.tolist() == [[5, 0, 7]] and labels.tolist() == [[0, IGNORE, 8]]


def test_boundaries_hold_rows_and_documents_and_a_fixed_length():
    tokens = np.array([[5, EOS, 6, 7, 8, 9], [1, 2, 3, EOS, 4, 5]])
    assert document_boundaries(tokens, EOS, 1).tolist() == [0, 2, 6, 10, 12] + [12] * 8
    assert len(document_boundaries(tokens, EOS, 1)) == boundary_slots(2, 6, 1) == 13


@pytest.mark.parametrize("min_tokens", [1, 2, 3, 5, 16])
def test_boundaries_fit_whatever_the_documents(min_tokens):
    rng = np.random.default_rng(0)
    for density in (0.0, 0.1, 0.5, 1.0):
        tokens = np.where(rng.random((3, 40)) < density, EOS, 1)
        found = document_boundaries(tokens, EOS, min_tokens)
        assert len(found) == boundary_slots(3, 40, min_tokens)
        assert set(range(0, 121, 40)) <= set(found.tolist()) and (np.diff(found) >= 0).all()
        starts = np.unique(found)
        inside = [b - a for a, b in itertools.pairwise(starts) if b % 40]
        assert all(length >= min_tokens for length in inside)


def test_a_document_shorter_than_the_minimum_joins_the_next():
    tokens = np.array([[1, 1, 1, 1, EOS, 2, EOS, 3, 3, 3, 3, 3]])
    assert np.unique(document_boundaries(tokens, EOS, 4)).tolist() == [0, 5, 12]
    assert np.unique(document_boundaries(tokens, EOS, 2)).tolist() == [0, 5, 7, 12]


def test_digests_tell_samples_apart_and_ignore_the_storage_type():
    windows = np.arange(40, dtype=np.uint16).reshape(4, 10)
    changed = windows.copy()
    changed[2, 9] += 1
    assert np.array_equal(digests(windows), digests(windows.astype(np.uint32)))
    assert (digests(windows) != digests(changed)).tolist() == [False, False, True, False]


def test_the_ledger_depends_on_every_sample_and_on_their_order():
    a = np.array([1, 2, 3, 4], dtype=np.int64)
    whole = roll(EMPTY, a)
    assert whole == roll(EMPTY, a.reshape(2, 2)) and len(whole) == 32
    assert len({whole, roll(EMPTY, a[::-1]), roll(EMPTY, a[:3]), roll(whole, a)}) == 4
