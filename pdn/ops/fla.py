"""The kernels of flash-linear-attention 0.6.0 as a backend, for baselines: ``ops.backend=fla``.

Every function of the peer gets its arguments as the peer's own layers pass them: gates fused into
the kernel for GDN and KDA, activated outside for the rest; what the peer lacks is a ValueError.
DeltaNet with the preconditioner runs as Gated DeltaNet with a decay of zero. Needs a CUDA device;
single tokens without gradient go to the recurrent kernels.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from pdn.ops.reference import expand_heads, l2norm
from pdn.ops.types import (
    DiagonalPreconditioner,
    RecurrentState,
    SigmoidGain,
    SoftplusDecay,
    materialise,
)


def delta_rule(
    q, k, v, *, beta, log_decay, write_k, scale, qk_l2norm, state, return_state, cu_seqlens
):
    """See ``pdn.ops.delta_rule``. Raises ValueError for write keys other than a squashed
    preconditioner's.
    """
    if isinstance(write_k, Tensor):
        raise ValueError(
            "write_k: the peer takes no explicit write key; use backend='chunkwise' or 'triton'"
        )
    options = dict(
        scale=scale, use_qk_l2norm_in_kernel=qk_l2norm, output_final_state=return_state,
        cu_seqlens=cu_seqlens,
        initial_state=None if state is None else state.S,
    )  # fmt: skip
    diagonal = _is_diagonal(log_decay)
    if write_k is not None:
        return _preconditioned(q, k, v, beta, log_decay, write_k, state, options, diagonal)
    if log_decay is None:
        if v.dtype == torch.float32:
            raise ValueError(
                "dtype = float32: the peer's delta rule without decay takes half precision only"
            )
        q, k = expand_heads(q, v.shape[2]), expand_heads(k, v.shape[2])
        return _call("delta_rule", q, k, v, beta=_activated(beta, v.dtype), **options)
    options |= _gates_in_kernel(beta, log_decay)
    if diagonal:
        return _call("kda", q, k, v, **options)
    return _call("gated_delta_rule", q, k, v, **options)


def linear_attention(
    q, k, v, *, beta, log_decay, preconditioner, scale, qk_l2norm, state, return_state, cu_seqlens
):
    """See ``pdn.ops.linear_attention``. Raises ValueError with a preconditioner, which the peer's
    offline solves lack.
    """
    if preconditioner is not None:
        raise ValueError(
            "preconditioner: the peer has none for the offline solve; use backend='chunkwise' or "
            "'triton'"
        )
    if qk_l2norm:
        q, k = l2norm(q.float()).to(q.dtype), l2norm(k.float()).to(k.dtype)
    q, k = expand_heads(q, v.shape[2]), expand_heads(k, v.shape[2])
    if beta is not None:
        v = v * _activated(beta, v.dtype)[..., None]
    options = dict(
        scale=scale, output_final_state=return_state, cu_seqlens=cu_seqlens,
        initial_state=None if state is None else state.S,
    )  # fmt: skip
    decay = materialise(log_decay)
    if _is_diagonal(log_decay):
        name = "gk" if _recurrent(q) else "g"
        return _call("gla", q, k, v, **{name: decay}, **options)
    return _call("simple_gla", q, k, v, g=decay, **options)


def _preconditioned(
    q, k, v, beta, log_decay, preconditioner: DiagonalPreconditioner, state, options, diagonal
):
    if preconditioner.form != "squash":
        raise ValueError(
            f"form = {preconditioner.form!r}: the peer has the squashed preconditioner only"
        )
    if state is not None and state.A is None:
        raise ValueError(
            "state.A is missing: a preconditioned recurrence carries its curvature accumulator"
        )
    assert preconditioner.mu is not None  # of every squashed one
    heads = v.shape[2]
    g_atk, beta_atk = (
        materialise(preconditioner.log_decay),
        _activated(preconditioner.beta, v.dtype),
    )
    # one preconditioner per value head, or a diagonal decay: the peer shares no key heads there
    if diagonal or g_atk.shape[2] != k.shape[2]:
        q, k = expand_heads(q, heads), expand_heads(k, heads)
    options |= dict(
        beta=_activated(beta, v.dtype), g_atk=expand_heads(g_atk, k.shape[2]),
        beta_atk=expand_heads(beta_atk, k.shape[2]),
        initial_A_state=None if state is None else state.A, x=preconditioner.bound,
        eps=preconditioner.eps,
        log_atk_scale=expand_heads(preconditioner.mu.float(), k.shape[2], 0),
    )  # fmt: skip
    if diagonal:
        if not options.pop("use_qk_l2norm_in_kernel"):
            raise ValueError(
                "qk_l2norm = False: the peer's preconditioned KDA always normalises q and k"
            )
        if _recurrent(q):
            options["use_qk_l2norm_in_kernel"] = True
        return _call("precond_kda", q, k, v, g=_kda_gate(log_decay), **options)
    if log_decay is None:
        log_decay = torch.zeros(v.shape[:3], dtype=torch.float32, device=v.device)
    options["g"] = materialise(log_decay)
    return _call("precond_gated_delta_rule", q, k, v, **options)


def _gates_in_kernel(beta: Tensor | SigmoidGain, log_decay: Tensor | SoftplusDecay) -> dict:
    """Raw gates for the kernels that activate them themselves; activated ones as they are."""
    if isinstance(beta, SigmoidGain) and beta.range in (1.0, 2.0):
        options = dict(
            beta=beta.x, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=beta.range == 2.0
        )
    else:
        options = dict(beta=materialise(beta))
    if isinstance(log_decay, SoftplusDecay):
        parameters = dict(
            A_log=log_decay.A_log.float(), dt_bias=log_decay.dt_bias.float().reshape(-1)
        )
        return options | dict(g=log_decay.x, use_gate_in_kernel=True, **parameters)
    return options | dict(g=log_decay)


def _kda_gate(log_decay: Tensor | SoftplusDecay) -> Tensor:
    if isinstance(log_decay, Tensor):
        return log_decay
    gate = _import("fla.ops.kda.gate").fused_kda_gate
    return gate(
        g=log_decay.x, A_log=log_decay.A_log.float(), dt_bias=log_decay.dt_bias.float().reshape(-1)
    )


def _activated(gain: Tensor | SigmoidGain, dtype: torch.dtype) -> Tensor:
    """Activated in the dtype of its projection, as the peer's layers do."""
    return gain if isinstance(gain, Tensor) else materialise(gain).to(dtype)


def _is_diagonal(log_decay: Tensor | SoftplusDecay | None) -> bool:
    return (
        log_decay is not None
        and (log_decay.x if isinstance(log_decay, SoftplusDecay) else log_decay).ndim == 4
    )


def _recurrent(q: Tensor) -> bool:
    """The recurrent kernels have no backward pass for gates; the peer's layers use them for
    generation only.
    """
    return q.shape[1] == 1 and not torch.is_grad_enabled()


def _call(
    name: str, q: Tensor, k: Tensor, v: Tensor, **options
) -> tuple[Tensor, RecurrentState | None]:
    """One function of the peer. With ``cu_seqlens`` it wants a batch of one, so the rows are
    joined.
    """
    _check_device(q)
    batch, time, joined = *v.shape[:2], options["cu_seqlens"] is not None and v.shape[0] > 1
    mode = "fused_recurrent" if _recurrent(q) else "chunk"
    if joined:
        per_token = {"g", "gk", "beta", "g_atk", "beta_atk"}
        options = {
            n: x.flatten(0, 1)[None] if n in per_token and x is not None else x
            for n, x in options.items()
        }
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
    o, *final = getattr(_import(f"fla.ops.{name}"), f"{mode}_{name}")(q, k, v, **options)
    if joined:
        o = o.view(batch, time, *o.shape[2:])
    if not options["output_final_state"]:
        return o, None
    return o, RecurrentState(final[0].float(), final[1].float() if len(final) > 1 else None)


def _check_device(q: Tensor) -> None:
    if not q.is_cuda:
        raise ValueError(
            f"device = {q.device}: the peer's kernels need a CUDA device; use backend='chunkwise'"
        )


def _import(module: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            "backend = 'fla' needs flash-linear-attention: pip install "
            "flash-linear-attention==0.6.0"
        ) from error
