"""What ranks that share sequences exchange, and what it gives together, in order.

Everything that carries a state over the border of two pieces is linear in it::

    state after a piece = transition (state before) + added

``before`` puts the pieces before one together, ``after`` the adjoints of those behind it. Letters:
K key size, V value size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Operators take a name in place of a process group.
_groups: dict[str, Any] = {}

# PyTorch's newer names, and those that it calls deprecated from then on
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def name_of(group: Any) -> str:
    """Return the name by which ``gather`` finds a process group; empty for None."""
    if group is None:
        return ""
    _groups[group.group_name] = group
    return group.group_name


def all_gather(x: Tensor, group: str, count: int) -> Tensor:
    """Return x of every rank, in order: [count, *x.shape]. Collective; the host does not wait."""
    everyone = x.new_empty(count * x.numel())
    _gather(everyone, x.reshape(-1), group=_groups[group])
    return everyone.view(count, *x.shape)


def reduce_scatter(parts: Tensor, group: str) -> Tensor:
    """Return the sum over all ranks of this rank's one of ``parts`` [count, ...]. Collective."""
    mine = parts.new_empty(parts[0].numel())
    _scatter(mine, parts.reshape(-1), group=_groups[group])
    return mine.view(parts.shape[1:])


def gather_together(tensors: list[Tensor], group: str, count: int) -> list[Tensor]:
    """Return several tensors of one dtype of every rank, [count, ...] each, in one exchange."""
    if len(tensors) == 1:
        return [all_gather(tensors[0], group, count)]
    flat = all_gather(torch.cat([x.reshape(-1) for x in tensors]), group, count)
    parts = flat.split([x.numel() for x in tensors], 1)
    return [part.reshape(count, *x.shape) for part, x in zip(parts, tensors, strict=True)]


def before(added: Tensor, transitions: Tensor | None) -> Tensor:
    """Return the state after some pieces in a row, the first of which starts from zero.

    Args:
        added: [pieces, ..., K, V], of every piece that starts from zero.
        transitions: [pieces, ..., K, K], matrices; [pieces, ..., K or 1, 1], factors; None: nothing
            passes through a piece. That of the first one does not matter.
    """
    return _chained(added, transitions, range(len(added)), _through)


def after(adjoints: Tensor, transitions: Tensor | None) -> Tensor:
    """Return the adjoint of the state before some pieces in a row, the last ones of a sequence.

    Args:
        adjoints: [pieces, ..., K, V], of the states before every piece, by that piece alone.
        transitions: as of ``before``; that of the last piece does not matter.
    """
    return _chained(adjoints, transitions, range(len(adjoints) - 1, -1, -1), _back)


def _chained(parts: Tensor, transitions: Tensor | None, order: range, pass_on: Callable) -> Tensor:
    state = None
    for piece in order if transitions is not None else order[-1:]:
        if state is None or transitions is None:
            state = parts[piece]
        else:
            state = parts[piece] + pass_on(transitions[piece], state)
    return parts.new_zeros(parts.shape[1:]) if state is None else state


def is_factor(transition: Tensor) -> bool:
    """Return whether a transition multiplies by a number, of all or of a row."""
    return transition.shape[-1] == 1


def _through(transition: Tensor, state: Tensor) -> Tensor:
    return transition * state if is_factor(transition) else _product(transition, state)


def _back(transition: Tensor, adjoint: Tensor) -> Tensor:
    return transition * adjoint if is_factor(transition) else _product(transition.mT, adjoint)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float64: float32 products may be set to ten bits, and these are few."""
    return (a.double() @ b.double()).to(b.dtype)


# ------------------------------------------------------------ where the time goes

# What is under way from now on: "local summary", "exchange", "combine", "scan" or "other".
_clock: Callable[[str], None] | None = None


@contextlib.contextmanager
def clocked(clock: Callable[[str], None]) -> Iterator[None]:
    """Tell ``clock`` the name of every part of the work on pieces as it begins, for a benchmark."""
    global _clock
    _clock = clock
    try:
        yield
    finally:
        _clock = None


def phase(name: str) -> None:
    """Say what begins, if anybody asked."""
    if _clock is not None:
        _clock(name)
