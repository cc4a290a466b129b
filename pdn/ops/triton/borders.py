"""What passes from a piece of longer sequences to the next one, on another rank.

On a piece the kernels scan what they scan of segments, and the last segments of the B rows besides
(backward the first): so the piece's own part of the state after it, and its transition, come from
the launches that cut sequences anyway. The ranks exchange these, and then every scan starts from
the true state. Where sequences are not cut, a row is one segment. ``segment`` arrays, the parts,
transitions and starts, have the rows' ends behind the ``wholes``: [wholes + B, ...].

The state takes a transition [K, K] only through a piece between two others; the curvature of the
preconditioner, which all write keys need, goes first, with a factor a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdn.ops import exchange
from pdn.ops.triton.common import await_inputs
from pdn.ops.triton.compiled import cdiv, run
from pdn.ops.triton.contract import Inputs, Options, Saved
from pdn.ops.triton.curvature import SCAN, scan_kernel
from pdn.ops.triton.scan import combine_kernel
from pdn.ops.triton.sizes import Problem, padded

SLOTS = 64  # segments that a program of ``border_kernel`` has


@triton.jit(do_not_specialize=["N", "B", "wholes"])
def border_kernel(
    segments, rows, border, N, B, wholes, SEGMENT: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """border [wholes + N, 2] int32 of ``locate_border``: of every segment the one before it, of the
    first of a row's first document the row's end; and where what is after it goes, of the last of a
    row's last document the row's end. A program has SLOTS of them.

    segments [wholes + N, 4]: of ``documents.py``, SEGMENT > 0; rows [2, B]: the first and the last
    documents.
    """
    await_inputs()
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    keep = slot < wholes + N
    document = slot
    before = tl.full([SLOTS], -1, tl.int32)
    begins = keep
    if SEGMENT > 0:
        document = tl.load(segments + 4 * slot, mask=keep, other=-1)
        count = tl.load(segments + 4 * slot + 2, mask=keep, other=0)
        before = tl.load(segments + 4 * slot + 3, mask=keep, other=-1)
        begins = (before < 0) & (count > 0)  # a row that stands for no segment has no chunk
    place = tl.where(slot < wholes, slot, -1)
    for b in range(0, B):
        end = (wholes + b).to(tl.int32)
        before = tl.where(begins & (document == tl.load(rows + b)), end, before)
        place = tl.where((slot >= wholes) & (document == tl.load(rows + B + b)), end, place)
    tl.store(border + 2 * slot, before, mask=keep)
    tl.store(border + 2 * slot + 1, place, mask=keep)


def border_tables(p: Problem, rows: Tensor, saved: Saved) -> None:
    """Fill ``saved.border`` of documents, see ``border_kernel``."""
    run(border_kernel, (cdiv(p.wholes + p.N, SLOTS),),
        saved.segments, rows, saved.border, p.N, p.B, p.wholes,
        SEGMENT=p.segment, SLOTS=SLOTS, num_warps=4,
    )  # fmt: skip


def passes(rows: Tensor | None) -> Tensor | None:
    """Return [B], 1 where one document goes through the piece, 0 elsewhere; None: everywhere."""
    return None if rows is None else (rows[0] == rows[1]) * rows[2]


def of_rows(x: Tensor, documents: Tensor | None, factor: Tensor | None) -> Tensor:
    """Return x [N, ...] of one document a row [B], or x as it is, times ``factor`` [B]."""
    if documents is not None:
        x = x.index_select(0, documents)
    return x if factor is None else x * factor.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def of_documents(p: Problem, x: Tensor, documents: Tensor | None) -> Tensor:
    """Return x [B, ...] at one document a row, else zeros: [N, ...]."""
    if documents is None:
        return x
    return x.new_zeros(p.N, *x.shape[1:]).index_copy_(0, documents, x)


# ------------------------------------------------------------ the preconditioner's curvature


def scan(p: Problem, Z, initial, saved: Saved, before, last, *, reverse: bool, total=None) -> None:
    """Scan the curvature, or its adjoint, over chunks; see ``scan_kernel``."""
    options = p.common | dict(BK=16)
    run(scan_kernel, (p.N, p.HV, cdiv(p.K, 16)),
        Z, saved.curvature_gates, initial, saved.offsets, before, last, total, p.T,
        HAS_INITIAL=initial is not None, HAS_TOTAL=total is not None, REVERSE=reverse, L=SCAN,
        **options, num_warps=4,
    )  # fmt: skip


def curvature_before(
    p: Problem, i: Inputs, options: Options, saved: Saved, Z: Tensor, last: Tensor
) -> Tensor:
    """Return the curvature before the piece, [N, HV, K]. Collective.

    Args:
        p, i, options, saved: of the pass.
        Z: summaries of the chunks.
        last: [N, HV, K], to write to.
    """
    first_of, last_of, goes_on = (None,) * 3 if i.rows is None else i.rows
    total = last.new_empty(p.N, p.HV)
    scan(p, Z, None, saved, saved.A, last, reverse=False, total=total)
    decay = of_rows(total.exp(), last_of, passes(i.rows))[..., None]
    exchange.phase("exchange")
    added, decays = exchange.gather_together(
        [of_rows(last, last_of, None), decay], options.group, options.pieces
    )
    saved.curvature_passing.copy_(decays[options.piece + 1 :])
    before = exchange.before(added[: options.piece], decays)
    return of_documents(p, of_rows(before, None, goes_on), first_of)


def carry_after(
    p: Problem, i: Inputs, options: Options, saved: Saved, Z: Tensor, carry: Tensor, first: Tensor
) -> Tensor:
    """Return the adjoint of the curvature after the piece, [N, HV, K]. Collective.

    Args:
        p, i, options, saved: of the pass.
        Z: adjoint summaries of the chunks.
        carry: [NT, HV, K], to write to.
        first: [N, HV, K], to write to.
    """
    first_of, last_of, goes_on = (None,) * 3 if i.rows is None else i.rows
    scan(p, Z, None, saved, carry, first, reverse=True)
    exchange.phase("exchange")
    adjoints = exchange.all_gather(of_rows(first, first_of, goes_on), options.group, options.pieces)
    after = exchange.after(adjoints[options.piece + 1 :], saved.curvature_passing)
    exchange.phase("scan")
    return of_documents(p, after, last_of)


# ------------------------------------------------------------ the state


def combine(
    p: Problem, saved: Saved, parts: Tensor | None, initial=None, *, reverse: bool,
    rows: Tensor | None = None, starts: Tensor | None = None, through: Tensor | None = None,
) -> None:  # fmt: skip
    """Combine segments; see ``combine_kernel``.

    Args:
        p, saved: of the pass.
        parts: [wholes or wholes + B, HV, K, V]; None: only transitions, from the identity.
        initial: [sequences, HV, K, V], of states or of the adjoints of the last ones.
        reverse: of the adjoint.
        rows: the sequences, if not all; all there is of them is by their order here.
        starts: of the shape of parts, to write to.
        through: [sequences, HV, K, V], to write to.
    """
    width = p.K if parts is None else p.V
    block = min(32, padded(width))
    half = p.dtype.itemsize == 2
    count = p.N if rows is None else rows.shape[0]
    run(combine_kernel, (cdiv(width, block), count, p.HV),
        saved.transitions, parts, initial, saved.offsets, saved.segments, rows, starts, through,
        p.T, p.wholes,
        V=width, BV=block, HAS_INITIAL=initial is not None, HAS_PARTS=parts is not None,
        HAS_ROWS=rows is not None, STORE=starts is not None, THROUGH=through is not None,
        REVERSE=reverse, SEGMENT=p.segment, HALF=half, num_warps=8, num_stages=2 if half else 1,
        **p.common,
    )  # fmt: skip


def states_before(p: Problem, i: Inputs, options: Options, saved: Saved, parts: Tensor) -> Tensor:
    """Return the state before every segment of the piece that has one: [wholes + B, HV, K, V].

    Collective.

    Args:
        p, i, options, saved: of the pass.
        parts: [wholes + B, HV, K, V], after every segment, from zero.
    """
    first_of, last_of, goes_on = (None,) * 3 if i.rows is None else i.rows
    exchange.phase("combine")
    found = [_through(p, saved, parts, last_of, reverse=False)]
    if options.pieces > 2:
        found.append(of_rows(_transition(p, saved, last_of), None, passes(i.rows)))
    exchange.phase("exchange")
    added, *passing = exchange.gather_together(found, options.group, options.pieces)
    if passing:
        saved.passing.copy_(passing[0][options.piece + 1 :])
    exchange.phase("combine")
    before = exchange.before(added[: options.piece], passing[0] if passing else None)
    before = of_rows(before, None, goes_on)
    return _starts(p, saved, parts, before, first_of, reverse=False)


def adjoints_after(p: Problem, i: Inputs, options: Options, saved: Saved, parts: Tensor) -> Tensor:
    """Return the adjoint after every segment of the piece that has one: [wholes + B, HV, K, V].

    Collective.

    Args:
        p, i, options, saved: of the pass.
        parts: [wholes + B, HV, K, V], before every segment, from zero: at the place of the one
            before it, those of the rows' first documents at the rows' ends.
    """
    first_of, last_of, goes_on = (None,) * 3 if i.rows is None else i.rows
    exchange.phase("combine")
    before = of_rows(_through(p, saved, parts, first_of, reverse=True), None, goes_on)
    exchange.phase("exchange")
    adjoints = exchange.all_gather(before, options.group, options.pieces)
    exchange.phase("combine")
    passing = saved.passing if options.pieces > 2 else None
    after = exchange.after(adjoints[options.piece + 1 :], passing)
    return _starts(p, saved, parts, after, last_of, reverse=True)


def _through(p: Problem, saved: Saved, parts: Tensor, rows, *, reverse: bool) -> Tensor:
    """Return the state after the rows, or the adjoint before them, from zero: [B, HV, K, V]."""
    if not p.segment:
        return parts
    through = parts.new_empty(p.B, *parts.shape[1:])
    combine(p, saved, parts, reverse=reverse, rows=rows, through=through)
    return through


def _transition(p: Problem, saved: Saved, rows) -> Tensor:
    """Return the transitions of the rows' last documents, [B, HV, K, K]."""
    if not p.segment:
        return saved.transitions
    through = saved.transitions.new_empty(p.B, *saved.transitions.shape[1:])
    combine(p, saved, None, reverse=False, rows=rows, through=through)
    return through


def _starts(p: Problem, saved: Saved, parts: Tensor, given: Tensor, rows, *, reverse: bool):
    """Return the starts of all segments where those of the rows' are ``given`` [B, HV, K, V]."""
    if not p.segment:
        return given.contiguous()
    starts = torch.empty_like(parts)
    starts[p.wholes :] = given
    given = given.contiguous()
    if rows is not None:  # the other documents start from zero
        combine(p, saved, parts, reverse=reverse, starts=starts)
    combine(p, saved, parts, given, reverse=reverse, rows=rows, starts=starts)
    return starts
