"""What a call may not be given: PyTorch would stretch it, and a kernel read beyond its end."""

import pytest
import torch

from pdn import ops
from pdn.ops import DiagonalPreconditioner, RecurrentState, SigmoidGain, SoftplusDecay

B, T, H, HV, K, V = 2, 6, 2, 4, 8, 3
LENGTHS = dict(q=(B, T, H, K), k=(B, T, H, K), v=(B, T, HV, V), beta=(B, T, HV))


def call(op=ops.delta_rule, **given):
    options = {name: torch.rand(shape) for name, shape in LENGTHS.items()} | given
    q, k, v = (options.pop(name) for name in "qkv")
    return op(q, k, v, **options)


def preconditioner(**given) -> DiagonalPreconditioner:
    gate = torch.rand(B, T, H)
    return DiagonalPreconditioner(**(dict(log_decay=-gate, beta=gate, mu=torch.zeros(H)) | given))


WRONG = {
    "beta": [torch.rand(B, T, 1), torch.rand(1, T, HV), SigmoidGain(torch.rand(B, T, H)), 0.5],
    "log_decay": [
        -torch.rand(B, T, 1),
        -torch.rand(B, T, HV, 1),
        SoftplusDecay(torch.rand(B, T, HV), torch.rand(1), torch.rand(HV)),
        SoftplusDecay(torch.rand(B, T, HV, K), torch.rand(HV), torch.rand(HV)),
    ],
    "write_k": [
        torch.rand(1, T, H, K),
        torch.rand(B, T, HV, 1),
        preconditioner(beta=torch.rand(B, T, 1)),
        preconditioner(mu=torch.zeros(1)),
        preconditioner(log_decay=-torch.rand(B, T, HV)),
    ],
    "state": [
        RecurrentState(torch.zeros(1, HV, K, V)),
        RecurrentState(torch.zeros(B, HV, K, 1)),
        (torch.zeros(B, HV, K, V), None),
    ],
    "cu_seqlens": [[0, 6, 12], *(torch.tensor(x, dtype=torch.int32) for x in (
        [0, 6], [1, 6, 12], [0, 9, 6, 12], [0, 6, 13], [0, 4, 12], []))],
    "backend": ["cuda", "triton"],
    "q": [torch.ones(B, T, H, K, dtype=torch.int64), [[1.0]]],
}  # fmt: skip
SAID = {"write_k": "write_k|of the preconditioner|mu", "backend": "backend"}


@pytest.mark.parametrize("backend", ["reference", "chunkwise"])
@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_other_sizes_are_refused_by_name(name, backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call(backend=backend)
    for wrong in WRONG[name]:
        with pytest.raises(ValueError, match=SAID.get(name, name)):
            call(**{"backend": backend, name: wrong})
        if name != "write_k" and not isinstance(wrong, SoftplusDecay):
            with pytest.raises(ValueError, match=SAID.get(name, name)):
                call(ops.linear_attention, **{"backend": backend, name: wrong})


def test_a_curvature_of_another_size_is_refused():
    S = torch.zeros(B, HV, K, V)
    call(write_k=preconditioner(), state=RecurrentState(S, torch.zeros(B, H, K)))
    with pytest.raises(ValueError, match=r"state.A \(2, 2, 1\): expected \(2, 4, 8\) or"):
        call(write_k=preconditioner(), state=RecurrentState(S, torch.zeros(B, H, 1)))


def test_documents_that_leave_a_row_are_refused_by_the_convolution_too():
    x, weight = torch.rand(B, T, 3), torch.rand(3, 2)
    ops.short_convolution(x, weight, cu_seqlens=torch.tensor([0, 2, 6, 12], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens \[0, 4, 12\]: has no 6"):
        ops.short_convolution(x, weight, cu_seqlens=torch.tensor([0, 4, 12], dtype=torch.int32))


@pytest.mark.parametrize("name", ["form", "squash", "interval", "factor"])
def test_a_word_that_a_preconditioner_does_not_know_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} = 'upward': expected one of"):
        preconditioner(**{name: "upward"})
