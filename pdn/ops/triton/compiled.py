"""Kernel launches that find their compiled kernel by themselves.

Triton binds and specialises every argument of every call and asks the driver about every pointer:
    60 us for one of these kernels, more than most of them run. Here a call is looked up by what
    compilation depends on and handed to Triton's C
launcher with addresses in place of tensors: 5 to 9 us on a CPU, the driver apart.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from pdn.ops.triton.common import INTERPRETED

current_device = getattr(
    torch._C, "_cuda_getDevice", lambda: -1
)  # -1 is what a CPU tensor says, too
current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: 0
)  # without CUDA nothing is launched

# Triton says what a kernel gets from it; on the host it is a function of ints.
next_power_of_2 = cast("Callable[[int], int]", triton.next_power_of_2)


class Tiles(NamedTuple):
    """Names a matrix that a Gluon kernel reads or writes by tiles, through a descriptor.

    matrix: [rows, columns], contiguous, on a boundary of 16 bytes.
    tile: rows and columns of a tile.
    layout: Gluon's, of a tile in shared memory.
    """

    matrix: Tensor
    tile: tuple[int, int]
    layout: Any

    def described(self) -> Any:
        """Return what Triton makes a descriptor of."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        return TensorDescriptor.from_tensor(self.matrix, list(self.tile), self.layout)


class _Launch(NamedTuple):
    """Holds a compiled kernel, and how it is launched: by Triton's launcher or by its C function.

    ``function`` is there where the kernel needs nothing but arguments.
    """

    kernel: object  # kept, so that its id is its own
    compiled: Any  # Triton's, of a class for each backend
    constants: tuple  # values of the compile-time arguments, in the order of the signature
    function: Callable[..., None] | None  # launch(x, y, z, stream, *fixed, arguments)
    fixed: tuple
    descriptors: dict[tuple, list]  # what the C function takes for ``Tiles`` met before


DIRECT_RELEASES = "3.7.", "3.8.", "3.9."  # of Triton; pyproject.toml admits no others

DESCRIBING_RELEASES = "3.7."  # those in which what it takes for ``Tiles`` was looked up
MAX_DESCRIPTORS = 4096  # kept of a kernel, which as a rule meets the same addresses again

# by the kernel's id, since a hash of Triton's is one of its sources
_launches: dict[tuple, _Launch] = {}


_compiler: Executor | None = None  # of ``compiling_ahead``
_submitted: set[tuple] = set()


@contextlib.contextmanager
def compiling_ahead(threads: int = 16) -> Iterator[None]:
    """Have ``run`` compile in threads and launch nothing, so that what is called within computes
    garbage.

    The compiler leaves Python's lock, so kernels of a second each take little more than the longest
    of them. All are compiled at the end; an error is left to the launch that needs the kernel.
    """
    global _compiler
    if _compiler is not None:  # already within
        yield
        return
    with ThreadPoolExecutor(threads, "compile") as _compiler:
        try:
            yield
        finally:
            executor, _compiler = _compiler, None
            executor.shutdown(wait=True)
            _submitted.clear()


def _compile(kernel, grid, arguments, constants, device: int) -> None:
    with contextlib.suppress(Exception), torch.cuda.device(device):
        kernel.warmup(*arguments, grid=grid, **constants, **options_of(device))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def run(
    kernel, grid: tuple[int, ...], *arguments: Tensor | Tiles | int | None, **constants
) -> None:
    """``kernel[grid](*arguments, **constants)`` on the current CUDA device, on its current stream.

    The tensors must be on that device. ``run`` looks at that when it first meets a kernel;
    afterwards the caller does, by ``check_device`` of what it was given itself, since an address
    does not say where it belongs. Constants are compile-time arguments, which follow the others in
    the kernel's signature, and launch options such as ``num_warps``.

    Raises:
        ValueError: a tensor on another device.
    """
    if INTERPRETED.value or torch.compiler.is_compiling():
        kernel[grid](*arguments, **constants)
        return
    device = current_device()
    addresses, kinds, tiles = [], [], []
    x: Any  # a tensor where nothing else: isinstance would take longer than these two
    for x in arguments:
        if x is None:
            addresses.append(None)
            kinds.append(None)
        elif type(x) is int:
            addresses.append(x)
            kinds.append((x == 1, x % 16 == 0, x.bit_length() > 31))
        elif type(x) is Tiles:
            tiles.append(len(addresses))
            addresses.append(x)
            kinds.append((x.matrix.dtype, x.tile))
        else:
            address = x.data_ptr()
            addresses.append(address)
            kinds.append(x.dtype if address % 16 == 0 else (x.dtype,))
    key = (id(kernel), device, *constants, *constants.values(), *kinds)
    launch = _launches.get(key)
    if _compiler is not None:
        if launch is None and key not in _submitted:
            _submitted.add(key)
            _compiler.submit(_compile, kernel, grid, _plain(arguments), constants, device)
        return
    if launch is None:
        check_device(*(x.matrix if isinstance(x, Tiles) else x for x in arguments))
        compiled = kernel[grid](*_plain(arguments), **constants, **options_of(device))
        if compiled is not None:
            _launches[key] = _launch(kernel, compiled, arguments, constants)
        return
    x, y, z = (*grid, 1, 1)[:3]
    enter, exit = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if launch.function is None or getattr(enter, "calls", enter) or getattr(exit, "calls", exit):
        launch.compiled[x, y, z](*_plain(arguments), *launch.constants)
    else:
        for n in reversed(range(len(tiles))):
            addresses[tiles[n] : tiles[n] + 1] = _descriptor(launch, n, addresses[tiles[n]])
        launch.function(x, y, z, current_stream(device), *launch.fixed, addresses)


def _plain(arguments: tuple) -> tuple:
    """Return arguments as Triton takes them."""
    return tuple(x.described() if type(x) is Tiles else x for x in arguments)


def _descriptor(launch: _Launch, n: int, x: Tiles) -> list:
    """Return what the C function takes for the n-th ``Tiles``: a descriptor, sizes and strides."""
    key = n, x.matrix.data_ptr(), x.matrix.shape
    found = launch.descriptors.get(key)
    if found is None:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        if len(launch.descriptors) >= MAX_DESCRIPTORS:
            launch.descriptors.clear()
        kind = launch.compiled.metadata.tensordesc_meta[n]
        found = launch.descriptors[key] = make_tensordesc_arg(x.described(), kind)
    return found


@functools.cache
def starts_early(device: int) -> bool:
    """Whether a launch may start before the one before it has finished: ``common.await_inputs``
    then waits.
    """
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def persistent_programs(device: int) -> int:
    """Return how many programs the kernel of hopper.py runs as: one a multiprocessor.

    0 where it does not run: it is for compute capability 9.0, and a Triton that it was tried with.
    """
    known = triton.__version__.startswith(DESCRIBING_RELEASES) and not INTERPRETED.value
    if not known or device < 0:
        return 0
    if torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def options_of(device: int) -> dict:
    """What every kernel is compiled with, also where a release of Triton has another default."""
    return dict(launch_pdl=starts_early(device), enable_fp_fusion=True)


def check_device(*tensors: Tensor | int | None) -> None:
    """Raises ValueError unless all tensors are on the current CUDA device."""
    if INTERPRETED.value or torch.compiler.is_compiling():
        return
    device = current_device()
    x: Any  # as in ``run``
    for x in tensors:
        if x is not None and type(x) is not int and x.get_device() != device:
            raise ValueError(
                f"a {tuple(x.shape)} tensor on {x.device} for kernels on the current device, "
                f"cuda:{device}: move it there, or call under torch.cuda.device(...)"
            )


def _launch(kernel, compiled, arguments, constants) -> _Launch:
    values = {name: x.value if type(x) is tl.constexpr else x for name, x in constants.items()}
    rest = tuple(values[name] for name in kernel.arg_names[len(arguments) :])
    run = getattr(compiled, "run", None)
    tiles = sum(type(x) is Tiles for x in arguments)
    if run is None or not _takes_only_arguments(run, tiles > 0):
        return _Launch(kernel, compiled, rest, None, (), {})
    # each of the tiles' is a descriptor, two sizes and two strides
    taken = run.arg_annotations[: len(arguments) + 4 * tiles]
    fixed = (
        compiled.function, run.launch_cooperative_grid, run.launch_pdl, compiled.packed_metadata,
        None, None, None, None, None,  # what hooks are given, the hooks, scratch memory
        taken, run.kernel_signature,
    )  # fmt: skip
    driver: Any = triton.runtime.driver.active  # its class declares no ``utils``
    return _Launch(kernel, compiled, rest, driver.utils.launch, fixed, {})


def _takes_only_arguments(run, tiles: bool) -> bool:
    """Whether a compiled kernel's ``run`` is a call of the C launcher known here, without scratch.

    The launcher's arguments are nowhere promised: these are the releases in which they were looked
    up. ``tiles``: before that call, ``run`` makes descriptors.
    """
    known = triton.__version__.startswith(DESCRIBING_RELEASES if tiles else DIRECT_RELEASES)
    if not known or type(run).__name__ != "CudaLauncher" or getattr(run, "gsan_enabled", False):
        return False
    driver: Any = triton.runtime.driver.active  # as in ``_launch``
    scratch = run.global_scratch_size or run.profile_scratch_size
    return not scratch and (tiles or run.launch is driver.utils.launch)
