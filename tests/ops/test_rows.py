"""States of rows together with documents: of the first one in each row, and after the last."""

import pytest
import torch

from pdn.ops import delta_rule
from pdn.ops.types import RecurrentState

B, T, H, K = 2, 48, 1, 16
DOCUMENTS = torch.tensor([0, 20, 48, 60, 96], dtype=torch.int32)


def result(backend: str) -> list[torch.Tensor]:
    """Return outputs, states and all gradients of gated delta rules that start from states."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, S = (
        torch.randn(shape, generator=generator) for shape in [(B, T, H, K)] * 3 + [(B, H, K, K)]
    )
    beta, decay = (torch.rand(B, T, H, generator=generator) for _ in range(2))
    k = torch.nn.functional.normalize(k, dim=-1)
    inputs = [x.detach().requires_grad_() for x in (q, k, v, beta, -0.2 * decay, S)]
    q, k, v, beta, log_decay, S = inputs
    o, state = delta_rule(
        q, k, v, beta=beta, log_decay=log_decay, state=RecurrentState(S, None), return_state=True,
        cu_seqlens=DOCUMENTS, backend=backend,
    )  # fmt: skip
    (o.square().sum() + state.S.square().sum()).backward()
    return [o, state.S, *(x.grad for x in inputs)]


@pytest.mark.parametrize("backend", ["chunkwise", "triton"])
def test_every_backend_goes_on_from_the_states_of_rows(backend):
    for found, expected in zip(result(backend), result("reference"), strict=True):
        bound = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    assert expected.abs().max() > 0  # of the states that it started from
