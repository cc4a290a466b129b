"""Scores: those of a plain forward pass, by both paths, in any batch, on any number of ranks."""

import pytest
import torch

from pdn.distributed.copies import HostCopy
from pdn.distributed.fsdp import World
from pdn.evals.scoring import Scorer
from pdn.inference.sampling import Sampling
from tests.presets import TINY, small_model
from tests.ranks import run_ranks

ALONE = World(0, 1, torch.device("cpu"))


def scorer(model, world: World = ALONE, **changes) -> Scorer:
    return Scorer(
        **dict(model=model, world=world, max_length=96, batch_size=3, bf16=False) | changes
    )


def pairs() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(5)
    sizes = [(1, 1), (70, 9), (3, 40), (12, 2), (20, 76), (150, 5), (7, 7)]
    return [
        tuple(torch.randint(0, 256, (n,), generator=generator).tolist() for n in size)
        for size in sizes
    ]


def test_a_score_is_the_sum_over_the_continuation_alone():
    model = small_model("pgdn_tiny")
    for (context, continuation), (score, greedy) in zip(
        pairs(), scorer(model).loglikelihoods(pairs()), strict=True
    ):
        tokens = (context + continuation)[-97:]
        logits = model(torch.tensor([tokens[:-1]])).logits[0, -len(continuation) :]
        expected = (
            logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum().item()
        )
        assert score == pytest.approx(expected, abs=1e-9)
        assert greedy == (logits.argmax(-1).tolist() == continuation)


def test_greedy_is_true_for_what_the_model_would_say():
    model = small_model("gdn_tiny")
    said = scorer(model).continuations([[1, 2, 3]], max_new_tokens=5, eos_id=None)[0]
    (_, yes), (_, no) = scorer(model).loglikelihoods(
        [([1, 2, 3], said), ([1, 2, 3], said[:-1] + [(said[-1] + 1) % 256])]
    )
    assert yes and not no


@pytest.mark.parametrize("name", TINY)
def test_the_chunkwise_and_the_recurrent_path_agree(name):
    model = small_model(name)
    chunkwise, recurrent = (
        scorer(model, path=path).loglikelihoods(pairs()) for path in ("chunkwise", "recurrent")
    )
    for (a, greedy_a), (b, greedy_b) in zip(chunkwise, recurrent, strict=True):
        assert a == pytest.approx(b, abs=1e-8)
        assert greedy_a == greedy_b


def test_the_batch_size_and_slices_of_the_head_change_nothing(monkeypatch):
    model = small_model("kda_tiny")
    expected = scorer(model, batch_size=1).loglikelihoods(pairs())
    monkeypatch.setattr("pdn.evals.scoring.LOGIT_ELEMENTS", 256 * 7)
    for (a, _), (b, _) in zip(
        expected, scorer(model, batch_size=7).loglikelihoods(pairs()), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-9)


@pytest.mark.parametrize("name", [n for n in TINY if n not in ("transformer_tiny", "hybrid_tiny")])
def test_packed_sequences_score_as_each_by_itself(name, monkeypatch):
    """Pack on a CPU as on a GPU."""
    model = small_model(name)
    alone = scorer(model, batch_size=1).loglikelihoods(pairs())
    monkeypatch.setattr(Scorer, "packs", True)
    batches = []
    read = Scorer._score
    monkeypatch.setattr(Scorer, "_score", lambda self, b: batches.append(len(b)) or read(self, b))
    for (a, greedy_a), (b, greedy_b) in zip(
        alone, scorer(model, batch_size=2).loglikelihoods(pairs()), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-8) and greedy_a == greedy_b
    assert sorted(batches) == [2, 5]  # 192 tokens together, at most


def test_a_packed_pass_fills_the_device_within_what_memory_allows_and_every_rank_has_one(
    monkeypatch,
):
    def most(lengths, **changes):
        return scorer(None, **changes)._tokens_of_a_pass(lengths)

    assert most([5] * 1000) == 3 * 96  # not 3 * 5: launches would take longer than the work
    assert most([5] * 8) == 40  # there is no more
    assert most([5] * 100, world=World(0, 4, ALONE.device)) == 125
    assert most([90, 1, 1], world=World(0, 4, ALONE.device)) == 90
    monkeypatch.setattr("pdn.evals.scoring.FULL_TOKENS", 100)
    assert most([5] * 1000) == 100
    assert most([60] * 1000) == 3 * 60
    whole = scorer(None).whole()
    assert whole._tokens_of_a_pass([5000] * 10) == 15000


def test_the_next_batch_is_laid_out_while_the_device_reads_one(monkeypatch):
    happened = []

    def score(self, batch):
        happened.append(f"begun {len(batch)}")
        return HostCopy(torch.zeros(len(batch), 2))

    monkeypatch.setattr(Scorer, "_score", score)
    share = [[0] * n for n in (4, 3, 2)]
    results = scorer(None)._score_all(share, lambda n: happened.append(f"read {n}"))
    assert [len(rows) for rows in results] == [4, 3, 2] and results[2] == [(0.0, True)] * 2
    assert happened == ["begun 4", "begun 3", "read 4", "begun 2", "read 3", "read 2"]


def test_attention_is_never_packed():
    on_gpu = World(0, 1, torch.device("cuda"))
    assert scorer(small_model("pgdn_tiny"), on_gpu).packs
    assert not scorer(small_model("hybrid_tiny"), on_gpu).packs
    assert not scorer(small_model("pgdn_tiny"), on_gpu, path="recurrent").packs
    assert not scorer(small_model("pgdn_tiny")).packs


def test_ranks_share_the_work_and_all_get_every_result(tmp_path):
    model = small_model("pgdn_tiny")
    prompts = [context for context, _ in pairs()]
    expected = scorer(model).loglikelihoods(pairs())
    continued = scorer(model).continuations(prompts, max_new_tokens=4, eos_id=0)

    def work(rank: int):
        mine = scorer(model, World(rank, 2, torch.device("cpu")))
        scored = []
        read_out = Scorer._score
        Scorer._score = lambda self, batch: scored.extend(batch) or read_out(self, batch)
        results = mine.loglikelihoods(pairs())
        return results, mine.continuations(prompts, max_new_tokens=4, eos_id=0), len(scored)

    outcomes = run_ranks(2, work, tmp_path)
    for results, texts, _ in outcomes:
        assert [tuple(row) for row in results] == expected
        assert texts == continued
    assert sum(count for *_, count in outcomes) == len(pairs())


def test_samples_differ_by_seed_and_not_by_batch_size():
    model = small_model("pgdn_tiny")
    prompts = [[5, 6], [5, 6], [7], [8, 9, 10], [5, 6], list(range(20))]
    options = dict(max_new_tokens=8, eos_id=None, how=Sampling(), seeds=[1, 2, 1, 2, 3, 4])
    by_size = [
        scorer(model, batch_size=size).continuations(prompts, **options) for size in (1, 2, 6)
    ]
    assert by_size[0] == by_size[1] == by_size[2]
    assert len({tuple(by_size[0][i]) for i in (0, 1, 4)}) == 3
    with pytest.raises(ValueError, match="0 seeds: expected one for each of 6 prompts"):
        scorer(model).continuations(prompts, max_new_tokens=1, eos_id=None, how=Sampling())


def test_continuations_stop_at_eos_and_where_they_are_done():
    model = small_model("pgdn_tiny")
    prompts = [[5, 6], [7], [8, 9, 10]]
    free = scorer(model).continuations(prompts, max_new_tokens=10, eos_id=None)
    assert [len(row) for row in free] == [10, 10, 10]
    eos = free[1][4]
    ended = scorer(model).continuations(prompts, max_new_tokens=10, eos_id=eos)
    assert ended[1] == free[1][: free[1].index(eos)]
    cut = scorer(model).continuations(
        prompts, max_new_tokens=10, eos_id=None, done=lambda tokens: len(tokens) == 3
    )
    assert cut == [row[:3] for row in free]


def test_what_cannot_be_scored_is_refused():
    model = small_model("pgdn_tiny")
    for pair in ([], [1]), ([1], []), ([1], [2] * 97):
        with pytest.raises(ValueError, match="expected at least one of each"):
            scorer(model).loglikelihoods([pair])
    assert scorer(model).whole().loglikelihoods([([1], [2] * 97)])
