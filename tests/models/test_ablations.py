"""The paper's ablations of the preconditioner, written out token by token in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.models.test_shapes import shaped
from tests.presets import built

ABLATIONS = {
    "tanh": {"squash": "tanh"},
    "upper": {"interval": "upper"},
    "lower": {"interval": "lower", "squash": "tanh"},
    "inverse": {"factor": "inverse"},
    "one_plus": {"factor": "one_plus"},
    "share": {"factor": "share"},
    "tied": {"tied": True},
    "sherman_morrison": {"form": "sherman_morrison"},
}


def rescaling(p: dict, A: torch.Tensor, mu) -> torch.Tensor:
    """Compute B of the curvature A [H, K]."""
    if p.get("form") == "sherman_morrison":
        return 1 / (A + 1e-6)
    r = torch.log(A + 1e-6) - mu[:, None]
    s = torch.tanh(r) if p.get("squash") == "tanh" else r / (1 + r.abs())
    low, high = {"upper": (1, 1.5), "lower": (1 / 1.5, 1)}.get(p.get("interval"), (1 / 1.5, 1.5))
    place = (1 - s) / 2  # 0 where the curvature is large, 1 where it is small
    return torch.exp(math.log(low) + (math.log(high) - math.log(low)) * place)


def factor(p: dict, curvature, alpha, beta):
    if p.get("factor") == "inverse":
        return 1 / curvature
    if p.get("factor") == "one_plus" or p.get("form") == "sherman_morrison":
        return 1 / (1 + curvature)
    if p.get("factor") == "share":
        return 1 / (alpha + beta * curvature)
    return torch.ones_like(curvature)


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_write_key_of_an_ablation_follows_its_formula(name):
    p = ABLATIONS[name]
    mixer = built(shaped("pgdn_tiny", {"preconditioner": p}))
    x = torch.randn(1, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = (
        getattr(mixer, f"{c}_conv")(getattr(mixer, f"{c}_proj")(x))[0][0].unflatten(-1, (2, 16))
        for c in "qkv"
    )
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))

    def gates(decay, gain):
        rates = decay.rates
        alpha = (-rates.A_log.exp() * F.softplus(decay.a_proj(x[0]) + rates.dt_bias)).exp()
        return alpha, torch.sigmoid(gain.b_proj(x[0]))

    alpha, beta = gates(mixer.decay, mixer.gain)
    own = mixer.preconditioner
    alpha_p, beta_p = (alpha, beta) if p.get("tied") else gates(own.decay, own.gain)
    mu = None if own.center is None else own.center.mu
    A = torch.zeros(2, 16, dtype=torch.float64)
    S = torch.zeros(2, 16, 16, dtype=torch.float64)
    outputs = []
    for t in range(9):
        A = alpha_p[t, :, None] * A + beta_p[t, :, None] * k[t] ** 2
        write = rescaling(p, A, mu) * k[t]
        curvature = (write * k[t]).sum(-1)
        write = factor(p, curvature, alpha[t], beta[t])[:, None] * write
        S = alpha[t, :, None, None] * S
        error = v[t] - torch.einsum("hkv,hk->hv", S, k[t])
        S = S + beta[t, :, None, None] * write[:, :, None] * error[:, None, :]
        outputs.append(torch.einsum("hkv,hk->hv", S, q[t]) / 4)
    o = mixer.o_norm(torch.stack(outputs))
    torch.testing.assert_close(mixer(x)[0][0], mixer.o_proj(o.flatten(-2)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("interval", ["both", "upper", "lower"])
@pytest.mark.parametrize("squash", ["softsign", "tanh"])
def test_the_rescaling_stays_in_its_interval_and_falls_with_the_curvature(interval, squash):
    from pdn.ops import DiagonalPreconditioner

    mu = torch.zeros(1, dtype=torch.float64)
    p = DiagonalPreconditioner(None, None, mu, 1.5, squash=squash, interval=interval)
    B = p.rescaling(torch.logspace(-8, 8, 99, dtype=torch.float64)[:, None])[:, 0]
    low, high = {"both": (1 / 1.5, 1.5), "upper": (1, 1.5), "lower": (1 / 1.5, 1)}[interval]
    assert (low <= B).all() and (high >= B).all() and (B.diff() <= 0).all()
    assert B[0] - B[-1] > 0.8 * (high - low)


@pytest.mark.parametrize(
    ("preset", "p", "message"),
    [
        ("pgdn_tiny", {"form": "inverse"}, "form = inverse is unbounded"),
        ("pla_tiny", {"form": "sherman_morrison"}, "they scale a write key"),
        ("pla_tiny", {"factor": "one_plus"}, "they scale a write key"),
        ("pkda_tiny", {"factor": "share"}, "factor = share with decay.kind = diagonal"),
        ("pdn_tiny", {"tied": True}, "tied with decay.kind = none"),
        ("pgdn_tiny", {"form": "sherman_morrison", "squash": "tanh"}, "are of form = squash"),
        ("pmamba2_tiny", {"tied": True}, "Mamba-2 has none of these"),
        ("pcomba_tiny", {"factor": "inverse"}, "read key is not its write key"),
    ],
)
def test_ablations_without_meaning_are_refused_by_name(preset, p, message):
    with pytest.raises(ValueError, match=message):
        shaped(preset, {"preconditioner": p})
