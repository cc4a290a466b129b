"""What the container asks of an optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdn.distributed.fsdp import local_part, scale_all


class GuardedOptimizer(torch.optim.Optimizer):
    """Takes steps that a number on the device may call off.

    Attributes:
        moments: names of its state of a parameter's size.
    """

    moments: tuple[str, ...]

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def guarded_step(self, found_inf: Tensor, clip: Tensor) -> None:
        """Take a step with gradients scaled by ``clip``, or none if ``found_inf``.

        It waits for the device, to read ``found_inf``; a subclass may decide there instead. See
        ``OptimizerContainer.step``.
        """
        if not found_inf:
            scale_gradients(self, clip)
            self.step()


def scale_gradients(optimizer: torch.optim.Optimizer, factor: Tensor) -> None:
    """Multiply the local parts of all gradients by a scalar tensor, in place."""
    gradients = [
        local_part(parameter.grad)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if gradients:
        scale_all(gradients, factor)
