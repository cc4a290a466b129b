"""What a step returns, and how its numbers reach the host without a wait."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pdn.distributed.world import World


class StepOutput(NamedTuple):
    """Holds scalars on the device: of all ranks, equal on all."""

    loss: Tensor  # mean over all counted tokens, nats
    grad_norm: Tensor  # before clipping; of a rank that differs, only its own is not finite
    found_inf: Tensor  # 1.0: loss or norm was not finite on some rank, and nothing was updated


def agree_on_finite(loss: Tensor, norm: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Sum the loss over the ranks, and tell in the same exchange whether any was not finite.

    Nothing waits for the device. Collective.

    Args:
        loss: of this rank's samples.
        norm: of the gradients.
        world: this process among its peers.

    Returns:
        The loss, and 1.0 or 0.0.
    """
    mine = torch.stack([loss, (~norm.isfinite()).to(loss)])
    loss, spoiled = world.sum(mine).unbind()
    return loss, (~loss.isfinite() | (spoiled > 0)).float()


class HostCopy:
    """Holds a small tensor on its way from the device, to be read when later work is under way."""

    def __init__(self, values: Tensor):
        self._event = None
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """Return the values, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


@dataclass
class StepResult:
    """Holds one optimiser step. ``read`` gives the numbers; until then it may still be computed.

    Attributes:
        step: its number, from 1.
        first_sample, end_sample: the samples that it consumed, [first, end).
        sample_digests: of this rank's samples.
        lr: peak of the configuration times the schedule's fraction.
        data_seconds: for which the host waited for its batch.
        seconds: from the end of the step before to its own; set when it is read.
    """

    step: int
    first_sample: int
    end_sample: int
    sample_digests: Tensor
    lr: float
    data_seconds: float
    output: HostCopy
    seconds: float = 0.0
    _numbers: list[float] = field(default_factory=list, repr=False)

    def read(self) -> None:
        """Wait for the numbers."""
        self._numbers = self.output.read()

    @property
    def loss(self) -> float:
        return self._numbers[0]

    @property
    def grad_norm(self) -> float:
        return self._numbers[1]

    @property
    def skipped(self) -> bool:
        """Return whether the update was skipped, on all ranks."""
        return bool(self._numbers[2])
