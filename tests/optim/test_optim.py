"""Parameter groups, the container of the optimisers, and precision."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from pdn import ops
from pdn.models.language_model import LanguageModel
from pdn.optim.config import AdamWConfig, OptimConfig
from pdn.optim.groups import named_groups
from pdn.optim.optimizers import build_optimizer
from tests.presets import CONFIGS, TINY, small_config, small_model

ADAMW = dict(kind="adamw", lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

OPTIMIZERS = sorted(path.stem for path in (CONFIGS / "optim").glob("*.yaml"))


def of_file(name: str) -> OptimConfig:
    """What ``optim=<name>`` gives."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("train", ["model=pgdn_tiny", f"optim={name}"])
    options = OmegaConf.to_container(composed.optim, resolve=True)
    return TypeAdapter(OptimConfig).validate_python(options)


def adamw(**changes) -> AdamWConfig:
    return AdamWConfig.model_validate(ADAMW | changes)


def trained(config=None, steps: int = 2, preset: str = "pgdn_tiny"):
    """Return a small model and its optimiser after some steps."""
    model = small_model(preset, torch.float32)
    optimizer = build_optimizer(model, config or adamw())
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def backward(model, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 64, (2, 16), generator=generator)
    model(tokens, labels=tokens).loss_sum.backward()


def everything(model, optimizer) -> list[torch.Tensor]:
    """Copy the parameters and all optimiser state."""
    state = [value for single in optimizer for of in single.state.values() for value in of.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *state)]


@pytest.mark.parametrize("preset", TINY)
def test_every_parameter_is_in_one_group_and_the_blocks_linear_maps_are_the_matrices(preset):
    model = small_model(preset)
    groups = named_groups(model)
    names = [name for found in groups.values() for name in found]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(name.endswith("_proj.weight") or "_up." in name or "_down." in name
               for name in groups["matrices"])  # fmt: skip
    other = [name for name in groups["filters"] if "conv" not in name]
    assert not other, "put what is to be spared into a module that says weight_decay = False"
    assert list(groups["embeddings"]) == ["embedding.weight"]
    assert all("norm" not in name and "bias" not in name
               for group in ("matrices", "filters") for name in groups[group])  # fmt: skip


def test_weight_decay_spares_norms_biases_and_the_parameters_of_the_recurrence():
    vectors = named_groups(small_model("pkda_tiny"))["vectors"]
    spared = {name.rsplit(".", 1)[1] for name in vectors if "norm" not in name}
    assert spared == {"A_log", "dt_bias", "mu", "bias"}
    for decay, expected in (("matrices", 0.0), ("all", 0.1)):
        found = {
            group["name"]: group["weight_decay"] for group in trained(adamw(decay=decay))[1].groups
        }
        assert found == dict.fromkeys(("embeddings", "matrices", "filters"), 0.1) | {
            "vectors": expected
        }


def test_a_group_may_have_its_own_weight_decay_and_share_of_the_learning_rate():
    groups = {
        "embeddings": {"lr_scale": 0.5, "weight_decay": 0.0},
        "vectors": {"lr_scale": 2.0, "weight_decay": 0.3},
    }
    _, optimizer = trained(adamw(groups=groups))
    optimizer.set_lr_fraction(0.1)
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.groups}
    assert found["embeddings"] == (pytest.approx(5e-5), 0.0)
    assert found["matrices"] == (pytest.approx(1e-4), 0.1)
    assert found["vectors"] == (pytest.approx(2e-4), 0.3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_told_of_non_finite_gradients_changes_nothing(name):
    model, optimizer = trained(of_file(name))
    before = everything(model, optimizer)
    backward(model, 2)
    model.embedding.weight.grad[0, 0] = torch.nan
    optimizer.step(found_inf=torch.tensor(True), clip=torch.tensor(torch.nan))
    assert all(map(torch.equal, before, everything(model, optimizer)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_a_clip_factor_is_the_step_of_gradients_scaled_before(name):
    results = []
    for before in (True, False):
        model, optimizer = trained(of_file(name))
        backward(model, 2)
        if before:
            for parameter in model.parameters():
                parameter.grad.mul_(0.3)
            optimizer.step()
        else:
            optimizer.step(found_inf=torch.tensor(False), clip=torch.tensor(0.3))
        results.append(everything(model, optimizer))
    assert all(map(torch.equal, *results))


def test_the_fused_step_decides_and_scales_as_the_plain_one():
    """Run the fused kernels on a CPU; they are what a GPU uses."""
    results = []
    for fused in (False, True):
        model = small_model("pgdn_tiny", torch.float32)
        optimizer = build_optimizer(model, adamw())
        for single in optimizer:
            single.defaults["fused"] = fused
            for group in single.param_groups:
                group["fused"] = fused
        for step in range(4):
            backward(model, step)
            skip = step == 2
            if skip:
                model.norm.weight.grad.fill_(torch.inf)
            optimizer.step(torch.tensor(skip), torch.tensor(torch.nan if skip else 0.5))
            optimizer.zero_grad()
        results.append(everything(model, optimizer))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-6)


def test_optimizer_state_goes_by_parameter_name_and_survives_other_groups():
    model, optimizer = trained()
    saved = optimizer.state_dict()
    assert saved["state"].keys() == {name for name, _ in model.named_parameters()}
    assert saved["hyperparameters"]["embedding.weight"]["weight_decay"] == 0.1
    other = build_optimizer(model, adamw(decay="all"))
    other.optimizers[0].param_groups.reverse()
    other.load_state_dict(saved)
    again = other.state_dict()["state"]
    for name, values in saved["state"].items():
        assert all(torch.equal(value, again[name][key]) for key, value in values.items())
    with pytest.raises(ValueError, match=r"'other.weight': found no such parameter"):
        other.load_state_dict({"state": {"other.weight": {}}})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_from_saved_state_as_if_it_had_not_stopped(name):
    model, optimizer = trained(of_file(name))
    other, continued = trained(of_file(name), steps=0)
    other.load_state_dict(model.state_dict())
    continued.load_state_dict(optimizer.state_dict())
    for one, its in ((model, optimizer), (other, continued)):
        backward(one, 2)
        its.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_bytes_are_known_before_there_is_any_state(name):
    with torch.device("meta"):
        meta = LanguageModel(small_config("pgdn_tiny"))
    _, optimizer = trained(of_file(name))
    state = [v for single in optimizer for of in single.state.values() for v in of.values()]
    moments = sum(tensor.numel() * 4 for tensor in state if tensor.dim())
    assert build_optimizer(meta, of_file(name)).state_bytes() == moments == optimizer.state_bytes()


def test_autocast_does_not_lower_the_precision_of_a_recurrence():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 8, generator=generator) for _ in range(3))
    beta = torch.rand(1, 70, 2, generator=generator)
    for backend in ("reference", "chunkwise"):
        plain, _ = ops.delta_rule(q, k, v, beta=beta, qk_l2norm=True, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            lowered, _ = ops.delta_rule(q, k, v, beta=beta, qk_l2norm=True, backend=backend)
        assert torch.equal(plain, lowered)
