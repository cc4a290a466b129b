"""The Triton kernels: the recurrences of ``pdn.ops`` in six launches forward and backward, one family for all of them.

Keyword arguments, results and errors are those of the other backends. q, k and a ``write_k`` tensor are taken in the
dtype of v, which is that of the matrix products; states, gates and all sums are float32 (float64 in float64).
"""

from __future__ import annotations

import torch

from pdn.ops.reference import expand_heads
from pdn.ops.triton.launch import chunk_forward
from pdn.ops.types import DiagonalPreconditioner, RecurrentState, accumulation_dtype, materialise


def delta_rule(q, k, v, *, beta, log_decay, write_k, scale, qk_l2norm, state, return_state, cu_seqlens):
    """See ``pdn.ops.delta_rule``."""
    preconditioner = write_k if isinstance(write_k, DiagonalPreconditioner) else None
    write_k = None if preconditioner else write_k
    return _run(True, q, k, v, beta, log_decay, write_k, preconditioner, scale, qk_l2norm, state, return_state, cu_seqlens)


def linear_attention(q, k, v, *, beta, log_decay, preconditioner, scale, qk_l2norm, state, return_state, cu_seqlens):
    """See ``pdn.ops.linear_attention``."""
    return _run(False, q, k, v, beta, log_decay, None, preconditioner, scale, qk_l2norm, state, return_state, cu_seqlens)


def _run(delta, q, k, v, beta, log_decay, write_k, preconditioner, scale, qk_l2norm, state, return_state, cu_seqlens):
    heads, dtype, acc = v.shape[2], v.dtype, accumulation_dtype(v)
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    beta = v.new_ones(v.shape[:3], dtype=acc) if beta is None else materialise(beta).contiguous()
    log_decay = None if log_decay is None else materialise(log_decay).contiguous()
    if write_k is not None:
        write_k = expand_heads(write_k.to(dtype), heads).contiguous()
    gP = bP = mu = None
    gate_heads = heads
    if preconditioner is not None:
        gP, bP = materialise(preconditioner.log_decay), materialise(preconditioner.beta)
        gate_heads = gP.shape[2]
        gP, bP = (expand_heads(x, heads).contiguous() for x in (gP, bP))
        mu = None if preconditioner.form == "inverse" else expand_heads(preconditioner.mu, heads, 0)
    S = None if state is None else state.S.to(acc).contiguous()
    A = None if state is None or state.A is None or gP is None else expand_heads(state.A.to(acc), heads, 1).contiguous()
    tensors = (q, k, v, beta, log_decay, write_k, gP, bP, mu, S, A)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    inverse = preconditioner is not None and preconditioner.form == "inverse"
    o, S_last, A_last, *_ = chunk_forward(
        *tensors, cu_seqlens, q.shape[-1] ** -0.5 if scale is None else scale, qk_l2norm, delta, not delta, inverse,
        1.0 if preconditioner is None else preconditioner.bound, 1e-6 if preconditioner is None else preconditioner.eps,
        save, return_state,
    )  # fmt: skip
    if not return_state:
        return o, None
    return o, RecurrentState(S_last, A_last[:, :: heads // gate_heads] if gP is not None else None)
