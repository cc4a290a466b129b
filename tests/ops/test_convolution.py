"""The short convolution: the kernel's source under Triton's interpreter against PyTorch.

And what the op promises.
"""

import contextlib
import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from pdn import ops
from pdn.certification import certify
from pdn.certification.problems import ConvolutionProblem, relative_error, sample_convolution
from pdn.ops import convolution
from pdn.ops.triton import convolution as kernels

# lengths 0, 1, 2, 17, 45, ...; a row of the batch begins at 65
BOUNDARIES = [0, 0, 1, 3, 20, 65, 65, 66, 68, 130, 130]
# sums of at most 8 products, and over up to 260 tokens
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="compiled there: see test_convolution_gpu.py"
)


def plain(x, weight, bias, *, cu_seqlens=None):
    return convolution.short_convolution(x, weight, bias, cu_seqlens=cu_seqlens, state=None)[0]


def check(p: ConvolutionProblem, convolve=kernels.convolve) -> None:
    found, expected = p.run(convolve), p.to(torch.float64).run(plain)
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], x) for name, x in expected.items()}
    assert all(error <= TOLERANCES[found[name].dtype] for name, error in errors.items()), errors


def sample(*shape, **options) -> ConvolutionProblem:
    return sample_convolution(*shape, **dict(dtype=torch.float64) | options)


@interpreted
@pytest.mark.usefixtures("fresh_memory_is_nan")
class TestKernel:
    @pytest.mark.parametrize("time", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 127, 128, 130])
    def test_any_length(self, time):
        check(sample(2, time, 8))

    @pytest.mark.parametrize("cu_seqlens", [None, BOUNDARIES], ids=["dense", "documents"])
    @pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
    def test_any_width(self, width, cu_seqlens):
        check(sample(2, 65, 8, width, cu_seqlens=cu_seqlens))

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("channels", [1, 24, 96, 200])
    def test_channels_that_are_no_power_of_two(self, channels, bias):
        check(sample(2, 9, channels, bias=bias))

    @pytest.mark.parametrize(
        "width,time,bounds", [(8, 7, None), (4, 130, [0, 1, 130, 135, 260, 260])]
    )
    def test_the_inputs_before_go_on_in_every_row(self, width, time, bounds):
        p = sample(2, time, 8, width, cu_seqlens=bounds)
        before = sample(2, width - 1, 8, seed=1).x
        starts = p.cu_seqlens
        if starts is not None:  # a row's first document goes on from what is before
            starts = kernels.document_starts(starts, 2 * time)
            starts[: 2 * time : time] = 0
        given = p.x, [p.weight], [p.bias], starts
        found = kernels.forward_pass(*given, [before])
        found += kernels.backward_pass(*given, [p.dy], [before])
        inputs = [x.requires_grad_() for x in (p.x, p.weight, p.bias, before)]
        options = dict(cu_seqlens=p.cu_seqlens, state=before)
        y, _ = convolution.short_convolution(*inputs[:3], **options)
        expected = [y, *torch.autograd.grad(y, inputs, p.dy)]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_every_document_is_alone(self):
        p = sample(2, 65, 24, cu_seqlens=BOUNDARIES)
        check(p)
        y = p.run(kernels.convolve)["y"].flatten(0, 1)
        for start, end in itertools.pairwise(BOUNDARIES):
            if end > start:
                alone = kernels.convolve(
                    p.x.flatten(0, 1)[None, start:end], p.weight, p.bias, cu_seqlens=None
                )
                torch.testing.assert_close(y[start:end], alone[0], rtol=1e-12, atol=1e-12)

    def test_boundaries_at_every_place_of_a_block_and_of_a_stretch(self):
        # every residue of 8, and blocks without
        check(sample(2, 150, 8, cu_seqlens=sorted({0, 150, 300, *range(3, 300, 19)})))
        check(sample(1, 300, 8, cu_seqlens=[0, 63, 64, 65, 66, 127, 129, 255, 257, 258, 300]))

    @pytest.mark.parametrize("cu_seqlens", [None, BOUNDARIES], ids=["dense", "documents"])
    def test_rows_of_a_wider_tensor_are_read_where_they_are(self, cu_seqlens):
        p = sample(2, 65, 24, margin=40, cu_seqlens=cu_seqlens)
        rows, *_ = kernels._launch(p.x, p.weight, p.bias, None, None, kernels.FORWARD)
        assert rows.data_ptr() == p.x.data_ptr() and rows.stride(0) == 64
        check(p)

    @pytest.mark.parametrize("batch", [1, 2])
    def test_channels_apart(self, batch):
        p = sample(batch, 20, 24)
        p.x = p.x.mT.contiguous().mT
        check(p)

    def test_single_precision(self):
        check(sample(2, 130, 24, dtype=torch.float32))

    def test_half_precision_is_rounded_once(self):
        p = sample(2, 65, 24, dtype=torch.float16, parameters=torch.float32, cu_seqlens=BOUNDARIES)
        found, expected = p.run(kernels.convolve), p.to(torch.float64).run(plain)
        for name in ("y", "dx"):
            assert (
                found[name] != expected[name].half()
            ).float().mean() < 1e-3  # but for what is halfway between two
        assert found["dweight"].dtype == found["dbias"].dtype == torch.float32
        assert relative_error(found["dweight"], expected["dweight"]) < 2e-6

    def test_parameters_of_half_precision_have_gradients_of_half_precision(self):
        p = sample(1, 20, 8, dtype=torch.float32, parameters=torch.bfloat16)
        found, expected = p.run(kernels.convolve), p.to(torch.float64).run(plain)
        for name in ("dweight", "dbias"):
            assert torch.equal(found[name], expected[name].bfloat16())

    def test_a_token_reads_itself_and_the_tokens_before_it(self):
        p = sample(1, 70, 4)
        x = p.x.requires_grad_()
        y = kernels.convolve(x, p.weight, p.bias, cu_seqlens=None)
        (gradient,) = torch.autograd.grad(y[0, 66].sum(), x)
        assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == [63, 64, 65, 66]

    def test_nan_of_one_document_reaches_no_other(self):
        p = sample(1, 40, 8, cu_seqlens=[0, 10, 18, 40])
        p.x[:, 10:18] = float("nan")
        results = p.run(kernels.convolve)
        for name in ("y", "dx"):
            assert results[name].isnan().any(-1)[0].nonzero().flatten().tolist() == [*range(10, 18)]

    def test_extreme_inputs_stay_finite(self):
        p = sample(1, 20, 4, dtype=torch.float32)
        p.x *= 1e4
        check(p)

    def test_no_tokens(self):
        results = sample(2, 0, 8).run(kernels.convolve)
        assert results["y"].shape == results["dx"].shape == (2, 0, 8)
        assert not results["dweight"].any() and not results["dbias"].any()

    @pytest.mark.parametrize("tokens", [1, 2, 8])
    def test_blocks_of_other_lengths(self, tokens, monkeypatch):
        for config in kernels.FORWARD, kernels.BACKWARD:
            monkeypatch.setitem(config, "UNROLL", tokens)
        check(sample(2, 65, 24, cu_seqlens=BOUNDARIES))

    @pytest.mark.parametrize(
        "options",
        [
            dict(),
            dict(bias=False, cu_seqlens=BOUNDARIES),
            dict(dtype=torch.float32, parameters=torch.float16),
        ],
        ids=["dense", "documents", "dtypes"],
    )
    def test_the_operators_are_what_they_say(self, options):
        p = sample(2, 65, 8, **options)
        starts = None if p.cu_seqlens is None else kernels.document_starts(p.cu_seqlens, 130)
        for rest in (0, 3):
            x = F.pad(p.x, (0, rest)).requires_grad_()
            parameters = [
                [] if y is None else [y.clone().requires_grad_()] for y in (p.weight, p.bias)
            ]
            torch.library.opcheck(kernels.convolution, (x, *parameters, starts))
            detached = [[y.detach() for y in own] for own in parameters]
            dys = [p.dy, *([x.detach()[..., -rest:].contiguous()] if rest else [])]
            torch.library.opcheck(
                kernels.convolution_backward, (x.detach(), *detached, starts, dys)
            )

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
    def test_parts_of_one_tensor_are_convolved_as_each_by_itself(self, bias, compiled):
        """And the gradients of the parts, the rest's too, lie side by side in one tensor."""
        p = sample(2, 70, 24, cu_seqlens=[0, 5, 70, 140], dtype=torch.float32)
        x = F.pad(p.x, (0, 5), value=0.5).requires_grad_()
        weights = [w.clone().requires_grad_() for w in p.weight.split([8, 16])]
        biases = [b.clone().requires_grad_() for b in p.bias.split([8, 16])] if bias else []
        leaves = [x, *weights, *biases]
        dys = [*p.dy.split([8, 16], -1), torch.ones(2, 70, 5)]

        def joint(x, weights, biases):
            return ops.short_convolutions(
                x, weights, biases, cu_seqlens=p.cu_seqlens, backend="triton"
            )[0]

        def apart(x, weights, biases):
            *parts, rest = x.split([8, 16, 5], -1)
            return [
                *(
                    kernels.convolve(
                        part, weight, biases[i] if biases else None, cu_seqlens=p.cu_seqlens
                    )
                    for i, (part, weight) in enumerate(zip(parts, weights, strict=True))
                ),
                rest,
            ]

        call = torch.compile(joint, fullgraph=True, backend="aot_eager") if compiled else joint
        found, expected = call(x, weights, biases), apart(x, weights, biases)
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs) and mine.is_contiguous()
        gradients = torch.autograd.grad(found, leaves, dys)
        for mine, theirs in zip(gradients, torch.autograd.grad(expected, leaves, dys), strict=True):
            assert torch.equal(mine, theirs)
        # PyTorch's form, too
        chunkwise = ops.short_convolutions(
            x, weights, biases, cu_seqlens=p.cu_seqlens, backend="chunkwise"
        )[0]
        for mine, theirs in zip(chunkwise, expected, strict=True):
            torch.testing.assert_close(mine, theirs)

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize(
        "width,time,bounds", [(4, 3, None), (8, 70, None), (4, 70, [0, 5, 68, 70, 139, 140])]
    )
    def test_states_continue_in_the_kernels_and_their_gradients_come_back(
        self, width, time, bounds, compiled
    ):
        p = sample(2, time, 24, width, cu_seqlens=bounds)
        x = F.pad(p.x, (0, 5), value=0.5).requires_grad_()
        weights = [w.clone().requires_grad_() for w in p.weight.split([8, 16])]
        biases = [b.clone().requires_grad_() for b in p.bias.split([8, 16])]
        states = [
            s.clone().requires_grad_()
            for s in sample(2, width - 1, 24, seed=1).x.split([8, 16], -1)
        ]
        leaves = [x, *weights, *biases, *states]
        dys = [*p.dy.split([8, 16], -1), torch.ones_like(p.dy[..., :5])]
        dys += [2 * s.detach() for s in states]
        found = []
        for backend in "triton", "chunkwise":

            def call(x, weights, biases, states, backend=backend):
                options = dict(cu_seqlens=p.cu_seqlens, states=states, backend=backend)
                parts, tails = ops.short_convolutions(x, weights, biases, **options)
                return [*parts, *tails]

            if compiled and backend == "triton":
                call = torch.compile(call, fullgraph=True, backend="aot_eager")
            results = call(x, weights, biases, states)
            found.append([*results, *torch.autograd.grad(results, leaves, dys)])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("cu_seqlens", [None, BOUNDARIES], ids=["dense", "documents"])
    def test_compiles_into_one_graph(self, cu_seqlens):
        p = sample(2, 65, 8, dtype=torch.float32, cu_seqlens=cu_seqlens)

        def call(x, weight, bias, *, cu_seqlens):
            return ops.short_convolution(x, weight, bias, cu_seqlens=cu_seqlens, backend="triton")[
                0
            ]

        check(p, torch.compile(call, fullgraph=True, backend="aot_eager"))

    def test_in_a_graph_the_convolutions_of_a_layer_share_the_table_of_documents(self):
        p, graphs = sample(1, 20, 8, cu_seqlens=[0, 5, 20]), []

        def call(x, weight, bias, cu_seqlens):
            return [kernels.convolve(x * i, weight, bias, cu_seqlens=cu_seqlens) for i in range(3)]

        def keep(graph, _):
            graphs.append(graph)
            return graph

        partition = min_cut_rematerialization_partition  # as the default compiler does
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
        torch.compile(call, fullgraph=True, backend=backend)(
            p.x.requires_grad_(), p.weight, p.bias, p.cu_seqlens
        )
        calls = [node for node in graphs[0].graph.nodes if "short_convolution" in str(node.target)]
        assert len(calls) == 3 and len({node.args[3] for node in calls}) == 1


def test_pytorch_takes_documents_state_and_any_width():
    p = sample(1, 30, 6, 5, cu_seqlens=[0, 7, 7, 30])
    y = plain(p.x, p.weight, p.bias, cu_seqlens=p.cu_seqlens)
    for start, end in (0, 7), (7, 30):
        past = F.pad(p.x[:, start:end].mT, (4, 0))
        expected = F.silu(F.conv1d(past, p.weight[:, None], p.bias, groups=6)).mT
        torch.testing.assert_close(y[:, start:end], expected)


def test_a_state_continues_a_sequence():
    p = sample(2, 12, 6)
    whole, none = ops.short_convolution(p.x, p.weight, p.bias)
    assert none is None
    state, parts = torch.zeros(2, 3, 6, dtype=torch.float64), []
    for part in p.x.split([1, 2, 9], 1):
        y, state = ops.short_convolution(part, p.weight, p.bias, state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert torch.equal(state, p.x[:, -3:])


def test_a_state_continues_the_first_document_of_each_row_and_leaves_that_of_the_last():
    p = sample(2, 6, 6)
    before = p.x.flip(1)[:, :3]
    cu_seqlens = torch.tensor([0, 4, 6, 12, 12], dtype=torch.int32)
    y, state = ops.short_convolution(p.x, p.weight, p.bias, cu_seqlens=cu_seqlens, state=before)
    for row, spans in enumerate([[(0, 4), (4, 6)], [(0, 6)]]):
        for start, end in spans:
            past = before[row : row + 1] if start == 0 else torch.zeros_like(before[:1])
            own = p.x[row : row + 1, start:end]
            expected, tail = ops.short_convolution(own, p.weight, p.bias, state=past)
            torch.testing.assert_close(y[row : row + 1, start:end], expected)
        assert torch.equal(state[row : row + 1], tail)


def test_half_precision_sums_in_single_precision():
    p = sample(1, 40, 8, dtype=torch.bfloat16, parameters=torch.float32)
    assert torch.equal(
        plain(p.x, p.weight, p.bias),
        plain(p.x.double(), p.weight.double(), p.bias.double()).bfloat16(),
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(x=torch.zeros(2, 8)), r"x \(2, 8\)"),
        (dict(weight=torch.zeros(7, 4)), r"weight \(7, 4\)"),
        (dict(weight=torch.zeros(8, 0)), "W >= 1"),
        (dict(bias=torch.zeros(7)), r"bias \(7,\)"),
        (dict(cu_seqlens=torch.tensor([0, 10])), "int32"),
        (dict(state=torch.zeros(2, 4, 8)), r"\(2, 3, 8\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = dict(x=torch.zeros(2, 5, 8), weight=torch.zeros(8, 4), bias=torch.zeros(8)) | change
    with pytest.raises(ValueError, match=message):
        ops.short_convolution(**arguments)


@pytest.mark.parametrize(
    "sizes,biases", [([8, 8], 0), ([4, 2], 1)], ids=["more channels than x", "one bias for two"]
)
def test_parts_that_do_not_fit_are_refused(sizes, biases):
    weights = [torch.zeros(size, 4) for size in sizes]
    with pytest.raises(ValueError, match="at most C channels together"):
        ops.short_convolutions(torch.zeros(1, 5, 8), weights, [torch.zeros(4)] * biases)


@contextlib.contextmanager
def default_backend(name):
    ops.set_default_backend(name)
    try:
        yield
    finally:
        ops.set_default_backend("auto")


class TestDispatch:
    """A fake GPU stands for a real one."""

    @pytest.fixture
    def asked(self, monkeypatch):
        calls = types.SimpleNamespace(verdict=True, configurations=[])

        def usable(*configuration):
            calls.configurations.append(configuration)
            return calls.verdict

        monkeypatch.setattr(certify, "convolution_is_usable", usable)
        return calls

    def has_kernel(self, dtype=torch.bfloat16, name=None):
        x = types.SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))
        return ops._convolution_has_kernel(name or ops._default_backend, x, torch.zeros(8, 4), None)

    def test_a_gpu_uses_the_kernel_once_certified(self, asked):
        assert self.has_kernel()
        assert asked.configurations == [
            (torch.device("cuda", 0), 8, 4, torch.bfloat16, torch.float32, False, False)
        ]
        asked.verdict = False
        assert not self.has_kernel()

    def test_float64_and_a_cpu_never_ask(self, asked):
        assert not self.has_kernel(torch.float64)
        assert not ops._convolution_has_kernel(
            "auto", torch.zeros(1, 1, 8), torch.zeros(8, 4), None
        )
        assert not asked.configurations

    @pytest.mark.parametrize(
        "name,kernel", [("reference", False), ("chunkwise", False), ("triton", True), ("fla", True)]
    )
    def test_the_backend_of_the_recurrences_decides(self, asked, name, kernel):
        with default_backend(name):
            assert self.has_kernel() == kernel
        assert not asked.configurations

    @interpreted
    def test_the_backend_computes(self, monkeypatch):
        called = []
        monkeypatch.setattr(kernels, "convolve_parts", lambda x, *_, **__: called.append(x) or [x])
        x, weight = torch.zeros(1, 2, 8), torch.zeros(8, 4)
        for name in ("triton", "reference"):
            with default_backend(name):
                ops.short_convolution(x, weight)
                # fewer tokens than the state: PyTorch's
                ops.short_convolution(x, weight, state=torch.zeros(1, 3, 8))
        assert called == [x]
