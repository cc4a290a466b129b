"""Kernels beside those of the zoo: certification tries what stands in ``KERNELS``, too.

A module that brings one registers it when it is imported, in this package or outside of it.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pdn import ops, verdicts

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Kernel:
    """Describes a kernel, what it is to compute, and what it is tried on before it may run.

    Attributes:
        run: takes tensors by name and returns the outputs by name, all of them differentiable. An
            edited file of this function is tried anew, as are those of ``pdn/ops/triton``.
        definition: the same in plain torch; certification calls it in float64.
        problems: takes the sizes of a call and returns calls that try it: the arguments of ``run``
            by name, on the CPU, numbers in float64. With documents and states, if it takes them.
        tolerances: by dtype that it may run in, the relative L2 errors against float64 of an output
            and of a gradient: about twice what its own test finds.
    """

    run: Callable[..., Results]
    definition: Callable[..., Results]
    problems: Callable[..., list[dict[str, Tensor]]]
    tolerances: Mapping[torch.dtype, tuple[float, float]]

    def digest(self) -> str:
        """Hash the file of ``run``."""
        file = inspect.getsourcefile(inspect.unwrap(self.run))
        content = b"" if file is None else Path(file).read_bytes()
        return hashlib.sha256(content).hexdigest()[:12]


KERNELS: dict[str, Kernel] = {}


def register(name: str, kernel: Kernel) -> None:
    """Add a kernel.

    Raises:
        ValueError: there is one of that name.
    """
    if name in KERNELS:
        raise ValueError(f"kernel {name}: registered already; expected another name")
    KERNELS[name] = kernel


def uses_kernel(name: str, x: Tensor, *sizes: int, backend: ops.Backend | None = None) -> bool:
    """Return whether a registered kernel computes a call. Where not, its definition does.

    Args:
        name: of the kernel.
        x: what the device and the dtype of the call are of.
        sizes: all on which its compilation depends, as ``Kernel.problems`` takes them.
        backend: None: the one that ``ops.backend`` names. ``triton``: the kernel, come what may.
            ``auto``: the kernel on a GPU, in a dtype of its tolerances, once it is certified there.
    """
    backend = ops.named_backend(backend)
    if backend == "triton":
        return True
    if backend != "auto" or not x.is_cuda or x.dtype not in KERNELS[name].tolerances:
        return False
    return _certified(x.device, name, x.dtype, sizes)


def _certified(*configuration) -> bool:
    return verdicts.certifier().kernel_is_usable(*configuration)


# As in ``pdn.ops``: traced calls ask once, for real.
setattr(_certified, "_dynamo_marked_constant", True)  # noqa: B010 (no attribute of functions)
