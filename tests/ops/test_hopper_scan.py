"""The serial kernels of compute capability 9.0 on the CPU: arithmetic, tiles, barriers, choice."""

from pathlib import Path

import pytest
import torch
import triton.language as tl

from pdn.certification.problems import relative_error
from pdn.ops.triton import common, compiled, hopper_forward, hopper_scan, launch, serial
from pdn.ops.triton.contract import Inputs, Options
from pdn.ops.triton.sizes import empty_gradients, empty_results
from tests.ops.gluon_on_cpu import Kernel

CONSTANTS = {
    name: value.value for name, value in vars(common).items() if isinstance(value, tl.constexpr)
}
OPTIONS = Options("online", 128**-0.5, True, 2.0, 0.0, False, 1.5, 1e-6, True, False)


@pytest.fixture
def launches(monkeypatch):
    """Run the kernels under torch; return the names of those that were launched."""
    seen = []

    class Recorded(Kernel):
        def __getitem__(self, grid):
            seen.append(self.name)
            return super().__getitem__(grid)

    for module, name in [
        (hopper_forward, "fused_forward_kernel"),
        (hopper_scan, "reverse_scan_kernel"),
    ]:
        monkeypatch.setattr(module, name, Recorded(Path(str(module.__file__)), name, CONSTANTS))
    monkeypatch.setattr(compiled, "persistent_programs", lambda device: 2)
    return seen


def scanned(model: str, save: bool = True) -> dict[str, torch.Tensor]:
    """Return what a forward pass and the reverse scan write, of two sequences of three chunks.

    A key head has two value heads; the preconditioned key is random. Without ``save``: the outputs.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(torch.bfloat16)

    B, T, H, HV, K = 2, 192, 1, 2, 128
    gates = dict(log_decay=normal(B, T, HV), A_log=normal(HV), dt_bias=normal(HV))
    i = Inputs(
        q=normal(B, T, H, K), k=normal(B, T, H, K), v=normal(B, T, HV, K), beta=normal(B, T, HV),
        **gates if model != "deltanet" else {},
        P_log_decay=normal(B, T, HV) if model == "pgdn" else None,
    )  # fmt: skip
    do, rescaled = normal(B, T, HV, K), normal(B * T, HV, K)
    options = OPTIONS._replace(save=save)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "precondition", lambda *x: x[3].rescaled.copy_(rescaled))
        results, saved = launch.forward_pass(i, options)
    if not save:
        return dict(o=results.o)
    p = launch.problem(i, "online")
    g = empty_gradients(p, i, options)
    adjoints = launch.run_reverse(p, i, options, saved, do, None, g)
    wanted = dict(o=results.o, x=saved.x, states=saved.states, dv=g.v, adjoints=adjoints)
    return wanted | dict(table=saved.table, T=saved.T, P=saved.P)


# Three chunks wait for both stages' barriers, and for one of them again.
@pytest.mark.parametrize("model", ["gdn", "pgdn", "deltanet"])
def test_they_compute_what_the_other_kernels_do(model, monkeypatch, launches):
    found = scanned(model)
    assert launches == ["fused_forward_kernel", *["reverse_scan_kernel"] * (model == "pgdn")]
    monkeypatch.setattr(compiled, "persistent_programs", lambda device: 0)
    launches.clear()
    expected = scanned(model)
    assert not launches
    errors = {name: relative_error(found[name], x.double()) for name, x in expected.items()}
    # Triton's interpreter cuts bfloat16 off where others round.
    assert max(errors.values()) < 1.5e-2, errors


def test_without_a_backward_pass_the_outputs_are_the_same(launches):
    assert torch.equal(scanned("pgdn", save=False)["o"], scanned("pgdn")["o"])


def taken(monkeypatch, model="gdn", batch=1, time=192, heads=8, given=(), **changes) -> list[str]:
    """Return which kernels of these a call takes, of those of an H200 with 132 multiprocessors."""
    seen = []

    def row(*size, dtype=torch.bfloat16):
        return torch.empty(batch, time, heads, *size, dtype=dtype)

    dtype = changes.pop("dtype", torch.bfloat16)
    gate = row(128) if model == "kda" else row()
    i = Inputs(
        q=row(128, dtype=dtype), k=row(128, dtype=dtype), v=row(128, dtype=dtype), beta=row(),
        log_decay=gate, P_log_decay=row() if model == "pgdn" else None,
        S=torch.empty(batch, heads, 128, 128) if "state" in given else None,
        cu_seqlens=torch.tensor([0, 64, batch * time]) if "documents" in given else None,
    )  # fmt: skip
    options = OPTIONS._replace(**changes)
    p = launch.problem(i, options.solve)
    results, saved = empty_results(p, i, options)
    monkeypatch.setattr(compiled, "persistent_programs", lambda device: 132)
    monkeypatch.setattr(serial, "run", lambda kernel, *_, **__: seen.append(kernel.__name__))
    serial.prepare_and_scan(p, i, options, saved, results)
    serial.scan_reverse(p, i, options, saved, i.v, results.S, i.v, saved.states)
    return seen


def test_only_the_preconditioned_key_has_a_reverse_kernel(monkeypatch):
    assert taken(monkeypatch) == ["fused_forward_kernel"]
    assert taken(monkeypatch, "pgdn") == ["fused_forward_kernel", "reverse_scan_kernel"]


# 8 heads: 14 sequences fill four fifths of the 132 at once, 13 and 24 do not
@pytest.mark.parametrize("batch,fill", [(13, False), (14, True), (16, True), (24, False)])
def test_long_sequences_are_prepared_ahead_where_they_fill_the_device(batch, fill, monkeypatch):
    assert taken(monkeypatch, batch=batch, time=576) == ["fused_forward_kernel"] * fill
    assert taken(monkeypatch, batch=batch, time=512) == ["fused_forward_kernel"]


@pytest.mark.parametrize(
    "call",
    [
        dict(model="kda"),
        dict(given=["documents"]),
        dict(given=["state"]),
        dict(final=True),
        dict(time=200),
        dict(time=8192, heads=1),
        dict(pieces=2),
        dict(solve="offline"),
        dict(dtype=torch.float16),
    ],
    ids=str,
)
def test_all_else_is_left_to_the_other_scans(call, monkeypatch):
    assert taken(monkeypatch, **dict(model="pgdn") | call) == []
