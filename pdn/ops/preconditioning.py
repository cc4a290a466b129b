"""Preconditioners that no backend fuses: the write key, or the read query, computed before the op.

A backend then gets a tensor, so that its kernels serve these as well.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pdn.ops.reference import expand_heads, l2norm
from pdn.ops.types import (
    DiagonalPreconditioner,
    SigmoidGain,
    SoftplusDecay,
    accumulation_dtype,
    materialise,
    without_autocast,
)

# B and A of a key, as ``pdn.ops.diagonal_preconditioner``
Diagonal = Callable[[Tensor, DiagonalPreconditioner], tuple[Tensor, Tensor]]


@without_autocast
def write_key(
    k: Tensor,
    preconditioner: DiagonalPreconditioner,
    diagonal: Diagonal,
    *,
    normalise: bool,
    heads: int,
    beta: Tensor | SigmoidGain,
    log_decay: Tensor | SoftplusDecay | None,
) -> tuple[Tensor, Tensor]:
    """Return the write key and A after the last token.

    The key is [B, T, H or HV, K] in the accumulation dtype.

    Args:
        k: [B, T, H, K], as the op takes it; ``normalise``: as its ``qk_l2norm``.
        diagonal: computes B and A.
        heads: HV, of the values.
        beta, log_decay: of the main recurrence, as the op takes them.

    Raises:
        ValueError: factor "share" with a decay of each channel.
    """
    k = read_key(k, normalise)
    B, A = diagonal(k, preconditioner)
    decay, gain = None, materialise(beta).to(k.dtype)
    if preconditioner.factor == "share":
        decay = materialise(log_decay)
        if decay is not None and decay.ndim == 4:
            raise ValueError("factor = share with a decay of each channel: expected a scalar one")
        k, B = expand_heads(k, heads), expand_heads(B, heads)
    k = expand_heads(k, B.shape[2])
    write = B * k
    if preconditioner.factor != "none":
        write = write * preconditioner.scale_of(k, B, decay, gain)
    return write, A


@without_autocast
def query_and_key(
    q: Tensor,
    k: Tensor,
    preconditioner: DiagonalPreconditioner,
    diagonal: Diagonal,
    *,
    normalise: bool,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rescaled query and the key, both [B, T, HV, K], and A after the last token.

    Raises:
        ValueError: a factor, which scales a write key.
    """
    if preconditioner.factor != "none":
        raise ValueError(
            f"factor = {preconditioner.factor}: it scales a write key, and the offline solve has "
            "none; expected factor = none"
        )
    q, k = read_key(q, normalise), read_key(k, normalise)
    B, A = diagonal(k, preconditioner)
    q, k, B = (expand_heads(x, heads) for x in (q, k, B))
    return B * q, k, A


def read_key(k: Tensor, normalise: bool) -> Tensor:
    """Return the key, or query, in the accumulation dtype, normalised if asked."""
    k = k.to(accumulation_dtype(k))
    return l2norm(k) if normalise else k
