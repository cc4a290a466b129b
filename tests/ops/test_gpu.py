"""The Triton kernels on a GPU: ``pytest -m gpu tests/ops/test_gpu.py``.

``-n 8`` compiles in parallel. ``python tests/ops/test_gpu.py`` prints the errors of every
configuration as a table instead, beside the peer's where it is installed. The expected values are
the float64 chunkwise form on the same rounded inputs.

PDN_TEST_DEVICE and PDN_TEST_BACKEND run the same tests elsewhere: on a CPU with the chunkwise form
they test themselves.
"""

import os

import pytest
import torch

from pdn.certification.problems import KINDS, Problem, relative_error, sample
from pdn.ops import decoding
from pdn.ops.recurrences import ONLINE, RECURRENCES
from pdn.ops.types import RecurrentState
from tests.ops.cases import ADVERSARIAL, adversarial, check, check_adversarial, tolerance

DEVICE = torch.device(os.environ.get("PDN_TEST_DEVICE", "cuda"))
BACKEND = os.environ.get("PDN_TEST_BACKEND", "triton")
ROWS = {torch.bfloat16: "bf16_gpu", torch.float16: "bf16_gpu", torch.float32: "fp32_gpu"}
OFFLINE = [name for name in RECURRENCES if name not in ONLINE]
TIME = 200  # not a multiple of the chunk
# of the chunk, and nothing but full ones: kernels of their own on some devices
WHOLE = dict(time=320)
TILED = ["deltanet", "gdn", "kda", "pdn", "pgdn", "pkda"]
# lengths 0, 1, 63, 65; a row of the batch begins at 200
BOUNDARIES = [0, 0, 1, 64, 129, 129, 200, 263, 400]
LAYOUTS = {
    "dense": {},
    "documents": {"cu_seqlens": BOUNDARIES},
    "states": {"initial": True, "final": True},
    "documents and states": {"cu_seqlens": BOUNDARIES, "initial": True, "final": True},
}

cuda_only = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"
    ),
]


def problem(model: str, dtype=torch.bfloat16, **options) -> Problem:
    defaults = dict(batch=2, time=TIME, heads=4, key=128, dtype=dtype, device=DEVICE)
    return sample(RECURRENCES[model], **(defaults | options))


def check_problem(p: Problem) -> None:
    check(p.run(BACKEND), p.to(torch.float64).run("chunkwise"), ROWS[p.tensors["q"].dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", [64, 128])
@pytest.mark.parametrize("model", ONLINE)
def test_bf16_results_and_gradients(model, key, layout):
    check_problem(problem(model, key=key, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", ["dense", "documents and states"])
@pytest.mark.parametrize("key", [64, 128])
@pytest.mark.parametrize("model", ONLINE)
def test_fp32_results_and_gradients(model, key, layout):
    check_problem(problem(model, torch.float32, key=key, **LAYOUTS[layout]))


def test_fp16_results_and_gradients():
    check_problem(problem("pgdn", torch.float16))


@pytest.mark.parametrize("layout", ["dense", "documents and states"])
@pytest.mark.parametrize("model", OFFLINE)
def test_offline_solves(model, layout):
    check_problem(problem(model, key=128, value=64, **LAYOUTS[layout]))


@pytest.mark.parametrize(
    "model,key,value",
    [
        ("pgdn", 96, 96),
        ("pkda", 112, 112),
        ("pkda", 120, 120),
        ("pgdn", 256, 256),
        ("pkda", 64, 128),
    ],
)
def test_other_head_sizes(model, key, value):
    check_problem(problem(model, key=key, value=value, heads=2))


@pytest.mark.parametrize("model", ["gdn", "pgdn", "pkda"])
def test_grouped_value_heads(model):
    check_problem(problem(model, heads=2, value_heads=4))


@pytest.mark.parametrize("time", [1, 15, 63, 64, 65, 130])
@pytest.mark.parametrize("model", ["pdn", "pgdn", "pkda"])
def test_any_length(model, time):
    check_problem(problem(model, time=time, key=64, initial=True, final=True))


@pytest.mark.parametrize("model", ["gdn", "kda"])
def test_an_explicit_write_key(model):
    p = problem(model, key=64)
    p.tensors["write_k"] = torch.nn.functional.normalize(torch.randn_like(p.tensors["k"]), dim=-1)
    check_problem(p)


@pytest.mark.parametrize("model", ["pgdn", "pkda"])
def test_activated_gates(model):
    check_problem(problem(model, key=64, raw_gates=False))


@pytest.mark.parametrize("model", ["pdn", "pgdn", "pkda"])
def test_no_drift_over_32k_tokens(model):
    time = 32768 if DEVICE.type == "cuda" else 1024
    check_problem(problem(model, batch=1, time=time, heads=1))


@pytest.mark.parametrize("model", ["gdn", "pgdn", "pkda"])
def test_long_documents_in_segments(model):
    bounds = [0, 0, 1, 65, 2500, 2500, 4160]
    layout = dict(cu_seqlens=bounds, initial=True, final=True)
    check_problem(problem(model, batch=1, time=4160, heads=1, **layout))


@pytest.mark.parametrize("layout", ["dense", "states"])
@pytest.mark.parametrize("model", TILED)
def test_full_chunks(model, layout):
    check_problem(problem(model, **WHOLE, **LAYOUTS[layout]))


@pytest.mark.parametrize("model", TILED)
def test_full_chunks_of_grouped_value_heads_and_activated_gates(model):
    check_problem(problem(model, **WHOLE, heads=2, value_heads=4, raw_gates=False))


@pytest.mark.parametrize("model", TILED)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_inputs_in_full_chunks(name, model):
    p = adversarial(name, model, torch.bfloat16, key=128, device=DEVICE, time=192)
    check_adversarial(p.run(BACKEND), p.to(torch.float64).run("chunkwise"), "bf16_gpu")


@cuda_only
@pytest.mark.parametrize("model", TILED)
def test_many_full_chunks_are_the_same_bits_every_time(model):
    p = problem(model, batch=4, time=1024, heads=8)
    first = p.run(BACKEND)
    for _ in range(20):
        again = p.run(BACKEND)
        assert not [name for name in first if not torch.equal(first[name], again[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", ONLINE)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_inputs(name, model, dtype):
    p = adversarial(name, model, dtype, key=64, device=DEVICE)
    check_adversarial(p.run(BACKEND), p.to(torch.float64).run("chunkwise"), ROWS[dtype])


@pytest.mark.parametrize("layout", ["dense", "documents and states"])
@pytest.mark.parametrize("model", RECURRENCES)
def test_two_runs_are_bitwise_equal(model, layout):
    p = problem(model, **LAYOUTS[layout])
    first, second = p.run(BACKEND), p.run(BACKEND)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.mark.parametrize(
    "base,preconditioned", [("deltanet", "pdn"), ("gdn", "pgdn"), ("kda", "pkda")]
)
def test_bound_one_is_bitwise_the_base_recurrence(base, preconditioned):
    p = problem(preconditioned, key=64, bound=1.0)
    assert torch.equal(
        p.forward(BACKEND)["o"],
        Problem(RECURRENCES[base], p.tensors, p.cotangents).forward(BACKEND)["o"],
    )


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """Return a copy with NaN in the memory before and after it."""
    margin = 1 << 15  # elements; keeps the alignment
    memory = torch.full((x.numel() + 2 * margin,), float("nan"), dtype=x.dtype, device=x.device)
    view = memory[margin : margin + x.numel()].view(x.shape)
    view.copy_(x)
    return view


@pytest.mark.parametrize(
    "model,options",
    [
        *((model, dict(key=64)) for model in ("pgdn", "pkda", "mamba2")),
        *(
            (model, dict(key=64) | LAYOUTS["documents and states"])
            for model in ("pgdn", "pkda", "mamba2")
        ),
        *((model, WHOLE) for model in ("gdn", "pgdn")),
    ],
)
def test_nan_around_the_inputs_and_in_fresh_memory_reaches_nothing(model, options):
    p = problem(model, **options)
    clean = p.run(BACKEND)
    p.tensors = {name: poisoned(x) for name, x in p.tensors.items()}
    p.cotangents = {name: poisoned(x) for name, x in p.cotangents.items()}
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN
    try:
        assert torch.empty(1, device=DEVICE).isnan().all()
        dirty = p.run(BACKEND)
    finally:
        torch.use_deterministic_algorithms(before)
    different = [name for name in clean if not torch.equal(clean[name], dirty[name])]
    assert not different


@pytest.mark.parametrize("model", ["kda", "pkda"])
def test_small_gradients_of_a_fast_decay_do_not_vanish(model):
    p = problem(model, raw_gates=False)
    p.tensors["log_decay"][
        ..., :4
    ] = -2.2  # 70 nats in half a chunk: the fastest that takes one reference
    p.cotangents = {name: 1e-9 * x for name, x in p.cotangents.items()}
    check_problem(p)


@pytest.mark.parametrize("model", ["pgdn", "pkda"])
def test_strided_inputs(model):
    p = problem(model, key=64)
    clean = p.run(BACKEND)
    p.tensors = {
        n: x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim >= 3 else x
        for n, x in p.tensors.items()
    }
    strided = p.run(BACKEND)
    assert not [name for name in clean if relative_error(strided[name], clean[name]) > 1e-6]


@pytest.mark.parametrize(
    "layout", ["dense", "documents", pytest.param("documents and states", marks=cuda_only)]
)
@pytest.mark.parametrize("model", ["deltanet", "pgdn", "pkda"])
def test_torch_compile_takes_the_whole_graph(model, layout):
    p = problem(model, key=64, **LAYOUTS[layout])
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda leaves: p.forward(BACKEND, leaves),
        fullgraph=True,
        backend="inductor" if DEVICE.type == "cuda" else "aot_eager",
    )
    leaves = p.leaves()
    outputs = compiled(leaves)
    results = {name: x.detach() for name, x in outputs.items()} | p.gradients(outputs, leaves)
    expected = p.run(BACKEND)
    assert not [
        name
        for name, x in expected.items()
        if relative_error(results[name], x) > tolerance(name, "bf16_gpu")
    ]


@cuda_only
@pytest.mark.parametrize(
    "model,options", [*((model, {}) for model in (*ONLINE, "mamba2")), ("pgdn", WHOLE)]
)
def test_a_cuda_graph_replays_on_new_inputs(model, options):
    p, other = problem(model, **options), problem(model, seed=1, **options)
    leaves = p.leaves()

    def call():
        outputs = p.forward(BACKEND, leaves)
        return outputs | p.gradients(outputs, leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        for name, x in leaves.items():
            x.copy_(other.tensors[name])
    graph.replay()
    other.cotangents = p.cotangents
    expected = other.run(BACKEND)
    assert not [name for name in expected if not torch.equal(captured[name], expected[name])]


@cuda_only
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", [*ONLINE, "mamba2"])
def test_no_call_waits_for_the_device(model, layout):
    p = problem(model, **LAYOUTS[layout])
    p.run(BACKEND)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        p.run(BACKEND)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step_of(p: Problem, state: RecurrentState, in_place: bool):
    step = pytest.importorskip("pdn.ops.triton.step")
    arguments, options = p.arguments(p.tensors)
    function = step.delta_rule if p.recurrence.online else step.linear_attention
    with torch.no_grad():
        return function(*arguments, **options | {"state": state, "in_place": in_place})


@pytest.mark.parametrize("batch", [1, 16])  # few heads and many have different tiles
@pytest.mark.parametrize("model", RECURRENCES)
def test_the_decoding_step(model, batch):
    kernels = pytest.importorskip("pdn.ops.triton.step")
    p = problem(model, batch=batch, time=1, initial=True, final=True)
    state = RecurrentState(p.tensors["S"], p.tensors.get("A"))
    o, new = step_of(p, state, in_place=False)
    found = {"o": o, "S": new.S} | ({} if new.A is None else {"A": new.A})
    check(found, p.to(torch.float64).forward("reference"), "bf16_gpu")
    mine = RecurrentState(*(None if x is None else x.clone() for x in state))
    again, _ = step_of(p, mine, in_place=True)
    assert torch.equal(again, o) and torch.equal(mine.S, new.S)
    assert new.A is None or torch.equal(mine.A, new.A)
    for clock in 0, 1:
        expected = p.to(torch.float64).advanced(decoding.advance, clock)
        check(p.advanced(kernels.advance, clock), expected, "bf16_gpu")


def peer_is_installed() -> bool:
    import importlib.util

    return DEVICE.type == "cuda" and importlib.util.find_spec("fla") is not None


@pytest.mark.slow  # the peer tunes for minutes from a cold cache
@pytest.mark.parametrize("model", ONLINE)
def test_errors_are_at_most_one_and_a_half_times_the_peers(model):
    if not peer_is_installed():
        pytest.skip("flash-linear-attention is not installed")
    p = problem(model, batch=1, time=2048, heads=8)
    expected, ours, peers = p.to(torch.float64).run("chunkwise"), p.run(BACKEND), p.run("fla")
    lines, bad = [], False
    for name, x in expected.items():
        error, peer = relative_error(ours[name], x), relative_error(peers[name], x)
        # far inside the table, a ratio of two roundings says nothing
        ok = error <= max(1.5 * peer, 0.1 * tolerance(name, "bf16_gpu"))
        bad |= not ok
        lines.append(f"{name}: {error:.1e}, the peer {peer:.1e}{'' if ok else '  <--'}")
    assert not bad, "\n".join(lines)


def print_table() -> None:
    """Print the largest error over tolerance of each column of the table, and its tensor."""
    columns = ["o, states", "dq dk dv", "gates", "preconditioner"]
    print(f"{'configuration':44s}" + "".join(f"{c:>28s}" for c in columns))
    for model in RECURRENCES:
        for dtype in (torch.bfloat16, torch.float32):
            for key in (64, 128):
                for layout, options in LAYOUTS.items():
                    p = problem(model, dtype, key=key, **options)
                    expected = p.to(torch.float64).run("chunkwise")
                    label = f"{model} {str(dtype)[6:]} K={key} {layout}"
                    try:
                        print(
                            f"{label:44s}{_cells(p.run(BACKEND), expected, ROWS[dtype])}",
                            flush=True,
                        )
                    except Exception as error:
                        print(
                            f"{label:44s}  {type(error).__name__}: {str(error)[:120]}", flush=True
                        )


def _cells(results: dict, expected: dict, row: str) -> str:
    worst = [(0.0, "")] * 4
    for name, x in expected.items():
        error = relative_error(results[name], x)
        ratio = error / tolerance(name, row)
        if not ratio <= worst[KINDS[name]][0]:  # NaN too
            worst[KINDS[name]] = ratio, f"{error:.1e} = {ratio:.2f} tol {name}"
    return "".join(f"{text:>28s}" for _, text in worst)


if __name__ == "__main__":
    print_table()
