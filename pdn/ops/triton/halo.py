"""The short convolutions of a piece of longer sequences, whose taps reach over to another rank.

The exchange is within the operators, so that the gradient of what the next rank read is added to
the last rows of dx where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdn.ops import exchange
from pdn.ops.context import Piece
from pdn.ops.triton.convolution import (
    backward_pass,
    document_starts,
    empty_results,
    forward_pass,
)


def convolve_parts(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, cu_seqlens: Tensor | None,
    piece: Piece,
) -> list[Tensor]:  # fmt: skip
    """See ``pdn.ops.short_convolutions``; all weights have one width, of two taps or more."""
    weights, biases = ([y.contiguous() for y in parameters] for parameters in (weights, biases))
    starts = None
    if cu_seqlens is not None:
        batch, time = x.shape[:2]
        starts = document_starts(cu_seqlens, batch * time)
        starts[: batch * time : time] = 0  # a row's first document goes on from what is before
    found = convolution_of_piece(x, weights, biases, starts, piece.reach, *piece.ranks.values())
    return found[: len(found) - len(weights)]


@torch.library.custom_op("pdn::short_convolutions_of_piece", mutates_args=())
def convolution_of_piece(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], starts: Tensor | None,
    reach: Tensor | None, group: str, index: int, count: int,
) -> list[Tensor]:  # fmt: skip
    """Return what ``convolution.forward_pass`` does, and the inputs before, [B, W - 1, C_i] each.

    Args:
        x, weights, biases: as there; all weights have one width W.
        starts: of ``document_starts``, without those at the rows' first tokens.
        reach, group, index, count: of ``pdn.ops.context.Piece``.
    """
    exchange.phase("exchange")
    sizes, halo = _sizes(weights)
    tails = exchange.all_gather(x[:, x.shape[1] - halo :, : sum(sizes)], group, count)
    before = exchange.before(tails[:index], None)
    before = [part.contiguous() for part in _reached(before, reach).split(sizes, -1)]
    exchange.phase("other")
    return [*forward_pass(x, weights, biases, starts, before), *before]


@torch.library.custom_op("pdn::short_convolutions_of_piece_backward", mutates_args=())
def convolution_of_piece_backward(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], starts: Tensor | None,
    reach: Tensor | None, before: list[Tensor], dys: list[Tensor], group: str, index: int,
    count: int,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of x, of every weight, and of every bias."""
    sizes, halo = _sizes(weights)
    found = backward_pass(x, weights, biases, starts, dys, before)
    exchange.phase("exchange")
    given = len(found) - len(weights)
    adjoints = exchange.all_gather(_reached(torch.cat(found[given:], -1), reach), group, count)
    found[0][:, x.shape[1] - halo :, : sum(sizes)] += exchange.after(adjoints[index + 1 :], None)
    exchange.phase("other")
    return found[:given]


def _sizes(weights: list[Tensor]) -> tuple[list[int], int]:
    """Return the channels of each weight, and how many inputs before a token all read."""
    return [weight.shape[0] for weight in weights], weights[0].shape[1] - 1


def _reached(before: Tensor, reach: Tensor | None) -> Tensor:
    """Return ``before`` [B, W - 1, C], zero where it is not of the row's first document."""
    if reach is None:
        return before
    distance = torch.arange(before.shape[1], 0, -1, device=before.device)
    return before * (distance <= reach[:, None])[..., None]


@convolution_of_piece.register_fake
def _(x, weights, biases, starts, reach, group, index, count):
    sizes, halo = _sizes(weights)
    before = [x.new_empty(x.shape[0], halo, size) for size in sizes]
    return [*empty_results(x, weights), *before]


@convolution_of_piece_backward.register_fake
def _(x, weights, biases, starts, reach, before, dys, group, index, count):
    return [x.new_empty(x.shape), *(y.new_empty(y.shape) for y in (*weights, *biases))]


def _save(ctx, inputs, output):
    x, weights, biases, starts, reach, *ctx.ranks = inputs
    before = output[len(output) - len(weights) :]
    ctx.save_for_backward(x, starts, reach, *before, *weights, *biases)
    ctx.weights = len(weights)


def _gradients(ctx, dys):
    x, starts, reach, *rest = ctx.saved_tensors
    n = ctx.weights
    before, weights, biases = rest[:n], rest[n : 2 * n], rest[2 * n :]
    dys = [dy.contiguous() for dy in dys[: len(dys) - n]]
    dx, *found = convolution_of_piece_backward(
        x, weights, biases, starts, reach, before, dys, *ctx.ranks
    )
    return dx, found[:n], found[n:], None, None, None, None, None


convolution_of_piece.register_autograd(_gradients, setup_context=_save)
