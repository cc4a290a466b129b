"""Every kernel compiles for Ampere and Hopper within their shared memory, without a GPU.

``pytest -m slow`` runs it. In a process of its own, since Triton decides at import whether it
compiles or interprets.
"""

import os
import subprocess
import sys

import pytest

LIMITS = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory a program

COMPILE_ONLY = """
import sys, types
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

capability, model, dtype, size, time = (int(x) if x.isdigit() else x for x in sys.argv[1:])
driver.set_active(types.SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", capability, 32), get_current_device=lambda: 0,
    get_current_stream=lambda device=None: 0,
))
compile_and_run = JITFunction.run

def only_compile(self, *args, grid, warmup=False, **options):
    kernel = compile_and_run(self, *args, grid=grid, warmup=True, **options)
    print(self.__name__, kernel.metadata.shared)

JITFunction.run = only_compile
from pdn.ops import triton as kernels
kernels.compiled.current_device = lambda: -1  # as the tensors say
kernels.compiled.starts_early = lambda device: capability >= 90
full = time == 320 or (model != "pgdn" and dtype == "bfloat16")  # others: as with documents
persistent = capability == 90 and full
kernels.compiled.persistent_programs = lambda device: 132 if persistent else 0
from pdn.certification.problems import sample, sample_convolution
from pdn.ops.recurrences import RECURRENCES
"""

RECURRENCE = """
dtype = getattr(torch, dtype)
sample(RECURRENCES[model], batch=1, time=time, heads=1, key=size, dtype=dtype).run(kernels)
"""

CONVOLUTION = """
from pdn.ops.triton.convolution import convolve
for options in dict(), dict(cu_seqlens=[0, time], bias=False, margin=64):
    dtypes = dict(dtype=getattr(torch, dtype), parameters=torch.float32)
    sample_convolution(1, time, size, **dtypes, **options).run(convolve)
"""

# of the middle one of three pieces: the first has no state before it, the last none after
PIECE = """
from pdn import ops
from pdn.ops import context, exchange
exchange.all_gather = lambda x, group, count: torch.stack([x] * count)
ops.check_on_gpu = lambda x: None
ops.set_default_backend("triton")
dtype = getattr(torch, dtype)
for cu_seqlens in None, torch.tensor([0, 3 * time], dtype=torch.int32):
    piece = context.Piece(None, 1, 3, 1, time, cu_seqlens)
    with context.split(piece):
        p = sample(RECURRENCES[model], batch=1, time=time, heads=1, key=size, dtype=dtype)
        p.cu_seqlens = piece.documents
        p.run("triton")
        c = sample_convolution(1, time, size, dtype=dtype, parameters=torch.float32)
        c.cu_seqlens = piece.documents
        c.run(lambda *inputs, **options: ops.short_convolution(*inputs, **options)[0])
"""

DECODING = """
from pdn.certification.decoding import sample_decoding
from pdn.ops.triton import decoding
import pdn.ops.triton.step as step
rows = 3 * size + 32
dtype = getattr(torch, dtype)
for name, batch, sizes in [
    ("project", 1, (rows, size, size, 0, 0, 0)), ("project", 1, (size, size, 128, 0, 0, 1)),
    ("project", 1, (size, size, 128, 1, 0, 1)), ("project", 1, (size, 2816, 0, 0, 1, 1)),
    ("project", 2, (32000, size, size, 0, 0, 0)), ("prepare", 8, (2816, 0, 0, 1)),
    ("prepare", 8, (size, size, 0, 0)), ("draw", 2, (32000, 50)), ("draw", 2, (32000, 0)),
    ("split_and_convolve", 8, (3 * size, 4, 4, size, size, size, 8, 8, 8, 8)),
    ("attend", 1, (8, 8, 128, 0)), ("attend", 64, (8, 8, 128, 0)),
]:
    sample_decoding(name, dtype, batch, sizes, "cpu").run(decoding)
for batch in 1, 64:
    with torch.no_grad():
        size = dict(batch=batch, time=1, heads=8, key=128, dtype=dtype, initial=True)
        p = sample(RECURRENCES[model], **size)
        p.forward(step)
"""

CASES = [
    ("pgdn", "bfloat16", 128, 2048),
    ("pkda", "bfloat16", 128, 2048),
    ("gdn", "bfloat16", 128, 8192),  # in segments
    ("pgdn", "bfloat16", 256, 128),
    ("pgdn", "float32", 128, 128),
    ("pkda", "float32", 128, 128),
    ("pkda", "float16", 120, 128),
]


def compiled(script: str, *arguments) -> dict[str, int]:
    """Return the kernels that the script launches, and their bytes of shared memory."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE_ONLY + script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {name: int(shared) for name, shared in map(str.split, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("model,dtype,size,time", CASES)
def test_every_kernel_fits(model, dtype, size, time, capability):
    kernels = compiled(RECURRENCE, capability, model, dtype, size, time)
    assert {"forward_kernel", "reverse_kernel"} <= kernels.keys()
    persistent = {name for name in kernels if name.startswith("persistent")}
    if capability == 90 and dtype == "bfloat16" and model != "pgdn":
        vector = "_vector" if model == "pkda" else ""
        assert persistent == {f"persistent{vector}_gradient_kernel"}
    else:
        assert not persistent
    assert not {name: shared for name, shared in kernels.items() if shared > LIMITS[capability]}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pgdn", "gdn", "deltanet", "pdn"])
def test_the_kernels_of_full_chunks_fit(model):
    kernels = compiled(RECURRENCE, 90, model, "bfloat16", 128, 320)
    assert {"fused_forward_kernel", "persistent_gradient_kernel"} <= kernels.keys()
    assert ("reverse_scan_kernel" in kernels) == model.startswith("p")
    assert not {name: shared for name, shared in kernels.items() if shared > LIMITS[90]}


@pytest.mark.slow
@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("model,dtype,size,time", CASES)
def test_every_kernel_fits_on_a_piece_of_a_sequence(model, dtype, size, time, capability):
    kernels = compiled(PIECE, capability, model, dtype, size, time)
    assert {"forward_kernel", "reverse_kernel", "convolution_kernel"} <= kernels.keys()
    assert ("combine_kernel" in kernels) == (time > 2048 * 2)
    assert not {name: shared for name, shared in kernels.items() if shared > LIMITS[capability]}


@pytest.mark.slow
@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("dtype,channels", [("bfloat16", 1024), ("float16", 24), ("float32", 1000)])
def test_the_short_convolution_fits(dtype, channels, capability):
    kernels = compiled(CONVOLUTION, capability, "convolution", dtype, channels, 200)
    assert {"convolution_kernel", "convolution_backward_kernel"} <= kernels.keys()
    assert not {name: shared for name, shared in kernels.items() if shared > LIMITS[capability]}


@pytest.mark.slow
@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernels_of_a_decoding_step_fit(dtype, capability):
    kernels = compiled(DECODING, capability, "pgdn", dtype, 1024, 1)
    assert {"project_kernel", "convolve_kernel", "attend_kernel", "step_kernel"} <= kernels.keys()
    assert not {name: shared for name, shared in kernels.items() if shared > LIMITS[capability]}
