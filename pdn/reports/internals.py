"""What the recurrences of a model do on given text.

That is gain, decay, and what the preconditioner makes of the write key.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pdn.models.language_model import LanguageModel
from pdn.models.mixers.linear_recurrence import LinearRecurrence
from pdn.ops import diagonal_preconditioner
from pdn.ops.reference import l2norm
from pdn.ops.types import DiagonalPreconditioner, SigmoidGain, SoftplusDecay, materialise

SATURATED = 0.95  # of the bounds' logarithm


@torch.no_grad()
def internals(model: LanguageModel, tokens: Tensor) -> list[dict[str, float]]:
    """Describe each layer that solves online, in the order of the layers.

    Args:
        model: in evaluation mode.
        tokens: [B, T] ids on the model's device; every row starts from the zero state.

    Returns:
        For each layer ``layer``, ``beta`` and ``decay`` (means), to four significant digits. With a
        preconditioner also

        - ``mu``: mean over heads; ``B``: mean;
        - ``B_spread``: standard deviation of B over a head's channels, which is what tells a
          preconditioner from a larger gain;
        - ``kBk``: mean of k . (B k), 1 without preconditioner;
        - ``write``: mean of beta k . (B k), the share of the old value that a write erases;
        - ``reversed``: share of tokens and heads where that exceeds 1, a negative eigenvalue;
        - and for bounds above 1 ``log_A`` (median), ``log_A_spread`` (over a head's channels) and
          ``saturated``: share of B whose logarithm is within 5 % of the bounds'.
    """
    rows: list[dict[str, float]] = []
    mixers = enumerate(block.mixer for block in model.blocks)
    patched = [(i, mixer) for i, mixer in mixers if isinstance(mixer, LinearRecurrence)]
    for i, mixer in patched:
        mixer.solve = _watched(i, mixer.solve, rows)
    try:
        model(tokens)
    finally:
        for _, mixer in patched:
            del mixer.solve  # uncovers the class's own method
    return rows


def _watched(layer: int, solve, rows: list[dict[str, float]]):
    def wrapped(
        q: Tensor, k: Tensor, v: Tensor, decay: Tensor | SoftplusDecay | None,
        gain: SigmoidGain | None, preconditioner: DiagonalPreconditioner | None, **options,
    ):  # fmt: skip
        row = {"layer": layer, "beta": 1.0 if gain is None else materialise(gain).mean().item()}
        row["decay"] = 1.0 if decay is None else materialise(decay).exp().mean().item()
        if isinstance(preconditioner, DiagonalPreconditioner) and preconditioner.form == "squash":
            row |= _preconditioner(l2norm(k.float()), gain, preconditioner)
        rows.append({key: _rounded(value) for key, value in row.items()})
        return solve(q, k, v, decay, gain, preconditioner, **options)

    return wrapped


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _preconditioner(
    k: Tensor, gain: SigmoidGain | None, preconditioner: DiagonalPreconditioner
) -> dict[str, float]:
    assert preconditioner.mu is not None  # of every squashed one
    B, _ = diagonal_preconditioner(k, preconditioner)
    kBk = (B * k.square()).sum(-1)
    beta = torch.ones_like(kBk) if gain is None else materialise(gain).float()
    found = {
        "mu": preconditioner.mu.mean(),
        "B": B.mean(),
        "B_spread": B.std(-1).mean(),
        "kBk": kBk.mean(),
        "write": (beta * kBk).mean(),
        "reversed": (beta * kBk > 1).float().mean(),
    }
    if preconditioner.bound > 1:
        # B = exp(-log(x) s) and s = r / (1 + |r|), so r comes back from B.
        s = -B.log() / math.log(preconditioner.bound)
        log_A = s / (1 - s.abs()).clamp(min=1e-6) + preconditioner.mu.float()[:, None]
        found |= {"log_A": log_A.median(), "log_A_spread": log_A.std(-1).mean()}
        found["saturated"] = (s.abs() > SATURATED).float().mean()
    return {key: value.item() for key, value in found.items()}
