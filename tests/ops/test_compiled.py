"""A launch finds its compiled kernel again.

It compiles anew for whatever compilation depends on.
"""

import ast
import tomllib
import types
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from pdn.certification.problems import sample
from pdn.ops import triton as kernels
from pdn.ops.recurrences import RECURRENCES
from pdn.ops.triton import compiled, launch, step


class Compiled:
    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """What ``run`` uses of a JIT function."""

    def __init__(self):
        self.arg_names = ["x", "y", "T", "SIZE", "FLAG"]
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **constants):
            self.compiled.append((grid, arguments, constants))
            return Compiled(self.launched)

        return compile_and_launch


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(compiled, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(compiled, "starts_early", lambda device: True)
    return Kernel()


def test_the_second_launch_passes_everything_in_the_order_of_the_signature(kernel):
    for x in torch.zeros(4), torch.ones(4):
        compiled.run(kernel, (3, 2), x, None, 5, FLAG=tl.constexpr(True), SIZE=64, num_warps=4)
    assert len(kernel.compiled) == 1
    grid, arguments = kernel.launched[0]
    assert grid[:3] == (3, 2, 1)
    assert arguments == (x, None, 5, 64, True)


def test_what_a_later_compiler_may_decide_otherwise_is_said_at_compilation(kernel):
    compiled.run(kernel, (1,), torch.zeros(4), None, 5, SIZE=64, FLAG=True)
    constants = kernel.compiled[0][2]
    assert constants == dict(SIZE=64, FLAG=True, launch_pdl=True, enable_fp_fusion=True)


# What a kernel may read before it waits, by the names of its arguments: what the launch before it,
# which may still run, never writes.
READ_EARLY = {
    "weight": "a parameter, which no launch of a decoding step writes",
    "starts": "a table that is made once, by the host",
    "sizes": "a table that is made once, by the host",
    "state": "written by the same kernel a token ago, with the rest of that step in between",
    "S_in": "likewise, where CLOCKED says that it is of a decoding step",
    "A_in": "likewise, of two halves in turns",
    "clock": "counted at a step's end, with the head's product and an embedding in between",
}


def parts_of(kernel: ast.FunctionDef) -> tuple[list[ast.stmt], set[str]]:
    """Return the statements of a kernel before it has waited for sure, and under which conditions
    it waits: "" for none.
    """
    body = kernel.body[1:] if ast.get_docstring(kernel) else kernel.body
    early, conditions = [], set()
    for statement in body:
        if ast.unparse(statement) == "await_inputs()":
            return early, {""}
        inside = statement.body if isinstance(statement, ast.If) else []
        if isinstance(statement, ast.If) and [*map(ast.unparse, inside)] == ["await_inputs()"]:
            assert not statement.orelse, kernel.name
            conditions.add(ast.unparse(statement.test))
            if any(f"not {condition}" in conditions for condition in conditions):
                return early, conditions
        else:
            early.append(statement)
    return early, conditions


def early_faults(kernel: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """Say what a kernel does too early.

    Args:
        kernel: to be looked at.
        functions: of its module by name, which it may call.
    """
    early, conditions = parts_of(kernel)
    waits = conditions == {""} or len(conditions) == 2
    faults = [] if waits else [f"{kernel.name} need not wait: {conditions}"]
    nodes = [node for statement in early for node in ast.walk(statement)]
    called = [functions.get(node.id) for node in nodes if isinstance(node, ast.Name)]
    nodes += [node for function in called if function for node in ast.walk(function)]
    writes = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    faults += [f"{kernel.name}: {x}" for x in writes if "store" in x or "atomic" in x]
    # Tensors are named in small letters, numbers in capitals; constants are annotated.
    tensors = {x.arg for x in kernel.args.args if x.annotation is None and not x.arg.isupper()}
    read = {x.id for x in nodes if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}
    return faults + [f"{kernel.name} reads {x}" for x in sorted(read & tensors - set(READ_EARLY))]


def kernels_in(source: str) -> list[tuple[ast.FunctionDef, dict[str, ast.FunctionDef]]]:
    found = [x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)]
    functions = {function.name: function for function in found}
    return [(x, functions) for x in found if x.name.endswith("_kernel")]


def test_before_it_waits_a_kernel_writes_nothing_and_reads_what_the_launch_before_does_not_write():
    paths = Path(compiled.__file__).parent.glob("*.py")
    kernels = [kernel for path in paths for kernel in kernels_in(path.read_text())]
    assert len(kernels) >= 18
    assert [fault for kernel in kernels for fault in early_faults(*kernel)] == []
    assert sum(bool(parts_of(kernel)[0]) for kernel, _ in kernels) == 3  # of a decoding step


WAITS_TOO_LATE = {
    "helper reads": "y = tl.load(weight)\n b = put(x)\n await_inputs()",
    "reads": "y = tl.load(x + 1)\n await_inputs()",
    "writes": "tl.store(weight, 0)\n await_inputs()",
    "helper writes": "put(weight)\n await_inputs()",
    "never waits": "y = tl.load(weight)",
    "may not wait": "if FLAG:\n  await_inputs()\n y = 1",
}


@pytest.mark.parametrize("body", WAITS_TOO_LATE.values(), ids=WAITS_TOO_LATE)
def test_a_kernel_that_waits_too_late_is_found(body):
    source = f"def put(y):\n tl.store(y, 1)\ndef a_kernel(x, weight, N, FLAG: int):\n {body}"
    ((kernel, functions),) = kernels_in(source)
    assert early_faults(kernel, functions)
    good = source.replace(body, "y = tl.load(weight + N)\n await_inputs()\n tl.store(x, y)")
    assert not early_faults(*kernels_in(good)[0])


@pytest.mark.parametrize(
    "change",
    [
        dict(x=torch.zeros(4, dtype=torch.bfloat16)),
        dict(x=torch.zeros(5)[1:]),  # not aligned to 16 bytes
        dict(y=torch.zeros(4)),
        dict(T=1),
        dict(T=32),
        dict(T=2**40),
        dict(SIZE=32),
        dict(num_warps=8),
    ],
    ids=[
        "dtype",
        "alignment",
        "presence",
        "one",
        "divisible by 16",
        "64 bits",
        "constant",
        "option",
    ],
)
def test_compiles_anew(kernel, change):
    for changed in {}, change:
        case = dict(x=torch.zeros(4), y=None, T=5, SIZE=64, FLAG=True, num_warps=4) | changed
        compiled.run(kernel, (1,), case.pop("x"), case.pop("y"), case.pop("T"), **case)
    assert len(kernel.compiled) == 2 and not kernel.launched


def test_the_grid_is_free(kernel):
    for grid in (1,), (7, 5, 3):
        compiled.run(kernel, grid, torch.zeros(4), None, 5, SIZE=64, FLAG=False)
    assert len(kernel.compiled) == 1 and kernel.launched[0][0][:3] == (7, 5, 3)


class Direct(Compiled):
    """A compiled kernel whose launcher takes only arguments.

    Its scratch memory decides whether it may be called so.
    """

    def __init__(self, launches, direct, scratch=0):
        super().__init__(launches)
        self.function, self.packed_metadata = "function", (4, 1, 0)
        self.run = type("CudaLauncher", (), {})()
        self.run.__dict__.update(
            global_scratch_size=scratch, profile_scratch_size=0, launch_cooperative_grid=False,
            launch_pdl=False,
            arg_annotations=list("xyTSF"), kernel_signature=b"signature", launch=direct.append_call,
        )  # fmt: skip


class Calls(list):
    def __init__(self):
        self.append_call = lambda *arguments: self.append(arguments)


@pytest.fixture
def direct(monkeypatch, kernel):
    """Record calls of the C launcher; ``kernel`` compiles to what is launched by it."""
    calls = Calls()
    active = types.SimpleNamespace(utils=types.SimpleNamespace(launch=calls.append_call))
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    monkeypatch.setattr(compiled, "current_stream", lambda device: f"stream of {device}")
    calls.scratch = 0
    monkeypatch.setattr(
        Kernel,
        "__getitem__",
        lambda self, grid: lambda *_, **__: Direct(self.launched, calls, calls.scratch),
    )
    return calls


def launch_twice(kernel, x):
    for _ in range(2):
        compiled.run(kernel, (3, 2), x, None, 5, SIZE=64, FLAG=True)


def test_the_c_launcher_is_given_addresses_and_the_current_stream(kernel, direct):
    x = torch.zeros(4)
    launch_twice(kernel, x)
    (arguments,) = direct
    assert arguments[:5] == (3, 2, 1, "stream of -1", "function")
    assert arguments[-3:] == (["x", "y", "T"], b"signature", [x.data_ptr(), None, 5])
    assert not kernel.launched


def test_a_kernel_with_scratch_memory_goes_through_triton(kernel, direct):
    direct.scratch = 128
    x = torch.zeros(4)
    launch_twice(kernel, x)
    assert not direct and kernel.launched == [((3, 2, 1), (x, None, 5, 64, True))]


def test_another_triton_goes_through_its_own_launcher(kernel, direct, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    launch_twice(kernel, torch.zeros(4))
    assert not direct and len(kernel.launched) == 1


@pytest.mark.parametrize("version", ["3.7.1", "3.8.0", "3.9.0"])
def test_every_triton_that_may_be_installed_is_launched_directly(
    kernel, direct, version, monkeypatch
):
    monkeypatch.setattr(triton, "__version__", version)
    launch_twice(kernel, torch.zeros(4))
    assert len(direct) == 1 and not kernel.launched
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (bound,) = (x for x in project["dependencies"] if x.startswith("triton"))
    assert bound.startswith("triton>=3.7.1,<3.10;")


@pytest.fixture
def tiles(monkeypatch):
    """Return a matrix by tiles, and the kinds of descriptors that were made."""
    kinds = []

    def describe(x, kind):
        kinds.append(kind)
        return ["descriptor", *x.matrix.shape, *x.matrix.stride()]

    monkeypatch.setattr(compiled.Tiles, "described", lambda self: self)
    monkeypatch.setattr("triton.backends.nvidia.driver.make_tensordesc_arg", describe)
    metadata = types.SimpleNamespace(tensordesc_meta=["kind of x"])
    monkeypatch.setattr(Direct, "metadata", metadata, raising=False)
    return compiled.Tiles(torch.zeros(128, 256), (64, 128), None), kinds


def test_the_c_launcher_is_given_a_descriptor_made_once_for_an_address(kernel, direct, tiles):
    x, kinds = tiles
    for _ in range(3):
        launch_twice(kernel, x)
    assert kinds == ["kind of x"] and len(direct) == 5
    assert direct[-1][-1] == ["descriptor", 128, 256, 256, 1, None, 5]
    launch_twice(kernel, x._replace(matrix=torch.zeros(128, 256)))
    assert len(kinds) == 2


def test_another_triton_makes_descriptors_itself(kernel, direct, tiles, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    x, kinds = tiles
    launch_twice(kernel, x)
    assert not kinds and not direct and kernel.launched == [((3, 2, 1), (x, None, 5, 64, True))]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_launches(kernel, direct, name):
    hook = getattr(triton.knobs.runtime, name)
    hook.add(print)
    try:
        launch_twice(kernel, torch.zeros(4))
    finally:
        hook.remove(print)
    assert not direct and len(kernel.launched) == 1


def test_a_tensor_elsewhere_is_refused(kernel, monkeypatch):
    monkeypatch.setattr(compiled, "current_device", lambda: 0)
    with pytest.raises(ValueError, match=r"\(4,\) tensor on cpu .* current device, cuda:0"):
        compiled.run(kernel, (1,), torch.zeros(4), None, 5, SIZE=64, FLAG=True)
    assert not kernel.compiled


@pytest.mark.parametrize(
    "time,options",
    [(1, {}), (3, {}), (3, {"cu_seqlens": [0, 2, 3]})],
    ids=["step", "chunk", "documents"],
)
def test_the_device_of_every_argument_is_looked_at_before_a_launch(monkeypatch, time, options):
    looked_at = set()
    for module in launch, step:
        monkeypatch.setattr(
            module,
            "check_device",
            lambda *x: looked_at.update(t.data_ptr() for t in x if t is not None),
        )
        monkeypatch.setattr(module, "run", lambda *_, **__: looked_at.add("launch"))
    p = sample(RECURRENCES["pkda"], batch=1, time=time, heads=1, key=16, initial=True, **options)
    with torch.no_grad():
        p.forward(step if time == 1 else kernels)
    given = [*p.tensors.values(), *([] if p.cu_seqlens is None else [p.cu_seqlens])]
    assert looked_at == {"launch", *(x.data_ptr() for x in given)}


def test_compiling_ahead_compiles_each_kernel_once_and_launches_nothing(kernel):
    warmed = []

    def warmup(*arguments, grid, **constants):
        warmed.append((grid, arguments, constants))
        raise RuntimeError("no such instruction")  # left to the launch

    kernel.warmup = warmup
    with compiled.compiling_ahead(2):
        for size in (16, 16, 32):
            compiled.run(kernel, (3,), torch.zeros(4), None, 5, SIZE=size, FLAG=True)
        with compiled.compiling_ahead():  # within, as certification may be
            compiled.run(kernel, (3,), torch.zeros(4), None, 5, SIZE=64, FLAG=True)
    assert sorted(constants["SIZE"] for *_, constants in warmed) == [16, 32, 64]
    assert not kernel.compiled and not kernel.launched
    compiled.run(kernel, (3,), torch.zeros(4), None, 5, SIZE=16, FLAG=True)
    assert len(kernel.compiled) == 1
