"""Kernel launches that find their compiled kernel by themselves.

Triton binds and specialises every argument of every call, 60 us for one of these kernels: more than most of them run.
Here a call is looked up by what compilation depends on, and launched as it was compiled: 10 us.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from pdn.ops.triton.common import INTERPRETED

_compiled: dict[tuple, tuple] = {}


def run(kernel, grid: tuple[int, ...], *arguments: Tensor | int | None, **constants) -> None:
    """``kernel[grid](*arguments, **constants)``. Constants are compile-time arguments, which follow the others in the
    kernel's signature, and launch options such as ``num_warps``."""
    if INTERPRETED.value or torch.compiler.is_compiling():
        kernel[grid](*arguments, **constants)
        return
    values = tuple([x.value if type(x) is tl.constexpr else x for x in constants.values()])
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
    key = (kernel, device, tuple(constants), values, *[_specialisation(x) for x in arguments])
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants)
        if compiled is not None:
            named = dict(zip(constants, values))
            rest = tuple(named[name] for name in kernel.arg_names[len(arguments) :])
            _compiled[key] = compiled, rest
        return
    compiled, rest = found
    compiled[(*grid, 1, 1)](*arguments, *rest)


def _specialisation(x: Tensor | int | None) -> object:
    """What of an argument its kernel is compiled for."""
    if x is None:
        return None
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return x == 1, x % 16 == 0, x.bit_length() > 31
