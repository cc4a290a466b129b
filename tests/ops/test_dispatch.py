"""Which module computes a call.

A fake GPU stands for a real one: tensors that say they are on CUDA.
"""

import os
import types

import pytest
import torch

from pdn import ops, verdicts
from pdn.certification import certify
from pdn.certification.problems import sample
from pdn.ops import chunkwise, fla, reference
from pdn.ops.recurrences import RECURRENCES


class OnGPU:
    """What the dispatch looks at of a tensor."""

    def __init__(self, x: torch.Tensor):
        self.shape, self.dtype, self.is_cuda, self.device = (
            x.shape,
            x.dtype,
            True,
            torch.device("cuda", 0),
        )


def chosen(model: str, backend: str | None = None, time: int = 3, gpu: bool = True, **sizes):
    p = sample(RECURRENCES[model], batch=1, time=time, heads=1, key=16, **sizes)
    (q, _, v), options = p.arguments(p.tensors)
    if gpu:
        q, v = OnGPU(q), OnGPU(v)
    write = options.get("write_k", options.get("preconditioner"))
    return ops._backend(backend, p.recurrence.solve, q, v, write, options)


@pytest.fixture
def asked(monkeypatch):
    """Put stand-ins in the kernels' place, certified; return what certification was asked for."""
    calls = []
    kernels = types.SimpleNamespace(name="chunk kernels", verdict=True, calls=calls)

    def usable(*arguments):
        calls.append(arguments)
        return kernels.verdict

    monkeypatch.setattr(certify, "triton_is_usable", usable)
    monkeypatch.setattr(ops, "_triton", lambda step: "step kernel" if step else "chunk kernels")
    return kernels


def test_a_cpu_uses_the_pytorch_forms():
    assert chosen("pgdn", gpu=False) is chunkwise
    assert chosen("pgdn", gpu=False, time=1) is reference


def test_a_gpu_uses_the_kernels_once_certified(asked):
    assert chosen("pgdn") == "chunk kernels"
    assert asked.calls == [
        (torch.device("cuda", 0), 16, 16, "scalar", "squash", "online", torch.float32, False, True)
    ]
    asked.verdict = False
    assert chosen("pgdn") is chunkwise
    assert chosen("pgdn", time=1) is reference


def test_float64_never_uses_the_kernels(asked):
    assert chosen("pgdn", dtype=torch.float64) is chunkwise
    assert not asked.calls


def test_one_token_without_gradient_uses_the_step(asked):
    with torch.no_grad():
        assert chosen("gla", time=1) == "step kernel"
        assert chosen("gla", time=1, cu_seqlens=[0, 1]) == "chunk kernels"
        assert chosen("gla", time=2) == "chunk kernels"
    assert chosen("gla", time=1) == "chunk kernels"
    assert [call[-2:] for call in asked.calls] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]


def test_a_named_backend_is_not_questioned(asked):
    assert chosen("gdn", "triton") == "chunk kernels"
    assert chosen("gdn", "chunkwise") is chunkwise
    assert chosen("gdn", "reference") is reference
    assert chosen("gdn", "fla") is fla
    assert not asked.calls


def test_the_default_backend_serves_calls_that_name_none():
    try:
        ops.set_default_backend("reference")
        assert chosen("gdn") is reference
    finally:
        ops.set_default_backend("auto")


def test_a_traced_call_asks_once_for_real_and_keeps_the_verdict(monkeypatch):
    asked = []

    class Certifier:
        def triton_is_usable(self, *configuration):
            open(os.devnull).close()  # nothing that could be traced
            asked.append(configuration)
            return True

    monkeypatch.setattr(verdicts, "_load", Certifier)
    compiled = torch.compile(
        lambda x: x + 1 if ops._certified(16) else x - 1, fullgraph=True, backend="eager"
    )
    assert [compiled(torch.zeros(1)).item() for _ in range(2)] == [1, 1]
    assert asked == [(16,)]


def test_a_graph_for_many_lengths_asks_as_one_for_a_single_length(asked):
    def call(x: torch.Tensor) -> torch.Tensor:
        q = OnGPU(x)
        found = ops._backend(None, "online", q, q, None, {"log_decay": None, "cu_seqlens": None})
        return x + 1 if found == "chunk kernels" else x - 1

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for time in (8, 4, 6):  # from the second on the length is a symbol
        assert compiled(torch.zeros(1, time, 1, 16)).max() == 1
    assert set(asked.calls) == {
        (torch.device("cuda", 0), 16, 16, "none", "key", "online", torch.float32, False, True)
    }
