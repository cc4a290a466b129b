"""Sequences whose pieces lie on several ranks: the losses, gradients and ledger of one rank."""

import pytest
import torch
import torch.distributed as dist

from pdn import ops
from pdn.distributed.context import ContextRanks, context_ranks
from pdn.distributed.dims import ParallelDims
from pdn.ops import context
from tests.presets import TINY, small_model
from tests.ranks import run_ranks
from tests.tolerances import SUM_FACTOR

CPU = torch.device("cpu")
SHOWN = ["pgdn_tiny", "pkda_tiny", "gdn_tiny", "kda_tiny", "deltanet_tiny", "mamba2_tiny"]
SHOWN += ["hybrid_tiny"]
# Sizes of other presets that mix in ways of their own
OTHERS = ["mesa_net_340m", "plonghorn_340m", "nlms_340m", "gdn_learned_340m", "retnet_340m"]


def documents(time: int) -> torch.Tensor:
    """Return documents of two rows that begin at, just before and just after borders of pieces.

    Of 2 pieces and of 4; other documents pass a border.
    """
    quarter = time // 4
    first = [0, 1, quarter, 2 * quarter, 3 * quarter + 1]
    second = [0, 2 * quarter - 1, 2 * quarter + 2]
    # Padded, as the data's are.
    bounds = [*first, *(time + start for start in second), *[2 * time] * 3]
    return torch.tensor(bounds, dtype=torch.int32)


class Case:
    """A model and two sequences, and the loss and gradients of one rank that has them whole.

    They are computed before the ranks are forked, so that none waits for another.
    """

    def __init__(self, name: str, dtype: torch.dtype, time: int, isolated: bool):
        self.model = small_model(name, dtype)
        drawn = torch.randint(0, 256, (2, time + 1), generator=torch.Generator().manual_seed(0))
        self.tokens, self.labels = drawn[:, :-1], drawn[:, 1:]
        self.cu_seqlens = documents(time) if isolated else None
        self.whole = self.computed(ContextRanks())

    def computed(self, ranks: ContextRanks) -> list[torch.Tensor]:
        """Return the loss and the gradients of this rank's pieces."""
        self.model.zero_grad()
        tokens, labels = ranks.piece_of(self.tokens), ranks.piece_of(self.labels)
        with ranks.split(tokens, self.cu_seqlens) as own:
            loss = self.model(tokens, labels=labels, cu_seqlens=own).loss_sum
            loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in self.model.parameters())]

    def errors(self, pieces: int) -> tuple[float, float]:
        """Return the relative errors of the loss and of the worst gradient; on a rank.

        Gradients of vectors, sums over all tokens that largely cancel, may differ ``SUM_FACTOR``
        times as much.
        """
        found = self.computed(context_ranks(ParallelDims(1, 1, pieces), CPU))
        for value in found:
            dist.all_reduce(value)
        errors = [
            float((a - b).norm() / b.norm().clamp(min=1e-30)) / (SUM_FACTOR if b.ndim == 1 else 1)
            for a, b in zip(found, self.whole, strict=True)
        ]
        return errors[0], max(errors[1:])


def worst(names, pieces: int, dtype, time: int, directory) -> dict[str, tuple[float, float]]:
    """Return the ``Case.errors``, by preset and whether there are documents."""
    cases = {
        f"{name}, {'in documents' if isolated else 'whole'}": Case(name, dtype, time, isolated)
        for name in names
        for isolated in (False, True)
    }

    def work(rank: int):
        return {key: case.errors(pieces) for key, case in cases.items()}

    return run_ranks(pieces, work, directory, timeout_s=1200)[0]


def test_pieces_on_two_ranks_give_the_loss_and_gradients_of_one(tmp_path):
    for key, errors in worst(SHOWN, 2, torch.float64, 24, tmp_path).items():
        assert max(errors) < 1e-10, (key, errors)


def test_what_passes_through_a_piece_has_its_gradient(tmp_path):
    """With two pieces nothing does: the first starts from zero, and none follows the second."""
    names = ["pgdn_tiny", "mamba2_tiny"]
    for key, errors in worst(names, 4, torch.float64, 24, tmp_path).items():
        assert max(errors) < 1e-10, (key, errors)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [2, 4])
def test_every_preset_and_every_kind_of_mixer_gives_them(pieces, tmp_path):
    for key, errors in worst(TINY + OTHERS, pieces, torch.float64, 48, tmp_path).items():
        assert max(errors) < 1e-10, (key, errors)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_so_do_pieces_of_sequences_of_4096_tokens(pieces, dtype, tolerance, tmp_path):
    for key, errors in worst(SHOWN, pieces, dtype, 4096, tmp_path).items():
        assert max(errors) < tolerance, (key, errors)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_other_backends_take_pieces_too(backend, tmp_path):
    ops.set_default_backend(backend)
    try:
        case = Case("pgdn_tiny", torch.float64, 12, isolated=True)
        errors = run_ranks(2, lambda rank: case.errors(2), tmp_path, timeout_s=600)[0]
    finally:
        ops.set_default_backend("auto")
    assert max(errors) < 1e-10


@pytest.mark.slow
def test_blocks_traced_by_the_compiler_take_pieces_too(tmp_path):
    case = Case("pgdn_tiny", torch.float64, 24, isolated=True)

    def work(rank: int):
        for block in case.model.blocks:
            block.compile(backend="aot_eager")
        return case.errors(2)

    assert max(run_ranks(2, work, tmp_path, timeout_s=600)[0]) < 1e-10


def test_the_documents_of_a_piece_are_those_of_the_whole_between_its_ends():
    batch, time, pieces = 2, 24, 4
    whole = documents(time)
    ids = torch.searchsorted(whole, torch.arange(batch * time, dtype=torch.int32), right=True)
    ids = ids.view(batch, time)
    for index in range(pieces):
        piece = context.Piece(None, index, pieces, batch, time // pieces, whole)
        bounds, length = piece.documents, piece.time
        assert set(bounds.tolist()) >= {0, length, 2 * length}
        assert bounds.diff().min() >= 0 and bounds[-1] == 2 * length
        tokens = torch.arange(batch * length, dtype=torch.int32)
        own = torch.searchsorted(bounds, tokens, right=True).view(batch, length)
        expected = ids[:, piece.start : piece.start + piece.time]
        assert torch.equal(own.diff() != 0, expected.diff() != 0)
        first = ids[:, piece.start]
        reach = (ids[:, : piece.start] == first[:, None]).sum(1)
        assert torch.equal(piece.reach, reach)
        continues = first == ids[:, piece.start - 1] if index else first < 0
        assert torch.equal(piece.continues(CPU), continues)


def test_what_a_piece_cannot_have_is_refused_by_name():
    x, weight = torch.zeros(1, 2, 8), torch.zeros(8, 4)
    with context.split(context.Piece(None, 0, 2, 1, 2)):
        with pytest.raises(ValueError, match="width 4 on pieces of 2 tokens"):
            ops.short_convolution(x, weight)
        with pytest.raises(ValueError, match="state was given for a piece of a sequence"):
            ops.short_convolution(x, weight, state=torch.zeros(1, 3, 8))
        q = torch.zeros(1, 2, 1, 4)
        with pytest.raises(ValueError, match="return_state was given for a piece"):
            ops.linear_attention(q, q, q, return_state=True)
    assert context.current() is None
