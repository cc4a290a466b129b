"""The Triton kernels: the recurrences of ``pdn.ops`` in a few launches forward and backward.

One family serves all of them. Keyword arguments, results and errors are those of the other
backends. q, k and a ``write_k`` tensor are taken in the dtype of v, which is that of the matrix
products; states, gates and all sums are float32 (float64 in float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from pdn.ops import context
from pdn.ops.reference import expand_heads
from pdn.ops.triton.contract import Inputs, Options
from pdn.ops.triton.launch import chunk
from pdn.ops.types import (
    DiagonalPreconditioner,
    RecurrentState,
    SigmoidGain,
    SoftplusDecay,
    accumulation_dtype,
)


def short_convolutions(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], states: Sequence[Tensor],
    cu_seqlens: Tensor | None, piece: context.Piece | None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """See ``pdn.ops.short_convolutions``; of a piece of longer sequences, if there is one."""
    from pdn.ops.triton import continued, convolution, halo

    if states:
        return continued.convolve_parts(x, weights, biases, states, cu_seqlens=cu_seqlens)
    if piece is None or weights[0].shape[1] == 1:
        return convolution.convolve_parts(x, weights, biases, cu_seqlens=cu_seqlens), []
    context.check_width(weights[0].shape[1], x.shape[1])
    return halo.convolve_parts(x, weights, biases, cu_seqlens=cu_seqlens, piece=piece), []


def delta_rule(q, k, v, *, write_k, **options):
    """See ``pdn.ops.delta_rule``."""
    preconditioned = isinstance(write_k, DiagonalPreconditioner)
    preconditioner, write_k = (write_k, None) if preconditioned else (None, write_k)
    return _run("online", q, k, v, write_k, preconditioner, **options)


def linear_attention(q, k, v, *, preconditioner, **options):
    """See ``pdn.ops.linear_attention``."""
    return _run("offline", q, k, v, None, preconditioner, **options)


def _run(
    solve, q, k, v, write_k, preconditioner,
    *, beta, log_decay, scale, qk_l2norm, state, return_state, cu_seqlens, piece=None,
):  # fmt: skip
    heads, dtype, acc = v.shape[2], v.dtype, accumulation_dtype(v)
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    beta, beta_range = (v.new_ones(v.shape[:3], dtype=acc), 0.0) if beta is None else raw_gain(beta)
    log_decay, A_log, dt_bias = raw_decay(log_decay)
    if write_k is not None:
        write_k = expand_heads(write_k.to(dtype), heads).contiguous()
    gates, P_beta_range, gate_heads = {}, 0.0, heads
    S = A = None
    if state is not None:
        S = state.S.to(acc).contiguous()
        if preconditioner is not None and state.A is not None:
            A = expand_heads(state.A.to(acc), heads, 1).contiguous()
    if preconditioner is not None:
        gate_heads = preconditioner_heads(preconditioner)
        gates, P_beta_range = raw_preconditioner(preconditioner, heads)
    inputs = Inputs(
        q, k, v, beta, log_decay, A_log, dt_bias, write_k,
        **gates, S=S, A=A, cu_seqlens=cu_seqlens, rows=None if piece is None else piece.rows,
    )  # fmt: skip
    group, index, count = ("", 0, 1) if piece is None else piece.ranks.values()
    tracked = any(x is not None and x.requires_grad for x in inputs)
    options = Options(
        solve=solve,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        qk_l2norm=qk_l2norm,
        beta_range=beta_range,
        P_beta_range=P_beta_range,
        inverse=preconditioner is not None and preconditioner.form == "inverse",
        bound=1.0 if preconditioner is None else preconditioner.bound,
        eps=1e-6 if preconditioner is None else preconditioner.eps,
        save=torch.is_grad_enabled() and tracked,
        final=return_state,
        group=group,
        piece=index,
        pieces=count,
    )
    o, S_last, A_last = chunk(inputs, options)
    if not return_state:
        return o, None
    assert S_last is not None  # as asked for
    last = None
    if preconditioner is not None and A_last is not None:
        last = A_last[:, :: heads // gate_heads]
    return o, RecurrentState(S_last, last)


PRECONDITIONER = "P_log_decay", "P_A_log", "P_dt_bias", "P_beta", "mu"  # fields of Inputs


def raw_preconditioner(
    preconditioner: DiagonalPreconditioner, heads: int
) -> tuple[dict[str, Tensor | None], float]:
    """Return the preconditioner's ``Inputs`` for so many heads, and the range of its gain."""
    log_decay, A_log, dt_bias = raw_decay(preconditioner.log_decay)
    beta, range_ = raw_gain(preconditioner.beta)
    log_decay, beta = (expand_heads(x, heads).contiguous() for x in (log_decay, beta))
    mu = None if preconditioner.form == "inverse" else preconditioner.mu
    A_log, dt_bias, mu = (
        None if x is None else expand_heads(x, heads, 0) for x in (A_log, dt_bias, mu)
    )
    return dict(zip(PRECONDITIONER, (log_decay, A_log, dt_bias, beta, mu), strict=True)), range_


def raw_gain(gain: Tensor | SigmoidGain) -> tuple[Tensor, float]:
    """Return what the kernels take of a gain.

    That is a tensor, and the range of the sigmoid to apply to it, 0 for none.
    """
    if isinstance(gain, SigmoidGain):
        return gain.x.contiguous(), gain.range
    return gain.contiguous(), 0.0


@overload
def raw_decay(
    decay: Tensor | SoftplusDecay,
) -> tuple[Tensor, Tensor | None, Tensor | None]: ...
@overload
def raw_decay(
    decay: Tensor | SoftplusDecay | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...
def raw_decay(
    decay: Tensor | SoftplusDecay | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return a log-decay, or its raw projection with A_log and dt_bias."""
    if isinstance(decay, SoftplusDecay):
        return decay.x.contiguous(), decay.A_log.contiguous(), decay.dt_bias.contiguous()
    return None if decay is None else decay.contiguous(), None, None


def preconditioner_heads(preconditioner: DiagonalPreconditioner) -> int:
    decay = preconditioner.log_decay
    return (decay.x if isinstance(decay, SoftplusDecay) else decay).shape[2]
