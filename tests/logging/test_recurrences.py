"""What is said of a recurrence is what it did; and which heads raise an alarm."""

import math

import pytest
import torch

from pdn.logging import heat
from pdn.logging.alarms import Alarms
from pdn.logging.recurrences import (
    LONGEST,
    Attention,
    Call,
    describe,
    entropy,
    half_lives,
    measure,
    rounded,
)
from pdn.ops import DiagonalPreconditioner, delta_rule, observed
from pdn.ops.reference import l2norm
from tests.presets import TINY, small_config, small_model

B, T, H, K, V = 2, 24, 2, 8, 12


@pytest.fixture
def call():
    """Describe one call of the delta rule, with two heads of known decay and gain."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, n, generator=generator) for n in (K, K, V))
    decay = torch.tensor([0.5, 0.25]).log().expand(B, T, H)
    beta = torch.tensor([0.3, 0.9]).expand(B, T, H)
    seen: list[Call] = []
    rule = DiagonalPreconditioner(decay, beta, torch.tensor([-0.2, 5.0]))
    with observed(lambda *found: seen.append(Call(*found))):
        o, final = delta_rule(q, k, v, beta=beta, log_decay=decay, write_k=rule, qk_l2norm=True)
    assert final is None and o.shape == v.shape
    (found,) = seen
    return found


def test_a_call_is_described_by_its_decay_gain_write_key_and_state(call):
    found = describe(call)
    for name in ("half_life_p10", "half_life_p50", "half_life_p90"):
        assert found[name].tolist() == pytest.approx([1.0, 0.5])
    assert found["beta"].tolist() == pytest.approx([0.3, 0.9])
    # every token by itself, in float64
    k = l2norm(call.k.double())
    A, S = torch.zeros(B, H, K).double(), torch.zeros(B, H, K, V).double()
    decay, beta = torch.tensor([0.5, 0.25]).double(), torch.tensor([0.3, 0.9]).double()
    mu, products, distances = torch.tensor([-0.2, 5.0]).double(), [], []
    for t in range(T):
        A = decay[:, None] * A + beta[:, None] * k[:, t].square()
        r = (A + 1e-6).log() - mu[:, None]
        kw = 1.5 ** (-r / (1 + r.abs())) * k[:, t]
        S = decay[:, None, None] * S
        error = call.v[:, t].double() - (k[:, t, ..., None] * S).sum(2)
        S = S + beta[:, None, None] * kw[..., None] * error[:, :, None]
        products.append((k[:, t] * kw).sum(-1))
        distances.append(r)
    product = torch.stack(products, 1)
    assert found["key_write"].tolist() == pytest.approx(product.mean((0, 1)).tolist(), rel=1e-5)
    assert found["write_max"].tolist() == pytest.approx(
        (beta * product).amax((0, 1)).tolist(), rel=1e-5
    )
    r = torch.stack(distances, 1).movedim(2, 0).flatten(1)
    assert found["log_A_minus_mu"].tolist() == pytest.approx(r.median(1).values.tolist(), rel=1e-3)
    norms = torch.linalg.matrix_norm(S)
    assert found["S_norm"].tolist() == pytest.approx(norms.amax(0).tolist(), rel=1e-5)
    s = torch.linalg.svdvals(S)
    rank = s.square().sum(-1).square() / s.pow(4).sum(-1)
    assert found["S_rank"].tolist() == pytest.approx(rank.mean(0).tolist(), rel=1e-5)


def test_tokens_without_any_decay_have_no_part_in_the_half_lives():
    halves = torch.full((1, 6, 2), 0.5).log()
    halves[0, 3:] = 0  # as the inner steps of several to a token
    halves[0, 1, 1] = 0  # of one head only: it forgets nothing there
    found = half_lives(halves)
    assert found["half_life_p50"].tolist() == [1, 1]
    assert found["half_life_p90"].tolist() == pytest.approx([1, 0.8 * LONGEST], rel=1e-6)
    assert half_lives(torch.zeros(1, 6, 2))["half_life_p10"].tolist() == [LONGEST] * 2


def test_the_entropy_of_attention_is_that_of_the_tokens_in_reach():
    q, k = torch.zeros(1, 4, T, K), torch.randn(1, 2, T, K)
    causal = entropy(Attention(q, k, None, True))["attention_entropy"]
    assert causal.tolist() == pytest.approx([sum(map(math.log, range(1, T + 1))) / T] * 4)
    mask = torch.eye(T, dtype=torch.bool)
    alone = entropy(Attention(q, k, mask, False))["attention_entropy"]
    assert alone.tolist() == pytest.approx([0.0] * 4)


@pytest.mark.parametrize("name", TINY)
def test_every_mixer_is_described_and_computes_the_same_meanwhile(name):
    model = small_model(name, torch.float32)
    tokens = torch.arange(32)[None] % 256
    with torch.no_grad():
        plain = model(tokens).logits
    seen = []
    maps, failures = measure(model, lambda: seen.append(model(tokens).logits))
    assert torch.equal(seen[0], plain) and not failures
    layers = small_config(name).num_layers
    for layer in range(layers):
        assert any(rows[layer] for rows in maps.values())
    values = [x for rows in rounded(maps).values() for row in rows for x in row or ()]
    assert None not in values
    silent, _ = measure(model, lambda: model(tokens), describing=False)
    assert silent == {}


def well(**changed) -> dict:
    maps = {"half_life_p90": [[8.0, 0.4]], "S_norm": [[1.0, 2.0]]}
    return maps | {"saturated": [[0.0, 0.1]], "write_max": [[0.9, 1.4]]} | changed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"half_life_p90": [[0.5, 0.4]]}, "layer 0, head 0: the decay collapsed: half-life 0.5"),
        ({"saturated": [[0.0, 0.7]]}, "layer 0, head 1: B saturates: 70% of it"),
        ({"S_norm": [[1.0, 25.0]]}, "layer 0, head 1: the state S blew up: norm 25"),
        ({"S_norm": [[None, 2.0]]}, "layer 0, head 0: the norm of the state S is not finite"),
        ({"write_max": [[2.3, 1.4]]}, "layer 0, head 0: a write erases 2.3 times the old value"),
    ],
)
def test_a_head_that_goes_wrong_is_named_once_until_it_is_well_again(changed, said):
    alarms = Alarms()
    assert alarms.check(well()) == alarms.check(well()) == []
    (alarm,) = alarms.check(well(**changed))
    assert str(alarm).startswith(said)
    assert alarms.check(well(**changed)) == []
    assert alarms.check(well()) == []
    assert len(alarms.check(well(**changed))) == 1


def test_a_map_is_drawn_from_blue_to_red_and_grey_where_nothing_is():
    drawn = heat.image([[0.0, 1.0], None])
    assert drawn.shape == (2 * heat.CELL, 2 * heat.CELL, 3)
    assert drawn[0, 0].tolist() == [70, 70, 245] and drawn[0, -1].tolist() == [245, 70, 70]
    assert drawn[-1, 0].tolist() == list(heat.GREY)
