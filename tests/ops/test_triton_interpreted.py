"""The kernels' source in float64 and float32 under Triton's interpreter.

It is compared with the token-by-token recurrence.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pdn.certification.problems import Problem, sample
from pdn.ops import triton as kernels
from pdn.ops.recurrences import RECURRENCES
from pdn.ops.triton import sizes
from pdn.ops.triton.contract import Inputs
from tests.ops.cases import check

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="compiled there: see test_gpu.py"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]


BOUNDARIES = [0, 0, 1, 20, 65, 65, 130]  # lengths 0, 1, 19, 45; a row of the batch begins at 65


def problem(model: str, time: int, **options) -> Problem:
    return sample(
        RECURRENCES[model],
        **(dict(batch=1, time=time, heads=2, key=16, dtype=torch.float64) | options),
    )


REST = [("pgdn", 2), ("kda", 1)]


def size_of(q, v, cu_seqlens=None) -> sizes.Problem:
    return sizes.problem(Inputs(q, q, v, beta=v[..., 0], cu_seqlens=cu_seqlens), "online")


def check_problem(p: Problem, row: str = "fp64") -> None:
    check(p.run(kernels), p.to(torch.float64).run("reference"), row)


@pytest.mark.parametrize("time", [1, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("model", ["pgdn", "pkda"])
def test_any_length_from_and_to_a_state(model, time):
    check_problem(problem(model, time, heads=1, initial=True, final=True))


@pytest.mark.parametrize("model", RECURRENCES)
def test_every_model(model):
    check_problem(problem(model, 70))


@pytest.mark.parametrize("model", ["deltanet", "pgdn", "pkda", "pmamba2"])
def test_documents_with_their_own_states(model):
    check_problem(
        problem(model, 65, batch=2, heads=1, cu_seqlens=BOUNDARIES, initial=True, final=True)
    )


@pytest.mark.parametrize("model", ["gdn", "pkda"])
def test_value_heads_that_share_a_key_head(model):
    check_problem(problem(model, 20, heads=1, value_heads=2))


@pytest.mark.parametrize("model", ["gdn", "kda"])
def test_an_explicit_write_key(model):
    p = problem(model, 66)
    p.tensors["write_k"] = torch.nn.functional.normalize(torch.randn_like(p.tensors["k"]), dim=-1)
    check_problem(p)


@pytest.mark.parametrize("model", ["pgdn", "pkda"])
def test_activated_gates_and_sizes_that_are_no_power_of_two(model):
    check_problem(problem(model, 20, key=24, value=20, raw_gates=False))


@pytest.mark.parametrize("nats", [4.0, 12.0], ids=["within blocks of 16", "column by column"])
@pytest.mark.parametrize("model", ["kda", "gla"])
def test_a_channel_that_decays_too_fast_for_one_reference(model, nats):
    p = problem(model, 66, key=48, raw_gates=False)
    p.tensors["log_decay"][..., :40:3] *= nats / p.tensors["log_decay"].abs().mean()
    check_problem(p)


def test_small_gradients_of_a_fast_decay_do_not_vanish():
    p = problem("kda", 130, dtype=torch.bfloat16, raw_gates=False)
    p.tensors["log_decay"][
        ..., :4
    ] = -2.2  # 70 nats in half a chunk: the fastest that takes one reference
    large = p.run(kernels)
    p.cotangents = {name: 1e-9 * x for name, x in p.cotangents.items()}
    small = p.run(kernels)
    check(
        {name: 1e9 * x if name.startswith("d") else x for name, x in small.items()},
        large,
        "bf16_gpu",
    )


@pytest.mark.parametrize("model", ["pgdn", "kda", "mamba2"])
def test_a_long_sequence_is_scanned_in_segments(model, monkeypatch):
    monkeypatch.setattr(sizes, "MIN_SEGMENT", 1)
    monkeypatch.setattr(sizes, "PROGRAMS", 1 << 30)
    monkeypatch.setattr(sizes, "known", sizes.Problem)
    p = problem(model, 4 * 64 + 5, heads=1, value=32, initial=True, final=True)
    assert size_of(p.tensors["q"], p.tensors["v"]).wholes == 4
    check_problem(p)


@pytest.mark.parametrize(
    ("model", "chunks"),
    [("pgdn", 1), ("kda", 2), *(pytest.param(*m, marks=pytest.mark.slow) for m in REST)],
)
def test_long_documents_are_scanned_in_segments(model, chunks, monkeypatch):
    monkeypatch.setattr(sizes, "MIN_SEGMENT", chunks)
    monkeypatch.setattr(sizes, "PROGRAMS", 1 << 30)
    monkeypatch.setattr(sizes, "known", sizes.Problem)
    bounds = [0, 0, 70, 195, 195, 390] if chunks == 1 else [0, 0, 70, 400, 400]
    size = dict(batch=2, time=195) if chunks == 1 else dict(batch=1, time=400)
    p = problem(model, heads=1, value=32, cu_seqlens=bounds, initial=True, final=True, **size)
    q, v = p.tensors["q"], p.tensors["v"]
    assert size_of(q, v, p.cu_seqlens).segment == chunks
    check_problem(p)


@pytest.mark.parametrize(
    "batch,time,heads,chunks",
    [(16, 2048, 8, 0), (8, 4096, 14, 0), (3, 10000, 14, 53), (8, 8192, 8, 0), (1, 32768, 8, 32)],
)
@pytest.mark.parametrize("documents", [False, True])
def test_segments_where_sequences_do_not_fill_a_device(batch, time, heads, chunks, documents):
    q = torch.empty(batch, time, heads, 128, dtype=torch.bfloat16, device="meta")
    bounds = torch.empty(batch + 9, dtype=torch.int32, device="meta") if documents else None
    p = size_of(q, q, bounds)
    assert p.segment == chunks
    assert p.wholes * p.segment * 64 <= batch * time and p.B * p.HV * p.wholes <= 132 * batch


@pytest.mark.parametrize("form", ["squash", "inverse"])
def test_the_preconditioner_of_the_query(form):
    p = problem("pgla", 66)
    p.form = form
    if form == "inverse":  # eps alone bounds it, and the first tokens' A is small
        p.tensors["P_beta_x"] += 2
    check_problem(p, "fp64" if form == "squash" else "fp32")


@pytest.mark.parametrize("model", ["pdn", "pgdn", "pkda"])
def test_single_precision(model):
    check_problem(problem(model, 70, dtype=torch.float32), "fp32")


@pytest.mark.slow
def test_gradients_agree_with_finite_differences():
    p = problem("pkda", 20, heads=1, final=True)
    leaves = p.leaves()

    def outputs(*values):
        return tuple(p.forward(kernels, dict(zip(leaves, values))).values())

    assert torch.autograd.gradcheck(
        outputs, tuple(leaves.values()), eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True
    )


def test_a_bound_of_one_is_bitwise_the_base_recurrence():
    p = problem("pgdn", 20, bound=1.0, dtype=torch.float32)
    base = Problem(RECURRENCES["gdn"], p.tensors, p.cotangents)
    assert torch.equal(p.forward(kernels)["o"], base.forward(kernels)["o"])


class Recorder(TorchDispatchMode):
    """The operators that were called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", ["gdn", "pkda"])
def test_what_traces_sees_operators_with_the_same_results(model):
    p = problem(model, 20, initial=True, final=True)
    direct = p.run(kernels)
    with Recorder() as recorder:
        traced = p.run(kernels)
    assert {"pdn.chunk_forward.default", "pdn.chunk_backward.default"} <= recorder.called
    assert all(torch.equal(traced[name], x) for name, x in direct.items())
