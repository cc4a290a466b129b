"""Registers, spills and shared memory of every kernel as the compiler leaves them.

It needs Triton and no GPU. The table of docs/kernel_resources.md is this command's. A kernel that
takes more registers than before runs fewer programs at once, and one that spills goes through
memory for what it has no room for: both are slower, and both are seen here before anything is
timed. ``stack`` is what a thread spills, in bytes.

    python scripts/benchmark.py registers            all kernels, for sm_80 and sm_90
    python scripts/benchmark.py registers --write    and into docs/kernel_resources.md
    python scripts/benchmark.py registers --models pgdn --capabilities 90 --kernels finish_kernel
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import tempfile
import types
from pathlib import Path

from benchmarks._measure import markdown

HEADER = ["case", "kernel", "sm", "registers", "stack", "shared", "instructions"]
TABLE = Path(__file__).parents[2] / "docs/kernel_resources.md"
TIME = 8192  # long enough that one sequence with one head is cut into segments
# by name: the model and what differs from bfloat16, K = V = 128 and one sequence that is not cut
CASES = {
    "gdn": ("gdn", {}),
    "pgdn": ("pgdn", {}),
    "pkda": ("pkda", {}),
    "pgdn segments": ("pgdn", dict(time=TIME, cu_seqlens=[0, TIME])),
    "gdn persistent": ("gdn", {}),
    "pgdn persistent": ("pgdn", {}),
    "kda persistent": ("kda", {}),
    "pkda persistent": ("pkda", {}),
}
# of the cases of that name, and alone in them
PERSISTENT = (
    "persistent_gradient_kernel",
    "persistent_vector_gradient_kernel",
    "fused_forward_kernel",
    "reverse_scan_kernel",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=[*CASES], choices=[*CASES], metavar="CASE")
    parser.add_argument("--capabilities", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--kernels", nargs="+", help="only these, by their functions' names")
    parser.add_argument("--write", action="store_true", help=f"replace {TABLE.name}")


def main(args: argparse.Namespace) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit(
            "TRITON_INTERPRET=1 interprets kernels in place of compiling them: unset it"
        )
    context = multiprocessing.get_context("spawn")  # a process compiles for one device
    rows = []
    for capability in args.capabilities:
        with context.Pool(1) as pool:
            rows += pool.apply(compile_cases, (capability, args.models, args.kernels))
    table = markdown(HEADER, rows)
    print(table)
    if args.write:
        import triton

        note = (
            "Made by `python scripts/benchmark.py registers --write`, Triton "
            f"{triton.__version__}. "
        )
        note += "Registers and stack (what is spilt, in bytes) of a thread; bytes of shared memory "
        note += "of a program. Without `segments`: one sequence of 256 tokens, bf16, K = V = 128."
        TABLE.write_text(
            f"# What the kernels take of a multiprocessor\n\n{note}\n\n{table}\n", encoding="utf-8"
        )


def compile_cases(capability: int, cases: list[str], kernels: list[str] | None) -> list[list]:
    """Compile the kernels of some cases; return a row of the table for each.

    Args:
        capability: compute capability of the device, such as 90.
        cases: names in ``CASES``.
        kernels: names of kernels; None: all.
    """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    device = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )
    driver.set_active(device)
    rows, compile_and_run = [], JITFunction.run

    def only_compile(self, *args, grid, warmup=False, **options):
        of_this_case = (self.__name__ in PERSISTENT) == case.endswith("persistent")
        if of_this_case and (kernels is None or self.__name__ in kernels):
            kernel = compile_and_run(self, *args, grid=grid, warmup=True, **options)
            row = [case, self.__name__, capability, *resources(kernel)]
            if row not in rows:
                rows.append(row)

    JITFunction.run = only_compile
    from pdn.certification.problems import sample
    from pdn.ops import triton as ours
    from pdn.ops.recurrences import RECURRENCES

    ours.compiled.current_device = lambda: -1  # as the tensors say
    ours.compiled.starts_early = lambda device: capability >= 90
    for case in cases:
        programs = 132 if case.endswith("persistent") and capability == 90 else 0
        ours.compiled.persistent_programs = lambda device, programs=programs: programs
        model, options = CASES[case]
        size = dict(batch=1, time=256, heads=1, key=128, dtype=torch.bfloat16) | options
        sample(RECURRENCES[model], **size).run(ours)
    return rows


def resources(kernel) -> list[int]:
    """Return what a compiled kernel takes.

    Registers and stack bytes of a thread, shared memory of a program, and instructions.
    """
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def tool(*command):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = tool(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = tool(tools / "nvdisasm", "--print-code", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return [
        int(registers),
        int(stack),
        kernel.metadata.shared,
        len(re.findall(r"/\*[0-9a-f]{4,5}\*/ ", code)),
    ]
