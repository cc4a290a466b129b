"""The gains that depend on the key's size, learned write keys and the fixed decay.

They are written out token by token in float64.
"""

import pytest
import torch
import torch.nn.functional as F

from tests.models.test_ablations import rescaling
from tests.models.test_shapes import shaped
from tests.presets import built

TIME = 9


def inputs(mixer, x):
    return (
        getattr(mixer, f"{c}_conv")(getattr(mixer, f"{c}_proj")(x))[0][0].unflatten(-1, (2, 16))
        for c in "qkv"
    )


def unit(y):
    return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def delta_rule(mixer, x, q, k, v, gain, write):
    """Run the rule with gain(t, h): of a token and head, for a key of its own size.

    write: [T, H, K].
    """
    S, outputs = torch.zeros(2, 16, 16, dtype=torch.float64), []
    for t in range(TIME):
        error = v[t] - torch.einsum("hkv,hk->hv", S, k[t])
        S = S + gain[t][:, None, None] * write[t][:, :, None] * error[:, None, :]
        outputs.append(torch.einsum("hkv,hk->hv", S, q[t]) / 4)
    return mixer.o_proj(mixer.o_norm(torch.stack(outputs)).flatten(-2))


@pytest.fixture
def x():
    return torch.randn(1, TIME, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["longhorn", "efla", "nlms"])
def test_the_gain_is_that_of_the_unnormalised_key(kind, x):
    mixer = built(shaped("deltanet_tiny", {"qk_l2norm": False, "gain": {"kind": kind}}))
    q, k, v = inputs(mixer, x)
    square = k.square().sum(-1)
    if kind == "nlms":
        gain = 1 / (square + 1e-6)
    else:
        beta = torch.sigmoid(mixer.gain.b_proj(x[0]))
        gain = (
            beta / (1 + beta * square)
            if kind == "longhorn"
            else (1 - torch.exp(-beta * square)) / square
        )
    close(mixer(x)[0][0], delta_rule(mixer, x, q, k, v, gain, k))


def test_a_key_of_nothing_is_written_with_a_finite_gain_and_gradient():
    for kind in ("longhorn", "efla", "nlms"):
        mixer = built(shaped("deltanet_tiny", {"qk_l2norm": False, "gain": {"kind": kind}}))
        x = torch.zeros(1, TIME, 64, dtype=torch.float64, requires_grad=True)
        mixer(x)[0].sum().backward()
        assert x.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


def test_longhorn_with_a_preconditioner_divides_by_the_curved_norm(x):
    mixer = built(shaped("pdn_tiny", {"qk_l2norm": False, "gain": {"kind": "longhorn"}}))
    q, k, v = inputs(mixer, x)
    own = mixer.preconditioner
    rates = own.decay.rates
    decay = (-rates.A_log.exp() * F.softplus(own.decay.a_proj(x[0]) + rates.dt_bias)).exp()
    gain_p = torch.sigmoid(own.gain.b_proj(x[0]))
    A, B = torch.zeros(2, 16, dtype=torch.float64), []
    for t in range(TIME):
        A = decay[t, :, None] * A + gain_p[t, :, None] * k[t] ** 2
        B.append(rescaling({}, A, own.center.mu))
    write = torch.stack(B) * k
    beta = torch.sigmoid(mixer.gain.b_proj(x[0]))
    gain = beta / (1 + beta * (k * write).sum(-1))
    close(mixer(x)[0][0], delta_rule(mixer, x, q, k, v, gain, write))


@pytest.mark.parametrize("form", ["scale", "projection"])
def test_a_learned_write_key_takes_the_place_of_the_key(form, x):
    learned = {"kind": "learned", "form": form, "bound": 1.5}
    mixer = built(shaped("deltanet_tiny", {"preconditioner": learned}))
    q, k, v = inputs(mixer, x)
    q, k, own = unit(q), unit(k), mixer.preconditioner
    if form == "scale":
        write = k * 1.5 ** torch.tanh(own.w_up(own.w_down(x[0])).unflatten(-1, (2, 16)))
    else:
        write = unit(own.w_proj(x[0]).unflatten(-1, (2, 16)))
    gain = torch.sigmoid(mixer.gain.b_proj(x[0]))
    close(mixer(x)[0][0], delta_rule(mixer, x, q, k, v, gain, write))


def test_the_fixed_decay_is_retnets(x):
    mixer = built(shaped("linear_attention_tiny", {"decay": {"kind": "fixed"}}))
    q, k, v = inputs(mixer, x)
    q, k = unit(q), unit(k)
    decay = torch.tensor([1 - 2**-5, 1 - 2**-6], dtype=torch.float64)
    S, outputs = torch.zeros(2, 16, 16, dtype=torch.float64), []
    for t in range(TIME):
        S = decay[:, None, None] * S + k[t][:, :, None] * v[t][:, None, :]
        outputs.append(torch.einsum("hkv,hk->hv", S, q[t]) / 4)
    close(mixer(x)[0][0], mixer.o_proj(mixer.o_norm(torch.stack(outputs)).flatten(-2)))


LEARNED = {"kind": "learned", "form": "scale", "bound": 1.5}


@pytest.mark.parametrize(
    ("preset", "mixer", "message"),
    [
        ("linear_attention_tiny", {"gain": {"kind": "efla"}}, "has the gains none and beta"),
        ("linear_attention_tiny", {"preconditioner": LEARNED}, "learned with solve = offline"),
        ("pgdn_tiny", {"gain": {"kind": "nlms"}}, "nlms together with a preconditioner"),
        ("comba_tiny", {"gain": {"kind": "nlms"}}, "Comba has the gain beta"),
        ("delta_product_tiny", {"preconditioner": LEARNED}, "no learned write key"),
        ("mamba2_tiny", {"preconditioner": LEARNED}, "Mamba-2 has no write key"),
        (
            "pgdn_tiny",
            {"gain": {"kind": "longhorn"}, "preconditioner": {"factor": "one_plus"}},
            "longhorn has a factor of its own",
        ),
    ],
)
def test_gains_and_write_keys_that_do_not_go_together_are_refused_by_name(preset, mixer, message):
    with pytest.raises(ValueError, match=message):
        shaped(preset, mixer)


@pytest.mark.parametrize(
    ("preconditioner", "most"),
    [({"bound": 1.5}, 1.3333), ({"bound": 2.0}, 1.0),
     ({"bound": 1.5, "factor": "one_plus"}, 1.0), ({"form": "sherman_morrison"}, 1.0)],
)  # fmt: skip
def test_a_gain_goes_with_a_preconditioner_as_far_as_the_recurrence_is_stable(preconditioner, most):
    shaped("pgdn_tiny", {"gain": {"range": most}, "preconditioner": preconditioner})
    with pytest.raises(ValueError, match=r"no longer stable; expected gain\.range <= "):
        shaped("pgdn_tiny", {"gain": {"range": most + 0.001}, "preconditioner": preconditioner})
