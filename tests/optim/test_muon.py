"""Muon: torch's own on one process, and the same update where matrices are sharded."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pdn.optim.config import MuonConfig
from pdn.optim.muon import ShardedMuon, orthogonalise, shard_rows
from pdn.optim.optimizers import build_optimizer
from tests.presets import small_model
from tests.ranks import run_ranks
from tests.small_runs import losses, train, train_on_ranks

MUON = dict(
    kind="muon", lr=1e-2, momentum=0.95, nesterov=True, ns_steps=5, ns_dtype="bfloat16",
    adjust_lr="match_rms_adamw", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
    decay="matrices", groups={},
)  # fmt: skip
SHAPES = ((7, 5), (3, 9), (1, 4), (8, 8), (5, 2))  # uneven shards, and an empty one
OPTIONS = dict(momentum=0.9, adjust_lr_fn="match_rms_adamw", weight_decay=0.1, lr=0.02)


def matrices(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def steps(optimizer, parameters, place=lambda tensor: tensor, number: int = 3) -> None:
    for step in range(number):
        for parameter, gradient in zip(parameters, matrices(step + 1), strict=True):
            parameter.grad = place(gradient)
        optimizer.step()


def test_on_one_process_it_is_torchs_own_bit_by_bit():
    ours, theirs = ([torch.nn.Parameter(m) for m in matrices(0)] for _ in range(2))
    steps(ShardedMuon([{"params": ours}], ns_dtype=torch.bfloat16, **OPTIONS), ours)
    steps(torch.optim.Muon(theirs, **OPTIONS), theirs)
    assert all(map(torch.equal, ours, theirs))


def test_newton_schulz_brings_all_singular_values_near_one():
    coefficients = torch.optim.Muon([torch.nn.Parameter(torch.ones(2, 2))]).defaults
    for matrix in matrices(0):
        found = orthogonalise(matrix, coefficients["ns_coefficients"], 12, 1e-7)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6 and values.max() < 1.3, values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sharded_matrix_gets_the_update_of_the_whole_one(dtype, tmp_path):
    alone = [torch.nn.Parameter(m) for m in matrices(0)]
    steps(ShardedMuon([{"params": alone}], ns_dtype=getattr(torch, dtype), **OPTIONS), alone)

    def work(rank: int):
        mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("shard",))

        def place(tensor: torch.Tensor) -> DTensor:
            return distribute_tensor(tensor, mesh, [Shard(0)])

        parameters = [torch.nn.Parameter(place(m)) for m in matrices(0)]
        for parameter in parameters:
            rows = shard_rows(parameter.shape[0], 3)[rank]
            assert parameter.to_local().shape[0] == rows
        optimizer = ShardedMuon([{"params": parameters}], ns_dtype=getattr(torch, dtype), **OPTIONS)
        steps(optimizer, parameters, place)
        return [parameter.full_tensor().tolist() for parameter in parameters]

    for found in run_ranks(3, work, tmp_path):
        for ours, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(torch.tensor(ours), expected.detach(), rtol=0, atol=1e-6)


def test_a_masked_step_is_decided_without_the_host():
    """Run as on a GPU: parameters and momentum keep their values, whatever the gradients hold."""
    parameters = [torch.nn.Parameter(m) for m in matrices(0)]
    optimizer = ShardedMuon([{"params": parameters}], ns_dtype=torch.float32, **OPTIONS)
    steps(optimizer, parameters)
    before = [p.detach().clone() for p in parameters]
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in parameters]
    for skip in (True, False):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, torch.nan if skip else 1.0)
        with torch.no_grad():
            optimizer._update(torch.tensor(skip), torch.tensor(0.5))
        same = [*map(torch.equal, before, parameters)]
        held = [
            torch.equal(buffer, optimizer.state[p]["momentum_buffer"])
            for buffer, p in zip(buffers, parameters, strict=True)
        ]
        assert all(same + held) if skip else not any(same + held)
        assert all(parameter.isfinite().all() for parameter in parameters)


def test_the_blocks_linear_maps_go_to_muon_and_all_else_to_adamw():
    model = small_model("pgdn_tiny", torch.float32)
    optimizer = build_optimizer(model, MuonConfig.model_validate(MUON))
    muon, adamw = optimizer
    assert [group["name"] for group in muon.param_groups] == ["matrices"]
    assert [group["name"] for group in adamw.param_groups] == ["embeddings", "filters", "vectors"]
    matrices = sum(p.numel() for p in muon.param_groups[0]["params"])
    total = sum(p.numel() for p in model.parameters())
    assert optimizer.state_bytes() == 4 * (matrices + 2 * (total - matrices))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_two_ranks_give_the_losses_of_one(dtype, tolerance, tmp_path):
    words = "optim=muon", f"optim.ns_dtype={dtype}"
    one = losses(train(tmp_path / "one", "pgdn_tiny", *words))
    two = losses(train_on_ranks(2, tmp_path / "two", "pgdn_tiny", *words, "parallel=fsdp"))
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= tolerance
    assert sum(one[-5:]) / 5 < one[0] - 0.15


def test_orthogonalising_shards_would_be_another_optimiser(tmp_path, monkeypatch):
    """Show what the test above would see: parts orthogonalised as if each were whole."""
    words = "optim=muon", "optim.ns_dtype=float32"
    one = losses(train(tmp_path / "one", "pgdn_tiny", *words))
    monkeypatch.setattr(
        ShardedMuon,
        "_by_owners",
        lambda self, group, parts, shapes, shards: [self._newton_schulz(group, p) for p in parts],
    )
    words = *words, "parallel=fsdp"
    two = losses(train_on_ranks(2, tmp_path / "two", "pgdn_tiny", *words, start="fork"))
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) > 1e-3


def test_a_run_with_muon_continues_bit_by_bit_where_it_was_stopped(tmp_path):
    whole = losses(train_on_ranks(2, tmp_path / "whole", "pgdn_tiny", "optim=muon"))
    train_on_ranks(2, tmp_path / "parts", "pgdn_tiny", "optim=muon", "trainer.stop_at=10")
    assert losses(train_on_ranks(2, tmp_path / "parts", "pgdn_tiny", "optim=muon")) == whole
