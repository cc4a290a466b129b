"""Whether a run can fit into this machine at all, before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pdn.distributed.world import World
from pdn.errors import ConfigError
from pdn.store.local import format_bytes
from pdn.training.carry import state_bytes
from pdn.training.config import RunConfig

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_STATE_BYTES = {"adamw": 16}  # a parameter with its gradient and two moments, in float32
_OTHER_STATE_BYTES = 12


def require_memory(config: RunConfig, world: World) -> None:
    """Raise ``ConfigError`` if the least that this run needs on a rank is more than there is.

    The estimate is a lower bound: parameters, gradients, optimiser state, the residual stream of
    every block, and the batches that are made ahead. What passes may still not fit.

    Args:
        config: where the model's vocabulary is not settled yet, that of the data counts.
    """
    device, host = _parts(config, world)
    if world.device.type == "cuda":
        total = torch.cuda.get_device_properties(world.device).total_memory
        _compare(device, total, world.device, "the device has")
    else:
        host = {name: size for name, size in (*host.items(), *device.items())}
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    whole = {name: size * ranks for name, size in host.items()}
    _compare(whole, host_memory(), "this machine", "it has")


def _parts(config: RunConfig, world: World) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of a rank by what they are for, on the device and in host memory."""
    t, p, d = config.trainer, config.parallel, config.data
    vocabulary = config.model.vocab_size or getattr(d, "vocab_size", None) or 2
    model = config.model.model_copy(update={"vocab_size": vocabulary})
    shards = p.dims(world.size).parameter_ranks
    parameters = model.num_params()
    bytes_each = _STATE_BYTES.get(config.optim.kind, _OTHER_STATE_BYTES)
    state = parameters * (bytes_each + (4 if config.optim.ema is not None else 0)) // shards
    at_once = min(d.seq_len // p.context, t.piece_tokens or d.seq_len)
    tokens = t.micro_batch_size * at_once
    stream = tokens * model.num_layers * model.d_model * 2
    batch = t.global_batch_size // world.batch_ranks * d.seq_len * 8
    device = {f"{parameters:,} parameters with their state": state}
    carried = state_bytes(config, bf16=config.trainer.precision != "fp32") // world.batch_ranks
    if carried:
        device["the states of the rows (data.carry_windows)"] = carried
    activations = f"micro-batches of {t.micro_batch_size} x {at_once:,} tokens"
    host = {f"{d.prefetch_steps + 1} batches of {t.global_batch_size} sequences": batch * (
        d.prefetch_steps + 1
    )}  # fmt: skip
    if p.cpu_offload:
        return {activations: stream}, host | device
    return device | {activations: stream}, host


def _compare(parts: dict[str, int], total: int | None, where: object, has: str) -> None:
    needed = sum(parts.values())
    if total is None or needed <= total:
        return
    listed = ", ".join(
        f"{format_bytes(size)} for {name}"
        for name, size in sorted(parts.items(), key=lambda item: -item[1])
    )
    raise ConfigError(
        "MEMORY",
        f"{where}: this run needs at least {format_bytes(needed)} ({listed}); {has} "
        f"{format_bytes(total)}; expected a run that fits: a smaller model, "
        "trainer.micro_batch_size or data.seq_len, or more ranks",
    )


def host_memory() -> int | None:
    """Return the bytes of memory of this machine, or the container; None where nothing tells."""
    try:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (OSError, ValueError):
        found = []
    for name in _CGROUPS:
        try:
            text = Path(name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if text.isdecimal():
            found.append(int(text))
    return min(found, default=None)
