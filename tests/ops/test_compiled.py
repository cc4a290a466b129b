"""A launch finds its compiled kernel again, and compiles anew for whatever compilation depends on."""

import pytest
import torch
import triton.language as tl

from pdn.ops.triton import compiled


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
    return Kernel()


def test_the_second_launch_passes_everything_in_the_order_of_the_signature(kernel):
    for x in torch.zeros(4), torch.ones(4):
        compiled.run(kernel, (3, 2), x, None, 5, FLAG=tl.constexpr(True), SIZE=64, num_warps=4)
    assert len(kernel.compiled) == 1
    grid, arguments = kernel.launched[0]
    assert grid[:3] == (3, 2, 1)
    assert arguments == (x, None, 5, 64, True)


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
    ids=["dtype", "alignment", "presence", "one", "divisible by 16", "64 bits", "constant", "option"],
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
