"""The chunkwise matrix form in PyTorch: the CPU path, differentiated by autograd, and the kernels'
specification.

Per chunk of C tokens, with G the cumulative log-decay inside the chunk, kw the write key, S0 the
state at its start, and every factor exp(G_i - G_j) restricted to i >= j inside one document::

    L = stril(beta_i k_i . kw_j exp(G_i - G_j))         P = tril(q_i . kw_j exp(G_i - G_j))
    v' = (I + L)^-1 beta (V - exp(G) k S0)              (v' = beta V for the offline solve)
    o  = exp(G) q S0 + P v'                             S_C = exp(G_C) S0 + (exp(G_C - G) kw)^T v'

Only differences of G are exponentiated, so any decay is safe. A document boundary is a mask, not a
data-dependent shape: a chunk's state reaches only the tokens of the document that it ends in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pdn.ops.checks import check_boundaries
from pdn.ops.reference import each_sequence, expand_heads, offline_inputs, online_inputs
from pdn.ops.types import (
    DiagonalPreconditioner,
    RecurrentState,
    accumulation_dtype,
    materialise,
    without_autocast,
)

CHUNK = 64
CHUNK_DIAGONAL = 16  # a diagonal decay materialises [C, C, K] factors
MIN_LOG_DECAY = (
    -30.0
)  # exp(-30) = 1e-13; keeps the cumulative sum precise next to tokens that erase the state


@without_autocast
def delta_rule(q, k, v, *, state, return_state, cu_seqlens, **options):
    """See ``pdn.ops.delta_rule``."""
    rescaling = diagonal_preconditioner
    inputs, A = online_inputs(q, k, v, rescaling, state, cu_seqlens, **options)
    return _scan("online", inputs, A, state, return_state, cu_seqlens, v.dtype)


@without_autocast
def linear_attention(q, k, v, *, state, return_state, cu_seqlens, **options):
    """See ``pdn.ops.linear_attention``."""
    rescaling = diagonal_preconditioner
    inputs, A = offline_inputs(q, k, v, rescaling, state, cu_seqlens, **options)
    return _scan("offline", inputs, A, state, return_state, cu_seqlens, v.dtype)


@without_autocast
def diagonal_preconditioner(k, preconditioner: DiagonalPreconditioner, *, A=None, cu_seqlens=None):
    """See ``pdn.ops.diagonal_preconditioner``."""
    A_BTHK, A = curvature(k, preconditioner, A=A, cu_seqlens=cu_seqlens)
    return preconditioner.rescaling(A_BTHK), A


def curvature(
    k: Tensor,
    preconditioner: DiagonalPreconditioner,
    *,
    A: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return A_t of every token [B, T, H, K], and A after the last one [B or N, H, K]."""
    dtype = accumulation_dtype(k)
    gP, bP = (
        materialise(preconditioner.log_decay).to(dtype),
        materialise(preconditioner.beta).to(dtype),
    )
    k = expand_heads(k.to(dtype), gP.shape[2])
    if cu_seqlens is not None and A is not None:

        def run(tensors, state):
            steps, last = _curvature(*tensors, A=state.S, cu_seqlens=None)
            return steps, RecurrentState(last)

        A_BTHK, final = each_sequence(cu_seqlens, RecurrentState(A), run, k, gP, bP)
        return A_BTHK, final.S
    A_BTHK, last = _curvature(k, gP, bP, A, cu_seqlens)
    return A_BTHK, last if cu_seqlens is None else _last_of_each(A_BTHK, cu_seqlens)


def document_ids(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """Return the number of the document that each token belongs to, [B, T].

    Empty documents have no token.
    """
    check_boundaries(cu_seqlens, batch, time)
    positions = torch.arange(batch * time, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True).view(batch, time)


def _last_of_each(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N, ...]: the last token of each document; zeros for empty ones."""
    ends = cu_seqlens[1:].long()
    filled = (ends > cu_seqlens[:-1]).view(-1, *[1] * (x.ndim - 2))
    return x.flatten(0, 1)[(ends - 1).clamp(min=0)] * filled


def _chunked(x: Tensor, size: int) -> Tensor:
    """[B, T, H, ...] -> [B, H, T / C, C, ...], zero-padded."""
    x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, -x.shape[1] % size])
    return x.unflatten(1, (-1, size)).movedim(3, 1)


def _document_masks(
    cu_seqlens: Tensor | None, batch: int, time: int, size: int, device
) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs i >= j of a chunk share a document; which tokens the state at its start and the
    one at its end reach.

    [B or 1, 1, N, C, C], [B or 1, 1, N, C], [B or 1, 1, N, C].
    """
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    if cu_seqlens is None:
        everything = torch.ones(1, 1, 1, size, dtype=torch.bool, device=device)
        return causal.view(1, 1, 1, size, size), everything, everything
    ids = document_ids(cu_seqlens, batch, time)
    ids = torch.cat([ids, ids[:, -1:].expand(-1, -time % size)], 1).unflatten(1, (-1, size))[
        :, None
    ]
    before = F.pad(ids[..., :-1, -1], (1, 0))
    return (
        causal & (ids[..., :, None] == ids[..., None, :]),
        ids == before[..., None],
        ids == ids[..., -1:],
    )


def _curvature(
    k: Tensor, gP: Tensor, bP: Tensor, A: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A_t of every token [B, T, H, K], and the last one [B, H, K]."""
    batch, time, heads, width = k.shape
    A = k.new_zeros(batch, heads, width) if A is None else A.to(k.dtype)
    if time == 0:
        return k, A
    pairs, from_start, _ = _document_masks(cu_seqlens, batch, time, CHUNK, k.device)
    c = _chunked(gP.clamp(min=MIN_LOG_DECAY), CHUNK).cumsum(-1)
    update = _chunked(bP[..., None] * k.square(), CHUNK)
    within = _decay_factors(c[..., :, None] - c[..., None, :], pairs) @ update
    carry = c.exp() * from_start
    starts = []
    factors = carry[..., -1, None].unbind(2)
    for last, factor in zip(within[..., -1, :].unbind(2), factors, strict=True):
        starts.append(A)
        A = factor * A + last
    steps = within + carry[..., None] * torch.stack(starts, 2)[..., None, :]
    return steps.movedim(1, 3).flatten(1, 2)[:, :time], A


def _decay_factors(difference: Tensor, mask: Tensor) -> Tensor:
    """exp where the mask holds, else 0; masked before exp, so that no 0 * inf arises, in the
    gradient neither.
    """
    return difference.masked_fill(~mask, float("-inf")).exp()


def _scan(solve, tensors, A, state, return_state, cu_seqlens, dtype):
    def run(tensors, state):
        S = None if state is None else state.S
        o, S = _chunks(solve, *tensors, S=S, cu_seqlens=None)
        return o, RecurrentState(S)

    if cu_seqlens is not None and (return_state or state is not None):
        o, (S, _) = each_sequence(cu_seqlens, state, run, *tensors)
    else:
        S = None if state is None else state.S
        o, S = _chunks(solve, *tensors, S=S, cu_seqlens=cu_seqlens)
    return o.to(dtype), RecurrentState(S, A) if return_state else None


def _chunks(solve, q, k, write_k, v, beta, log_decay, S, cu_seqlens):
    batch, time, heads, width = q.shape
    S = v.new_zeros(batch, heads, width, v.shape[-1]) if S is None else S.to(v.dtype)
    if time == 0:
        return torch.zeros_like(v), S
    diagonal = log_decay is not None and log_decay.ndim == 4
    size = CHUNK_DIAGONAL if diagonal else CHUNK
    pairs, from_start, to_end = _document_masks(cu_seqlens, batch, time, size, q.device)
    q, k, write_k, v, beta = (_chunked(x, size) for x in (q, k, write_k, v, beta))
    if log_decay is not None and diagonal:
        G = _chunked(log_decay.clamp(min=MIN_LOG_DECAY), size).cumsum(-2)
        weighted = (
            _decay_factors(G[..., :, None, :] - G[..., None, :, :], pairs[..., None])
            * write_k[..., None, :, :]
        )
        products = weighted @ torch.stack([q, k], -1)  # [..., i, j, 2]
        P, KK = products.unbind(-1)
        reach = G.exp() * from_start[..., None]
        remain = (G[..., -1:, :] - G).exp() * to_end[..., None]
        keep = reach[..., -1, :, None]
    else:
        P, KK = q @ write_k.mT, k @ write_k.mT
        log_decay = (
            beta.new_zeros(1, time, 1) if log_decay is None else log_decay.clamp(min=MIN_LOG_DECAY)
        )
        G = _chunked(log_decay, size).cumsum(-1)
        factors = _decay_factors(G[..., :, None] - G[..., None, :], pairs)
        P, KK = P * factors, KK * factors
        reach = (G.exp() * from_start)[..., None]
        remain = ((G[..., -1:] - G).exp() * to_end)[..., None]
        keep = reach[..., -1, :, None]
    inserted = beta[..., None] * v
    erased = None
    if solve == "online":
        L = (beta[..., None] * KK).tril(-1)
        solved = torch.linalg.solve_triangular(
            L,
            torch.cat([inserted, beta[..., None] * reach * k], -1),
            upper=False,
            unitriangular=True,
        )
        inserted, erased = solved.split([v.shape[-1], width], -1)
    read, write = reach * q, remain * write_k
    shape = batch, heads, q.shape[2]
    keep = keep.expand(*shape, *keep.shape[3:])
    outputs = []
    columns = (read, write, P, inserted, keep) + (() if erased is None else (erased,))
    for r, w, p, u, decay, *e in zip(*(x.unbind(2) for x in columns), strict=True):
        if solve == "online":
            u = u - e[0] @ S
        outputs.append(r @ S + p @ u)
        S = decay * S + w.mT @ u
    return torch.stack(outputs, 2).movedim(1, 3).flatten(1, 2)[:, :time], S
