"""The persistent gradient kernel's arithmetic, tiles and barriers, on the CPU; and who gets it."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from pdn.certification.problems import relative_error, sample
from pdn.ops import triton as kernels
from pdn.ops.recurrences import RECURRENCES
from pdn.ops.triton import common, compiled, hopper, launch, persistent, sums
from pdn.ops.triton.contract import Inputs, Options
from pdn.ops.triton.sizes import empty_gradients, empty_results
from tests.ops.gluon_on_cpu import Kernel

CONSTANTS = {
    name: value.value
    for module in (sums, common)
    for name, value in vars(module).items()
    if isinstance(value, tl.constexpr)
}


@pytest.fixture
def launches(monkeypatch):
    """Run the kernel as two programs, under torch; return the grids it was launched with."""
    grids = []

    class Recorded(Kernel):
        def __getitem__(self, grid):
            grids.append(grid)
            return super().__getitem__(grid)

    name = "persistent_gradient_kernel"
    monkeypatch.setattr(hopper, name, Recorded(Path(hopper.__file__), name, CONSTANTS))
    monkeypatch.setattr(compiled, "persistent_programs", lambda device: 2)
    return grids


def call(decay: str, preconditioned: bool) -> tuple:
    """Return what ``chunk_gradients`` is given, with random numbers of a plausible size.

    One sequence of three chunks, a key head for two value heads.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=draw).to(dtype)

    B, T, H, HV, K = 1, 192, 1, 2, 128
    gates: dict[str, Any] = dict(log_decay=normal(B, T, HV), A_log=normal(HV), dt_bias=normal(HV))
    i = Inputs(
        q=normal(B, T, H, K), k=normal(B, T, H, K), v=normal(B, T, HV, K), beta=normal(B, T, HV),
        **gates if decay == "scalar" else {},
        P_log_decay=normal(B, T, HV) if preconditioned else None,
    )  # fmt: skip
    options = Options("online", K**-0.5, True, 2.0, 0.0, False, 1.5, 1e-6, True, False)
    p = launch.problem(i, options.solve)
    _, saved = empty_results(p, i, options)
    saved.table.copy_(torch.rand(saved.table.shape, generator=draw) + 0.1)
    if decay == "scalar":
        saved.table[:, :, common.DECAY_SUM.value].neg_().cumsum_(-1).mul_(0.1)
    for x in saved.states, saved.rescaled, saved.x:
        x.copy_(normal(*x.shape))
    adjoints = normal(*saved.states.shape)
    return p, i, options, saved, normal(B, T, HV, K), normal(B, T, HV, K), adjoints


def gradients(decay: str, preconditioned: bool) -> dict[str, torch.Tensor]:
    """Return what ``chunk_gradients`` writes."""
    p, i, options, *rest = call(decay, preconditioned)
    g = empty_gradients(p, i, options)
    g.v.copy_(i.v.flip(1))
    parts = torch.zeros(p.NT, p.HV, sums.NUM_PARTS)
    launch.chunk_gradients(p, i, options, *rest, g, parts)
    names = "q", "k", "write_k", "beta", "log_decay"
    found = {name: getattr(g, name) for name in names} | {"parts": parts}
    return {name: x for name, x in found.items() if x.numel() and x.any()}


# A program's three tiles of a head wait for both phases of every barrier, and for one again.
@pytest.mark.parametrize(
    "decay,preconditioned", [("scalar", False), ("scalar", True), ("none", False)]
)
def test_it_computes_what_the_other_kernel_does(decay, preconditioned, monkeypatch, launches):
    found = gradients(decay, preconditioned)
    assert launches == [(2,)]
    monkeypatch.setattr(compiled, "persistent_programs", lambda device: 0)
    expected = gradients(decay, preconditioned)
    assert found.keys() == expected.keys() and len(launches) == 1
    for name, x in expected.items():
        # Triton's interpreter cuts bfloat16 off where others round.
        assert relative_error(found[name], x.double()) < 1e-2, name


def problem(model: str, time: int = 192, key: int = 128, **options):
    size: dict[str, Any] = dict(dtype=torch.bfloat16, batch=1, time=time, heads=1, key=key)
    return sample(RECURRENCES[model], **size | options)


@pytest.mark.parametrize(
    "model,change",
    [
        ("gdn", dict(time=190)),  # a chunk that is not full
        ("gdn", dict(cu_seqlens=[0, 64, 192])),
        ("gdn", dict(dtype=torch.float16)),
        ("gdn", dict(key=64)),
        ("kda", {}),
        ("mamba2", {}),
    ],
    ids=["ragged", "documents", "float16", "small heads", "vector decay", "offline"],
)
def test_all_else_is_left_to_the_other_kernels(model, change, monkeypatch):
    p, seen = problem(model, **change), []
    monkeypatch.setattr(compiled, "persistent_programs", lambda device: 132)

    class Seen(Exception):
        pass

    def stop(*arguments):
        seen.append(persistent.persistent_programs(arguments[0], arguments[1], arguments[2]))
        raise Seen

    monkeypatch.setattr(launch, "chunk_gradients", stop)
    monkeypatch.setattr(launch, "run", lambda *_, **__: None)
    with pytest.raises(Seen):
        p.run(kernels)
    assert seen == [0]


@pytest.mark.parametrize(
    "capability,release,programs",
    [((9, 0), "3.7.1", 132), ((9, 0), "3.8.0", 0), ((8, 0), "3.7.1", 0), ((10, 0), "3.7.1", 0)],
)
def test_only_a_hopper_device_with_a_known_triton_has_programs(
    capability, release, programs, monkeypatch
):
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(compiled, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(triton, "__version__", release)
    count = compiled.persistent_programs.__wrapped__
    assert count(0) == programs and count(-1) == 0
