"""Long sequences whose activations are in memory a piece at a time.

A sequence is cut into pieces along time, which continue each other with the recurrences' states:
the loss and the gradient are those of the whole sequence (``pdn.training.windows``). What is in
memory of the whole is its tokens, and the states that its pieces start from. An attention layer's
state is the keys and values of all tokens before; it does not tell documents apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pdn.distributed.fsdp import compute_in, last_micro_batch
from pdn.distributed.world import World
from pdn.models.language_model import LanguageModel
from pdn.models.state import State, clear_rows
from pdn.ops.context import Piece
from pdn.training.windows import backpropagate


@dataclass(frozen=True)
class Part:
    """Holds a piece of every sequence of a micro-batch.

    Attributes:
        tokens, labels: [B, t].
        cu_seqlens: its own documents, [N + 1] as for windows of t; None without isolation.
        begins: [B] bool, rows in which no document goes on from the piece before.
    """

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    begins: Tensor


def cut(micro: dict[str, Tensor], size: int) -> list[Part]:
    """Cut a micro-batch into pieces.

    Args:
        micro: ``tokens`` and ``labels`` [B, T], and ``cu_seqlens`` where documents are isolated.
        size: tokens of a piece, which divide T.
    """
    batch, time = micro["tokens"].shape
    tokens, labels = (micro[key].split(size, dim=1) for key in ("tokens", "labels"))
    found = []
    for number in range(time // size):
        piece = Piece(None, number, time // size, batch, size, micro.get("cu_seqlens"))
        begins = ~piece.continues(micro["tokens"].device)
        found.append(Part(tokens[number], labels[number], _documents(piece), begins))
    return found


def _documents(piece: Piece) -> Tensor | None:
    """Return the piece's own cu_seqlens, without the slots of what lies in other pieces.

    The ops take and return a state for each slot. Nothing waits for the device: how many slots a
    piece needs follows from those of the whole, which are as many as there can be documents of some
    least length (``pdn.data.pack.boundary_slots``).
    """
    found = piece.documents
    if found is None:
        return None
    whole = piece.count * piece.time
    inside = (len(found) - 1) // piece.batch  # a row has at most so many starts
    per_row = 2 + math.ceil((piece.time - 1) * inside / max(1, whole - 1))
    slots = min(len(found), piece.batch * per_row + 1)
    first = torch.ones_like(found, dtype=torch.bool)
    first[1:] = found[1:] != found[:-1]
    kept = found.new_full((slots,), piece.batch * piece.time)
    return kept.scatter_(0, first.cumsum(0) - 1, found)


def accumulate_in_pieces(
    model: nn.Module,
    micro: dict[str, Tensor],
    counted: Tensor,
    world: World,
    *,
    size: int,
    last: bool,
    bf16: bool,
    keep_gathered: bool,
    z_loss: float,
) -> Tensor:
    """Add the gradients of one micro-batch, from its last piece to its first.

    Collective. All pieces but the last take another forward pass.

    Args:
        model: as ``parallelise`` returned it; with attention layers only if there are no documents.
        micro: as of ``cut``.
        counted: labels that count, over all ranks and micro-batches.
        world: this process among its peers.
        size: tokens of a piece.
        last: whether it is the step's last micro-batch.
        bf16, keep_gathered, z_loss: as of ``pdn.training.step.accumulate_gradients``.

    Returns:
        This rank's shares of the losses, [1] or [2], as there.
    """
    parts = cut(micro, size)
    shares = torch.zeros(2 if z_loss else 1, device=world.device)

    def run(number: int, state: State) -> tuple[Tensor, State]:
        part, training = parts[number], torch.is_grad_enabled()
        last_micro_batch(model, training and last and number == 0, keep_gathered=keep_gathered)
        with compute_in(world.device, bf16):
            found = model(
                part.tokens, labels=part.labels, cu_seqlens=part.cu_seqlens, state=state,
                z_loss=z_loss,
            )  # fmt: skip
        share, after = found.loss_sum / counted, found.state
        if training and z_loss:
            shares.add_(torch.stack([found.losses.sum(), found.z_losses.sum()]) / counted)
        elif training:
            shares.add_(share.detach())
        if number + 1 < len(parts):
            after = clear_rows(after, parts[number + 1].begins)
        return share, after

    with compute_in(world.device, bf16):
        zero = cast("LanguageModel", model).init_state(micro["tokens"].shape[0])
    backpropagate(run, zero, len(parts))
    return shares
