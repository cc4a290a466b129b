"""The kernels on pieces of sequences that lie on several ranks: what the whole sequences have."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from pdn import ops
from pdn.certification.problems import Problem, relative_error, sample
from pdn.distributed.context import ContextRanks, context_ranks
from pdn.distributed.dims import ParallelDims
from pdn.ops.recurrences import RECURRENCES
from pdn.ops.triton import sizes
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs GPUs there: run by hand")
CPU = torch.device("cpu")
PARAMETERS = ("A_log", "dt_bias", "P_A_log", "P_dt_bias", "mu")


def piece_of(p: Problem, ranks: ContextRanks, documents: torch.Tensor | None) -> Problem:
    def parts(tensors):
        return {
            name: x if name in PARAMETERS else ranks.piece_of(x.movedim(1, -1)).movedim(-1, 1)
            for name, x in tensors.items()
        }

    return replace(
        p, tensors=parts(p.tensors), cotangents=parts(p.cotangents), cu_seqlens=documents
    )


def errors(p: Problem, pieces: int, directory) -> dict[str, float]:
    """Return the largest error of every result on any rank, relative to the whole's."""
    whole = p.run("chunkwise")

    def work(rank: int) -> dict[str, float]:
        # Fresh memory is NaN: what a kernel reads before anything wrote it shows in the results.
        torch.use_deterministic_algorithms(True, warn_only=True)
        ranks = context_ranks(ParallelDims(1, 1, pieces), CPU)
        tokens = ranks.piece_of(p.tensors["v"][:, :, 0, 0])
        with ranks.split(tokens, p.cu_seqlens) as own:
            found = piece_of(p, ranks, own).run("triton")
        for name in PARAMETERS:
            if f"d{name}" in found:
                dist.all_reduce(found[f"d{name}"])
        expected = replace(p, tensors=whole, cotangents={})
        expected = {
            name: x if name[1:] in PARAMETERS else ranks.piece_of(x.movedim(1, -1)).movedim(-1, 1)
            for name, x in expected.tensors.items()
        }
        return {name: relative_error(found[name], x) for name, x in expected.items()}

    found = run_ranks(pieces, work, directory, timeout_s=600)
    return {name: max(of_rank[name] for of_rank in found) for name in whole}


def problem(model: str, time: int, documents: list[int] | None = None) -> Problem:
    batch = 2 if documents else 1
    size = dict(batch=batch, heads=1, key=16, dtype=torch.float64, cu_seqlens=documents)
    return sample(RECURRENCES[model], time=time, **size)


def in_segments(monkeypatch) -> None:
    monkeypatch.setattr(sizes, "MIN_SEGMENT", 1)
    monkeypatch.setattr(sizes, "PROGRAMS", 1 << 30)
    monkeypatch.setattr(sizes, "known", sizes.Problem)


def check(found: dict[str, float]) -> None:
    assert max(found.values()) < 1e-10, found


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pgdn", "kda", "deltanet"])
def test_rows_that_are_not_cut(model, tmp_path):
    check(errors(problem(model, 3 * 70), 3, tmp_path))


OTHERS = ["pkda", "gdn", "pmamba2"]


@pytest.mark.parametrize(
    "model", ["pgdn", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_rows_that_are_cut_into_segments(model, tmp_path, monkeypatch):
    in_segments(monkeypatch)
    check(errors(problem(model, 3 * 130), 3, tmp_path))


# Of two rows of 3 pieces of 150 tokens: documents that pass a border or both, that begin at one,
# just before and just after; of one segment and of several; and slots without a document.
DOCUMENTS = [0, 140, 151, 290, 450, 450 + 299, 450 + 300, 900, 900, 900]
THROUGH = [0, 20, 450, 450 + 150, 900]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pgdn", "kda"])
@pytest.mark.parametrize("bounds", [DOCUMENTS, THROUGH], ids=["several", "through a piece"])
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "in segments"])
def test_documents_of_long_pieces(model, bounds, segments, tmp_path, monkeypatch):
    if segments:
        in_segments(monkeypatch)
    check(errors(problem(model, 450, bounds), 3, tmp_path))


def test_documents(tmp_path):
    check(errors(problem("pgdn", 3 * 20, [0, 10, 40, 60, 79, 90, 110, 120, 120]), 3, tmp_path))


@pytest.mark.parametrize("bounds", [None, [0, 9, 12, 30, 30 + 11, 60, 60]])
def test_convolutions(bounds, tmp_path):
    """Of two rows of 3 pieces of 10 tokens, 4 taps: documents begin before and behind a border."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 30, 15), (8, 4), (4, 4), (2, 30, 15)
    x, *weights, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)

    def run(x, dy, own, backend) -> list[torch.Tensor]:
        inputs = [y.clone().requires_grad_() for y in (x, *weights)]
        parts, _ = ops.short_convolutions(inputs[0], inputs[1:], cu_seqlens=own, backend=backend)
        y = torch.cat(parts, -1)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    whole = run(x, dy, cu_seqlens, "chunkwise")

    def work(rank: int) -> list[float]:
        ranks = context_ranks(ParallelDims(1, 1, 3), CPU)
        x_here, dy_here, *expected = (
            ranks.piece_of(y.movedim(1, -1)).movedim(-1, 1) for y in (x, dy, *whole[:2])
        )
        with ranks.split(x_here[..., 0], cu_seqlens) as own:
            y, dx, *d_weights = run(x_here, dy_here, own, "triton")
        for part in d_weights:
            dist.all_reduce(part)
        pairs = zip([y, dx, *d_weights], [*expected, *whole[2:]], strict=True)
        return [relative_error(found, right) for found, right in pairs]

    assert torch.tensor(run_ranks(3, work, tmp_path)).max() < 1e-12
