"""A run that cannot fit is refused before anything is allocated."""

import time

import pytest
import torch

from pdn.cli.compose import compose
from pdn.cli.parse import parse
from pdn.data import open_data
from pdn.distributed.world import World
from pdn.errors import ConfigError
from pdn.training import memory
from pdn.training.fit import fit
from pdn.training.memory import host_memory, require_memory

ALONE = World(world_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 16 * 10**9)


def need(*words: str, world: World = ALONE) -> str:
    with pytest.raises(ConfigError) as caught:
        require_memory(parse(compose(words)), world)
    return str(caught.value)


def test_what_does_not_fit_is_said_with_its_parts_and_the_ways_out():
    message = need(
        "model=pgdn_1b", "data=text", "data.vocab_size=32000", "trainer.micro_batch_size=1"
    )
    assert "pdn[E-MEMORY] this machine: this run needs at least" in message
    assert "parameters with their state" in message and "it has 16 GB" in message
    assert "13 GB for" not in message and "expected a run that fits: a smaller model" in message
    message = need("trainer.micro_batch_size=65536", "trainer.global_batch_size=65536")
    assert "for micro-batches of 65536 x 256 tokens" in message


def test_shards_and_the_ranks_of_a_machine_are_counted(monkeypatch):
    words = ["model=pgdn_340m", "data=text", "data.vocab_size=32000", "trainer.micro_batch_size=1"]
    require_memory(parse(compose(words)), ALONE)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    sharded = World(world_rank=0, size=4, device=torch.device("cpu"))
    require_memory(parse(compose([*words, "parallel=fsdp"])), sharded)
    assert "MEMORY" in need(*words, "parallel=ddp", world=sharded)


def test_a_model_of_trillions_of_parameters_is_refused_within_seconds(tmp_path):
    words = ["model.d_model=65536", "model.num_layers=4096", "model.num_heads=64",
             "model.head_dim=1024", f"output_dir={tmp_path}", "logger=none"]  # fmt: skip
    began = time.monotonic()
    with pytest.raises(ConfigError, match="MEMORY"):
        fit(parse(compose(words)), open_data=open_data)
    assert time.monotonic() - began < 60


def test_this_machines_memory_is_known():
    assert host_memory() > 10**8
