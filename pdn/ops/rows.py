"""Documents that go on from one call to the next: states of rows in place of states of documents.

With ``cu_seqlens`` the backends take and return a state for every document. A row of a batch that
continues an earlier one has one state: its first document goes on from it, the others start from
zero, and the state after its last document is the row's. Letters: B batch, T time, N documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pdn.ops.types import RecurrentState


def ends_of_rows(cu_seqlens: Tensor | None, batch: int, time: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the documents that hold the first and the last token of each row."""
    if cu_seqlens is None:
        every = torch.arange(batch)
        return every, every
    rows = torch.arange(batch, device=cu_seqlens.device, dtype=cu_seqlens.dtype) * time
    tokens = torch.stack([rows, rows + time - 1])
    first, last = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    return first, last


def is_of_rows(state: Tensor | None, cu_seqlens: Tensor | None, batch: int) -> bool:
    """Return whether a state [B or N, ...] is of rows where the backends want one of documents.

    Where there are as many documents as rows, each row is one, and the two are the same.
    """
    if state is None or cu_seqlens is None:
        return False
    return state.shape[0] == batch != cu_seqlens.shape[0] - 1


def to_documents(x: Tensor, first: Tensor, documents: int) -> Tensor:
    """Place the states of rows [B, ...] at their ``first`` documents: [N, ...], else zero."""
    return x.new_zeros(documents, *x.shape[1:]).index_copy(0, first, x)


def run(op: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]):
    """Return what an op of ``pdn.ops`` does for states of rows.

    Args:
        op: ``delta_rule`` or ``linear_attention``.
        q, k, v: [B, T, ...].
        options: its other arguments.
    """
    cu_seqlens, state = options["cu_seqlens"], options["state"]
    first, last = ends_of_rows(cu_seqlens, *q.shape[:2])
    documents = cu_seqlens.shape[0] - 1
    A = None if state.A is None else to_documents(state.A, first, documents)
    started = RecurrentState(to_documents(state.S, first, documents), A)
    o, final = op(q, k, v, **options | {"state": started})
    if final is None:
        return o, None
    A = None if final.A is None else final.A.index_select(0, last)
    return o, RecurrentState(final.S.index_select(0, last), A)
