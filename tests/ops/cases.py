"""What the CPU and the GPU tests of the ops share.

That is comparison by the table of tolerances, and inputs chosen to break.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pdn.certification.problems import (
    KINDS,
    SUMS,
    Problem,
    relative_error,
    sample,
)
from pdn.ops.recurrences import RECURRENCES
from tests.tolerances import MAX_ABS_FACTOR, OPS, SUM_FACTOR


def elementwise_error(x: Tensor, reference: Tensor) -> float:
    """Return the largest |x - reference|, in units of the reference.

    The unit is the root mean square of the reference plus the element itself.
    """
    x, reference = x.double(), reference.double()
    scale = reference.abs() + reference.square().mean().sqrt()
    return (
        ((x - reference).abs() / torch.where(scale == 0, 1.0, scale)).max().item()
        if x.numel()
        else 0.0
    )


def tolerance(name: str, row: str) -> float:
    """Return the relative L2 tolerance of a result by its name."""
    return OPS[row][KINDS[name]] * (SUM_FACTOR if name in SUMS and row != "fp64" else 1)


def check(results: dict, expected: dict, row: str) -> None:
    """Check every tensor against the table's row, in the L2 norm and elementwise.

    The message lists all of them.
    """
    assert results.keys() == expected.keys()
    lines, bad = [], False
    for name, x in expected.items():
        limit = tolerance(name, row)
        error, worst = relative_error(results[name], x), elementwise_error(results[name], x)
        ok = error <= limit and worst <= MAX_ABS_FACTOR * limit
        bad |= not ok
        lines.append(
            f"{name}: {error:.1e} / {limit:.0e}, elementwise {worst:.1e}{'' if ok else '  <--'}"
        )
    assert not bad, "\n".join(lines)


def check_adversarial(results: dict, expected: dict, row: str) -> None:
    """Check that results are finite, and within ten times the row: saturated inputs cancel.

    An absolute term covers results that should vanish.
    """
    lines, bad = [], False
    for name, x in expected.items():
        error = (results[name].double() - x).norm().item()
        limit = 10 * tolerance(name, row) * (x.norm().item() + 0.1 * x.numel() ** 0.5)
        ok = bool(results[name].isfinite().all()) and error <= limit
        bad |= not ok
        lines.append(
            f"{name}: |error| {error:.1e} / {limit:.1e}, |expected| "
            f"{x.norm().item():.1e}{'' if ok else '  <--'}"
        )
    assert not bad, "\n".join(lines)


def adversarial(
    name: str, model: str, dtype: torch.dtype, key: int = 16, device="cpu", time: int = 130
) -> Problem:
    """Return a problem with activated gates, spoilt in one way; skip if the model lacks it."""
    recurrence = RECURRENCES[model]
    p = sample(
        recurrence,
        batch=1,
        time=time,
        heads=2,
        key=key,
        raw_gates=False,
        initial=True,
        final=True,
        dtype=dtype,
        device=device,
    )
    t = p.tensors
    if (name.startswith("decay") and recurrence.decay == "none") or (
        name.startswith("P_") and not recurrence.preconditioned
    ):
        pytest.skip(f"{model} has no such axis")
    match name:
        case "decay of zero":
            t["log_decay"].zero_()
        case "decay erases at one token":
            t["log_decay"][:, 37] = -1e4
        case "decay erases at every token":
            t["log_decay"].fill_(-1e4)
        case "decay mixes 0 and -50":
            t["log_decay"][:, ::2], t["log_decay"][:, 1::2] = 0, -50
            if recurrence.decay == "diagonal":
                t["log_decay"][..., ::2] = -50 - t["log_decay"][..., ::2]
        case "P_decay of -100":
            t["P_log_decay"].fill_(-100)
        case "P_gain of zero":
            t["P_beta"].zero_()
        case "P_curvature of zero with zero keys":
            t["A"].zero_(), t["k"].zero_()
        case "P_centre of -10 and 10":
            t["mu"][0], t["mu"][1] = -10, 10
        case "zero keys":
            t["k"][:, 10:20] = 0
        case "one-hot keys":
            t["k"] = (
                F.one_hot(torch.arange(time) % key, key)
                .to(t["k"])
                .view(1, time, 1, key)
                .repeat(1, 1, 2, 1)
            )
        case "identical keys with full gain":
            t["k"] = t["k"][:, :1].repeat(1, time, 1, 1)
            t["beta"].fill_(1)
            p.bound = 2.0
        case "gain of zero":
            t["beta"].zero_()
    return p


ADVERSARIAL = [
    "decay of zero", "decay erases at one token", "decay erases at every token",
    "decay mixes 0 and -50", "P_decay of -100",
    "P_gain of zero", "P_curvature of zero with zero keys", "P_centre of -10 and 10", "zero keys",
    "one-hot keys",
    "identical keys with full gain", "gain of zero",
]  # fmt: skip
