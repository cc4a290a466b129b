"""The fused decoding step under Triton's interpreter (or on a GPU) against the reference."""

import pytest
import torch

from pdn.certification.problems import relative_error, sample
from pdn.ops import decoding
from pdn.ops.recurrences import RECURRENCES
from pdn.ops.types import RecurrentState

step = pytest.importorskip("pdn.ops.triton.step", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3}


def problem(model: str, dtype=torch.float64, **options):
    defaults = dict(
        batch=2,
        time=1,
        heads=2,
        key=16,
        value=8,
        initial=True,
        final=True,
        dtype=dtype,
        device=DEVICE,
    )
    return sample(RECURRENCES[model], **(defaults | options))


def take(p, state="state", in_place=False) -> dict:
    """Return outputs by name, from the step instead of a backend."""
    arguments, options = p.arguments(p.tensors)
    if state != "state":
        options["state"] = state
    with torch.no_grad():
        o, new = (step.delta_rule if p.recurrence.online else step.linear_attention)(
            *arguments, **options, in_place=in_place
        )
    return {"o": o, "S": new.S} | ({} if new.A is None else {"A": new.A})


def compare(p) -> None:
    expected = p.to(torch.float64).forward("reference")
    results = take(p)
    assert results.keys() == expected.keys()
    for name, x in expected.items():
        tolerance = TOLERANCE[p.tensors["q"].dtype]
        assert relative_error(results[name], x) < tolerance, (
            name,
            relative_error(results[name], x),
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("model", RECURRENCES)
def test_a_step_equals_the_reference(model, dtype):
    compare(problem(model, dtype))
    compare(problem(model, dtype, raw_gates=False))


@pytest.mark.parametrize("model", RECURRENCES)
def test_a_first_step_starts_from_zero(model):
    p = problem(model, initial=False)
    compare(p)


@pytest.mark.parametrize("key,value", [(12, 20), (32, 8), (24, 40)])
def test_sizes_that_are_no_power_of_two(key, value):
    compare(problem("pkda", key=key, value=value))
    compare(problem("pmamba2", key=key, value=value))


@pytest.mark.parametrize("model", ["gdn", "pgdn", "pkda", "pgla"])
def test_grouped_value_heads(model):
    compare(problem(model, value_heads=4))


def test_the_preconditioner_of_key_heads_serves_their_value_heads():
    p = problem("pgdn", value_heads=4)
    for name in ("P_log_decay_x", "P_beta_x"):
        p.tensors[name] = p.tensors[name][:, :, ::2]
    for name in ("P_A_log", "P_dt_bias", "mu"):
        p.tensors[name] = p.tensors[name][::2]
    p.tensors["A"] = p.tensors["A"][:, ::2]
    compare(p)


def test_an_explicit_write_key():
    p = problem("gdn")
    p.tensors["write_k"] = torch.randn_like(p.tensors["k"])
    compare(p)


def test_the_inverse_form():
    p = problem("pgla")
    p.form = "inverse"
    del p.tensors["mu"]
    compare(p)


def test_small_rates_keep_their_relative_precision():
    x = torch.tensor([-40.0, -20.0, -7.0, -1.0, 0.0, 3.0, 30.0], dtype=torch.float32)
    p = sample(
        RECURRENCES["gdn"],
        batch=7,
        time=1,
        heads=1,
        key=16,
        initial=True,
        final=True,
        device=DEVICE,
    )
    p.tensors["log_decay_x"] = x.view(7, 1, 1).to(DEVICE)
    p.tensors["dt_bias"].zero_()
    p.tensors["beta_x"].fill_(-60.0)  # nothing is written: the state only decays
    decayed = take(p)["S"]
    expected = p.to(torch.float64).forward("reference")["S"]
    assert relative_error(decayed, expected) < 1e-6


@pytest.mark.parametrize("model", ["gdn", "pkda"])
def test_in_place_writes_the_given_state(model):
    p = problem(model, value=40)
    expected = take(p)
    S, A = p.tensors["S"].clone(), p.tensors["A"].clone() if "A" in p.tensors else None
    results = take(p, RecurrentState(S, A), in_place=True)
    assert results["S"] is S and results.get("A") is A
    for name, x in expected.items():
        assert torch.equal(results[name], x)


@pytest.mark.parametrize("clock", [4, 5])
@pytest.mark.parametrize("model,options", [("gdn", {}), ("pkda", {"value": 40}), ("pgla", {})])
def test_a_recurrence_advances_in_place_by_a_clock(model, options, clock):
    p = problem(model, **options)
    expected, found = p.forward("reference"), p.advanced(step.advance, clock)
    assert found.keys() == {f"advanced {name}" for name in expected}
    if "A" in expected:
        old, new = p.tensors["A"], expected["A"]
        expected["A"] = torch.stack([old, new] if clock == 4 else [new, old])
    expected["o"] = expected["o"].flatten(1)
    for name, x in expected.items():
        assert relative_error(found[f"advanced {name}"], x) < 1e-12, name


def test_the_kernel_and_the_plain_form_advance_alike():
    for model in ("gdn", "pgdn", "pmamba2"):
        p = problem(model)
        expected, found = p.advanced(decoding.advance), p.advanced(step.advance)
        assert expected.keys() == found.keys()
        assert all(relative_error(found[name], x) < 1e-12 for name, x in expected.items())


def test_the_preconditioner_of_a_key_head_advances_once_for_its_value_heads():
    p = problem("pgdn", value_heads=4)
    for name in ("P_log_decay_x", "P_beta_x"):
        p.tensors[name] = p.tensors[name][:, :, ::2]
    for name in ("P_A_log", "P_dt_bias", "mu"):
        p.tensors[name] = p.tensors[name][::2]
    p.tensors["A"] = p.tensors["A"][:, ::2].contiguous()
    expected, found = p.advanced(decoding.advance), p.advanced(step.advance)
    assert all(relative_error(found[name], x) < 1e-12 for name, x in expected.items())


def test_out_of_place_leaves_the_given_state():
    p = problem("pgdn")
    before = {name: p.tensors[name].clone() for name in ("S", "A")}
    take(p)
    assert all(torch.equal(p.tensors[name], x) for name, x in before.items())


@pytest.mark.parametrize("model", ["pgdn", "pkda", "mamba2"])
def test_steps_in_a_row_equal_the_whole_sequence(model):
    p = problem(model, time=5)
    whole = p.forward("reference")
    state, outputs = RecurrentState(p.tensors["S"], p.tensors.get("A")), []
    for t in range(5):
        one = problem(model)
        one.tensors = {
            name: x[:, t : t + 1] if x.ndim >= 3 and name not in ("S", "A") else x
            for name, x in p.tensors.items()
        }
        result = take(one, state)
        state = RecurrentState(result["S"], result.get("A"))
        outputs.append(result["o"])
    assert relative_error(torch.cat(outputs, 1), whole["o"]) < 1e-12
    assert relative_error(state.S, whole["S"]) < 1e-12


def test_what_the_step_cannot_do_is_refused():
    with pytest.raises(ValueError, match="one token"):
        take(problem("gdn", time=2))
    with pytest.raises(ValueError, match="cu_seqlens"):
        problem("gdn", cu_seqlens=[0, 1, 2]).forward(step)
    p = problem("gdn")
    p.tensors["q"].requires_grad_()
    arguments, options = p.arguments(p.tensors)
    with pytest.raises(ValueError, match="no gradient"):
        step.delta_rule(*arguments, **options)
    p = problem("pgdn")
    with pytest.raises(ValueError, match="contiguous"):
        take(p, RecurrentState(p.tensors["S"].mT, p.tensors["A"]), in_place=True)
    with pytest.raises(ValueError, match="needs a state"):
        take(p, None, in_place=True)
    with pytest.raises(ValueError, match="curvature"):
        take(p, RecurrentState(p.tensors["S"]))
