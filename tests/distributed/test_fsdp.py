"""What ranks say to each other in a step.

The ways to spread a model give the same losses.
"""

import itertools
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pdn.distributed.config import ParallelConfig
from pdn.distributed.fsdp import (
    BLOCKS_TOGETHER,
    World,
    clip_gradients,
    compute_in,
    last_micro_batch,
    parallelise,
)
from pdn.models.language_model import LanguageModel
from pdn.optim.config import AdamWConfig
from pdn.optim.optimizers import build_optimizer
from tests.presets import small_config
from tests.ranks import run_ranks
from tests.small_runs import losses, train, train_on_ranks

SHORT = "trainer.micro_batch_size=1", "trainer.stop_at=6"
LAYOUTS = {
    "fsdp": dict(replicate=1, shard="all"),
    "ddp": dict(replicate="all", shard=1),
    "hsdp": dict(replicate=2, shard="all"),
}
OPTIONS = dict(context=1, activation_checkpointing="none", compile=False, cpu_offload=False)


class Collectives(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def spread(rank: int, kind: str, reshard: bool = False, **sizes) -> LanguageModel:
    config = ParallelConfig(**LAYOUTS[kind], reshard_after_forward=reshard, **OPTIONS)
    with torch.device("meta"):
        model = LanguageModel(small_config("pgdn_tiny").model_copy(update=sizes))
    return parallelise(model, config, World(rank, 2, torch.device("cpu")), seed=0)


def communication(kind: str, reshard: bool, micro_batches: int, rank: int) -> dict[str, int]:
    """Count the collectives of the second step, of so many micro-batches."""
    model = spread(rank, kind, reshard)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    for _ in range(2):
        with Collectives() as seen:
            for i in range(micro_batches):
                last_micro_batch(model, i == micro_batches - 1, keep_gathered=not reshard)
                model(tokens, labels=tokens).loss_sum.backward()
    return seen.counts


@pytest.mark.parametrize(
    ("kind", "reshard"), [("fsdp", False), ("fsdp", True), ("hsdp", False), ("ddp", False)]
)
def test_accumulating_gradients_adds_no_communication(kind, reshard, tmp_path):
    def work(rank: int):
        return [communication(kind, reshard, micro_batches, rank) for micro_batches in (1, 4)]

    [[one, four], *_] = run_ranks(2, work, tmp_path)
    assert sum(one.values()) > 0
    if reshard:  # each forward and each backward pass gathers the blocks anew: that is its price
        assert {name: count for name, count in one.items() if "gather" not in name} == {
            name: count for name, count in four.items() if "gather" not in name
        }
    else:
        assert one == four


def test_blocks_are_gathered_and_reduced_several_at_a_time(tmp_path):
    def work(rank: int):
        model = spread(rank, "fsdp", num_layers=2 * BLOCKS_TOGETHER + 1)
        tokens = torch.zeros(1, 16, dtype=torch.int64)
        with Collectives() as seen:
            model(tokens, labels=tokens).loss_sum.backward()
        return seen.counts

    [counts, *_] = run_ranks(2, work, tmp_path)
    # three groups and what is outside the blocks: gathered, reduced
    assert sorted(counts.values()) == [4, 4], counts


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_clipping_and_adamw_on_local_parts_are_those_of_torch(kind, tmp_path):
    config = AdamWConfig(kind="adamw", lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def work(rank: int):
        ours, theirs = spread(rank, kind), spread(rank, kind)
        optimizers = build_optimizer(ours, config), build_optimizer(theirs, config)
        optimizers[1].optimizers[0].__class__ = torch.optim.AdamW
        for step in range(3):
            tokens = torch.randint(
                0, 64, (2, 16), generator=torch.Generator().manual_seed(2 * step + rank)
            )
            for model in (ours, theirs):
                model(tokens, labels=tokens).loss_sum.backward()
            norm, expected = (
                clip_gradients(ours, 0.1),
                torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1).full_tensor(),
            )
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
            assert norm > 0.1
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a.grad.to_local(), b.grad.to_local(), rtol=1e-6, atol=0)
                a.grad = b.grad.detach().clone()  # from here on bit by bit
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        state = optimizers[0].optimizers[0].state[ours.embedding.weight]["exp_avg"]
        assert (
            state.shape == ours.embedding.weight.shape
            and state.placements == ours.embedding.weight.placements
        )
        return [
            torch.equal(a.to_local(), b.to_local())
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
        ]

    assert all(all(equal) for equal in run_ranks(2, work, tmp_path))


@pytest.mark.parametrize("option", ["reshard_after_forward=true", "cpu_offload=true"])
def test_where_the_weights_lie_changes_nothing(option, tmp_path):
    plain = losses(train_on_ranks(2, tmp_path / "plain", "pgdn_tiny", "parallel=fsdp", *SHORT))
    assert (
        losses(
            train_on_ranks(
                2, tmp_path / "moved", "pgdn_tiny", "parallel=fsdp", *SHORT, f"parallel.{option}"
            )
        )
        == plain
    )


def test_hsdp_on_four_ranks_gives_the_losses_of_one(tmp_path):
    one = losses(train(tmp_path / "one", "pgdn_tiny", *SHORT))
    options = "parallel=hsdp", *SHORT
    four = losses(train_on_ranks(4, tmp_path / "four", "pgdn_tiny", *options))
    assert max(abs(a - b) for a, b in zip(one, four, strict=True)) <= 1e-5


def test_blocks_stay_compiled_for_more_kinds_of_calls_than_the_compiler_allows(monkeypatch):
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="eager"))
    with torch.device("meta"):
        model = LanguageModel(
            small_config("transformer_tiny").model_copy(update=dict(num_layers=1))
        )
    compiled = OPTIONS | dict(compile=True)
    config = ParallelConfig(replicate=1, shard=1, reshard_after_forward=False, **compiled)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        parallelise(model, config, World(0, 1, torch.device("cpu")), seed=0)
        tokens, bounds = torch.zeros(1, 8, dtype=torch.int64), torch.tensor([0, 3, 8]).int()
        for gradients, bf16, documents in itertools.product((True, False), repeat=3):
            with torch.set_grad_enabled(gradients), compute_in(torch.device("cpu"), bf16):
                for size in (8, 7):  # from the second on the length is a symbol
                    model(
                        tokens[:, :size], cu_seqlens=bounds.clamp(max=size) if documents else None
                    )
