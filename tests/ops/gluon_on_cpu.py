"""Gluon's language on torch tensors, as far as ``pdn.ops.triton.hopper`` speaks it.

Triton's interpreter knows no Gluon. Here a kernel's source runs as it is, program after program,
with a thread for each of its partitions. Layouts mean nothing. What is asynchronous happens as late
as it may: a copy into shared memory when its barrier's phase ends, with NaN in its place from the
moment it is asked for; a product when it is waited for, from what its operands are then; a copy out
of shared memory when room is made for another. So a tile that is overwritten or read too early
gives wrong numbers, and a barrier that nobody arrives at fails instead of hanging.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PATIENCE = 20  # seconds for a barrier, far above what a tile takes


class Int(int):
    """A scalar of a kernel, which can be cast."""

    def to(self, dtype) -> Int:
        return self


def _int_operator(name: str) -> Callable:
    of_int = getattr(int, name)

    def operator(self, other):
        result = of_int(self, other)
        return Int(result) if type(result) is int else result

    return operator


for _name in ("__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__floordiv__", "__mod__"):
    setattr(Int, _name, _int_operator(_name))


class Shared:
    """A piece of shared memory, or a view of one."""

    def __init__(self, data: Tensor):
        self.data = data

    def load(self, layout) -> Tensor:
        return self.data.clone()

    def store(self, x: Tensor) -> None:
        self.data.copy_(x)

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.data.narrow(0, start, length))

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def index(self, i: int) -> Shared:
        return Shared(self.data[i])

    def _reinterpret(self, dtype, shape: list[int], layout) -> Shared:
        if self.data.ndim == 3:  # two tiles beside one another: as a swizzled one of both lies
            return Shared(self.data.permute(1, 0, 2).view(*shape))
        return Shared(self.data.view(dtype).view(*shape))


def allocate(dtype, shape: list[int], layout) -> Shared:
    """Return shared memory with NaN in it, several tiles so that they lie beside one another."""
    data = torch.full(shape, float("nan"), dtype=dtype)
    if data.ndim == 3 and shape[0] > 1 and dtype == torch.bfloat16:
        data = data.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    return Shared(data)


class Pointer:
    def __init__(self, tensor: Tensor, at: Tensor | int = 0):
        self.tensor, self.at = tensor, at

    def __add__(self, offset) -> Pointer:
        return Pointer(self.tensor, self.at + offset)


class Asked(threading.local):
    """What a partition has asked for and not waited for, in the order in which it ends."""

    def __init__(self):
        self.products: list[Product] = []
        self.stores: list[Callable[[], object]] = []


asked = Asked()


class Product:
    """A product on top of an accumulator, which is computed when it has to be there."""

    def __init__(self, a: Shared, b: Shared, start: Tensor | Product):
        self.a, self.b, self.start = a, b, start
        asked.products.append(self)

    def end(self) -> None:
        start = self.start.value if isinstance(self.start, Product) else self.start
        self.value = start + self.a.data.float() @ self.b.data.float()


def warpgroup_mma(a, b, accumulator, *, use_acc=True, is_async) -> Product:
    if not use_acc:
        accumulator = torch.zeros(a.data.shape[0], b.data.shape[1])
    return Product(a, b, accumulator)


def warpgroup_mma_wait(outstanding: int, products: list[Product]):
    while len(asked.products) > outstanding:
        asked.products.pop(0).end()
    values = tuple(x.value for x in products)  # of one that is still pending there is none
    return values[0] if len(values) == 1 else values


class Barrier:
    """Its phase ends when all have arrived and as many bytes have come as are expected."""

    def __init__(self):
        self.changed = threading.Condition()
        self.count = self.arrived = self.expected = self.phase = 0
        self.copies: list[tuple[Callable[[], object], int]] = []

    def end_phase_if_complete(self) -> None:
        come = sum(size for _, size in self.copies)
        if self.arrived == self.count and self.expected == come:
            for copy, _ in self.copies:
                copy()
            self.copies, self.arrived, self.expected = [], 0, 0
            self.phase += 1
            self.changed.notify_all()


class Barriers(list):
    """Several, of which one is taken by its index."""

    def index(self, i: int) -> Barrier:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self[i]


class mbarrier:
    @staticmethod
    def allocate_mbarrier(batch: int | None = None) -> Barrier | Barriers:
        return Barrier() if batch is None else Barriers(Barrier() for _ in range(batch))

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = count

    @staticmethod
    def expect(barrier: Barrier, size: int) -> None:
        with barrier.changed:
            barrier.expected += size
            barrier.arrived += 1
            barrier.end_phase_if_complete()

    @staticmethod
    def arrive(barrier: Barrier, count: int) -> None:
        with barrier.changed:
            barrier.arrived += count
            barrier.end_phase_if_complete()

    @staticmethod
    def wait(barrier: Barrier, phase: int) -> None:
        with barrier.changed:
            if not barrier.changed.wait_for(lambda: barrier.phase % 2 != phase, PATIENCE):
                raise TimeoutError("nobody arrives at a barrier")


class tma:
    @staticmethod
    def async_copy_global_to_shared(source, corner, barrier: Barrier, tile: Shared) -> None:
        part = _part(source, corner)
        beyond = tile.data.shape[0] - part.shape[0]  # zeros, of a last tile that is cut off
        part = torch.nn.functional.pad(part, (0, 0, 0, beyond)) if beyond else part
        assert part.shape == tile.data.shape
        tile.data.fill_(float("nan"))
        with barrier.changed:
            copy = lambda: tile.data.copy_(part)  # noqa: E731
            barrier.copies.append((copy, part.numel() * part.element_size()))
            barrier.end_phase_if_complete()

    @staticmethod
    def async_copy_shared_to_global(target, corner, tile: Shared) -> None:
        part = _part(target, corner)
        assert part.shape == tile.data.shape, "a tile beyond its matrix"
        asked.stores.append(lambda: part.copy_(tile.data))

    @staticmethod
    def store_wait(pending: int) -> None:
        while len(asked.stores) > pending:
            asked.stores.pop(0)()


def _part(tiles, corner) -> Tensor:
    row, column = corner
    height, width = tiles.tile
    return tiles.matrix[row : row + height, column : column + width]


def _load(at: Pointer) -> Tensor:
    return at.tensor.reshape(-1)[at.at]


def _store(at: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    where, value = torch.as_tensor(at.at), torch.as_tensor(value).to(at.tensor.dtype)
    if mask is not None:
        where, value = where.expand_as(mask)[mask], value.expand_as(mask)[mask]
    at.tensor.view(-1)[where] = value


def _assembly(code: str, constraints: str, arguments: list, *_):
    """Compute a statement of assembly.

    It is a zero, a conversion, or a number from another lane along the last axis.
    """
    if not arguments:
        return 0
    if code.startswith("shl"):
        return arguments[0].float()
    distance = int(code.split(",")[2])
    lanes = torch.arange(arguments[0].shape[-1]) ^ distance
    return arguments[0][..., lanes]


def _warp_specialize(partitions, warps, registers) -> None:
    (main, arguments), *others = partitions
    failures = []

    def guarded(function, arguments):
        try:
            with torch.no_grad():  # which another thread does not inherit
                function(*arguments)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=x, daemon=True) for x in others]
    for thread in threads:
        thread.start()
    main(*arguments)
    for thread in threads:
        thread.join(PATIENCE)
    assert not failures and not any(thread.is_alive() for thread in threads)


def _associative_scan(x: Tensor, axis: int, add, reverse: bool = False) -> Tensor:
    return x.flip(0).cumsum(0).flip(0) if reverse else x.cumsum(0)


def _where(condition, a, b) -> Tensor:
    return torch.where(condition, *(torch.as_tensor(x, dtype=torch.float32) for x in (a, b)))


def _language(program: tuple[int, ...], programs: tuple[int, ...]) -> types.SimpleNamespace:
    gl = types.SimpleNamespace(
        bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32,
        int32=torch.int32, int64=torch.int64, constexpr=lambda x: x, num_warps=lambda: 8,
        barrier=lambda: None,
        program_id=lambda axis: Int(program[axis]), num_programs=lambda axis: Int(programs[axis]),
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        allocate_shared_memory=allocate,
        inline_asm_elementwise=_assembly, convert_layout=lambda x, layout, **_: x,
        split=lambda x: x.unbind(-1), join=lambda *x: torch.stack(x, -1),
        permute=lambda x, order: x.permute(order),
        associative_scan=_associative_scan, abs=torch.abs,
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        sum=lambda x, axis: x.sum(axis), reshape=lambda x, shape: x.reshape(shape), where=_where,
        minimum=lambda a, b: Int(min(a, b)), maximum=lambda a, b: Int(max(a, b)),
        load=_load, store=_store, static_range=builtins.range,
        warp_specialize=_warp_specialize,
    )  # fmt: skip
    for layout in (
        "NVMMADistributed",
        "NVMMAShared",
        "SwizzledShared",
        "Blocked",
        "Slice",
        "DotOperand",
    ):
        setattr(gl, f"{layout}Layout", lambda *_: None)
    return gl


def _decay_gradient(d, x, rate, bias, RAW):
    if not RAW:
        return d, d
    d, x = -rate * d, x + bias
    return d * torch.sigmoid(x), d * torch.nn.functional.softplus(x)


def _decay_of(x, rate, bias, RAW):
    if RAW:
        x = -rate * torch.nn.functional.softplus(x + bias)
    return x.clamp(min=-30.0)


def _compiled(path: Path) -> Iterator[types.CodeType]:
    """Yield a module without its imports, behind the modules in Gluon that it imports from."""
    tree = ast.parse(path.read_text())
    body = []
    for x in tree.body:
        if not isinstance(x, ast.ImportFrom) or x.module in ("__future__", "typing"):
            body.append(x)
        elif x.module and x.module.startswith("pdn.ops.triton.hopper"):
            yield from _compiled(path.with_name(x.module.rpartition(".")[2] + ".py"))
    tree.body = body
    yield compile(tree, str(path), "exec")


class Kernel:
    """A kernel of a module, launched as Triton's are.

    Names that the module imports from Triton are the ones here; of ``pdn``, constants are their
    values and functions the ones given.
    """

    def __init__(self, path: Path, name: str, constants: dict):
        self.codes, self.name, self.constants = list(_compiled(path)), name, constants

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*arguments, num_warps: int, **constants) -> None:
            given = [Pointer(x) if isinstance(x, Tensor) else x for x in arguments]
            for program in itertools.product(*map(range, grid)):
                names: dict[str, Any] = dict(
                    self.constants, gl=_language(program, grid), tma=tma, mbarrier=mbarrier,
                    gluon=types.SimpleNamespace(jit=lambda function: function),
                    warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
                    fence_async_shared=lambda: None, await_inputs=lambda: None,
                    exp=lambda x: torch.exp(torch.as_tensor(x)),
                    gain_gradient=lambda d, b, RANGE: d * b * (1 - b / RANGE) if RANGE > 0 else d,
                    decay_gradient=_decay_gradient, zero=lambda: 0, inverse=lambda x: 1 / x,
                    decay_of=_decay_of, decay_slope=lambda g, rate, _: rate * torch.expm1(g / rate),
                    lift=lambda kind: 2.0**40,
                    gain_of=lambda x, RANGE: RANGE * torch.sigmoid(x) if RANGE > 0 else x,
                    inverse_root=lambda x: torch.rsqrt(x + 1e-6),
                    range=lambda *ends: map(Int, builtins.range(*ends)),
                )  # fmt: skip
                for code in self.codes:
                    exec(code, names)
                names |= dict(named_as=lambda x, y: x)  # a tensor of torch has no layout
                names[self.name](*given, **constants)

        return launch
