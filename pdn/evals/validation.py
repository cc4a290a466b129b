"""Validation loss on held-out text, in lockstep on all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdn.distributed.collectives import any_rank, raise_on_all_ranks
from pdn.distributed.fsdp import compute_in
from pdn.distributed.world import World
from pdn.evals.sequences import SequenceLosses
from pdn.logging.progress import perplexity
from pdn.models.layers import document_positions
from pdn.models.state import ended

FIRST_BUCKET = 16  # positions; each bucket ends four times later than the one before
SLICE_TOKENS = 4096  # whose logits are in float32 at a time


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    world: World,
    *,
    bf16: bool,
    token_bytes: Tensor | None = None,
    accuracy: bool = False,
    ends: list[int] | None = None,
    alive: Callable[[], None] = lambda: None,
    windows: int = 1,
    eos_id: int = -1,
    sequences: SequenceLosses | None = None,
) -> dict[str, float]:
    """Compute means over all counted tokens of all ranks.

    Args:
        model: of the trainer, possibly sharded or compiled.
        batches: dicts of tokens and labels [B, T] (and cu_seqlens); every rank must get the same
            number of them, since a sharded model communicates in each forward pass. Labels of -100
            are not counted.
        world: the ranks.
        bf16: run the forward pass under autocast to bfloat16.
        token_bytes: int64 [vocab], from ``token_bytes.token_bytes``; None where tokens are not
            text.
        ends: of the buckets of positions, ascending, the last one T; None takes 16, 64, 256, ….
        accuracy: also count how often the likeliest token is the label; materialises the logits.
        alive: called before each batch.
        windows: consecutive batches whose rows continue each other, with the recurrences' states;
            1: every batch starts from zero.
        eos_id: what ends a document; read only for such batches of isolated documents.
        sequences: receives the loss of each.

    Returns:
        ``loss`` in nats a token, ``perplexity``, ``tokens``, the number counted; ``bits_per_byte``
            with ``token_bytes``; ``accuracy`` if asked for; and ``loss_by_position@<end>``: the
            loss of the tokens with fewer than ``end`` tokens of their document before them, but not
            fewer than the previous bucket's end. It falls with the position where context helps.
    """
    was_training = model.training
    model.eval()
    try:
        rows = Rows(model, windows, eos_id) if windows > 1 else None
        sums = _Sums(world.device, token_bytes, ends, sequences)
        _add_all(sums, model, batches, world, bf16, accuracy, alive, rows)
        return sums.result(world)
    finally:
        model.train(was_training)


def _add_all(
    sums: _Sums,
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    world: World,
    bf16: bool,
    accuracy: bool,
    alive: Callable[[], None],
    rows: Rows | None,
) -> None:
    """Add the batches of this rank to ``sums``; see ``evaluate``."""
    for batch in _in_step(batches):
        alive()
        batch = {key: value.to(world.device, non_blocking=True) for key, value in batch.items()}
        labels, cu_seqlens = batch["labels"], batch.get("cu_seqlens")
        time, positions = labels.shape[1], _positions(labels, cu_seqlens)
        digests = None if sums.sequences is None else sums.sequences.digests(labels)
        if rows is not None:
            time, positions = rows.begin(batch["tokens"], cu_seqlens, positions)
        tokens, labels, positions = (
            world.context.piece_of(x) for x in (batch["tokens"], labels, positions)
        )
        right = None
        split = world.context.split(tokens, cu_seqlens)
        with compute_in(world.device, bf16), split as cu_seqlens:
            if accuracy:
                losses, right = _read(model(tokens, cu_seqlens=cu_seqlens).logits, labels)
            elif rows is not None:
                losses = rows.losses(tokens, labels, cu_seqlens)
            else:
                losses = model(tokens, labels=labels, cu_seqlens=cu_seqlens).losses
        sums.add(losses, labels, positions, time, right, digests)


def _read(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropies, and whether the likeliest token is the label, [B, T] each.

    In slices: in float32 the logits of a batch take twice the memory of a bfloat16 model's, and
    their cross entropy as much again.
    """
    slices = zip(
        logits.flatten(0, -2).split(SLICE_TOKENS), labels.flatten().split(SLICE_TOKENS), strict=True
    )
    read = [
        (F.cross_entropy(part.float(), label, reduction="none"), part.argmax(-1) == label)
        for part, label in slices
    ]
    losses, right = (torch.cat(parts).view(labels.shape) for parts in zip(*read, strict=True))
    return losses, right


class Rows:
    """Carries states and positions over batches whose rows continue each other.

    Args:
        model: of the trainer, possibly sharded or compiled.
        windows: of a segment: batches from one start from zero to the next.
        eos_id: what ends a document.
    """

    def __init__(self, model: Any, windows: int, eos_id: int):
        self.model, self.windows, self.eos_id = model, windows, eos_id
        self._number, self._state = 0, None
        self._before = torch.zeros(0)  # tokens before the window, of the document it begins with

    def begin(
        self, tokens: Tensor, cu_seqlens: Tensor | None, positions: Tensor
    ) -> tuple[int, Tensor]:
        """Return the tokens of a segment, and how many of its document are before each, [B, T].

        Args:
            tokens: [B, T], of the next window.
            cu_seqlens: its documents, if they are isolated.
            positions: [B, T], the same within the window.
        """
        time = tokens.shape[1]
        if self._number % self.windows == 0:
            self._state, self._before = None, torch.zeros_like(tokens[:, 0])
        self._number += 1
        first = positions == torch.arange(time, device=positions.device)
        positions = positions + self._before[:, None] * first
        self._before = positions[:, -1] + 1
        if cu_seqlens is not None:
            self._before = self._before.masked_fill(tokens[:, -1] == self.eos_id, 0)
        return self.windows * time, positions

    def losses(self, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Return the losses [B, T] of the window, and keep the states after it."""
        if self._state is None:
            self._state = self.model.init_state(len(tokens))
        found = self.model(tokens, labels=labels, cu_seqlens=cu_seqlens, state=self._state)
        isolated = cu_seqlens is not None
        self._state = ended(found.state, tokens, self.eos_id) if isolated else found.state
        return found.losses


def _positions(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Count the tokens of its document before each token, [B, T]."""
    if cu_seqlens is None:
        return torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)
    return document_positions(cu_seqlens, *labels.shape)


def _in_step(batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the same batches; where reading one fails on any rank, every rank raises.

    The others would wait in the next forward pass of a sharded model for ever.
    """
    source = iter(batches)
    while True:
        found, failure = None, None
        try:
            found = next(source, None)
        except Exception as error:
            failure = error
        if any_rank(failure is not None):
            raise_on_all_ranks(failure)
        if found is None:
            return
        yield found


def bucket_ends(length: int) -> list[int]:
    """Return 16, 64, 256, … up to the first that holds ``length``, which is then the last."""
    ends = [FIRST_BUCKET]
    while ends[-1] < length:
        ends.append(4 * ends[-1])
    return [min(end, length) for end in ends]


class _Sums:
    """Sums over this rank's tokens.

    They are one float64 tensor, so that the ranks add them up in one step.
    """

    SLOTS = 4  # loss, tokens, bytes, right

    def __init__(
        self,
        device: torch.device,
        token_bytes: Tensor | None,
        ends: list[int] | None,
        sequences: SequenceLosses | None,
    ):
        self.sequences = sequences
        self.token_bytes = None if token_bytes is None else token_bytes.to(device)
        self.totals = torch.zeros(self.SLOTS, dtype=torch.float64, device=device)
        self.ends = ends
        self.by_position = torch.zeros(0, 2, dtype=torch.float64, device=device)  # loss, tokens
        self.accuracy = False

    def add(
        self,
        losses: Tensor,
        labels: Tensor,
        positions: Tensor,
        time: int,
        right: Tensor | None,
        digests: Tensor | None,
    ) -> None:
        """Add the losses [B, T] of tokens with ``positions`` [B, T] others before them.

        The sequences have ``time`` tokens and the names ``digests``; T are here.
        """
        counted = labels >= 0
        losses = losses.double() * counted
        if self.sequences is not None and digests is not None:
            self.sequences.add(digests, losses, counted)
        self.totals[0] += losses.sum()
        self.totals[1] += counted.sum()
        if self.token_bytes is not None:
            self.totals[2] += (self.token_bytes[labels.clamp(min=0)] * counted).sum()
        if right is not None:
            self.accuracy = True
            self.totals[3] += (right & counted).sum()
        if not len(self.by_position):
            self.ends = self.ends or bucket_ends(time)
            self.by_position = self.by_position.new_zeros(len(self.ends), 2)
        bucket = torch.bucketize(
            positions.contiguous(), torch.tensor(self.ends, device=labels.device), right=True
        )
        for column, values in enumerate((losses, counted.double())):
            self.by_position[:, column].index_add_(0, bucket.flatten(), values.flatten())

    def result(self, world: World) -> dict[str, float]:
        loss_sum, tokens, bytes_, right = world.sum(self.totals).tolist()
        by_position = world.sum(self.by_position).tolist()
        loss = loss_sum / max(1.0, tokens)
        found = {"loss": loss, "tokens": int(tokens)}
        if self.token_bytes is not None and bytes_ > 0:
            found["bits_per_byte"] = loss_sum / bytes_ / math.log(2)
        if self.accuracy:  # answers, not text: they have no perplexity
            found["accuracy"] = right / max(1.0, tokens)
        else:
            found["perplexity"] = perplexity(loss)
        for end, (bucket_sum, count) in zip(self.ends or [], by_position, strict=False):
            if count:
                found[f"loss_by_position@{end}"] = bucket_sum / count
        return found
