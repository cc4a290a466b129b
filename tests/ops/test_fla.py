"""The peer as an oracle: its plain PyTorch definitions against ours.

Directly and through the argument mapping of ``fla``.
"""

import importlib.util
import inspect
import itertools
import types

import pytest
import torch

from pdn.certification.problems import Problem, relative_error, sample
from pdn.ops import fla, reference
from pdn.ops.recurrences import ONLINE, RECURRENCES
from pdn.ops.types import SoftplusDecay

# Found, not imported: that takes three seconds, in every process that collects these tests.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed"
)

PEER_MODELS = [*ONLINE, "linear_attention", "mamba2", "gla"]


def naive(name: str):
    return getattr(importlib.import_module(f"fla.ops.{name}.naive"), f"naive_recurrent_{name}")


def stand_in(name: str):
    """Return the peer's chunk function with its naive definition inside.

    It takes what the real one takes, and runs on a CPU.
    """
    real = getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")
    known = set(inspect.signature(real).parameters) | {"use_gate_in_kernel", "A_log", "dt_bias"}

    def run(q, k, v, **options):
        assert options.keys() <= known, options.keys() - known
        if options.pop("use_gate_in_kernel", False):
            A_log, dt_bias = options.pop("A_log"), options.pop("dt_bias")
            heads, diagonal = v.shape[2], options["g"].ndim == 4
            dt_bias = dt_bias.view(heads, -1) if diagonal else dt_bias
            options["g"] = SoftplusDecay(options["g"].float(), A_log, dt_bias).materialise()
        if options.pop("use_beta_sigmoid_in_kernel", False):
            options["beta"] = (2 if options.pop("allow_neg_eigval") else 1) * options[
                "beta"
            ].sigmoid()
        # that kernel always normalises
        normalise = options.pop("use_qk_l2norm_in_kernel", name == "precond_kda")
        if normalise and name != "precond_gated_delta_rule":
            # whose naive form normalises by itself
            q, k = reference.l2norm(q), reference.l2norm(k)
        cu_seqlens = options.pop("cu_seqlens")
        if cu_seqlens is None:
            return definition(q, k, v, options)
        parts = []
        assert q.shape[0] == 1
        for n, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            one = {
                key: x[n : n + 1]
                if key.startswith("initial") and x is not None
                else x[:, start:end]
                if is_per_token(x)
                else x
                for key, x in options.items()
            }
            parts.append(definition(*(x[:, start:end] for x in (q, k, v)), one))
        return torch.cat([p[0] for p in parts], 1), *(
            torch.cat(x) if x[0] is not None else None for x in list(zip(*parts))[1:]
        )

    def is_per_token(x):
        return isinstance(x, torch.Tensor) and x.ndim >= 3

    def definition(q, k, v, options):
        if name == "gated_delta_rule":  # whose naive form has no groups
            q, k = reference.expand_heads(q, v.shape[2]), reference.expand_heads(k, v.shape[2])
        if name in ("gated_delta_rule", "kda") or name.startswith("precond"):
            return naive(name)(q, k, v, **options)
        g, beta = options.pop("g", None), options.pop("beta", None)
        scale, initial, final = (
            options.pop("scale"),
            options.pop("initial_state"),
            options.pop("output_final_state"),
        )
        assert not options
        g = torch.zeros(*v.shape[:3]) if g is None else g
        if name == "delta_rule":
            return naive("gated_delta_rule")(q, k, v, beta, g, scale, initial, final)
        # the peer has no plain definition with this signature
        return offline(q, k, v, g, scale, initial)

    def offline(q, k, v, g, scale, S):
        S = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]) if S is None else S
        scale, out = q.shape[-1] ** -0.5 if scale is None else scale, []
        for t in range(q.shape[1]):
            S = S * g[:, t].exp().view(*S.shape[:2], -1, 1) + k[:, t, :, :, None] * v[:, t, :, None]
            out.append((scale * q[:, t, :, :, None] * S).sum(2))
        return torch.stack(out, 1), S

    return run


@pytest.fixture
def peer_on_cpu(monkeypatch):
    def load(module):
        name = module.removeprefix("fla.ops.")
        if name == "kda.gate":
            gate = importlib.import_module(module).naive_kda_gate
            return types.SimpleNamespace(fused_kda_gate=gate)
        return types.SimpleNamespace(**{f"chunk_{name}": stand_in(name)})

    monkeypatch.setattr(fla, "_import", load)
    monkeypatch.setattr(fla, "_check_device", lambda q: None)


def problem(model: str, **options) -> Problem:
    return sample(RECURRENCES[model], **(dict(batch=2, time=12, heads=2, key=8, value=6) | options))


def compare(p: Problem):
    results, expected = p.run(fla), p.to(torch.float64).run("reference")
    for name, x in expected.items():
        assert relative_error(results[name], x) < 2e-5, (name, relative_error(results[name], x))


# DeltaNet has no float32 at the peer
@pytest.mark.parametrize("documents", [None, [0, 5, 12, 20, 24]], ids=["dense", "documents"])
@pytest.mark.parametrize("model", [m for m in PEER_MODELS if m != "deltanet"])
def test_the_peers_definitions_with_our_arguments_give_our_results(peer_on_cpu, model, documents):
    compare(problem(model, cu_seqlens=documents, initial=True, final=True))
    compare(problem(model))
    compare(problem(model, raw_gates=False))


@pytest.mark.parametrize("model", ["gdn", "kda", "pgdn", "pkda", "gla"])
def test_grouped_value_heads_reach_the_peer(peer_on_cpu, model):
    compare(problem(model, value_heads=4))


def test_delta_rule_maps_in_half_precision(peer_on_cpu):
    p = problem("deltanet", dtype=torch.bfloat16)
    error = relative_error(p.run(fla)["o"], p.to(torch.float64).run("reference")["o"])
    assert error < 2e-2


def test_a_squashed_preconditioner_shared_by_key_heads_reaches_the_peer(peer_on_cpu):
    p = problem("pgdn", value_heads=4)
    for name in ("P_log_decay_x", "P_beta_x"):
        p.tensors[name] = p.tensors[name][:, :, ::2]
    for name in ("P_A_log", "P_dt_bias", "mu"):
        p.tensors[name] = p.tensors[name][::2]
    compare(p)


def test_what_the_peer_lacks_is_refused(peer_on_cpu):
    with pytest.raises(ValueError, match="float32"):
        problem("deltanet").run(fla)
    with pytest.raises(ValueError, match="offline"):
        problem("pgla").run(fla)
    p = problem("pgdn")
    p.form = "inverse"
    with pytest.raises(ValueError, match="squashed"):
        p.run(fla)
    p = problem("gdn")
    p.tensors["write_k"] = p.tensors["k"]
    with pytest.raises(ValueError, match="write_k"):
        p.run(fla)


def test_the_cpu_is_refused():
    with pytest.raises(ValueError, match="CUDA"):
        problem("gdn").run(fla)


def test_every_chunk_and_recurrent_function_exists_with_these_arguments():
    """Compare signatures: the arguments of ``fla`` are the peer's own names in both modes."""
    common = {"q", "k", "v", "scale", "initial_state", "output_final_state", "cu_seqlens"}
    preconditioned = {
        "g",
        "beta",
        "g_atk",
        "beta_atk",
        "initial_A_state",
        "x",
        "eps",
        "log_atk_scale",
    }
    table = {
        "delta_rule": {"beta", "use_qk_l2norm_in_kernel"},
        "gated_delta_rule": {
            "g",
            "beta",
            "use_qk_l2norm_in_kernel",
            "use_beta_sigmoid_in_kernel",
            "allow_neg_eigval",
        },
        "kda": {
            "g",
            "beta",
            "use_qk_l2norm_in_kernel",
            "use_gate_in_kernel",
            "use_beta_sigmoid_in_kernel",
        },
        "precond_gated_delta_rule": preconditioned | {"use_qk_l2norm_in_kernel"},
        "precond_kda": preconditioned,
        "simple_gla": {"g"},
        "gla": set(),
    }
    for name, extra in table.items():
        module = importlib.import_module(f"fla.ops.{name}")
        for mode in ("chunk", "fused_recurrent"):
            parameters = inspect.signature(getattr(module, f"{mode}_{name}")).parameters
            assert common | extra <= parameters.keys(), (
                mode,
                name,
                (common | extra) - parameters.keys(),
            )
