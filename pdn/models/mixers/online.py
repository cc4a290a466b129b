"""The online solve with what the op does not know.

That is gains that depend on the key's size, and learned write keys.
"""

from __future__ import annotations

from torch import Tensor

from pdn.models.mixers.axes.gain import NormGain
from pdn.models.mixers.axes.preconditioner import LearnedWriteKey
from pdn.ops import (
    DiagonalPreconditioner,
    RecurrentState,
    accumulation_dtype,
    delta_rule,
    diagonal_preconditioner,
)
from pdn.ops.reference import expand_heads, l2norm
from pdn.ops.types import without_autocast


def solve_online(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain,
    preconditioner: DiagonalPreconditioner | LearnedWriteKey | None,
    *,
    qk_l2norm: bool,
    **options,
) -> tuple[Tensor, RecurrentState | None]:
    """Run ``pdn.ops.delta_rule`` with any gain and any preconditioner of the axes.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V].
        gain, preconditioner: what the axes' modules return.
        qk_l2norm: normalise q and k here.
        options: as of the op.
    """
    if isinstance(gain, NormGain):
        return _with_norm_gain(q, k, v, gain, preconditioner, qk_l2norm=qk_l2norm, **options)
    if isinstance(preconditioner, LearnedWriteKey):
        dtype = accumulation_dtype(v)
        read = l2norm(k.to(dtype)) if qk_l2norm else k.to(dtype)
        write_k = preconditioner.of(read)
    else:
        write_k = preconditioner
    return delta_rule(q, k, v, beta=gain, write_k=write_k, qk_l2norm=qk_l2norm, **options)


@without_autocast
def _with_norm_gain(q, k, v, gain, preconditioner, *, qk_l2norm, state, cu_seqlens, **options):
    """Turn a key of any size n into one of unit size, which the kernels are made for.

    With k = n u, ``c k (v - S^T k)^T = (c n^2) u (v / n - S^T u)^T``.
    """
    dtype, heads = accumulation_dtype(v), v.shape[2]
    q, k = q.to(dtype), k.to(dtype)
    if qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    A, write, curvature = None, None, k.square().sum(-1)
    square = curvature + 1e-6
    unit = k * square.rsqrt()[..., None]
    if preconditioner is not None:
        B, A = diagonal_preconditioner(
            k, preconditioner, A=None if state is None else state.A, cu_seqlens=cu_seqlens
        )
        wide, curved = expand_heads(k, B.shape[2]), expand_heads(unit, B.shape[2])
        curvature = (wide * B * wide).sum(-1)
        write = (B * curved).to(v.dtype)
    curvature, square = (expand_heads(x, heads) for x in (curvature, square))
    o, final = delta_rule(
        q.to(v.dtype),
        unit.to(v.dtype),
        (v * square.rsqrt()[..., None]).to(v.dtype),
        beta=gain.step(square, curvature),
        write_k=write,
        state=state,
        cu_seqlens=cu_seqlens,
        **options,
    )
    return o, final and RecurrentState(final.S, A)
