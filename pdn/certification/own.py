"""Calls of the kernels of ``pdn.ops.kernels.KERNELS``, for certification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GRADIENT = "gradient of "


@dataclass
class OwnProblem:
    """Holds the arguments of one call, by name."""

    tensors: dict[str, Tensor]

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> OwnProblem:
        """Move all tensors and cast those of floating point."""
        return OwnProblem(
            {
                name: x.to(device, dtype) if x.is_floating_point() else x.to(device)
                for name, x in self.tensors.items()
            }
        )

    def run(self, function: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the outputs, and the gradients of all tensors of floating point.

        The gradients are those of the outputs' products with normal numbers.
        """
        inputs = {
            name: x.detach().requires_grad_(x.is_floating_point())
            for name, x in self.tensors.items()
        }
        outputs = function(**inputs)
        random = torch.Generator().manual_seed(0)
        cotangents = [
            torch.randn(x.shape, generator=random, dtype=torch.float64).to(x)
            for _, x in sorted(outputs.items())
        ]
        leaves = {name: x for name, x in inputs.items() if x.requires_grad}
        gradients = torch.autograd.grad(
            [x for _, x in sorted(outputs.items())], list(leaves.values()), cotangents
        )
        named = {f"{GRADIENT}{name}": x for name, x in zip(leaves, gradients, strict=True)}
        return {name: x.detach() for name, x in outputs.items()} | named
