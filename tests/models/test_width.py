"""Learning rates and initialisation that go over to other widths."""

import copy
import re

import pytest
import torch

from pdn.cli.compose import compose
from pdn.cli.parse import parse
from pdn.errors import ConfigError
from pdn.optim.optimizers import build_optimizer
from pdn.training.coordinates import first_and_last, slopes
from scripts.coordinates import Options, build

MIXERS = (
    "deltanet", "pdn", "gdn", "pgdn", "kda", "pkda", "linear_attention", "pla", "gla", "pgla",
    "mamba2", "pmamba2", "comba", "delta_product", "transformer",
)  # fmt: skip


def sloping(model: str, **options) -> dict[str, float]:
    options = Options(model=model, **options)
    found, _ = slopes(
        lambda width, seed: build(options, width, seed),
        widths=options.depths or options.widths,
        seeds=options.seeds,
        steps=options.steps,
        named=dict if options.depths is None else first_and_last,
    )
    return found


def test_numbers_keep_their_size_in_wider_models():
    small = dict(widths="64,256", seeds=1, steps=6)
    with_rules = sloping("pkda", base_width=64, **small)
    without = sloping("pkda", rules=False, **small)
    assert with_rules.keys() == without.keys() and len(with_rules) == 7
    assert max(map(abs, with_rules.values())) < 0.3 < min(map(abs, without.values()))


@pytest.mark.slow
@pytest.mark.parametrize("model", MIXERS)
def test_the_coordinate_check_of_every_mixer(model):
    found = sloping(model)
    first = found.pop("blocks.0.mlp")  # falls, ever more slowly: docs/width.md
    assert max(map(abs, found.values())) <= 0.1 and abs(first) <= 0.25, found


def test_what_grows_has_the_rules_and_all_else_stays():
    base, wide = (build(Options(model="pkda", base_width=64), width, 0)[0] for width in (64, 256))
    config = build(Options(model="pkda"), 256, 0)[1]
    scaled = {}
    for model in (base, wide):
        hyperparameters = build_optimizer(model, config).state_dict()["hyperparameters"]
        for name, parameter in model.named_parameters():
            values = parameter.detach().square().mean().sqrt(), hyperparameters[name]
            scaled.setdefault(name, []).append(values)
    factors = {}
    for name, ((size, options), (wider, others)) in scaled.items():
        factors[name] = others["lr"] / options["lr"], round(float(wider / size), 1)
        decay = [group["weight_decay"] * group["lr"] for group in (options, others)]
        assert decay[0] == pytest.approx(decay[1]), name
    assert factors["norm.weight"] == (0.25, 0.2)
    assert factors["blocks.0.mixer.q_proj.weight"] == (0.25, 0.5)
    assert factors["blocks.1.mlp.down_proj.weight"] == (0.25, 0.5)
    assert factors["blocks.0.mixer.decay.f_down.weight"] == (0.25, 0.5)
    for name in (
        "embedding.weight",
        "blocks.0.mixer.decay.f_up.weight",
        "blocks.0.mlp_norm.weight",
    ):
        assert factors[name] == (1.0, 1.0), name


def test_the_base_width_itself_is_the_model_without_rules():
    plain, based = (
        build(Options(model="pgdn", base_width=64, rules=rules), 64, 3)[0]
        for rules in (False, True)
    )
    for name, value in plain.state_dict().items():
        assert torch.equal(value, based.state_dict()[name]), name


EPS = 1e-4  # about the size of gradients, so that it counts


def losses_of(model, numbers: dict[str, dict]) -> list[float]:
    """Train three steps by torch's AdamW, with hyperparameters by parameter name."""
    groups = [{"params": [p], **numbers[name]} for name, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(groups)
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], labels=tokens[:, 1:]).loss_sum / 32
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def hyperparameters_of(model, optim) -> dict[str, dict]:
    optim = optim.model_copy(update={"eps": EPS})
    return build_optimizer(model, optim).state_dict()["hyperparameters"]


@pytest.mark.parametrize(("model", "last_map"), [("pkda", "o_proj"), ("mamba2", "out_proj")])
def test_a_deeper_model_trains_as_if_its_branches_were_multiplied_in_the_forward_pass(
    model, last_map
):
    """Factors of values, rates, decay and eps are CompleteP's multiplier of 1 / 4, as Adam sees it.

    Its eps is a fourth in blocks, where gradients are.
    """
    options = Options(model=model, depths="1,4", base_width=64)
    (multiplied, optim), (ours, _) = (
        build(options.model_copy(update={"rules": rules}), 4, 0) for rules in (False, True)
    )
    multiplied, ours = multiplied.double(), ours.double()
    for block in multiplied.blocks:
        for module in (getattr(block.mixer, last_map), block.mlp.down_proj):
            module.register_forward_hook(lambda _, __, out: out / 4)
    numbers = hyperparameters_of(multiplied, optim)
    for name, values in numbers.items():
        values["eps"] = EPS / 4 if name.startswith("blocks.") else EPS
    losses = losses_of(multiplied, numbers)
    assert losses == pytest.approx(losses_of(ours, hyperparameters_of(ours, optim)), rel=1e-9)
    for name, value in multiplied.state_dict().items():
        factor = 0.25 if name.endswith((f"{last_map}.weight", "down_proj.weight")) else 1.0
        assert torch.allclose(ours.state_dict()[name], factor * value, rtol=1e-7), name


def test_a_wider_model_trains_as_if_its_logits_were_multiplied_in_the_forward_pass():
    """The norm before the head, and Adam's eps, which is a fourth everywhere as gradients are."""
    options = Options(model="pkda", base_width=64)
    ours, optim = build(options, 256, 0)
    multiplied, ours = copy.deepcopy(ours).double(), ours.double()
    numbers = hyperparameters_of(ours, optim)
    plain = {name: dict(values) for name, values in numbers.items()}
    multiplied.norm.register_forward_hook(lambda _, __, out: out / 4)
    with torch.no_grad():
        multiplied.norm.weight.mul_(4)
    plain["norm.weight"]["lr"] *= 4
    for values in plain.values():
        values["eps"] = EPS / 4
    assert losses_of(multiplied, plain) == pytest.approx(losses_of(ours, numbers), rel=1e-9)
    for name, value in multiplied.state_dict().items():
        factor = 0.25 if name == "norm.weight" else 1.0
        assert torch.allclose(ours.state_dict()[name], factor * value, rtol=1e-7), name


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gdn", "pgdn", "kda", "transformer"])
def test_the_residual_of_a_deeper_model_keeps_its_size(model):
    """Branches fall as 1 / depth; what they add up to stays, and grows without the rule."""
    small = dict(depths="4,8,16", base_width=64, seeds=1)
    found, without = sloping(model, **small), sloping(model, rules=False, **small)
    assert abs(found["last"]) <= 0.25 < without["last"]
    assert abs(found["logits, moved by"]) <= 0.1
    assert max(found["first.mlp"], found["last.mlp"]) < -0.7


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["model.base_width=64", "model.init=released"], "base_width = 64 with init = released"),
        (["model.base_width=64", "optim=muon"], "model.base_width = 64 with optim = muon"),
        (["model.base_depth=2", "optim=muon"], "model.base_depth = 2 with optim = muon"),
    ],
)
def test_what_has_no_rule_is_refused(words, found):
    with pytest.raises(ConfigError, match=re.escape(found)):
        parse(compose(["model=pgdn_tiny", *words]))
