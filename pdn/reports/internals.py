"""What the recurrences of a model do on given text: gain, decay, and what the preconditioner makes of the write key."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pdn.ops import diagonal_preconditioner
from pdn.ops.reference import l2norm
from pdn.ops.types import DiagonalPreconditioner, materialise


@torch.no_grad()
def internals(model: nn.Module, tokens: Tensor) -> list[dict[str, float]]:
    """Statistics of each layer that solves online, in the order of the layers.

    Args:
        model: a LanguageModel, in evaluation mode.
        tokens: [B, T] ids on the model's device; every row starts from the zero state.

    Returns:
        For each layer ``layer``, ``beta`` and ``decay`` (means); with a preconditioner also ``mu`` (mean over heads),
        ``log_A`` (median), ``log_A_spread`` (standard deviation over a head's channels), ``B``, ``B_spread`` (the same
        deviation of B, which is what distinguishes a preconditioner from a larger gain), ``kBk`` (mean of k . (B k),
        1 without preconditioner), ``write`` (mean of beta k . (B k), the share of the old value that a write erases)
        and ``saturated`` (share of B within 5 % of the bounds' logarithms).
    """
    rows: list[dict[str, float]] = []
    patched = [(i, b.mixer) for i, b in enumerate(model.blocks) if hasattr(b.mixer, "solve")]
    for i, mixer in patched:
        mixer.solve = _watched(i, mixer.solve, rows)
    try:
        model(tokens)
    finally:
        for _, mixer in patched:
            del mixer.solve  # the class's own method shows again
    return rows


def _watched(layer: int, solve, rows: list[dict[str, float]]):
    def wrapped(q, k, v, decay, gain, preconditioner, **options):
        row = {"layer": layer, "beta": 1.0 if gain is None else materialise(gain).mean().item()}
        row["decay"] = 1.0 if decay is None else materialise(decay).exp().mean().item()
        if isinstance(preconditioner, DiagonalPreconditioner) and preconditioner.form == "squash":
            row |= _preconditioner(l2norm(k.float()), gain, preconditioner)
        rows.append(row)
        return solve(q, k, v, decay, gain, preconditioner, **options)

    return wrapped


def _preconditioner(k: Tensor, gain, preconditioner: DiagonalPreconditioner) -> dict[str, float]:
    B, _ = diagonal_preconditioner(k, preconditioner)
    # B = exp(-log(x) s) and s = r / (1 + |r|), so r comes back from B
    s = (
        -B.log() / torch.tensor(preconditioner.bound).log()
        if preconditioner.bound > 1
        else torch.zeros_like(B)
    )
    log_A = s / (1 - s.abs()).clamp(min=1e-6) + preconditioner.mu.float()[:, None]
    kBk = (B * k.square()).sum(-1)
    beta = materialise(gain).float() if gain is not None else torch.ones_like(kBk)
    return {
        "mu": preconditioner.mu.mean().item(),
        "log_A": log_A.median().item(),
        "log_A_spread": log_A.std(-1).mean().item(),
        "B": B.mean().item(),
        "B_spread": B.std(-1).mean().item(),
        "kBk": kBk.mean().item(),
        "write": (beta * kBk).mean().item(),
        "saturated": (s.abs() > 0.95).float().mean().item(),
    }
