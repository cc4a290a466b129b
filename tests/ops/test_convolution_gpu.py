"""The short convolution's kernel on a GPU: ``pytest -m gpu tests/ops/test_convolution_gpu.py``.

The expected values are the float64 PyTorch form on the same rounded inputs. PDN_TEST_DEVICE and
PDN_TEST_BACKEND run the same tests elsewhere, as in test_gpu.py.
"""

import os

import pytest
import torch

from pdn import ops
from pdn.certification.problems import ConvolutionProblem, relative_error, sample_convolution
from pdn.models.layers import ShortConv
from pdn.ops import convolution

DEVICE = torch.device(os.environ.get("PDN_TEST_DEVICE", "cuda"))
BACKEND = os.environ.get("PDN_TEST_BACKEND", "triton")
# two roundings; in float32, elementary functions
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
# gradients of float32 parameters: sums of float32 over all tokens
SUMS = {torch.bfloat16: 4e-3, torch.float32: 2e-5}
BOUNDARIES = [0, 0, 1, 3, 64, 129, 129, 200, 201, 263, 400, 400]  # a row of the batch begins at 200
LAYOUTS = {
    "dense": {},
    "documents": {"cu_seqlens": BOUNDARIES},
    "rows of a wider tensor": {"margin": 64},
    "documents in rows of a wider tensor": {"cu_seqlens": BOUNDARIES, "margin": 64},
}

cuda_only = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"
    ),
]


def sample(
    time=200, channels=256, width=4, dtype=torch.bfloat16, batch=2, **options
) -> ConvolutionProblem:
    options = dict(parameters=torch.float32, device=DEVICE) | options
    return sample_convolution(batch, time, channels, width, dtype=dtype, **options)


def convolve(*inputs, **options):
    return ops.short_convolution(*inputs, **options, backend=BACKEND)[0]


def plain(*inputs, **options):
    return convolution.short_convolution(*inputs, **options, state=None)[0]


def check(p: ConvolutionProblem, found: dict | None = None) -> None:
    found, expected = found or p.run(convolve), p.to(torch.float64).run(plain)
    assert found.keys() == expected.keys()
    lines, bad = [], False
    for name, x in expected.items():
        limit = (ROUNDING if name in ("y", "dx") else SUMS)[found[name].dtype]
        error = relative_error(found[name], x)
        bad |= not error <= limit
        lines.append(f"{name}: {error:.1e} / {limit:.0e}")
    assert not bad, "\n".join(lines)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients(layout, dtype):
    check(sample(dtype=dtype, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", ["dense", "documents"])
def test_parts_of_one_tensor_are_convolved_as_each_by_itself(layout):
    p = sample(channels=1024, **LAYOUTS[layout])
    x = torch.cat([p.x, p.x[..., :32]], -1).detach().requires_grad_()
    weights = [w.detach().requires_grad_() for w in p.weight.split([256, 768])]
    dys = [*p.dy.split([256, 768], -1), p.dy[..., :32]]
    apart = [
        convolve(part, weight, cu_seqlens=p.cu_seqlens)
        for part, weight in zip(x.split([256, 768, 32], -1), weights, strict=False)
    ]
    expected = [*apart, x[..., 1024:]]

    def joint(x, weights):
        return ops.short_convolutions(x, weights, cu_seqlens=p.cu_seqlens, backend=BACKEND)[0]

    torch._dynamo.reset()
    for call in (joint, torch.compile(joint, fullgraph=True)):
        found = call(x, weights)
        gradients = torch.autograd.grad(found, [x, *weights], dys)
        exact = torch.autograd.grad(expected, [x, *weights], dys, retain_graph=True)
        for mine, theirs in zip([*found, *gradients], [*expected, *exact], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("layout", ["dense", "documents"])
def test_states_continue_and_their_gradients_come_back(layout):
    p = sample(channels=1024, **LAYOUTS[layout])
    states = [part[:, :3].flip(1) for part in p.x.split([256, 768], -1)]
    weights, dys = p.weight.split([256, 768]), p.dy.split([256, 768], -1)
    found = []
    for backend, dtype in (BACKEND, p.x.dtype), ("chunkwise", torch.float64):
        leaves = [y.detach().to(dtype).requires_grad_() for y in (p.x, *states)]
        leaves += [w.detach().requires_grad_() for w in weights]
        options = dict(cu_seqlens=p.cu_seqlens, states=leaves[1:3], backend=backend)
        parts, tails = ops.short_convolutions(leaves[0], leaves[3:], **options)
        gradients = [*dys, *(2 * s for s in states)]
        results = [*parts, *tails]
        given = [g.to(y.dtype) for g, y in zip(gradients, results, strict=True)]
        found.append([*results, *torch.autograd.grad(results, leaves, given)])
    for mine, exact in zip(*found, strict=True):
        limits = SUMS if mine.dtype == torch.float32 else ROUNDING
        assert relative_error(mine, exact) <= limits[mine.dtype]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["dense", "documents"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_any_width(width, layout, bias):
    check(sample(width=width, bias=bias, **LAYOUTS[layout]))


@pytest.mark.parametrize("channels", [1, 24, 96, 200, 1000, 1280])
def test_any_channels(channels):
    check(sample(channels=channels))
    check(sample(channels=channels, margin=6))  # rows that are not aligned to 16 bytes


@pytest.mark.parametrize("time", [1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 128, 129, 1000])
def test_any_length(time):
    check(sample(time))


@pytest.mark.parametrize("layout", ["dense", "documents"])
def test_a_whole_batch(layout):
    bounds = sorted({*range(0, 32769, 2048), *range(0, 32768, 777)})
    size = (
        dict(batch=16, time=2048, channels=1024)
        if DEVICE.type == "cuda"
        else dict(batch=16, time=2048, channels=8)
    )
    check(sample(**size, cu_seqlens=bounds if layout == "documents" else None, bias=False))


def test_more_elements_than_32_bits_count():
    if DEVICE.type != "cuda" or torch.cuda.get_device_properties(DEVICE).total_memory < 60 << 30:
        pytest.skip("needs 60 GB of GPU memory")
    x = torch.zeros(2**21 + 64, 1040, dtype=torch.bfloat16, device=DEVICE)[
        None, :, 8:1032
    ].requires_grad_()
    weight = torch.randn(1024, 4, device=DEVICE)
    with torch.no_grad():
        x[:, -64:] = torch.randn(64, 1024, device=DEVICE)
    y = convolve(x, weight)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    p = ConvolutionProblem(x.detach()[:, -64:], weight, None, y.detach()[:, -64:])
    results = p.run(convolve)
    assert torch.equal(y[:, -64:], results["y"]) and torch.equal(dx[:, -64:], results["dx"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_are_bitwise_equal(layout):
    p = (
        sample(time=1000, cu_seqlens=[0, 500, 1000, 1001, 2000])
        if "documents" in layout
        else sample(time=1000)
    )
    first, second = p.run(convolve), p.run(convolve)
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """Return a copy with NaN in the memory before and after it."""
    margin = 1 << 12
    memory = torch.full((x.numel() + 2 * margin,), float("nan"), dtype=x.dtype, device=x.device)
    view = memory[margin : margin + x.numel()].view(x.shape)
    view.copy_(x)
    return view


@pytest.mark.parametrize("layout", ["dense", "documents"])
def test_nan_around_the_inputs_and_in_fresh_memory_reaches_nothing(layout):
    p = sample(channels=200, **LAYOUTS[layout])
    clean = p.run(convolve)
    p.x, p.weight, p.bias, p.dy = (poisoned(x) for x in (p.x, p.weight, p.bias, p.dy))
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 22):
        torch.full((size,), float("nan"), device=DEVICE)
    results = p.run(convolve)
    assert not [name for name, x in clean.items() if not torch.equal(results[name], x)]


@pytest.mark.parametrize("layout", ["dense", "documents"])
def test_compiles_without_graph_breaks(layout):
    p = sample(**LAYOUTS[layout])
    compiled = torch.compile(
        convolve, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager"
    )
    check(p, p.run(compiled))


@cuda_only
def test_in_a_compiled_module_under_autocast_with_the_backend_left_to_certification():
    torch.manual_seed(0)
    linear, conv = torch.nn.Linear(64, 200, device=DEVICE), ShortConv(128, 4, bias=True).to(DEVICE)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 200, 64, device=DEVICE)
    bounds = torch.tensor(BOUNDARIES, dtype=torch.int32, device=DEVICE)

    def call(x):
        with torch.autocast("cuda", torch.bfloat16):
            _, part, _ = linear(x).split([40, 128, 32], -1)
            return conv(part, cu_seqlens=bounds)[0]

    parameters = [*linear.parameters(), *conv.parameters()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y = torch.compile(call, fullgraph=True)(x)
        results = [y, *torch.autograd.grad(y.float().square().sum(), parameters)]
    names = {event.name for event in profile.events()}
    assert {"convolution_kernel", "convolution_backward_kernel"} <= names
    ops.set_default_backend("reference")
    try:
        y = call(x)
        expected = [y, *torch.autograd.grad(y.float().square().sum(), parameters)]
    finally:
        ops.set_default_backend("auto")
    for found, right in zip(results, expected, strict=True):
        assert found.dtype == right.dtype and relative_error(found, right) < 2e-2


@cuda_only
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_call_waits_for_the_device(layout):
    p = sample(**LAYOUTS[layout])
    p.run(convolve)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        p.run(convolve)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda_only
@pytest.mark.parametrize("layout", ["dense", "documents"])
def test_a_cuda_graph_replays_on_new_inputs(layout):
    p, other = sample(**LAYOUTS[layout]), sample(seed=1, **LAYOUTS[layout])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            p.run(convolve)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = p.run(convolve)
    for name in ("x", "weight", "bias", "dy"):
        getattr(p, name).copy_(getattr(other, name))
    graph.replay()
    expected = other.run(convolve)
    assert not [name for name in expected if not torch.equal(captured[name], expected[name])]
