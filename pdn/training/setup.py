"""What a launch does before its first step: open the data, find where to continue, build."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from pdn import ops
from pdn.checkpoint.find import VerifiedCheckpoint
from pdn.checkpoint.manager import Checkpointer
from pdn.checkpoint.recorded import recorded_fingerprint
from pdn.distributed.collectives import gather_or_raise, run_or_raise
from pdn.distributed.fsdp import parallelise
from pdn.distributed.world import World
from pdn.errors import ConfigError, Preempted
from pdn.hub.fla_model import language_model
from pdn.logging.progress import engineering, passing_line, peak_flops
from pdn.optim.container import OptimizerContainer
from pdn.optim.optimizers import build_optimizer
from pdn.runs.directory import RunDirectory
from pdn.runs.schema import config_changes
from pdn.training.branches import inherited_fingerprint
from pdn.training.carry import describe_carried, state_bytes
from pdn.training.config import RunConfig, attention_mixer
from pdn.training.continuation import require_same_run
from pdn.training.initial import InitialWeights
from pdn.training.phases import Course
from pdn.training.signals import Interrupted, StopRequest
from pdn.wording import counted

log = logging.getLogger(__name__)


def uses_bf16(config: RunConfig, world: World) -> bool:
    """Return whether forward passes compute in bfloat16."""
    precision = config.trainer.precision
    return precision == "bf16" or (precision == "auto" and world.device.type == "cuda")


def repeats_bits(config: RunConfig, device: torch.device) -> bool:
    """Return whether a step that is computed again has the bits of the first time.

    Only the backward pass of softmax attention has not on a GPU: its programs add in any order,
    whichever of PyTorch's kernels it is, unless torch's deterministic algorithms are asked for.
    """
    alone = attention_mixer(config) is None
    return config.trainer.deterministic or device.type == "cpu" or alone


def prepare_torch(config: RunConfig, world: World) -> None:
    """Set torch's process-wide switches and seed."""
    torch.manual_seed(config.seed)  # for layers that draw; a checkpoint restores its state
    torch.use_deterministic_algorithms(config.trainer.deterministic)
    if world.device.type == "cuda":
        if config.trainer.deterministic:
            # A pass over every new tensor, none of which is read before it is written.
            torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
            # or every product raises
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        bf16 = uses_bf16(config, world)
        torch.set_float32_matmul_precision("high" if bf16 else "highest")
    ops.set_default_backend(config.ops.backend)


def open_run_data(
    config: RunConfig,
    world: World,
    directory: RunDirectory,
    open_data: Callable,
    stop: StopRequest,
):
    """Open the data of a run for this rank; they are the same on every rank. Collective.

    Args:
        config: of the run.
        world: this process among its peers.
        directory: of the run, which tells what it was trained on so far.
        open_data: opens them from their configuration.
        stop: ends the opening when a signal arrives.

    Raises:
        Preempted: a signal arrived meanwhile.
        ConfigError: another corpus or tokenizer on another node.
    """
    open_data = functools.partial(open_data, recorded=_recorded(config, directory))
    data = run_or_raise(lambda: _open(config, world, open_data, stop))
    _require_same_data(data)
    return data


def _open(config: RunConfig, world: World, open_data: Callable, stop: StopRequest):
    try:
        with passing_line(enabled=world.is_main) as progress, stop.interruptible():
            return open_data(
                config.data,
                global_batch_size=config.trainer.global_batch_size,
                seed=config.data_seed,
                rank=world.batch_rank,
                world_size=world.batch_ranks,
                progress=progress,
            )
    except Interrupted as signal:
        raise Preempted(
            "PREEMPTED",
            f"{signal}: stopped while the data were opened, no step is lost; launch again to "
            "continue",
        ) from None


def _recorded(config: RunConfig, directory: RunDirectory) -> dict[str, object] | None:
    """Return what the run that is continued was trained on, or None for a new one."""
    own = None
    if config.resume not in ("never", "restart"):
        own = recorded_fingerprint(directory.checkpoints)
    return inherited_fingerprint(config) if own is None else own


def _require_same_data(data) -> None:
    """Refuse nodes that have another corpus or tokenizer under the same path.

    They would train on batches that do not belong together.
    """
    first, *others = gather_or_raise(lambda: data.fingerprint | data.validation_fingerprint)
    for rank, other in enumerate(others, start=1):
        for key in first.keys() | other.keys():
            if first.get(key) != other.get(key):
                raise ConfigError(
                    "DATA-RANKS",
                    f"{key}: rank 0 found {first.get(key)!r}, rank {rank} {other.get(key)!r}; "
                    "expected the same data on every node",
                )


def find_checkpoint(
    config: RunConfig, data, directory: RunDirectory, checkpointer: Checkpointer
) -> VerifiedCheckpoint | None:
    """Return the checkpoint to continue from, of the data that the run was trained on.

    Args:
        config: of the run; ``resume`` says which.
        data: the opened data.
        directory: of the run.
        checkpointer: of its checkpoints.

    Returns:
        None for a run that starts.
    """
    if config.resume == "never":
        if gather_or_raise(directory.has_progress)[0]:
            raise ConfigError(
                "RESUME",
                f"resume = never: {directory.path} already holds a run; expected another "
                "name= or resume=auto",
            )
        return None
    which = "auto" if config.resume == "restart" else config.resume
    found = checkpointer.find(which)
    if found is None:
        gather_or_raise(directory.require_nothing_lost)
        return None
    fingerprint = data.fingerprint
    gather_or_raise(lambda: require_same_run(found, config, fingerprint, directory))
    return found


def build(
    config: RunConfig,
    world: World,
    found: VerifiedCheckpoint | None,
    data,
    checkpointer: Checkpointer,
) -> tuple[nn.Module, OptimizerContainer]:
    """Build the model and its optimiser. Collective.

    They are as ``found`` has them, or else ``init_from``, or else initialised.

    Args:
        config: of the run, with its vocabulary.
        world: this process among its peers.
        found: the checkpoint to continue from, if any.
        data: the opened data, whose tokenizer ``init_from`` must share.
        checkpointer: makes sure that a checkpoint fits on the disk, and loads ``found``.
    """
    with torch.device("meta"):
        model = language_model(config.model)
    weights = None
    if found is not None:
        found.require_fit(model)
    elif (source := config.init_from) is not None:
        weights = run_or_raise(
            lambda: InitialWeights(
                source, data.tokenizer_path, any_tokenizer=config.init_tokenizer == "any"
            )
        )
        weights.require_fit(model)
    states = state_bytes(config, uses_bf16(config, world))
    optimizer_bytes = build_optimizer(model, config.optim).state_bytes()
    checkpointer.preflight(model, optimizer_bytes + states)
    model = parallelise(model, config.parallel, world, seed=config.seed)
    optimizer = build_optimizer(model, config.optim)
    if found is not None:
        checkpointer.load(found, model, optimizer)
        _keep_eps(found, config, optimizer, is_main=world.is_main)
    elif weights is not None:
        weights.load(model)
    mine = [states // world.batch_ranks] if states else []
    checkpointer.reserve(model, optimizer.local_state_sizes() + mine)
    return model, optimizer


def _keep_eps(
    found: VerifiedCheckpoint, config: RunConfig, optimizer: OptimizerContainer, *, is_main: bool
) -> None:
    """Go on with the ``eps`` that a checkpoint was trained with where only its rule is another.

    Earlier versions did not scale it with the width and the depth. A branch that has another base
    or another ``eps`` than its parent takes its own.
    """
    then, numbers = found.side.get("run", {}).get("identity"), found.hyperparameters
    if then is None or not isinstance(numbers, dict):
        return  # older than the bases
    changed = {key for key, *_ in config_changes(then, config.identity())}
    if changed & {"model.base_width", "model.base_depth", "optim.eps"}:
        return
    if optimizer.keep_eps(numbers) and is_main:
        log.warning(
            "step-%d: trained with an eps that an earlier version of pdn did not scale with width "
            "and depth; it stays so in this run. To have it scaled, start under another name",
            found.step,
        )


def announce(
    config: RunConfig, world: World, data, course: Course, path: Path, start: tuple[int, int],
    say: Callable,
) -> None:  # fmt: skip
    """Say what the launch will do.

    Args:
        config: of the run.
        world: this process among its peers.
        data: the opened data, at the place that it starts from.
        course: of the run.
        path: the run's directory.
        start: the steps taken, 0 for a new run, and the next sample.
        say: takes a line.
    """
    t, (step, sample) = config.trainer, start
    tokens = course.stage(step).tokens_per_step
    whole = course.tokens(t.steps)
    say(f"run      {path}" + (f", continuing from step {step}" if step else ""))
    if config.branch_from is not None:
        say(f"branch   from {config.branch_from}")
    by = "" if config.model.implementation == "own" else ", which flash-linear-attention computes"
    say(f"model    {config.model.name}, {config.model.num_params():,} parameters{by}")
    ahead = data.ahead(course.plan(step, t.steps, sample))
    say(
        "data     "
        + ahead.describe(sample + course.samples(step, t.steps))
        .removeprefix("data: ")
        .replace("\n", "\n         ")
    )
    precision = "bf16" if uses_bf16(config, world) else "fp32"
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    unknown = world.device.type == "cuda" and peak_flops(world.device) is None
    note = "; its peak rate is not known here: no mfu" if unknown else ""
    if not repeats_bits(config, world.device):
        note += "; attention repeats its bits with trainer.deterministic=true only, more slowly"
    say(f"device   {world.size} x {device}, {precision}{note}")
    say(f"plan     {counted(t.steps, 'step')} of {tokens:,} tokens, {engineering(whole)} in all")
    for line in course.lines(t.steps):
        say(f"         {line}")
    carried = describe_carried(config, world, uses_bf16(config, world))
    if carried is not None:
        say(f"carried  {carried}")
