"""Whether this machine has the devices and packages that a run asks for."""

from __future__ import annotations

import importlib.util
import os

import torch

from pdn.errors import ConfigError


def check_devices(device: str, backend: str, implementation: str) -> None:
    """Refuse what a run cannot have here, before anything is opened or joined.

    Args:
        device: auto, cpu or cuda, as ``trainer.device``.
        backend: of the recurrences, as ``ops.backend``.
        implementation: of the model, as ``model.implementation``.

    Raises:
        ConfigError: no CUDA device where one is needed, fewer of them than processes on this node,
            or no package for the backend or the implementation.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda" and count == 0:
        raise ConfigError(
            "DEVICE",
            "trainer.device = cuda: found no usable CUDA device; expected one: set "
            "trainer.device=cpu or auto",
        )
    if device != "cpu" and 0 < count < processes:
        raise ConfigError(
            "DEVICE",
            f"--nproc-per-node {processes}: found {count} CUDA devices on this node; expected at "
            f"most one process a device: launch with --nproc-per-node {count}, or set "
            "trainer.device=cpu",
        )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for key, name, fix in (
        ("ops.backend", backend, "set ops.backend=auto"),
        ("model.implementation", implementation, "set model.implementation=own"),
    ):
        if name not in ("triton", "fla"):
            continue
        if (device == "cpu" or count == 0) and not interpreted:
            raise ConfigError(
                "DEVICE",
                f"{key} = {name}: found no CUDA device to run its kernels on; expected one: {fix}",
            )
        if name == "fla" and importlib.util.find_spec("fla") is None:
            raise ConfigError(
                "BACKEND",
                f"{key} = fla: found no such package; expected it installed: pip install "
                "'pdn[fla]'",
            )
