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
The Triton kernels do the same among their own launches: ``pdn.ops.triton.borders``.
Attention, which has no such state, gathers the keys and values of all pieces with ``gather``.
What communicates is an operator, so that a compiled block is one graph. Letters: B batch, T time
(of the piece), H heads, K key size, V value size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pdn.ops import exchange
from pdn.ops.chunkwise import document_ids
from pdn.ops.rows import ends_of_rows
from pdn.ops.types import (
    DiagonalPreconditioner,
    RecurrentState,
    accumulation_dtype,
    materialise,
)


@dataclass(frozen=True)
class Piece:
    """Describes this rank's piece of every sequence of a batch.

    Attributes:
        group: the ranks that share the sequences, in the order of their pieces.
        index, count: which piece this is, of how many; all have the same number of tokens.
        batch, time: sequences, and tokens of the piece.
        cu_seqlens: documents of the whole sequences, as the ops take them; None for none.
        name: of the group, for ``pdn.ops.exchange``.
        documents: the piece's own cu_seqlens, of as many entries; None if there are none.
        reach: [B] int64: how many tokens before the piece are of the document of the row's first
            token; None without documents.
        rows: [3, B] int64: numbers, in ``documents``, of those of each row's first and last token,
            and whether (1 or 0) the first one goes on from the piece before; None likewise.
    """

    group: Any
    index: int
    count: int
    batch: int
    time: int
    cu_seqlens: Tensor | None = None
    name: str = field(init=False, default="")
    documents: Tensor | None = field(init=False, default=None)
    reach: Tensor | None = field(init=False, default=None)
    rows: Tensor | None = field(init=False, default=None)

    def __post_init__(self):
        # here, once for all layers, and outside of what is traced
        object.__setattr__(self, "name", exchange.name_of(self.group))
        if self.cu_seqlens is None:
            return
        whole = self.count * self.time
        row, place = self.cu_seqlens // whole, self.cu_seqlens % whole
        own = row * self.time + (place - self.start).clamp(0, self.time)
        own = own.clamp(max=self.batch * self.time)  # what pads
        begins = torch.arange(self.batch, device=own.device, dtype=own.dtype) * whole + self.start
        document = torch.searchsorted(self.cu_seqlens, begins, right=True) - 1
        reach = (begins - self.cu_seqlens[document]).long()
        rows = torch.stack([*ends_of_rows(own, self.batch, self.time), (reach > 0).long()])
        for name, value in dict(documents=own, reach=reach, rows=rows).items():
            object.__setattr__(self, name, value)

    @property
    def start(self) -> int:
        """Return how many tokens of a sequence are before the piece."""
        return self.index * self.time

    @property
    def ranks(self) -> dict[str, Any]:
        """Return what operators take of the ranks: the name of their group, and the numbers."""
        return dict(group=self.name, index=self.index, count=self.count)

    def continues(self, device: torch.device) -> Tensor:
        """Return [B] bool: whether the row's first token belongs to a document begun before."""
        if self.reach is None:
            return torch.full((self.batch,), self.index > 0, device=device)
        return self.reach > 0


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
    before, _ = _incoming(added, transition, piece.name, piece.index, piece.count)
    return before


@torch.library.custom_op("pdn::incoming", mutates_args=())
def _incoming(
    added: Tensor, transition: Tensor | None, group: str, index: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return the state before the piece, and the transitions of the pieces after it."""
    exchange.phase("exchange")
    if transition is None:
        every, passing = exchange.all_gather(added, group, count), None
    else:
        every, passing = exchange.gather_together([added, transition], group, count)
    before = exchange.before(every[:index], passing)
    later = added.new_empty(0) if passing is None else passing[index + 1 :].clone()
    exchange.phase("other")
    return before.contiguous(), later


@_incoming.register_fake
def _(added, transition, group, index, count):
    later = (0,) if transition is None else (count - 1 - index, *transition.shape)
    return added.new_empty(added.shape), added.new_empty(later)


@torch.library.custom_op("pdn::incoming_backward", mutates_args=())
def _incoming_backward(
    d_before: Tensor, before: Tensor, transition: Tensor | None, later: Tensor, group: str,
    index: int, count: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of ``_incoming``'s tensors, the second empty if there was none."""
    exchange.phase("exchange")
    every = exchange.all_gather(d_before, group, count)
    adjoint = exchange.after(every[index + 1 :], None if transition is None else later)
    if transition is None:
        d_transition = d_before.new_empty(0)
    elif exchange.is_factor(transition):
        d_transition = (adjoint * before).sum_to_size(transition.shape)
    else:
        d_transition = adjoint @ before.mT
    exchange.phase("other")
    return adjoint.contiguous(), d_transition


@_incoming_backward.register_fake
def _(d_before, before, transition, later, group, index, count):
    of_transition = (0,) if transition is None else transition.shape
    return d_before.new_empty(d_before.shape), d_before.new_empty(of_transition)


def _save_incoming(ctx, inputs, output):
    _, transition, *ctx.ranks = inputs
    before, later = output
    ctx.save_for_backward(before, transition, later)
    ctx.mark_non_differentiable(later)


def _incoming_gradients(ctx, d_before, _):
    before, transition, later = ctx.saved_tensors
    d_added, d_transition = _incoming_backward(
        d_before.contiguous(), before, transition, later, *ctx.ranks
    )
    return d_added, None if transition is None else d_transition, None, None, None


_incoming.register_autograd(_incoming_gradients, setup_context=_save_incoming)


def gather(x: Tensor, piece: Piece) -> Tensor:
    """Return the tokens of all pieces, [B, count T, ...], from those of this one, [B, T, ...].

    Collective, and backward too: a piece's gradient is the sum of all ranks' for its tokens.
    """
    return _gather(x, piece.name, piece.count)


@torch.library.custom_op("pdn::gather_pieces", mutates_args=())
def _gather(x: Tensor, group: str, count: int) -> Tensor:
    """Return x of all ranks, one after the other on axis 1."""
    exchange.phase("exchange")
    whole = exchange.all_gather(x, group, count).transpose(0, 1).flatten(1, 2)
    exchange.phase("other")
    return whole


@_gather.register_fake
def _(x, group, count):
    return x.new_empty(x.shape[0], count * x.shape[1], *x.shape[2:])


@torch.library.custom_op("pdn::gather_pieces_backward", mutates_args=())
def _gather_backward(d_whole: Tensor, group: str, count: int) -> Tensor:
    """Return the sum of all ranks' d_whole for this one's part of axis 1."""
    exchange.phase("exchange")
    wide = d_whole.to(accumulation_dtype(d_whole))
    mine = exchange.reduce_scatter(wide.unflatten(1, (count, -1)).transpose(0, 1), group)
    exchange.phase("other")
    return mine.to(d_whole.dtype)


@_gather_backward.register_fake
def _(d_whole, group, count):
    return d_whole.new_empty(d_whole.shape[0], d_whole.shape[1] // count, *d_whole.shape[2:])


def _save_gather(ctx, inputs, output):
    _, *ctx.ranks = inputs


def _gather_gradients(ctx, d_whole):
    return _gather_backward(d_whole, *ctx.ranks), None, None


_gather.register_autograd(_gather_gradients, setup_context=_save_gather)


# ------------------------------------------------------------ the ops on a piece

# o and the state after the last token, from v and the state to start from, zero if None. With
# cu_seqlens the states are one a document.
Run = Callable[[Tensor, RecurrentState | None], tuple[Tensor, RecurrentState | None]]


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


def diagonal_preconditioner(
    curvature: Callable, k: Tensor, preconditioner: DiagonalPreconditioner,
    cu_seqlens: Tensor | None, piece: Piece,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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


def check_width(width: int, time: int) -> None:
    """Raise ValueError if a convolution's taps reach over a whole piece of ``time`` tokens."""
    if width - 1 > time:
        raise ValueError(
            f"a convolution of width {width} on pieces of {time} tokens: a tap reaches over "
            f"a whole piece; expected pieces of at least {width - 1} tokens: a smaller "
            "parallel.context"
        )


def inputs_before(x: Tensor, width: int, piece: Piece) -> Tensor:
    """Return what convolutions of ``width`` W reach before the piece, [B, W - 1, C].

    It is zero where it is not of the document of the row's first token.

    Args:
        x: [B, T, C], their inputs.
        width: W.
        piece: of this rank.
    """
    halo = width - 1
    if halo == 0:
        return x[:, :0]
    before = incoming(x[:, -halo:], None, piece)
    if piece.reach is None:
        return before
    distance = torch.arange(halo, 0, -1, device=before.device)
    return before * (distance <= piece.reach[:, None])[..., None]


def without_state(op: str, **given) -> None:
    """Raise ValueError for what only whole sequences have, if any of ``given`` was."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{op}: {name} was given for a piece of a sequence, whose state comes from the "
                "piece before; expected whole sequences: outside of pdn.ops.context.split"
            )
