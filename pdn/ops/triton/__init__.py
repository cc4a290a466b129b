"""The Triton kernels: the recurrences of ``pdn.ops`` in a few launches forward and backward, one family for all of them.

Keyword arguments, results and errors are those of the other backends. q, k and a ``write_k`` tensor are taken in the
dtype of v, which is that of the matrix products; states, gates and all sums are float32 (float64 in float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdn.ops.reference import expand_heads
from pdn.ops.triton.launch import chunk
from pdn.ops.types import (
    DiagonalPreconditioner,
    RecurrentState,
    SigmoidGain,
    SoftplusDecay,
    accumulation_dtype,
)


def delta_rule(
    q, k, v, *, beta, log_decay, write_k, scale, qk_l2norm, state, return_state, cu_seqlens
):
    """See ``pdn.ops.delta_rule``."""
    preconditioner = write_k if isinstance(write_k, DiagonalPreconditioner) else None
    write_k = None if preconditioner else write_k
    return _run(
        True,
        q,
        k,
        v,
        beta,
        log_decay,
        write_k,
        preconditioner,
        scale,
        qk_l2norm,
        state,
        return_state,
        cu_seqlens,
    )


def linear_attention(
    q, k, v, *, beta, log_decay, preconditioner, scale, qk_l2norm, state, return_state, cu_seqlens
):
    """See ``pdn.ops.linear_attention``."""
    return _run(
        False,
        q,
        k,
        v,
        beta,
        log_decay,
        None,
        preconditioner,
        scale,
        qk_l2norm,
        state,
        return_state,
        cu_seqlens,
    )


def _run(
    delta,
    q,
    k,
    v,
    beta,
    log_decay,
    write_k,
    preconditioner,
    scale,
    qk_l2norm,
    state,
    return_state,
    cu_seqlens,
):
    heads, dtype, acc = v.shape[2], v.dtype, accumulation_dtype(v)
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    beta, beta_range = (v.new_ones(v.shape[:3], dtype=acc), 0.0) if beta is None else raw_gain(beta)
    log_decay, A_log, dt_bias = raw_decay(log_decay)
    if write_k is not None:
        write_k = expand_heads(write_k.to(dtype), heads).contiguous()
    gP = A_log_P = dt_bias_P = bP = mu = None
    range_P, gate_heads = 0.0, heads
    if preconditioner is not None:
        gate_heads = preconditioner_heads(preconditioner)
        gP, A_log_P, dt_bias_P = raw_decay(preconditioner.log_decay)
        bP, range_P = raw_gain(preconditioner.beta)
        gP, bP = (expand_heads(x, heads).contiguous() for x in (gP, bP))
        A_log_P, dt_bias_P = (
            None if x is None else expand_heads(x, heads, 0) for x in (A_log_P, dt_bias_P)
        )
        mu = None if preconditioner.form == "inverse" else expand_heads(preconditioner.mu, heads, 0)
    S = None if state is None else state.S.to(acc).contiguous()
    A = (
        None
        if state is None or state.A is None or gP is None
        else expand_heads(state.A.to(acc), heads, 1).contiguous()
    )
    tensors = (
        q,
        k,
        v,
        beta,
        log_decay,
        A_log,
        dt_bias,
        write_k,
        gP,
        A_log_P,
        dt_bias_P,
        bP,
        mu,
        S,
        A,
    )
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    inverse = preconditioner is not None and preconditioner.form == "inverse"
    o, S_last, A_last = chunk(
        *tensors, cu_seqlens, q.shape[-1] ** -0.5 if scale is None else scale, qk_l2norm, delta, not delta, inverse,
        1.0 if preconditioner is None else preconditioner.bound, 1e-6 if preconditioner is None else preconditioner.eps,
        beta_range, range_P, save, return_state,
    )  # fmt: skip
    if not return_state:
        return o, None
    return o, RecurrentState(S_last, A_last[:, :: heads // gate_heads] if gP is not None else None)


def raw_gain(gain: Tensor | SigmoidGain) -> tuple[Tensor, float]:
    """What the kernels take of a gain: a tensor, and the range of the sigmoid to apply to it, 0 for none."""
    if isinstance(gain, SigmoidGain):
        return gain.x.contiguous(), gain.range
    return gain.contiguous(), 0.0


def raw_decay(
    decay: Tensor | SoftplusDecay | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A log-decay, or its raw projection with A_log and dt_bias."""
    if isinstance(decay, SoftplusDecay):
        return decay.x.contiguous(), decay.A_log.contiguous(), decay.dt_bias.contiguous()
    return None if decay is None else decay.contiguous(), None, None


def preconditioner_heads(preconditioner: DiagonalPreconditioner) -> int:
    decay = preconditioner.log_decay
    return (decay.x if isinstance(decay, SoftplusDecay) else decay).shape[2]
