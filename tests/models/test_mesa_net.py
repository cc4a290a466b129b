"""MesaNet against the least-squares problem that it solves, token by token in float64."""

import pytest
import torch
import torch.nn.functional as F

from pdn.models.mixers.mesa_net import conjugate_gradients
from tests.models.test_shapes import SHAPES, shaped
from tests.presets import built


@pytest.fixture
def mixer():
    return built(shaped(*SHAPES["mesa net"]))


@pytest.fixture
def x():
    return torch.randn(1, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def exact(mixer, x):
    """Solve by torch.linalg.solve, differentiable by autograd."""
    q, k = (
        getattr(mixer, f"{c}_conv")(getattr(mixer, f"{c}_proj")(x))[0][0].unflatten(-1, (2, 8))
        for c in "qk"
    )
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    v = mixer.v_proj(x[0]).unflatten(-1, (2, 8))
    decay, beta = torch.sigmoid(mixer.a_proj(x[0])), torch.sigmoid(mixer.b_proj(x[0]))
    weights = torch.diag_embed((F.softplus(mixer.regularisation.raw) + 0.25).unflatten(0, (2, 8)))
    K, V = (torch.zeros(2, 8, 8, dtype=torch.float64) for _ in range(2))
    outputs = []
    for t in range(x.shape[1]):
        write = beta[t, :, None] * k[t]
        K = decay[t, :, None, None] * K + write[:, :, None] * k[t][:, None, :]
        V = decay[t, :, None, None] * V + write[:, :, None] * v[t][:, None, :]
        solved = torch.linalg.solve(K + weights, q[t])
        outputs.append(torch.einsum("hkv,hk->hv", V, solved))
    o = mixer.o_norm(torch.stack(outputs))
    o = o * F.silu(mixer.output_gate.g_proj(x[0])).unflatten(-1, (2, 8))
    return mixer.o_proj(o.flatten(-2))


def test_the_query_solves_the_least_squares_problem_of_all_earlier_keys(mixer, x):
    torch.testing.assert_close(mixer(x)[0][0], exact(mixer, x), rtol=1e-9, atol=1e-9)


def test_the_gradients_are_those_of_the_exact_solution(mixer, x):
    x.requires_grad_()
    wanted = (x, *mixer.parameters())
    found = torch.autograd.grad(mixer(x)[0][0].square().sum(), wanted)
    expected = torch.autograd.grad(exact(mixer, x).square().sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_conjugate_gradients_leave_alone_what_has_converged():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    target = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    x = conjugate_gradients(lambda y: y @ matrix, target, iterations=50)
    torch.testing.assert_close(x, target / matrix.diagonal())
