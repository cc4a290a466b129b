"""Certification: what passes, what is refused, and what stays on disk."""

import contextlib
import json
import multiprocessing
import sys
import types
import warnings

import pytest
import torch

from pdn import ops
from pdn.certification import certify
from pdn.certification.certify import certified
from pdn.certification.problems import sample
from pdn.certification.trials import Configuration, problems
from pdn.ops import chunkwise, decoding, reference
from pdn.ops.kernels import KERNELS, Kernel, register, uses_kernel
from pdn.ops.recurrences import RECURRENCES
from pdn.ops.types import axes_of


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDN_CACHE", str(tmp_path))
    monkeypatch.setattr(certify, "_verdicts", {})


def key(**changes) -> Configuration:
    fields = dict(
        gpu="GPU / X", triton="3.7.1", kernels="abc", key=16, value=8, decay="scalar",
        write="squash", solve="online",
        dtype=torch.float32,
    )  # fmt: skip
    return Configuration(**(fields | changes))


class Kernels:
    """The chunkwise form in place of kernels, with one result spoilt."""

    def __init__(self, spoilt: str | None = None, factor: float = 1.01):
        self.spoilt, self.factor, self.calls = spoilt, factor, 0

    def __call__(self, problem):
        self.calls += 1
        results = problem.run(chunkwise)
        if self.spoilt:
            results[self.spoilt] = results[self.spoilt] * self.factor
        return results


def forget() -> None:
    """Drop all verdicts, as a new process would."""
    certify._verdicts.clear()


@pytest.mark.parametrize("write", ["key", "tensor", "squash"])
@pytest.mark.parametrize("decay", ["none", "scalar", "diagonal"])
def test_right_kernels_are_certified_on_every_axis(decay, write):
    for dtype in (torch.float32, torch.bfloat16):
        assert certified(key(decay=decay, write=write, dtype=dtype), Kernels(), "cpu")


@pytest.mark.parametrize("write", ["key", "squash", "inverse"])
def test_offline_solves_are_certified(write):
    assert certified(key(solve="offline", write=write), Kernels(), "cpu")


@pytest.mark.parametrize("spoilt", ["o", "S", "A", "dq", "dk", "dv", "dP_A_log", "dmu", "dS", "dA"])
def test_one_wrong_result_is_refused_loudly(spoilt):
    with pytest.warns(UserWarning, match="REFUSED"):
        assert not certified(key(), Kernels(spoilt), "cpu")


def test_nan_is_refused():
    with pytest.warns(UserWarning, match="REFUSED"):
        assert not certified(key(), Kernels("dk", float("nan")), "cpu")


def test_the_verdict_is_computed_once_and_kept_on_disk():
    kernels = Kernels()
    assert certified(key(), kernels, "cpu") and certified(key(), kernels, "cpu")
    assert kernels.calls == 2  # one for each problem
    forget()
    assert certified(key(), kernels, "cpu")
    assert kernels.calls == 2


def test_a_refusal_is_kept_and_warned_about_again_by_the_next_process():
    with pytest.warns(UserWarning, match="REFUSED"):
        certified(key(), Kernels("o"), "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a process
        assert not certified(key(), Kernels(), "cpu")
    forget()
    with pytest.warns(UserWarning, match="REFUSED.*delete"):
        assert not certified(key(), Kernels(), "cpu")


def test_an_exception_is_a_refusal_of_this_process_only():
    def broken(problem):
        raise torch.cuda.OutOfMemoryError("out of memory")

    with pytest.warns(UserWarning, match="out of memory"):
        assert not certified(key(), broken, "cpu")
    forget()
    assert certified(key(), Kernels(), "cpu")


@pytest.mark.parametrize(
    "change",
    [{"triton": "3.8"}, {"kernels": "def"}, {"gpu": "Y"}, {"dtype": torch.bfloat16}, {"key": 32}],
)
def test_another_machine_compiler_source_size_or_dtype_is_tried_anew(change):
    kernels = Kernels()
    certified(key(), kernels, "cpu")
    certified(key(**change), kernels, "cpu")
    assert kernels.calls == 4


def test_a_torn_file_is_tried_anew():
    path = key().path(certify.cache_folder())
    path.parent.mkdir(parents=True)
    path.write_text('{"certi')
    assert certified(key(), Kernels(), "cpu")
    assert json.loads(path.read_text())["certified"] is True


def test_an_unwritable_cache_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PDN_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not kept"):
        assert certified(key(), Kernels(), "cpu")


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_context_does_not_matter(context):
    with context():
        assert certified(key(), Kernels(), "cpu")


def certify_in_a_process(folder: str) -> bool:
    import os

    os.environ["PDN_CACHE"] = folder
    return certified(key(), Kernels(), "cpu")


def test_processes_may_certify_at_once(tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(certify_in_a_process, [str(tmp_path)] * 4) == [True] * 4
    files = list(tmp_path.rglob("*.json"))
    assert len(files) == 1 and json.loads(files[0].read_text())["certified"]


@pytest.mark.parametrize("model", RECURRENCES)
def test_a_call_names_its_axes(model):
    recurrence = RECURRENCES[model]
    p = sample(recurrence, batch=1, time=2, heads=1, key=16)
    _, options = p.arguments(p.tensors)
    found = axes_of(options["log_decay"], options.get("write_k", options.get("preconditioner")))
    assert found == (recurrence.decay, recurrence.write)
    assert axes_of(None, p.tensors["k"]) == ("none", "tensor")


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """Put the PyTorch forms in the place of ``pdn.ops.triton``, on a device called GPU."""
    kernels = types.ModuleType("pdn.ops.triton")
    kernels.delta_rule, kernels.linear_attention = chunkwise.delta_rule, chunkwise.linear_attention
    kernels.step = types.SimpleNamespace(delta_rule=reference.delta_rule, advance=decoding.advance)
    monkeypatch.setitem(sys.modules, "pdn.ops.triton", kernels)
    monkeypatch.setattr(ops, "triton", kernels, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cached = certify._usable, certify._unsupported, certify._warn_once
    for function in cached:
        function.cache_clear()
    yield kernels
    for function in cached:
        function.cache_clear()


def arguments(step: bool = False) -> tuple:
    return torch.device("cpu"), 16, 8, "scalar", "squash", "online", torch.float32, step


@pytest.mark.parametrize("step", [False, True], ids=["chunk", "step"])
def test_the_kernels_of_the_package_are_the_ones_tried(kernels_on_cpu, tmp_path, step):
    assert certify.triton_is_usable(*arguments(step))
    (file,) = tmp_path.rglob("*.json")
    assert file.parent.name.startswith("GPU-triton3") and file.parent.name.endswith(
        certify.sources_hash()
    )
    assert file.name.startswith("step" if step else "chunk")


@pytest.mark.parametrize("step", [False, True], ids=["chunk", "step"])
def test_a_wrong_kernel_of_the_package_is_refused(kernels_on_cpu, step):
    def wrong(*args, **options):
        o, state = reference.delta_rule(*args, **options)
        return 1.1 * o, state

    if step:
        kernels_on_cpu.step.delta_rule = wrong
    else:
        kernels_on_cpu.delta_rule = wrong
    with pytest.warns(UserWarning, match="REFUSED"):
        assert not certify.triton_is_usable(*arguments(step))


def test_certification_runs_inside_a_compiled_graph(kernels_on_cpu, tmp_path):
    def dispatch(x):
        return x + 1 if certify.triton_is_usable(*arguments()) else x - 1

    compiled = torch.compile(dispatch, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_a_kernel_that_reads_the_wrong_half_is_refused(kernels_on_cpu):
    kernels_on_cpu.step.advance = lambda *args, clock, **options: decoding.advance(
        *args, clock=clock + 1, **options
    )
    with pytest.warns(UserWarning, match="REFUSED"):
        assert not certify.triton_is_usable(*arguments(step=True))


def test_a_call_is_looked_up_without_asking_the_driver_or_the_package_manager(
    kernels_on_cpu, monkeypatch
):
    assert certify.triton_is_usable(*arguments())
    monkeypatch.delattr(torch.cuda, "get_device_name")
    monkeypatch.delattr(certify.importlib.metadata, "version")
    assert certify.triton_is_usable(*arguments())


def test_an_old_triton_or_device_is_named_once(kernels_on_cpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match="compute capability"):
        assert not certify.triton_is_usable(*arguments())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not certify.triton_is_usable(*arguments())
        assert not certify.triton_is_usable(*arguments(step=True))
    certify._usable.cache_clear()
    certify._unsupported.cache_clear()
    monkeypatch.setattr(certify.importlib.metadata, "version", lambda name: "3.6.0+git1")
    with pytest.warns(UserWarning, match="miscompiles"):
        assert not certify.triton_is_usable(*arguments())


def test_the_problems_exercise_documents_states_and_both_kinds_of_gates():
    dense, documents = problems(key(), "cpu")
    assert "beta_x" in dense.tensors and "beta" in documents.tensors
    assert documents.cu_seqlens is not None and dense.cu_seqlens is None
    for p in (dense, documents):
        assert {"S", "A"} <= p.tensors.keys() and p.cotangents.keys() == {"o", "S", "A"}


def test_inference_is_certified_without_gradients(kernels_on_cpu, tmp_path):
    assert certify.triton_is_usable(*arguments(), False)
    (file,) = tmp_path.rglob("*.json")
    assert file.name.startswith("forward")
    (errors, *_) = json.loads(file.read_text())["errors"]
    assert errors.keys() == {"o", "S", "A"}


def test_what_a_call_launches_is_compiled_at_once_and_then_certified(kernels_on_cpu, monkeypatch):
    events = []
    compiled = types.SimpleNamespace(compiling_ahead=contextlib.nullcontext)
    monkeypatch.setitem(sys.modules, "pdn.ops.triton.compiled", compiled)
    monkeypatch.setattr(certify, "_compile", lambda key, *_: events.append(("compile", key.key)))

    def tried(key, *_):
        events.append(("try", key.key))
        return {"certified": True, "errors": []}

    monkeypatch.setattr(certify, "_try", tried)
    gpu = torch.device("cuda", 0)

    def call():
        for size in (32, 16, 32):
            assert certify.triton_is_usable(gpu, size, *arguments()[2:])

    certify.certify_together(call, gpu)
    assert events[:2] == [("compile", 32), ("compile", 16)]
    assert [event for event in events if event[0] == "try"] == [("try", 32), ("try", 16)]
    events.clear()
    certify.certify_together(call, gpu)
    assert not events


def test_on_a_cpu_there_is_nothing_to_certify():
    certify.certify_together(lambda: pytest.fail("called"), torch.device("cpu"))


@pytest.mark.parametrize("wrong", [False, True])
def test_a_decoding_kernel_is_certified_by_its_plain_form(
    kernels_on_cpu, monkeypatch, tmp_path, wrong
):
    from pdn.ops import decoding as plain

    def kernel(x, *, norm, eps, gate, swiglu):
        return plain.prepare(x, norm=norm, eps=eps, gate=gate, swiglu=swiglu) * (1.1**wrong)

    kernels_on_cpu.decoding = types.SimpleNamespace(prepare=kernel)
    question = torch.device("cpu"), "prepare", torch.float32, 3, (8, 0, 0, 1)
    certify._decoding_usable.cache_clear()
    if wrong:
        with pytest.warns(UserWarning, match="REFUSED"):
            assert not certify.decoding_is_usable(*question)
    else:
        assert certify.decoding_is_usable(*question)
    certify._decoding_usable.cache_clear()
    (file,) = tmp_path.rglob("*.json")
    assert file.name == "prepare-3x8x0x0x1-float32.json"


class Doubled(torch.autograd.Function):
    """The double of x, with a factor of its gradient."""

    @staticmethod
    def forward(ctx, x, wrong_output, wrong_gradient):
        ctx.factor = 2 * (1.1 if wrong_gradient else 1.0)
        return 2 * x * (1.1 if wrong_output else 1.0)

    @staticmethod
    def backward(ctx, dy):
        return ctx.factor * dy, None, None


@pytest.mark.parametrize("wrong", [(False, False), (True, False), (False, True)])
def test_a_kernel_of_ones_own_runs_if_it_computes_its_definition(
    kernels_on_cpu, monkeypatch, tmp_path, wrong
):
    own = Kernel(
        run=lambda x, cu_seqlens: {"y": Doubled.apply(x, *wrong)},
        definition=lambda x, cu_seqlens: {"y": 2 * x},
        problems=lambda size: [
            {
                "x": torch.linspace(1, 2, size, dtype=torch.float64),
                "cu_seqlens": torch.tensor([0, size], dtype=torch.int32),
            }
        ],
        tolerances={torch.float32: (1e-5, 1e-5)},
    )
    monkeypatch.setitem(KERNELS, "mine", own)
    certify._kernel_usable.cache_clear()
    on_gpu = types.SimpleNamespace(is_cuda=True, device=torch.device("cpu"), dtype=torch.float32)
    with contextlib.nullcontext() if not any(wrong) else pytest.warns(match="REFUSED"):
        assert uses_kernel("mine", on_gpu, 8) is not any(wrong)
    (file,) = tmp_path.rglob("*.json")
    assert file.name == "own-mine-8-float32.json" and own.digest() in file.parent.name
    (errors,) = json.loads(file.read_text())["errors"]
    assert errors.keys() == {"y", "gradient of x"}
    on_gpu.dtype = torch.bfloat16
    assert not uses_kernel("mine", on_gpu, 8)  # for want of a tolerance
    x = torch.ones(8)
    assert not uses_kernel("mine", x, 8) and uses_kernel("mine", x, 8, backend="triton")
    with pytest.raises(ValueError, match="mine: registered already"):
        register("mine", own)
