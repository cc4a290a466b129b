"""Single tensors of a checkpoint, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pdn.checkpoint import state
from pdn.checkpoint.find import VerifiedCheckpoint, newest_verified
from pdn.checkpoint.shards import read_tensors
from pdn.errors import ConfigError, StorageError

Weights = Literal["last", "ema"]
_PRUNED_ATTEMPTS = 4  # to read a checkpoint of a run that goes on meanwhile
WEIGHTS, MOMENTS = "model.", "optim."


class CheckpointReader(Mapping[str, Tensor]):
    """Maps the names of a verified checkpoint's tensors to them: whole, on the CPU.

    Weights go by their parameter's name, ``blocks.0.mixer.q_proj.weight``; ``moments(name)`` gives
    what the optimiser keeps for one. A tensor is read from disk each time it is asked for. Nothing
    is unpickled.

    Attributes:
        path: of the checkpoint.
        step: optimiser steps behind it.
        side: what the trainer kept beside the tensors.
    """

    def __init__(self, path: str | Path):
        self._found = newest_verified(Path(path).expanduser())
        self.path, self.step, self.side = self._found.path, self._found.step, self._found.side
        self._names = [
            name.removeprefix(WEIGHTS)
            for name in self._found.manifest.tensors
            if name.startswith(WEIGHTS)
        ]

    def __getitem__(self, name: str) -> Tensor:
        return self._read([self._known(name)])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight, without reading it."""
        return tuple(self._found.manifest.tensors[self._known(name)][1])

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return what the optimiser keeps for a parameter: ``exp_avg``, ``exp_avg_sq`` and such.

        Empty if the checkpoint has no optimiser.
        """
        self._known(name)
        prefix = f"{MOMENTS}{name}."
        stored = [full for full in self._found.manifest.tensors if full.startswith(prefix)]
        keys = [full.removeprefix(prefix) for full in stored]
        return {
            key: tensor
            for key, tensor in zip(keys, self._read(stored), strict=True)
            if "." not in key
        }

    def _known(self, name: str) -> str:
        """Return the stored name of a weight.

        Raises:
            KeyError: there is none of this name; the message names the nearest.
        """
        if WEIGHTS + name not in self._found.manifest.tensors:
            near = get_close_matches(name, self._names, 1) or self._names[:1]
            raise KeyError(f"{name}: not in {self.path}; did you mean {near[0]}?")
        return WEIGHTS + name

    def _read(self, stored: list[str]) -> list[Tensor]:
        tensors = {}
        for full in stored:
            dtype, shape = self._found.manifest.tensors[full]
            tensors[full] = torch.empty(shape, dtype=getattr(torch, dtype))
        if tensors:
            read_tensors(tensors, self.path, self._found.manifest, None)
        return list(tensors.values())


def read_checkpoint(path: str | Path) -> CheckpointReader:
    """Open a checkpoint to read single tensors of it.

    Args:
        path: one checkpoint (``…/step-00000100``), a ``checkpoints`` directory, or a run's
            directory (its newest verified one).

    Raises:
        ConfigError: no such checkpoint.
        StorageError: it is damaged; every byte is compared with its manifest here.
    """
    return CheckpointReader(path)


def load_weights(
    source: Path | VerifiedCheckpoint, model: nn.Module, weights: Weights = "last"
) -> tuple[int, dict]:
    """Load a checkpoint's weights into a model, each rank by itself, whatever ranks saved it.

    For evaluation, generation, export and ``init_from``; the optimizer is not read.

    Args:
        source: what ``newest_verified`` found, or a path for it: one checkpoint
            (``…/step-00000100``), a ``checkpoints`` directory or a run directory (its newest
            verified one).
        model: receives them, sharded or not.
        weights: those of the last update, or their moving average (``optim.ema``).

    Returns:
        ``(step, side)`` of the checkpoint.

    Raises:
        ConfigError: no such checkpoint, one of another model, or one without an average; or no such
            weights.
        StorageError: it is damaged.
    """
    if weights not in ("last", "ema"):
        raise ConfigError("CKPT-WEIGHTS", f"weights = {weights!r}: expected last or ema")
    for attempt in range(_PRUNED_ATTEMPTS):
        found = source if isinstance(source, VerifiedCheckpoint) else newest_verified(Path(source))
        found.require_fit(model, resuming=False)
        try:
            wanted = state.model_tensors(model)
            if weights == "ema":
                wanted = state.averaged_tensors(model, found.manifest, found.path)
            read_tensors(wanted, found.path, found.manifest, None)
        except StorageError:
            # A run that is training may have pruned it since it was verified: take the next one.
            pruned = not isinstance(source, VerifiedCheckpoint) and not found.path.exists()
            if not pruned or attempt == _PRUNED_ATTEMPTS - 1:
                raise
            continue
        return found.step, found.side
    raise AssertionError("unreachable")
