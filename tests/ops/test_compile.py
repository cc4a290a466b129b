"""The kernels inside torch.compile.

One graph, and shapes as the compiler is told, forward and backward.
"""

import pytest
import torch

from pdn import ops


def arguments(diagonal: bool):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    B, T, H, K = 1, 20, 2, 16
    decay = (
        (normal(B, T, H, K), normal(H), normal(H, K))
        if diagonal
        else (normal(B, T, H), normal(H), normal(H))
    )
    return [
        *(normal(B, T, H, K) for _ in range(3)),
        normal(B, T, H),
        *decay,
        normal(B, T, H),
        normal(B, T, H),
        *(normal(H) for _ in range(3)),
    ]


def call(backend, q, k, v, beta, a, A_log, dt_bias, aP, bP, A_logP, dt_biasP, mu):
    preconditioner = ops.DiagonalPreconditioner(
        ops.SoftplusDecay(aP, A_logP, dt_biasP), ops.SigmoidGain(bP), mu
    )
    return ops.delta_rule(
        q, k, v, beta=ops.SigmoidGain(beta), log_decay=ops.SoftplusDecay(a, A_log, dt_bias),
        write_k=preconditioner, qk_l2norm=True, backend=backend,
    )[0]  # fmt: skip


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_kernels_compile_into_one_graph_with_the_gradients_of_the_chunkwise_form(diagonal):
    tensors = arguments(diagonal)
    compiled = torch.compile(lambda *x: call("triton", *x), fullgraph=True, backend="aot_eager")
    results = []
    for run in (lambda *x: call("chunkwise", *x), compiled):
        o = run(*tensors)
        results.append([o.detach(), *torch.autograd.grad(o.square().sum(), tensors)])
    for expected, found in zip(*results, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
