"""Models that flash-linear-attention's own classes compute, trained by our trainer."""

import copy
import functools
import importlib
import importlib.util
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pdn.errors import ConfigError
from pdn.hub import fla_model
from pdn.hub.architectures import exported_shape, fla_target
from pdn.hub.fla_model import language_model
from pdn.hub.load import load_run
from pdn.models.language_model import LanguageModel
from pdn.ops import delta_rule
from pdn.ops.types import DiagonalPreconditioner
from pdn.optim.groups import named_groups
from pdn.runs.records import read_metrics
from pdn.training.config import RunConfig
from pdn.training.devices import check_devices
from tests.presets import small_overrides
from tests.small_runs import run_config, train

FLA = ("model.implementation=fla", "model.residual_dtype=fp32")
SMALL = (
    "model.num_layers=1", "model.d_model=32", "model.intermediate_size=32", "data.seq_len=16",
    "trainer.global_batch_size=4", "trainer.steps=3", "schedule.warmup_steps=1",
    "model.residual_dtype=fp32", "eval=validation", "eval.every=3", "eval.max_samples=2",
    "eval.batch_size=2",
)  # fmt: skip


COMPARED = ("loss", "grad_norm", "validation/loss")


class Theirs(nn.Module):
    """Has a class's parameters and call, and computes what ours does."""

    def __init__(self, config, target):
        super().__init__()
        self.names = target.names
        with torch.device("meta"):
            self.ours = (LanguageModel(config),)
        for ours, parameter in self.ours[0].named_parameters():
            *path, last = self.names[ours].split(".")
            node = self
            for part in path:
                if not hasattr(node, part):
                    node.add_module(part, nn.Module())
                node = getattr(node, part)
            shape = exported_shape(self.names[ours], parameter)
            node.register_parameter(last, nn.Parameter(0.02 * torch.randn(shape)))

    def forward(self, input_ids, use_cache):
        assert not use_cache and self.training == torch.is_grad_enabled()
        found, (model,) = dict(self.named_parameters()), self.ours
        ours = {n: found[self.names[n]].view(p.shape) for n, p in model.named_parameters()}
        return SimpleNamespace(logits=torch.func.functional_call(model, ours, (input_ids,)).logits)


@pytest.fixture
def stand_in(monkeypatch):
    """Put ``Theirs`` in the place of their classes, and let it run on a CPU."""
    monkeypatch.setattr(fla_model, "_their_model", Theirs)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def by_step(directory) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for record in read_metrics(directory / "run"):
        kept = {key: record[key] for key in COMPARED if key in record}
        found[record["step"]] = found.get(record["step"], {}) | kept
    return found


def assert_alike(ours, theirs):
    """Compare two runs: their samples, their losses, their gradients and their last weights."""
    found = by_step(theirs)
    for step, expected in by_step(ours).items():
        assert {key: found[step][key] for key in expected} == pytest.approx(expected, rel=1e-5)
    ledgers = [(out / "run" / "ledger.jsonl").read_text() for out in (ours, theirs)]
    assert ledgers[0] == ledgers[1]
    a, b = (load_run(out / "run").model for out in (ours, theirs))
    for (name, one), other in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other[0]
        assert torch.allclose(one, other[1], rtol=1e-4, atol=1e-5), name


def test_from_the_same_weights_another_class_trains_as_ours_and_resumes(tmp_path, stand_in, capsys):
    train(tmp_path / "ours", "pgdn_tiny", *SMALL)
    assert "flash-linear-attention" not in capsys.readouterr().out
    train(tmp_path / "theirs", "pgdn_tiny", *SMALL, *FLA, "trainer.stop_at=2")
    assert "parameters, which flash-linear-attention computes\n" in capsys.readouterr().out
    train(tmp_path / "theirs", "pgdn_tiny", *SMALL, *FLA)
    assert_alike(tmp_path / "ours", tmp_path / "theirs")
    with pytest.raises(ConfigError, match="implementation: recorded 'fla', now 'own'"):
        train(tmp_path / "theirs", "pgdn_tiny", *SMALL)


def test_a_released_start_is_the_one_that_their_class_draws_from_the_seed(stand_in):
    words = [*FLA, "model.init=released", "model.vocab_size=64"]
    config = run_config("runs", "pgdn_tiny", *words).model.model_copy(update={"vocab_size": 64})
    state = torch.get_rng_state()
    model, again, other = (language_model(config) for _ in range(3))
    model.init_weights(3), again.init_weights(3), other.init_weights(4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    target = fla_target(config)
    drawn = dict(Theirs(config, target).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten(), drawn[target.names[name]].flatten())
    pairs = zip(model.parameters(), again.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)
    groups = named_groups(model), named_groups(LanguageModel(config))
    assert [list(g) for g in groups[0].values()] == [list(g) for g in groups[1].values()]


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("model.residual_dtype", "auto", "model.residual_dtype = fp32"),
        ("model.base_depth", 2, "model.base_depth = null"),
        ("model.pattern", ["gdn", "other"], "a model that one computes"),
        ("model.mixers.gdn.gain.range", 1.3, "a model that one computes"),
        ("data.document_isolation", True, "data.document_isolation = false"),
        ("data.carry_windows", 2, "data.carry_windows = null"),
        ("parallel.shard", "all", "parallel.shard = auto or 1"),
        ("ops.backend", "reference", "ops.backend = auto"),
        ("parallel.compile", True, "parallel.compile = auto or false"),
        ("trainer.z_loss", 1e-4, "trainer.z_loss = 0.0"),
        ("trainer.telemetry_every", {"steps": 5}, "trainer.telemetry_every = null"),
        ("eval.tasks", ["mqar"], "eval.tasks = []"),
    ],
)
def test_what_their_class_has_not_is_refused_by_name(key, value, wanted):
    values = copy.deepcopy(recorded())
    *path, last = key.split(".")
    functools.reduce(dict.__getitem__, path, values)[last] = value
    if key == "model.pattern":
        values["model"]["mixers"]["other"] = values["model"]["mixers"]["gdn"]
    with pytest.raises(ValueError, match="implementation = fla") as caught:
        RunConfig.model_validate(values)
    assert f"expected {wanted}" in str(caught.value)


def test_a_start_that_their_class_draws_is_not_spread():
    values = copy.deepcopy(recorded())
    values["model"]["mixers"]["gdn"]["decay"]["spread"] = True
    RunConfig.model_validate(values)
    values["model"]["init"] = "released"
    with pytest.raises(ValueError, match=r"expected model\.mixers\.gdn\.decay\.spread = false"):
        RunConfig.model_validate(values)


@functools.cache
def recorded() -> dict:
    return run_config("runs", "gdn_tiny", *FLA).model_dump(mode="json")


def test_two_processes_are_refused():
    config = RunConfig.model_validate(recorded())
    with pytest.raises(ValueError, match="with 2 processes: its class is not sharded"):
        config.check_world_size(2)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_a_gpu_or_their_package_nothing_begins(device, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="implementation = fla: found no CUDA device"):
        check_devices(device, "auto", "fla")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="implementation = fla: found no such package"):
        check_devices(device, "auto", "fla")


@pytest.fixture
def plain_recurrences(monkeypatch, untuned):
    """Let their layers call our definitions: the chunked kernels do not run interpreted."""
    gdn = importlib.import_module("fla.layers.gated_deltanet")
    pgdn = importlib.import_module("fla.layers.precond_gated_deltanet")
    gate = importlib.import_module("fla.ops.gated_delta_rule.gate").naive_gdn_gate
    rule = functools.partial(delta_rule, qk_l2norm=True, backend="reference")
    absent = ("initial_state", "initial_A_state", "cu_seqlens", "output_final_state")

    def gated(q, k, v, g, beta, A_log, dt_bias, **options):
        assert not any(options.pop(key, None) for key in (*absent, "allow_neg_eigval"))
        assert all(options.values()) and len(options) == 4  # l2norm and gates inside, state_v_first
        g = gate(g, A_log, dt_bias)
        return rule(q, k, v, beta=beta.sigmoid(), log_decay=g)[0], None

    def preconditioned(q, k, v, g, g_atk, beta, beta_atk, x, eps, log_atk_scale, **options):
        assert not any(options.pop(key, None) for key in absent)
        assert options == {"use_qk_l2norm_in_kernel": True} and eps == 1e-6
        by = DiagonalPreconditioner(g_atk, beta_atk, log_atk_scale, x)
        return rule(q, k, v, beta=beta, log_decay=g, write_k=by)[0], None, None

    monkeypatch.setattr(gdn, "chunk_gated_delta_rule", gated)
    monkeypatch.setattr(pgdn, "chunk_precond_gated_delta_rule", preconditioned)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here")
@pytest.mark.parametrize("preset", ["gdn_tiny", "pgdn_tiny"])
def test_their_own_classes_train_as_ours_and_draw_their_start(preset, tmp_path, plain_recurrences):
    train(tmp_path / "ours", preset, *SMALL)
    train(tmp_path / "theirs", preset, *SMALL, *FLA)
    assert_alike(tmp_path / "ours", tmp_path / "theirs")
    words = [*small_overrides(preset)[1:], *FLA, "model.init=released"]
    config = run_config("runs", preset, *words).model.model_copy(update={"vocab_size": 256})
    model = language_model(config)
    model.init_weights(0)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    mixer = model.blocks[0].mixer
    assert mixer.q_conv.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert (mixer.decay.rates.A_log <= 2.8).all() and (mixer.decay.rates.dt_bias < 0).all()
    if preset == "pgdn_tiny":
        assert torch.equal(mixer.preconditioner.center.mu, torch.full((2,), -0.2))


def test_their_kernels_take_one_configuration_without_being_timed(monkeypatch):
    triton = pytest.importorskip("triton")

    def kernel(x, BLOCK: triton.language.constexpr):
        pass

    def configurations(*found):
        return [triton.Config({"BLOCK": b}, num_warps=w, num_stages=s) for b, w, s in found]

    tuned = triton.autotune(configurations((32, 8, 3), (64, 8, 2), (128, 4, 2)), key=[])
    module = types.ModuleType("fla.ops.made_up")
    module.plain = triton.jit(kernel)
    module.tuned = tuned(module.plain)
    module.wrapped = triton.heuristics({"EVEN": lambda arguments: True})(tuned(module.plain))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for _ in range(2):  # a second model of a process changes nothing
        fla_model.fix_tuning()
    for kernel in module.tuned, module.wrapped.fn:
        assert [config.kwargs for config in kernel.prune_configs({})] == [{"BLOCK": 128}]
    assert not hasattr(module.plain, "prune_configs")
