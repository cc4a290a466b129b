"""A moving average of a model's weights, kept while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pdn.distributed.fsdp import local_part, reshard

UPDATES = "updates"  # among ``tensors``; no parameter has a name without a dot
_RAMP = 9.0


class WeightAverage:
    """Averages weights exponentially, in float32, sharded as the parameters are.

    After the n-th update it moves towards the weights by ``max(1 - decay, 9 / (n + 8))``: the first
    weights are taken over as they are, and while there were few updates the average is one of about
    the last tenth of them. A skipped update counts its unchanged weights once more, so that the
    host never waits for the device.

    Args:
        parameters: by name; float32, on any device, also meta.
        decay: what is kept of the average in an update, in (0, 1).

    Attributes:
        updates: how many there were, a float32 scalar on the host.
        before_change: called before average and weights change places.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.parameters, self.decay = dict(parameters), decay
        self.updates = torch.zeros(())
        self.before_change: Callable[[], None] = lambda: None
        self._averages: dict[str, Tensor] = {}  # empty before the first update

    @property
    def exists(self) -> bool:
        """Return whether there is an average: from the first update on."""
        return bool(self._averages)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights."""
        if not self._averages:
            self.allocate()
        self.updates += 1
        moves = max(1 - self.decay, _RAMP / (float(self.updates) + _RAMP - 1))
        averages, weights = self._local()
        # torch has no public name for it.
        torch._foreach_lerp_(averages, weights, moves)  # pyright: ignore[reportPrivateImportUsage]

    def tensors(self) -> dict[str, Tensor]:
        """Return the average by parameter, and ``updates``; live, and empty before the first."""
        return {**self._averages, UPDATES: self.updates} if self._averages else {}

    def clear(self) -> None:
        """Forget all updates."""
        self._averages, self.updates = {}, torch.zeros(())

    def allocate(self) -> dict[str, Tensor]:
        """Begin again with zeros, and return them as ``tensors`` does, to be read into."""
        self.clear()
        self._averages = {
            name: torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
            for name, parameter in self.parameters.items()
        }
        return self.tensors()

    @contextlib.contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Have ``model``, whose parameters these are, compute with the average. Collective.

        Afterwards weights and average have the bits of before. Takes the memory of one parameter.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        self.before_change()
        reshard(model)  # or gathered copies of the weights would stay in use
        for average, weight in zip(*self._local(), strict=True):
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)

    def _local(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's parts of averages and weights, in one order."""
        averages = [local_part(average) for average in self._averages.values()]
        return averages, [local_part(self.parameters[name]) for name in self._averages]

    def local_sizes(self) -> list[int]:
        """Return the bytes of each of ``tensors`` that this rank will keep."""
        parts = [local_part(parameter) for parameter in self.parameters.values()]
        return [part.numel() * part.element_size() for part in parts] + [4]
