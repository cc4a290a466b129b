"""Sequences whose pieces lie on several ranks, in order: what the ops exchange at the borders.

While a ``Piece`` is in effect (``split``), the tokens that the ops get are this rank's piece of
longer sequences, and they compute what one rank would of the whole. Whatever carries a state over
a border is described by the same two things, the state that its piece adds to a start from zero,
and the operator that takes the state before the piece to its part of the state after it::

    state after = transition (state before) + added

- A of the preconditioner, before S, whose write keys need it. Its transition is a decay a head.
- S of the offline solve. Its transition is a decay a head or a channel.
- S of the online solve, whose transition is a matrix, in one scan: K more columns of v, zero, start
  from the identity instead of from zero. What they hold at the end is the transition, and what the
  queries read from them is how each output depends on the state before.
- The short convolution: the state is the last W - 1 inputs, and nothing passes through a piece.

``incoming`` combines them over the ranks, forward and backward; a new recurrence needs no more.
Attention, which has no such state, gathers the keys and values of all pieces with ``gather``.
Letters: B batch, T time (of the piece), H heads, K key size, V value size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pdn.ops.chunkwise import document_ids
from pdn.ops.rows import ends_of_rows
from pdn.ops.types import RecurrentState, accumulation_dtype, materialise, uncompiled


@dataclass(frozen=True)
class Piece:
    """Describes this rank's piece of every sequence of a batch.

    Attributes:
        group: the ranks that share the sequences, in the order of their pieces.
        index, count: which piece this is, of how many; all have the same number of tokens.
        batch, time: sequences, and tokens of the piece.
        cu_seqlens: documents of the whole sequences, as the ops take them; None for none.
    """

    group: Any
    index: int
    count: int
    batch: int
    time: int
    cu_seqlens: Tensor | None = None

    @property
    def start(self) -> int:
        """Return how many tokens of a sequence are before the piece."""
        return self.index * self.time

    def documents(self, before: int = 0) -> Tensor | None:
        """Return the piece's own cu_seqlens, of as many entries; None if there are no documents.

        before: tokens of the piece before that are put ahead of each row; then with B + 1 entries
            more, and what is ahead of the first piece is a document by itself.
        """
        if self.cu_seqlens is None:
            return None
        whole, time = self.count * self.time, self.time + before
        row, place = self.cu_seqlens // whole, self.cu_seqlens % whole
        found = row * time + (place - self.start + before).clamp(0, time)
        found = found.clamp(max=self.batch * time)  # what pads, from ``before`` on
        if before:
            rows = torch.arange(self.batch + 1, device=found.device, dtype=found.dtype) * time
            found = torch.cat([found, rows]).sort().values
        return found

    def continues(self, device: torch.device) -> Tensor:
        """Return [B] bool: whether the row's first token belongs to a document begun before."""
        if self.cu_seqlens is None:
            return torch.full((self.batch,), self.index > 0, device=device)
        first = torch.arange(self.batch, device=device, dtype=self.cu_seqlens.dtype)
        first = first * (self.count * self.time) + self.start
        return self.cu_seqlens[torch.searchsorted(self.cu_seqlens, first)] != first


_piece: Piece | None = None


def current() -> Piece | None:
    """Return the piece in effect; None where the ops have whole sequences."""
    return _piece


@contextlib.contextmanager
def split(piece: Piece | None) -> Iterator[None]:
    """Have the ops take their tokens for ``piece``, in forward and backward passes within.

    It holds for all threads of the process: backward passes run in threads of their own.
    """
    global _piece
    before, _piece = _piece, piece
    try:
        yield
    finally:
        _piece = before


# ------------------------------------------------------------ what passes a border


def incoming(added: Tensor, transition: Tensor | None, piece: Piece) -> Tensor:
    """Return the state before the piece; zeros before the first one. Collective, and backward too.

    Differentiable by both arguments: backward the adjoint passes from the last piece to the first.

    Args:
        added: [..., K, V], the state after the piece if the one before it is zero.
        transition: [..., K, K], a matrix; [..., K or 1, 1], a factor; None: nothing passes. Zero
            where a document begins at or within the piece.
        piece: of this rank.
    """
    return _Incoming.apply(added, transition, piece)


class _Incoming(torch.autograd.Function):
    @staticmethod
    def forward(ctx, added: Tensor, transition: Tensor | None, piece: Piece) -> Tensor:
        tensors = [added] if transition is None else [added, transition]
        pieces = _all_gather(tensors, piece)
        before = torch.zeros_like(added)
        for part, *passing in pieces[: piece.index]:
            before = part + _through(passing[0], before) if passing else part
        after = [passing[0] for _, *passing in pieces[piece.index + 1 :] if passing]
        ctx.piece, ctx.passes = piece, transition is not None
        ctx.save_for_backward(before, transition, *after)
        return before

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_before: Tensor):
        before, transition, *after = ctx.saved_tensors
        piece: Piece = ctx.piece
        pieces = _all_gather([d_before], piece)
        # the adjoint of the state after this piece, from the last piece backwards
        adjoint = torch.zeros_like(d_before)
        for number in range(piece.count - 1, piece.index, -1):
            [adjoint_here] = pieces[number]
            if ctx.passes:
                adjoint_here = adjoint_here + _back(after[number - piece.index - 1], adjoint)
            adjoint = adjoint_here
        if not ctx.passes:
            return adjoint, None, None
        if _is_factor(transition):
            return adjoint, (adjoint * before).sum_to_size(transition.shape), None
        return adjoint, adjoint @ before.mT, None


def _is_factor(transition: Tensor) -> bool:
    return transition.shape[-1] == 1


def _through(transition: Tensor, state: Tensor) -> Tensor:
    return transition * state if _is_factor(transition) else transition @ state


def _back(transition: Tensor, adjoint: Tensor) -> Tensor:
    return transition * adjoint if _is_factor(transition) else transition.mT @ adjoint


def _all_gather(tensors: list[Tensor], piece: Piece) -> list[list[Tensor]]:
    """Return the tensors of every piece, in order; of one dtype, in one exchange."""
    flat = torch.cat([x.reshape(-1) for x in tensors])
    everyone = list(flat.new_empty(piece.count, flat.numel()))
    dist.all_gather(everyone, flat, group=piece.group)
    sizes = [x.numel() for x in tensors]
    return [
        [part.view(x.shape) for part, x in zip(found.split(sizes), tensors, strict=True)]
        for found in everyone
    ]


@uncompiled  # it communicates
def gather(x: Tensor, piece: Piece) -> Tensor:
    """Return the tokens of all pieces, [B, count T, ...], from those of this one, [B, T, ...].

    Collective, and backward too: a piece's gradient is the sum of all ranks' for its tokens.
    """
    return _Gather.apply(x, piece)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, piece: Piece) -> Tensor:
        ctx.piece = piece
        return torch.cat([part for [part] in _all_gather([x], piece)], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_whole: Tensor):
        wide = d_whole.to(accumulation_dtype(d_whole))
        parts = [part.contiguous() for part in wide.chunk(ctx.piece.count, 1)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=ctx.piece.group)
        return mine.to(d_whole.dtype), None


# ------------------------------------------------------------ the ops on a piece

# o and the state after the last token, from v and the state to start from, zero if None. With
# cu_seqlens the states are one a document.
Run = Callable[[Tensor, RecurrentState | None], tuple[Tensor, RecurrentState | None]]


@uncompiled  # it communicates
def online(run: Run, v: Tensor, key_dim: int, cu_seqlens: Tensor | None, piece: Piece) -> Tensor:
    """Compute o [B, T, HV, V] of any recurrence that is linear in v and in its state.

    Args:
        run: of a backend.
        v: [B, T, HV, V].
        key_dim: K, of the state.
        cu_seqlens: documents of the piece.
        piece: of this rank.
    """
    batch, time, heads, width = v.shape
    dtype = accumulation_dtype(v)
    identity = torch.eye(key_dim, device=v.device, dtype=dtype)
    identity = identity * piece.continues(v.device)[:, None, None, None]
    start = torch.cat([identity.new_zeros(batch, 1, key_dim, width), identity], -1)
    start = start.expand(-1, heads, -1, -1)
    first, last = ends_of_rows(cu_seqlens, batch, time)
    if cu_seqlens is not None:
        rows, start = start, start.new_zeros(cu_seqlens.shape[0] - 1, *start.shape[1:])
        start = start.index_copy(0, first, rows)
    o, final = run(torch.cat([v, v.new_zeros(*v.shape[:3], key_dim)], -1), RecurrentState(start))
    assert final is not None  # ``run`` returns its state
    S = final.S if cu_seqlens is None else final.S[last]
    with torch.autocast(v.device.type, enabled=False):
        before = incoming(S[..., :width], S[..., width:], piece)
        o, reach = o.split([width, key_dim], -1)
        from_before = torch.einsum("bthk,bhkv->bthv", reach.to(dtype), before)
        return (o + from_before).to(v.dtype)


@uncompiled  # it communicates
def offline(
    run: Run, q: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None,
    piece: Piece,
) -> Tensor:  # fmt: skip
    """Compute o [B, T, HV, V] of a recurrence whose state only decays and takes up.

    Args:
        run: of a backend.
        q: [B, T, HV, K], as it reads from the state: normalised and scaled.
        v: [B, T, HV, V].
        log_decay: [B, T, HV] or [B, T, HV, K].
        cu_seqlens: documents of the piece.
        piece: of this rank.
    """
    o, final = run(v, None)
    assert final is not None  # ``run`` returns its state
    _, last = ends_of_rows(cu_seqlens, *v.shape[:2])
    added = final.S if cu_seqlens is None else final.S[last]
    with torch.autocast(v.device.type, enabled=False):
        if log_decay is None:
            log_decay = q.new_zeros(*v.shape[:2], 1)
        reach = _reach(log_decay.to(added.dtype), cu_seqlens, piece)
        reach = reach if reach.ndim == 4 else reach[..., None]
        before = incoming(added, reach[:, -1, ..., None], piece)
        from_before = torch.einsum("bthk,bhkv->bthv", reach * q.to(added.dtype), before)
        return (o + from_before).to(v.dtype)


def _reach(log_decay: Tensor, cu_seqlens: Tensor | None, piece: Piece) -> Tensor:
    """Return what each token finds left of the state before the piece, of log_decay's shape."""
    batch, time = log_decay.shape[:2]
    reached = piece.continues(log_decay.device)[:, None]
    if cu_seqlens is not None:
        ids = document_ids(cu_seqlens, batch, time)
        reached = reached & (ids == ids[:, :1])
    return log_decay.cumsum(1).exp() * reached.view(*reached.shape, *[1] * (log_decay.ndim - 2))


@uncompiled  # it communicates
def diagonal_preconditioner(
    curvature: Callable, k: Tensor, preconditioner, cu_seqlens: Tensor | None, piece: Piece
) -> tuple[Tensor, Tensor]:
    """Compute B [B, T, H, K] and A after each row's last token [B, H, K].

    Args:
        curvature: of a backend; A of every token, from zero.
        k, preconditioner: as of ``pdn.ops.diagonal_preconditioner``.
        cu_seqlens: documents of the piece.
        piece: of this rank.
    """
    with torch.autocast(k.device.type, enabled=False):
        A, _ = curvature(k, preconditioner, A=None, cu_seqlens=cu_seqlens)
        log_decay = materialise(preconditioner.log_decay).to(A.dtype)
        reach = _reach(log_decay, cu_seqlens, piece)
        before = incoming(A[:, -1, :, :, None], reach[:, -1, :, None, None], piece)
        A = A + reach[..., None] * before[:, None, ..., 0]
        return preconditioner.rescaling(A), A[:, -1]


@uncompiled  # it communicates
def short_convolution(
    run: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, width: int, piece: Piece
) -> Tensor:
    """Convolve x [B, T, C] with the last W - 1 inputs of the piece before ahead of it.

    Args:
        run: convolves a longer x of the documents given.
        x: [B, T, C].
        width: W.
        piece: of this rank.

    Raises:
        ValueError: a tap that reaches over a whole piece.
    """
    halo = width - 1
    if halo > x.shape[1]:
        raise ValueError(
            f"a convolution of width {width} on pieces of {x.shape[1]} tokens: a tap reaches over "
            f"a whole piece; expected pieces of at least {halo} tokens: a smaller parallel.context"
        )
    if halo == 0:
        return run(x, piece.documents())
    before = incoming(x[:, -halo:], None, piece)
    return run(torch.cat([before, x], 1), piece.documents(halo))[:, halo:]


def without_state(op: str, **given) -> None:
    """Raise ValueError for what only whole sequences have, if any of ``given`` was."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{op}: {name} was given for a piece of a sequence, whose state comes from the "
                "piece before; expected whole sequences: outside of pdn.ops.context.split"
            )
