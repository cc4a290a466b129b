"""The PyTorch backends against each other and against the theory.

Inputs are also chosen to break them.
"""

import math

import pytest
import torch

from pdn.certification.problems import Problem, relative_error, sample
from pdn.ops import (
    DiagonalPreconditioner,
    SigmoidGain,
    SoftplusDecay,
    delta_rule,
    diagonal_preconditioner,
    linear_attention,
    set_default_backend,
)
from pdn.ops.recurrences import ONLINE, RECURRENCES
from tests.ops.cases import ADVERSARIAL, adversarial, check, check_adversarial

# empty documents first and inside, lengths 1 and 63, a row border at 130
BOUNDARIES = [0, 0, 1, 64, 130, 130, 193, 260]


def problem(model: str, **options) -> Problem:
    defaults = dict(batch=1, time=70, heads=2, key=8, value=6, dtype=torch.float64)
    return sample(RECURRENCES[model], **(defaults | options))


@pytest.mark.parametrize("states", [False, True], ids=["zero", "states"])
@pytest.mark.parametrize("cu_seqlens", [None, BOUNDARIES], ids=["dense", "documents"])
@pytest.mark.parametrize("model", RECURRENCES)
def test_chunkwise_equals_reference_forward_and_backward(model, cu_seqlens, states):
    p = problem(
        model,
        batch=2,
        time=130,
        key=16,
        value=8,
        cu_seqlens=cu_seqlens,
        initial=states,
        final=states,
    )
    check(p.run("chunkwise"), p.run("reference"), "fp64")


@pytest.mark.parametrize("time", [1, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("model", ["pgdn", "pkda", "pgla"])
def test_any_length_works(model, time):
    p = problem(model, time=time, initial=True, final=True)
    check(p.run("chunkwise"), p.run("reference"), "fp64")


@pytest.mark.parametrize("model", ["pgdn", "pkda", "pmamba2"])
def test_activated_gates_equal_raw_ones(model):
    raw = problem(model)
    activated = problem(model, raw_gates=False)
    for backend in ("reference", "chunkwise"):
        torch.testing.assert_close(
            activated.forward(backend)["o"], raw.forward(backend)["o"], rtol=1e-6, atol=1e-7
        )
    check(activated.run("chunkwise"), activated.run("reference"), "fp64")


@pytest.mark.parametrize("model", ["pgdn", "pkda", "pgla"])
def test_value_heads_share_the_key_head_of_their_group(model):
    p = problem(model, heads=2, value_heads=4, initial=True, final=True)
    results = p.run("chunkwise")
    check(results, p.run("reference"), "fp64")
    tensors = dict(p.tensors)
    for name in ("q", "k"):
        tensors[name] = tensors[name].repeat_interleave(2, 2)
    torch.testing.assert_close(
        results["o"], Problem(p.recurrence, tensors, p.cotangents).forward("chunkwise")["o"]
    )


def test_the_preconditioner_of_key_heads_serves_their_value_heads():
    p = problem("pgdn", heads=2, value_heads=4)
    for name in ("P_log_decay_x", "P_beta_x"):
        p.tensors[name] = p.tensors[name][:, :, ::2]
    for name in ("P_A_log", "P_dt_bias", "mu"):
        p.tensors[name] = p.tensors[name][::2]
    shared = p.run("chunkwise")
    check(shared, p.run("reference"), "fp64")
    for name in ("P_log_decay_x", "P_beta_x"):
        p.tensors[name] = p.tensors[name].repeat_interleave(2, 2)
    for name in ("P_A_log", "P_dt_bias", "mu"):
        p.tensors[name] = p.tensors[name].repeat_interleave(2, 0)
    torch.testing.assert_close(p.forward("chunkwise")["o"], shared["o"])


@pytest.mark.parametrize("model", RECURRENCES)
@pytest.mark.parametrize("backend", ["reference", "chunkwise"])
def test_gradcheck(backend, model):
    p = problem(model, time=4, heads=1, key=2, value=2, initial=True, final=True)
    leaves = p.leaves()

    def outputs(*tensors):
        return tuple(p.forward(backend, dict(zip(leaves, tensors, strict=True))).values())

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model", RECURRENCES)
def test_documents_equal_separate_calls(model):
    p = problem(model, time=70, cu_seqlens=[0, 0, 23, 70], initial=True, final=True)
    together = p.forward("chunkwise")
    for n, (start, end) in enumerate([(0, 0), (0, 23), (23, 70)]):
        alone = {
            name: x[n : n + 1] if name in ("S", "A") else x[:, start:end] if x.ndim >= 3 else x
            for name, x in p.tensors.items()
        }
        if start == end:
            assert torch.equal(together["S"][n], alone["S"][0])
            continue
        expected = Problem(p.recurrence, alone, p.cotangents).forward("reference")
        torch.testing.assert_close(
            together["o"][:, start:end], expected["o"], rtol=1e-10, atol=1e-12
        )
        for name in expected.keys() - {"o"}:
            torch.testing.assert_close(together[name][n], expected[name][0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "chunkwise"])
@pytest.mark.parametrize("model", RECURRENCES)
def test_a_state_carries_a_sequence_over_two_calls(model, backend):
    p = problem(model, time=70)
    whole = p.forward(backend)["o"]
    first, second = (
        {name: x[:, part] if x.ndim >= 3 else x for name, x in p.tensors.items()}
        for part in (slice(0, 41), slice(41, None))
    )
    cotangents = {"o": p.cotangents["o"], "S": p.cotangents["o"]}  # asks for the final state
    begun = Problem(p.recurrence, first, cotangents).forward(backend)
    continued = Problem(
        p.recurrence, second | {n: x for n, x in begun.items() if n != "o"}, cotangents
    ).forward(backend)
    torch.testing.assert_close(
        torch.cat([begun["o"], continued["o"]], 1), whole, rtol=1e-10, atol=1e-12
    )


# The theory of *Preconditioned DeltaNet* (arXiv 2604.21100).


def least_squares_problem():
    torch.manual_seed(0)
    time, width = 40, 6
    q, k, v = (torch.randn(1, time, 1, width, dtype=torch.float64) for _ in range(3))
    ridge = 0.3
    P = torch.eye(width, dtype=torch.float64) / ridge
    write_k, read_q = torch.zeros_like(k), torch.zeros_like(q)
    for t in range(time):
        key = k[0, t, 0]
        write_k[0, t, 0] = P @ key / (1 + key @ P @ key)
        P = torch.linalg.inv(torch.linalg.inv(P) + torch.outer(key, key))
        read_q[0, t, 0] = P @ q[0, t, 0]
    return q, k, v, write_k, read_q, ridge


@pytest.mark.parametrize("backend", ["reference", "chunkwise"])
def test_the_exact_preconditioner_solves_least_squares_at_every_token(backend):
    q, k, v, write_k, _, ridge = least_squares_problem()
    beta = torch.ones(1, k.shape[1], 1, dtype=torch.float64)
    for t in (1, 2, 7, 40):
        _, state = delta_rule(
            q[:, :t],
            k[:, :t],
            v[:, :t],
            beta=beta[:, :t],
            write_k=write_k[:, :t],
            return_state=True,
            backend=backend,
        )
        K, V = k[0, :t, 0], v[0, :t, 0]
        solution = torch.linalg.solve(
            K.T @ K + ridge * torch.eye(K.shape[1], dtype=K.dtype), K.T @ V
        )
        assert relative_error(state.S[0, 0], solution) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "chunkwise"])
def test_exactly_preconditioned_online_and_offline_solves_agree(backend):
    q, k, v, write_k, read_q, _ = least_squares_problem()
    beta = torch.ones(1, k.shape[1], 1, dtype=torch.float64)
    online, _ = delta_rule(q, k, v, beta=beta, write_k=write_k, backend=backend)
    offline, _ = linear_attention(read_q, k, v, backend=backend)
    assert relative_error(online, offline) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "chunkwise"])
@pytest.mark.parametrize("form", ["squash", "inverse"])
def test_the_practical_preconditioner_follows_its_formulas(form, backend):
    p = problem("pgdn", time=21)
    k, A0 = p.tensors["k"], torch.rand(1, 2, 8, dtype=torch.float64)
    gP = SoftplusDecay(*(p.tensors[f"P_{name}"] for name in ("log_decay_x", "A_log", "dt_bias")))
    bP = SigmoidGain(p.tensors["P_beta_x"])
    bound = 1.7
    B, A = diagonal_preconditioner(
        k,
        DiagonalPreconditioner(gP, bP, p.tensors["mu"], bound=bound, form=form),
        A=A0,
        backend=backend,
    )
    rate = (
        p.tensors["P_A_log"].exp()
        * (1 + (p.tensors["P_log_decay_x"] + p.tensors["P_dt_bias"]).exp()).log()
    )
    gain = 1 / (1 + (-p.tensors["P_beta_x"]).exp())
    a = A0[0]
    for t in range(21):
        a = (-rate[0, t]).exp()[:, None] * a + gain[0, t][:, None] * k[0, t] ** 2
        r = (a + 1e-6).log() - p.tensors["mu"][:, None]
        expected = bound ** (-r / (1 + r.abs())) if form == "squash" else 1 / (a + 1e-6)
        torch.testing.assert_close(B[0, t], expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(A[0], a, rtol=1e-11, atol=1e-13)
    if form == "squash":
        assert B.max() < bound and B.min() > 1 / bound


@pytest.mark.parametrize("backend", ["reference", "chunkwise"])
@pytest.mark.parametrize(
    "base,preconditioned", [("deltanet", "pdn"), ("gdn", "pgdn"), ("kda", "pkda"), ("gla", "pgla")]
)
def test_bound_one_is_the_base_recurrence(base, preconditioned, backend):
    p = problem(preconditioned, bound=1.0)
    without = Problem(RECURRENCES[base], p.tensors, p.cotangents)
    assert torch.equal(p.forward(backend)["o"], without.forward(backend)["o"])


@pytest.mark.parametrize("mu", [-10.0, 10.0])
def test_an_extreme_centre_saturates_within_the_bound(mu):
    p = problem("pgdn")
    p.tensors["mu"] = torch.full_like(p.tensors["mu"], mu)
    check(p.run("chunkwise"), p.run("reference"), "fp64")


def spectral_radius(k: torch.Tensor, B: torch.Tensor, beta: float) -> float:
    """Return the spectral radius of the transition I - beta (B k) k^T."""
    transition = torch.eye(k.shape[0], dtype=k.dtype) - beta * torch.outer(B * k, k)
    return torch.linalg.eigvals(transition).abs().max().item()


def test_the_transition_stays_in_the_unit_disk_for_beta_times_bound_up_to_two():
    torch.manual_seed(0)
    for bound in (1.0, 1.5, 2.0):
        for _ in range(50):
            k = torch.nn.functional.normalize(torch.randn(8, dtype=torch.float64), dim=0)
            B = bound ** (2 * torch.rand(8, dtype=torch.float64) - 1)
            assert spectral_radius(k, B, 2 / bound) <= 1 + 1e-12


def test_the_transition_leaves_the_unit_disk_for_beta_times_bound_above_two():
    k = torch.zeros(8, dtype=torch.float64)
    k[0] = 1
    assert spectral_radius(k, torch.full((8,), 2.0, dtype=torch.float64), 1.2) > 1.3


@pytest.mark.parametrize("bound", [0.9, 2.1, math.nan])
def test_a_bound_outside_the_stable_range_is_refused(bound):
    with pytest.raises(ValueError, match="bound"):
        DiagonalPreconditioner(
            torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1), bound=bound
        )


# Adversarial inputs in float32: finite and close to float64.


@pytest.mark.parametrize("model", ONLINE)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_inputs_stay_finite_and_close_to_float64(name, model):
    p = adversarial(name, model, torch.float32)
    check_adversarial(p.run("chunkwise"), p.to(torch.float64).run("reference"), "fp32")


def test_non_contiguous_inputs_give_the_same_result():
    p = problem("pkda")
    strided = dict(p.tensors)
    for name in ("q", "k", "v", "log_decay_x", "beta_x"):
        strided[name] = p.tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
        assert not strided[name].is_contiguous()
    for backend in ("reference", "chunkwise"):
        assert torch.equal(p.forward(backend, strided)["o"], p.forward(backend)["o"])


# The boundary of the package.


def test_zero_tokens_give_zero_tokens_and_the_state_back():
    p = problem("pgdn", time=1, initial=True, final=True)
    tensors = {
        name: x[:, :0] if name not in ("S", "A") and x.ndim >= 3 else x
        for name, x in p.tensors.items()
    }
    for backend in ("reference", "chunkwise"):
        outputs = p.forward(backend, tensors)
        assert outputs["o"].shape == (1, 0, 2, 6)
        assert torch.equal(outputs["S"], tensors["S"]) and torch.equal(outputs["A"], tensors["A"])


def test_wrong_shapes_are_refused():
    q, v = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 3, 8)
    beta = torch.ones(1, 4, 2)
    with pytest.raises(ValueError, match="multiple"):
        delta_rule(q, q, v, beta=beta)
    with pytest.raises(ValueError, match=r"q .* and k"):
        delta_rule(q, q[..., :4], q, beta=beta)
    with pytest.raises(ValueError, match="int32"):
        delta_rule(q, q, q, beta=beta, cu_seqlens=torch.tensor([0, 4]))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="chunkwise"):
        set_default_backend("fast")


def test_half_precision_inputs_compute_in_float32():
    p = problem("pgdn", dtype=torch.bfloat16, final=True)
    outputs = p.forward("chunkwise")
    assert outputs["o"].dtype == torch.bfloat16
    assert outputs["S"].dtype == outputs["A"].dtype == torch.float32
    assert relative_error(outputs["S"], p.to(torch.float64).forward("reference")["S"]) < 1e-5


def test_a_single_token_uses_the_recurrence_on_cpu():
    p = problem("pgdn", time=1, initial=True, final=True)
    outputs = p.forward("auto")
    assert torch.equal(outputs["S"], p.forward("reference")["S"])
