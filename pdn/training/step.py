"""What a step returns, and how its numbers reach the host without a wait."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pdn.distributed.copies import HostCopy
from pdn.distributed.fsdp import compute_in, last_micro_batch
from pdn.distributed.world import World
from pdn.training.pieces import accumulate_in_pieces


class StepOutput(NamedTuple):
    """Holds scalars on the device: of all ranks, equal on all."""

    loss: Tensor  # mean over all counted tokens, nats
    grad_norm: Tensor  # before clipping; of a rank that differs, only its own is not finite
    found_inf: Tensor  # 1.0: loss or norm was not finite on some rank, and nothing was updated
    z_loss: Tensor | None = None  # mean likewise, times its coefficient; None: there is none


def accumulate_gradients(
    model: nn.Module,
    inputs: dict[str, Tensor],
    world: World,
    *,
    bf16: bool,
    keep_gathered: bool,
    z_loss: float,
    piece_tokens: int | None = None,
) -> Tensor:
    """Add up the gradients of this rank's share of the mean loss, over all micro-batches.

    Collective.

    Args:
        model: as ``parallelise`` returned it.
        inputs: of all micro-batches, on the device.
        world: this process among its peers.
        bf16: see ``compute_in``.
        keep_gathered: see ``last_micro_batch``.
        z_loss: its coefficient.
        piece_tokens: of a sequence, whose activations are in memory at once; None: the whole.

    Returns:
        This rank's shares of the mean cross entropy and, with a coefficient, of the mean z-loss:
        [1] or [2].
    """
    counted = world.sum((inputs["labels"] >= 0).sum())
    shares = torch.zeros(2 if z_loss else 1, device=world.device)
    micro_batches = len(inputs["tokens"])
    for i in range(micro_batches):
        micro = {key: value[i] for key, value in inputs.items()}
        tokens, last = micro["tokens"], i == micro_batches - 1
        if piece_tokens is not None and tokens.shape[1] > piece_tokens:
            shares += accumulate_in_pieces(
                model, micro, counted, world, size=piece_tokens, last=last, bf16=bf16,
                keep_gathered=keep_gathered, z_loss=z_loss,
            )  # fmt: skip
            continue
        last_micro_batch(model, last, keep_gathered=keep_gathered)
        with world.context.split(tokens, micro.get("cu_seqlens")) as cu_seqlens:
            with compute_in(world.device, bf16):
                output = model(tokens, labels=micro["labels"], cu_seqlens=cu_seqlens, z_loss=z_loss)
            share = output.loss_sum / counted
            share.backward()
        if z_loss:
            parts = output.losses.sum(), output.z_losses.sum()
            shares += torch.stack(parts) / counted
        else:
            shares += share.detach()
    return shares


def agree_on_finite(shares: Tensor, norm: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Sum losses over the ranks, and tell in the same exchange whether any was not finite.

    Nothing waits for the device. Collective.

    Args:
        shares: of this rank's samples, [n].
        norm: of the gradients.
        world: this process among its peers.

    Returns:
        The losses [n], and 1.0 or 0.0.
    """
    spoiled = (~norm.isfinite()).to(shares)
    summed = world.sum(torch.cat([shares, spoiled[None]]))
    losses = summed[:-1]
    return losses, (~losses.isfinite().all() | (summed[-1] > 0)).float()


@dataclass
class StepResult:
    """Holds one optimiser step. ``read`` gives the numbers; until then it may still be computed.

    Attributes:
        step: its number, from 1.
        first_sample, end_sample: the samples that it consumed, [first, end).
        sample_digests: of this rank's samples.
        lr: peak of the configuration times the schedule's fraction.
        data_seconds: for which the host waited for its batch.
        seconds: from the end of the step before to its own, by the device; set when it is read.
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
    def z_loss(self) -> float | None:
        """Return the mean z-loss, as ``loss`` is; None if the run has none."""
        return self._numbers[3] if len(self._numbers) > 3 else None

    @property
    def skipped(self) -> bool:
        """Return whether the update was skipped, on all ranks."""
        return bool(self._numbers[2])
