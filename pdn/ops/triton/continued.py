"""The short convolutions of rows that go on from states, and the states that they leave.

The latter are results of the operators, so that their gradients are added to the last rows of dx
where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdn.ops.triton.convolution import (
    backward_pass,
    document_starts,
    empty_results,
    forward_pass,
)


def convolve_parts(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], states: Sequence[Tensor], *,
    cu_seqlens: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """See ``pdn.ops.short_convolutions``; all weights have one width W, and x has W - 1 tokens."""
    weights, biases, states = (
        [y.contiguous() for y in tensors] for tensors in (weights, biases, states)
    )
    starts = None
    if cu_seqlens is not None:
        batch, time = x.shape[:2]
        starts = document_starts(cu_seqlens, batch * time)
        starts[: batch * time : time] = 0  # a row's first document goes on from its state
    found = continued_convolution(x, weights, biases, starts, states)
    tails = found[len(found) - len(weights) :]
    return found[: -len(weights)], [
        tail.to(state.dtype) for tail, state in zip(tails, states, strict=True)
    ]


@torch.library.custom_op("pdn::continued_convolutions", mutates_args=())
def continued_convolution(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], starts: Tensor | None,
    states: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Return what ``convolution.forward_pass`` does, and the next states, [B, W - 1, C_i] each.

    Args:
        x, weights, biases: as there; all weights have one width W.
        starts: of ``document_starts``, without those at the rows' first tokens.
        states: [B, W - 1, C_i], the inputs before every row.
    """
    sizes, halo = _sizes(weights)
    tails = _of_the_last_document(x[:, x.shape[1] - halo :, : sum(sizes)], starts, x.shape[1])
    found = forward_pass(x, weights, biases, starts, states)
    return [*found, *(part.clone() for part in tails.split(sizes, -1))]


@torch.library.custom_op("pdn::continued_convolutions_backward", mutates_args=())
def continued_convolution_backward(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], starts: Tensor | None,
    states: list[Tensor], dys: list[Tensor], dtails: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of x, of every weight, of every bias, and of every state."""
    sizes, halo = _sizes(weights)
    found = backward_pass(x, weights, biases, starts, dys, states)
    dtail = _of_the_last_document(torch.cat(dtails, -1), starts, x.shape[1])
    found[0][:, x.shape[1] - halo :, : sum(sizes)] += dtail
    return found


def _sizes(weights: list[Tensor]) -> tuple[list[int], int]:
    """Return the channels of each weight, and how many inputs before a token all read."""
    return [weight.shape[0] for weight in weights], weights[0].shape[1] - 1


def _of_the_last_document(tail: Tensor, starts: Tensor | None, time: int) -> Tensor:
    """Return ``tail`` [B, W - 1, C], the rows' ends, zero where another document begins later."""
    if starts is None:
        return tail
    batch, halo = tail.shape[:2]
    starts = starts[: batch * time].view(batch, time)[:, time - halo :]
    later = starts.flip(1).cumsum(1).flip(1) - starts
    return tail.masked_fill((later > 0)[..., None], 0)


@continued_convolution.register_fake
def _(x, weights, biases, starts, states):
    sizes, halo = _sizes(weights)
    return [*empty_results(x, weights), *(x.new_empty(x.shape[0], halo, size) for size in sizes)]


@continued_convolution_backward.register_fake
def _(x, weights, biases, starts, states, dys, dtails):
    return [x.new_empty(x.shape), *(y.new_empty(y.shape) for y in (*weights, *biases, *states))]


def _save(ctx, inputs, output):
    x, weights, biases, starts, states = inputs
    ctx.save_for_backward(x, starts, *weights, *states, *biases)
    ctx.weights = len(weights)


def _gradients(ctx, dys):
    x, starts, *rest = ctx.saved_tensors
    n = ctx.weights
    weights, states, biases = rest[:n], rest[n : 2 * n], rest[2 * n :]
    dys = [dy.contiguous() for dy in dys]
    dx, *found = continued_convolution_backward(
        x, weights, biases, starts, states, dys[:-n], dys[-n:]
    )
    return dx, found[:n], found[n : len(found) - n], None, found[len(found) - n :]


continued_convolution.register_autograd(_gradients, setup_context=_save)
