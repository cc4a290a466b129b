"""The axes of the ranks, and which rank is asked for what."""

import re

import pytest
import torch
import yaml

from pdn.config import config_root
from pdn.distributed.config import ParallelConfig
from pdn.distributed.dims import ParallelDims
from pdn.distributed.world import World

REST = dict(
    activation_checkpointing="none", compile=False, reshard_after_forward=False, cpu_offload=False
)


def layout(replicate, shard, context=1) -> ParallelConfig:
    return ParallelConfig(replicate=replicate, shard=shard, context=context, **REST)


@pytest.mark.parametrize(
    ("axes", "ranks", "expected", "mesh"),
    [
        ((1, "auto"), 1, (1, 1), False),
        ((1, "auto"), 4, (1, 4), False),
        ((1, 1), 1, (1, 1), False),
        ((1, "all"), 4, (1, 4), True),
        (("all", 1), 4, (4, 1), True),
        ((2, "all"), 8, (2, 4), True),
        (("all", 2), 8, (4, 2), True),
        ((2, 3), 6, (2, 3), False),
    ],
)
def test_an_open_axis_takes_the_ranks_that_the_others_leave(axes, ranks, expected, mesh):
    config = layout(*axes)
    assert config.dims(ranks) == ParallelDims(*expected, 1, whole=axes[1] == 1)
    assert config.needs_mesh == mesh


@pytest.mark.parametrize(
    ("axes", "ranks", "message"),
    [
        ((1, 1), 2, "parallel.replicate = 1 times parallel.shard = 1 with 2 processes"),
        ((2, "all"), 3, "parallel.replicate = 2 does not divide the number of processes, 3"),
        (("all", 2), 3, "parallel.shard = 2 does not divide the number of processes, 3"),
        ((2, 2), 8, "expected torchrun --nproc-per-node 4"),
    ],
)
def test_ranks_that_do_not_fit_the_axes_are_refused(axes, ranks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layout(*axes).dims(ranks)


def test_two_open_axes_are_refused_by_name():
    with pytest.raises(ValueError, match="replicate = all with shard = all"):
        layout("all", "all")


@pytest.mark.parametrize(
    ("axes", "ranks", "expected"),
    [((1, "auto"), 2, (1, 1)), (("all", 1), 8, (4, 1)), ((2, "all"), 8, (2, 2))],
)
def test_the_other_axes_take_the_ranks_that_split_sequences_leave(axes, ranks, expected):
    dims = layout(*axes, context=2).dims(ranks)
    assert (dims.replicate, dims.shard, dims.context) == (*expected, 2)
    # with parallel.shard = 1 each rank has the whole model
    assert dims.parameter_ranks == (1 if axes[1] == 1 else 2 * expected[1])
    assert dims.copies * dims.parameter_ranks == ranks


@pytest.mark.parametrize(
    ("axes", "ranks", "message"),
    [
        ((2, "all"), 2, "parallel.replicate = 2 times parallel.context = 2 does not divide the nu"),
        (("all", 2), 6, "number of processes, 6; expected torchrun --nproc-per-node with a mul"),
        ((1, "auto"), 3, "parallel.context = 2 does not divide the number of processes, 3"),
        ((1, 1), 4, "times parallel.context = 2 with 4 processes; expected torchrun --nproc"),
    ],
)
def test_ranks_that_split_sequences_must_fit_too(axes, ranks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layout(*axes, context=2).dims(ranks)


def test_ranks_of_one_sequence_see_the_same_samples_and_replicas_hold_the_same_part():
    dims = ParallelDims(replicate=2, shard=3, context=2)
    worlds = [World(rank, 12, torch.device("cpu"), dims=dims) for rank in range(12)]
    assert [world.batch_rank for world in worlds] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert {world.batch_ranks for world in worlds} == {6}
    assert [world.is_main for world in worlds] == [True] + [False] * 11
    assert dims.replicas_of(1) == [1, 7]


@pytest.mark.parametrize("kind", ["auto", "single", "ddp", "fsdp", "hsdp"])
def test_a_layout_recorded_by_its_kind_is_the_preset_of_that_name(kind):
    replicas = 2 if kind == "hsdp" else 1
    once = ParallelConfig.model_validate(REST | {"kind": kind, "replicas": replicas})
    preset = yaml.safe_load((config_root() / "parallel" / f"{kind}.yaml").read_text())
    assert once == ParallelConfig.model_validate(preset | REST)
