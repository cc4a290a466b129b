"""The mean of a run's last checkpoints, as a run that is evaluated and exported like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from pdn.checkpoint.format import committed_steps, step_directory
from pdn.checkpoint.manager import Checkpointer
from pdn.checkpoint.read import WEIGHTS, CheckpointReader
from pdn.checkpoint.state import model_tensors
from pdn.errors import ConfigError
from pdn.inference.load import load_trained, run_directory_of
from pdn.runs.directory import TOKENIZER
from pdn.store.local import storage_errors


def average(run: Path, last: int, out: Path) -> list[int]:
    """Write the mean of a run's last checkpoints into a directory of its own.

    The mean is taken in float64, tensor by tensor; whole numbers are those of the last. There is no
    optimiser's state: it cannot be resumed, but ``init_from`` takes it.

    Args:
        run: its directory.
        last: how many checkpoints, at least 2.
        out: must not exist yet.

    Returns:
        Their steps, ascending.

    Raises:
        ConfigError: too few checkpoints, or ``out`` exists.
        StorageError: one is damaged, or writing failed.
    """
    directory = run_directory_of(run)
    steps = committed_steps(directory / "checkpoints")
    if last < 2 or len(steps) < last:
        expected = f"last from 2 to {len(steps)}" if len(steps) > 1 else "two of them at least"
        raise ConfigError(
            "AVERAGE",
            f"{directory}: last = {last}, found the checkpoints {steps}; expected {expected}: keep "
            "more with checkpoint.keep_last or checkpoint.keep_every",
        )
    if out.exists():
        raise ConfigError("AVERAGE", f"out = {out}: exists; expected a new directory")
    steps = steps[-last:]
    checkpoints = [step_directory(directory / "checkpoints", step) for step in steps]
    loaded = load_trained(checkpoints[-1])
    mean = _mean([CheckpointReader(path) for path in checkpoints])
    for name, tensor in model_tensors(loaded.model).items():
        tensor.copy_(mean[name.removeprefix(WEIGHTS)])
    with storage_errors(out):
        (out / "checkpoints").mkdir(parents=True)
        for name in ("config.yaml", TOKENIZER, "metrics.jsonl"):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, out / name)
    writer = Checkpointer(out / "checkpoints", keep_last=1, keep_every=None, asynchronous=False)
    side = {"fingerprint": loaded.fingerprint, "average_of": [directory.name, *steps]}
    writer.save(steps[-1], loaded.model, [], side)
    return steps


def _mean(readers: list[CheckpointReader]) -> dict[str, Tensor]:
    """Return the mean of every weight; they are read one after the other."""
    found = {}
    for name in readers[-1]:
        newest = readers[-1][name]
        if newest.is_floating_point():
            whole = torch.zeros_like(newest, dtype=torch.float64)
            for reader in readers:
                whole += reader[name]
            newest = (whole / len(readers)).to(newest.dtype)
        found[name] = newest
    return found
