"""Gradients through the states between consecutive windows, with one window in memory at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pdn.models.state import State, leaves_of, map_state

# The loss of a window and the state after it, from the window's number and the state before it
Window = Callable[[int, State], tuple[Tensor, State]]


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
