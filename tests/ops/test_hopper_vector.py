"""The persistent gradient kernel of a decay per channel on the CPU; and who gets it."""

from pathlib import Path

import pytest
import torch
import triton.language as tl

from pdn.certification.problems import relative_error
from pdn.ops.triton import common, compiled, hopper, hopper_vector, launch, sums, vector
from pdn.ops.triton.contract import Inputs, Options
from pdn.ops.triton.sizes import empty_gradients, empty_results, has_persistent_vector
from tests.ops.gluon_on_cpu import Kernel

CONSTANTS = {
    name: value.value
    for module in (sums, common, vector, hopper)
    for name, value in vars(module).items()
    if isinstance(value, tl.constexpr)
} | {"SIZE": hopper.SIZE}


@pytest.fixture
def launches(monkeypatch):
    """Run the kernel as two programs, under torch; return the grids it was launched with."""
    grids = []

    class Recorded(Kernel):
        def __getitem__(self, grid):
            grids.append(grid)
            return super().__getitem__(grid)

    name = "persistent_vector_gradient_kernel"
    path = Path(hopper_vector.__file__)
    monkeypatch.setattr(hopper_vector, name, Recorded(path, name, CONSTANTS))
    monkeypatch.setattr(compiled, "persistent_programs", lambda device: 2)
    return grids


def call(preconditioned: bool, raw: bool) -> tuple:
    """Return what ``chunk_gradients`` is given, with random numbers of a plausible size.

    One sequence of three chunks, a key head for two value heads; one block of channels is steep.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=draw).to(dtype)

    B, T, H, HV, K = 1, 192, 1, 2, 128
    i = Inputs(
        q=normal(B, T, H, K), k=normal(B, T, H, K), v=normal(B, T, HV, K), beta=normal(B, T, HV),
        log_decay=normal(B, T, HV, K) if raw else -normal(B, T, HV, K).abs() / 10,
        **dict(A_log=normal(HV).float() - 2, dt_bias=normal(HV, K).float()) if raw else {},
        P_log_decay=normal(B, T, HV) if preconditioned else None,
    )  # fmt: skip
    options = Options("online", K**-0.5, True, 2.0, 0.0, False, 1.5, 1e-6, True, False)
    p = launch.problem(i, options.solve)
    _, saved = empty_results(p, i, options)
    saved.table.copy_(torch.rand(saved.table.shape, generator=draw) + 0.1)
    for x in saved.states, saved.rescaled, saved.x, saved.query, saved.key, saved.write:
        x.copy_(normal(*x.shape))
    if saved.growth.numel():
        decays = i.log_decay.float()
        if raw:
            decays = torch.nn.functional.softplus(decays + i.dt_bias)
            decays = -i.A_log.exp()[:, None] * decays
        decays = decays.clamp(min=-30).view(p.NT, 64, HV, K).transpose(1, 2)
        sums = decays.cumsum(2)
        saved.growth.copy_((sums - sums[:, :, 32:33]).exp())
        if raw:
            saved.gates.copy_(decays)
    saved.decay_sums.copy_(-torch.rand(saved.decay_sums.shape, generator=draw).cumsum(-2))
    saved.ends.fill_(1.0)
    saved.steep.zero_()
    saved.steep[1, 1, 1, 3] = 1
    saved.ends[1, 1, vector.KEEP.value, 48:64] = 0.25
    adjoints = normal(*saved.states.shape) * 2.0**40
    return p, i, options, saved, normal(B, T, HV, K), normal(B, T, HV, K), adjoints


def gradients(preconditioned: bool, raw: bool) -> dict[str, torch.Tensor]:
    """Return what ``chunk_gradients`` writes."""
    p, i, options, *rest = call(preconditioned, raw)
    g = empty_gradients(p, i, options)
    g.v.copy_(i.v.flip(1))
    launch.chunk_gradients(p, i, options, *rest, g, torch.zeros(p.NT, p.HV, sums.NUM_PARTS))
    names = "q", "k", "write_k", "beta", "log_decay", "A_log", "dt_bias"
    found = {name: getattr(g, name) for name in names}
    return {name: x for name, x in found.items() if x.numel()}


# A program's three tiles of a head wait for both phases of every barrier, and for one again.
@pytest.mark.parametrize("preconditioned,raw", [(False, True), (True, True), (False, False)])
def test_it_computes_what_the_other_kernel_does(preconditioned, raw, monkeypatch, launches):
    found = gradients(preconditioned, raw)
    assert launches == [(2,)]
    monkeypatch.setattr(compiled, "persistent_programs", lambda device: 0)
    expected = gradients(preconditioned, raw)
    assert found.keys() == expected.keys() and len(launches) == 1
    for name, x in expected.items():
        # Triton's interpreter cuts bfloat16 off where others round.
        assert relative_error(found[name], x.double()) < 1e-2, name


@pytest.mark.parametrize(
    "change,has_it",
    [
        (dict(), True),
        (dict(log_decay=torch.zeros(1, 192, 2)), False),
        (dict(log_decay=torch.zeros(1, 192, 2, 128)), False),
        (dict(cu_seqlens=torch.tensor([0, 192])), False),
        (dict(v=torch.zeros(1, 192, 2, 128, dtype=torch.float16)), False),
        (dict(v=torch.zeros(1, 192, 2, 64, dtype=torch.bfloat16)), False),
        (dict(write_k=torch.zeros(1, 192, 2, 128)), False),
    ],
    ids=["full", "scalar", "float32 gates", "documents", "float16", "small values", "second key"],
)
def test_all_else_is_left_to_the_other_kernel(change, has_it, monkeypatch):
    monkeypatch.setattr(compiled, "persistent_programs", lambda device: 132)
    _, i, options, *_ = call(False, True)
    i = i._replace(**change)
    p = launch.problem(i, options.solve)
    assert has_persistent_vector(p, i, options) == has_it
    kept = empty_results(p, i, options)[1].growth.numel() > 0
    assert kept == (not has_it and i.log_decay.ndim == 4)
    i = i._replace(**{name: x[:, :190] for name, x in zip(("q", "k", "v"), i)})
    p = launch.problem(i, options.solve)
    assert not has_persistent_vector(p, i, options)  # a chunk that is not full
