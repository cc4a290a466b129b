"""Memory of the host that holds a copy of a rank's tensors while they are written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

ALIGNMENT = 64
SLAB_BYTES = 256 << 20  # a power of two: torch rounds pinned memory up to one


class HostMemory:
    """Keeps slabs of host memory, pinned where there is a GPU, and places tensors in them.

    Allocating, pinning and first touching memory takes seconds for a large model: ``reserve`` does
    it before the first step, so that the first copy costs what the later ones do.
    """

    def __init__(self):
        self._slabs: list[Tensor] = []
        self._slab_bytes = 0

    def reserve(self, sizes: Iterable[int]) -> None:
        """Allocate what tensors of these sizes in bytes will need, and touch it."""
        self._place(list(sizes))

    def copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return uninitialised tensors of the same shapes and dtypes, by the same names.

        They share the memory of those that the last call returned.
        """
        names = list(tensors)
        places = self._place([_nbytes(tensors[name]) for name in names])
        return {
            name: memory.view(tensors[name].dtype).view(tensors[name].shape)
            for name, memory in zip(names, places, strict=True)
        }

    def clear(self) -> None:
        """Give the memory back."""
        self._slabs.clear()

    def _place(self, sizes: list[int]) -> list[Tensor]:
        """Return a piece of a slab for each size: the largest first, each where it first fits."""
        if not self._slabs:
            total = sum(_aligned(size) for size in sizes)
            self._slab_bytes = min(SLAB_BYTES, max(total, ALIGNMENT))
        used = [0] * len(self._slabs)
        places: dict[int, Tensor] = {}
        for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
            size = sizes[number]
            slab = next(
                (n for n, held in enumerate(used) if held + size <= len(self._slabs[n])), None
            )
            if slab is None:
                self._slabs.append(_new_slab(max(self._slab_bytes, size)))
                used.append(0)
                slab = len(used) - 1
            places[number] = self._slabs[slab][used[slab] : used[slab] + size]
            used[slab] += _aligned(size)
        return [places[number] for number in range(len(sizes))]


def _new_slab(size: int) -> Tensor:
    # Zeroed, so that the system gives the pages now and not in the copy.
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).zero_()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
