"""A small model and its checkpoints: built, trained, sharded, saved, compared and forged."""

import copy
import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pdn.checkpoint.manager import Checkpointer
from pdn.checkpoint.state import model_tensors, optimizer_tensors
from pdn.errors import ConfigError, StorageError

VOCAB, WIDTH = 61, 17  # neither divides by two: FSDP pads such shards


class TinyModel(nn.Module):
    """Tied embeddings, dropout (so that random states matter), two buffers, an odd width.

    One buffer is persistent, the other is not.
    """

    def __init__(self, width: int = WIDTH, dropout: float = 0.1):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        y = self.embed(x)
        for block in self.blocks:
            y = y + block(self.dropout(y))
        return self.head(y)


def build(seed: int = 0, **options) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = TinyModel(**options)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))


def train(model, optimizer, steps: range, rank: int = 0, world_size: int = 1) -> list[str]:
    """Train on batches that depend on the step only; the losses of each step in hexadecimal."""
    losses = []
    for step in steps:
        batch = torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(step))
        share = batch[rank::world_size]
        logits = model(share[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), share[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item().hex())
    return losses


def checkpointer(path: Path, **options) -> Checkpointer:
    return Checkpointer(
        path, **{"keep_last": 3, "keep_every": None, "asynchronous": False} | options
    )


def all_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    found = model_tensors(model) | optimizer_tensors(model, optimizer)
    return {
        name: t.full_tensor().clone() if hasattr(t, "full_tensor") else t.clone()
        for name, t in found.items()
    }


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def saved(path: Path, steps: tuple[int, ...] = (1, 2, 3), **options):
    """Save checkpoints of the given steps in a directory.

    Returns model, optimizer and their tensors at each step.
    """
    model, optimizer = build()
    saver, states, done = checkpointer(path, **options), {}, 0
    for step in steps:
        train(model, optimizer, range(done, step))
        done = step
        saver.save(step, model, optimizer, {"position": 4 * step})
        states[step] = all_tensors(model, optimizer)
    saver.wait()
    return model, optimizer, states


def shard(model: nn.Module, kind: str, world_size: int) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "plain":
        return model
    shape = {"fsdp": (1, world_size), "replicas": (world_size, 1)}[kind]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded(kind: str, world_size: int, seed: int):
    model, _ = build(seed, dropout=0.0)
    model = shard(model, kind, world_size)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))


def resign(path: Path, changes: dict) -> None:
    """Change the manifest and make the marker agree again, as an attacker would."""
    manifest = json.loads((path / "manifest.json").read_bytes()) | copy.deepcopy(changes)
    data = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "COMMITTED").write_text(sha256(data).hexdigest() + "\n")


def refusal(work) -> str:
    """Return the message with which ``work`` is refused."""
    with pytest.raises((ConfigError, StorageError)) as caught:
        work()
    return str(caught.value)
