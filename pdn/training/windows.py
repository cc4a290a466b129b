"""Gradients through the states between consecutive windows, with one window in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# The states of a model's blocks, as ``LanguageModel.forward`` takes and returns them
State = Any
# The loss of a window and the state after it, from the window's number and the state before it
Window = Callable[[int, State], tuple[Tensor, State]]


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Return a state of the same form, with ``function`` of every tensor."""
    return tree_map(lambda x: None if x is None else function(x), state)


def leaves_of(state: State) -> list[Tensor]:
    """Return the tensors of a state, always in the same order."""
    return [x for x in tree_leaves(state) if x is not None]


def ended(state: State, tokens: Tensor, eos_id: int) -> State:
    """Return the state for the next window: zero in rows whose document ends with this one.

    Args:
        state: after the window, [B, ...].
        tokens: [B, T], of the window.
        eos_id: what ends a document.
    """
    over = tokens[:, -1] == eos_id
    return map_state(lambda x: x.masked_fill(over.view(-1, *[1] * (x.ndim - 1)), 0), state)


def backpropagate(run: Window, state: State, count: int) -> tuple[Tensor, State]:
    """Add the gradients of the sum of the losses of ``count`` consecutive windows.

    They are those of one sequence of that many windows which starts from ``state``: exact through
    the states in between. All windows but the last are first computed without gradient, for the
    states that they start from; then each, from the last to the first, with the gradient that the
    next one has for its state. So a window's activations are in memory once, for another forward
    pass of all windows but the last.

    Args:
        run: of a window; called with gradients once for each, from the last to the first.
        state: before the first window, through which nothing goes back.
        count: windows.

    Returns:
        The sum of the losses and the state after the last window, without gradients.
    """
    starts = [map_state(Tensor.detach, state)]
    with torch.no_grad():
        for number in range(count - 1):
            starts.append(run(number, starts[-1])[1])
    total, final, adjoint = None, None, []
    for number in reversed(range(count)):
        before = starts.pop()
        if number:
            before = map_state(lambda x: x.detach().requires_grad_(), before)
        loss, after = run(number, before)
        if final is None:
            final = map_state(Tensor.detach, after)
        reached = [
            (x, gradient)
            for x, gradient in zip(leaves_of(after), adjoint, strict=bool(adjoint))
            if gradient is not None and x.requires_grad
        ]
        torch.autograd.backward(
            [loss, *(x for x, _ in reached)], [None, *(gradient for _, gradient in reached)]
        )
        adjoint = [x.grad for x in leaves_of(before)] if number else []
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None  # there is a window
    return total, final
