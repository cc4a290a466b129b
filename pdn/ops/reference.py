"""Token by token, in any dtype, differentiable: the definition that every other backend is tested
against.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pdn.ops.checks import check_boundaries
from pdn.ops.types import (
    DiagonalPreconditioner,
    RecurrentState,
    SigmoidGain,
    SoftplusDecay,
    accumulation_dtype,
    materialise,
    without_autocast,
)


def l2norm(x: Tensor) -> Tensor:
    """Return ``x * rsqrt(sum(x^2) + 1e-6)`` over the last axis."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def prepare(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | SigmoidGain | None,
    log_decay: Tensor | SoftplusDecay | None, scale: float | None, qk_l2norm: bool, heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return q, k and v, normalised and scaled, and the activated gates, beta before log_decay.

    All are in the accumulation dtype; q has a head for each of the ``heads`` of v.
    """
    dtype = accumulation_dtype(v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    beta = v.new_ones(v.shape[:3]) if beta is None else materialise(beta).to(dtype)
    decay = None if log_decay is None else materialise(log_decay).to(dtype)
    return expand_heads(q, heads), k, v, beta, decay


def expand_heads(x: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Repeat each key head for the value heads of its group."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


# o and the state after the last token, of one document's tensors and the state before it
Run = Callable[[Sequence[Tensor | None], RecurrentState | None], tuple[Tensor, RecurrentState]]


def each_sequence(
    cu_seqlens: Tensor, state: RecurrentState | None, run: Run, first: Tensor, *rest: Tensor | None
) -> tuple[Tensor, RecurrentState]:
    """Apply ``run`` to each document of the tensors by itself and put the results together."""
    batch, time = first.shape[:2]
    check_boundaries(cu_seqlens, batch, time)
    bounds = cu_seqlens.tolist()
    flat = [None if x is None else x.flatten(0, 1) for x in (first, *rest)]
    outputs, states = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        one = None
        if state is not None:
            A = None if state.A is None else state.A[n : n + 1]
            one = RecurrentState(state.S[n : n + 1], A)
        o, s = run([None if x is None else x[None, start:end] for x in flat], one)
        outputs.append(o[0])
        states.append(s)
    o = torch.cat(outputs).unflatten(0, (batch, time))
    As = [s.A for s in states if s.A is not None]
    return o, RecurrentState(torch.cat([s.S for s in states]), torch.cat(As) if As else None)


def accumulate_curvature(
    k: Tensor, log_decay: Tensor, beta: Tensor, A: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A_t of every token [B, T, H, K], and the last one."""
    A = k.new_zeros(k.shape[0], *k.shape[2:]) if A is None else A.to(k.dtype)
    steps = []
    for t in range(k.shape[1]):
        A = log_decay[:, t, :, None].exp() * A + beta[:, t, :, None] * k[:, t].square()
        steps.append(A)
    return (torch.stack(steps, 1) if steps else k), A


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
    gP = materialise(preconditioner.log_decay).to(accumulation_dtype(k))
    bP = materialise(preconditioner.beta).to(accumulation_dtype(k))
    k = expand_heads(k.to(accumulation_dtype(k)), gP.shape[2])
    if cu_seqlens is None:
        return accumulate_curvature(k, gP, bP, A)

    def run(tensors, state):
        steps, last = accumulate_curvature(*tensors, A=None if state is None else state.S)
        return steps, RecurrentState(last)

    state = None if A is None else RecurrentState(A)
    A_BTHK, last = each_sequence(cu_seqlens, state, run, k, gP, bP)
    return A_BTHK, last.S


def online_inputs(
    q, k, v, rescaling, state, cu_seqlens, *, beta, log_decay, write_k, scale, qk_l2norm
):
    """Return q, k, the write key, v, beta and log_decay for a scan, and A after the last token.

    ``rescaling`` is ``diagonal_preconditioner`` of the backend.
    """
    heads, A = v.shape[2], None
    q, k, v, beta, log_decay = prepare(q, k, v, beta, log_decay, scale, qk_l2norm, heads)
    if isinstance(write_k, DiagonalPreconditioner):
        B, A = rescaling(k, write_k, A=state and state.A, cu_seqlens=cu_seqlens)
        write_k = B * expand_heads(k, B.shape[2])
    write_k = expand_heads(k if write_k is None else write_k.to(k.dtype), heads)
    return (q, expand_heads(k, heads), write_k, v, beta, log_decay), A


def offline_inputs(
    q, k, v, rescaling, state, cu_seqlens, *, beta, log_decay, preconditioner, scale, qk_l2norm
):
    """Return the same for the offline solve, whose preconditioner rescales the query."""
    heads, A = v.shape[2], None
    q, k, v, beta, log_decay = prepare(q, k, v, beta, log_decay, scale, qk_l2norm, heads)
    if preconditioner is not None:
        B, A = rescaling(k, preconditioner, A=state and state.A, cu_seqlens=cu_seqlens)
        q = expand_heads(B, heads) * q
    k = expand_heads(k, heads)
    return (q, k, k, v, beta, log_decay), A


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


def _scan(solve, tensors, A, state, return_state, cu_seqlens, dtype):
    def run(tensors, state):
        o, S = _recurrence(solve, *tensors, S=None if state is None else state.S)
        return o, RecurrentState(S)

    if cu_seqlens is None:
        o, (S, _) = run(tensors, state)
    else:
        o, (S, _) = each_sequence(cu_seqlens, state, run, *tensors)
    return o.to(dtype), RecurrentState(S, A) if return_state else None


def _recurrence(solve, q, k, write_k, v, beta, log_decay, S):
    S = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1]) if S is None else S.to(k.dtype)
    outputs = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            decay = log_decay[:, t].exp()
            S = S * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])
        value = v[:, t]
        if solve == "online":
            value = value - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", write_k[:, t], beta[:, t, :, None] * value)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), S
