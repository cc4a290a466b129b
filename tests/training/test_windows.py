"""Windows that continue each other with the state: the loss and gradient of one long sequence."""

import pytest
import torch

from pdn import ops
from pdn.data.pack import document_boundaries
from pdn.models.state import ended
from pdn.training.windows import backpropagate
from tests.presets import TINY, small_model
from tests.tolerances import SUM_FACTOR

EOS, ROWS, TIME, COUNT = 7, 2, 10, 4
SHOWN = ["pgdn_tiny", "pkda_tiny", "gdn_tiny", "mamba2_tiny"]
# Sizes of other presets that mix in ways of their own
OTHERS = ["mesa_net_340m", "plonghorn_340m", "nlms_340m", "gdn_learned_340m", "retnet_340m"]
RECURRENT = [name for name in TINY if name not in ("hybrid_tiny", "transformer_tiny")]


def sequences() -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels [2, 40]: documents that end before, at and after the windows' ends.

    The first row's end at tokens 3, 10 (a window's last one), 21 and 32; the second row is one.
    """
    drawn = torch.randint(8, 256, (ROWS, COUNT * TIME + 1), generator=torch.manual_seed(0))
    drawn[0, [3, 9, 20, 31]] = EOS
    return drawn[:, :-1], drawn[:, 1:]


def bounds(tokens: torch.Tensor, isolated: bool) -> torch.Tensor | None:
    if not isolated:
        return None
    return torch.from_numpy(document_boundaries(tokens.numpy(), EOS, 1))


def gradients(model) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def in_windows(model, isolated: bool) -> tuple[torch.Tensor, object, list[torch.Tensor]]:
    """Return the loss, the last state and the gradients of four windows."""
    tokens, labels = (x.unflatten(1, (COUNT, TIME)).transpose(0, 1) for x in sequences())

    def run(number: int, state):
        own = tokens[number]
        found = model(own, labels=labels[number], cu_seqlens=bounds(own, isolated), state=state)
        return found.loss_sum, ended(found.state, own, EOS) if isolated else found.state

    loss, state = backpropagate(run, model.init_state(ROWS), COUNT)
    return loss, state, gradients(model)


def errors(model, isolated: bool) -> list[float]:
    """Return the relative errors of loss and gradients against sequences of four times the length.

    Gradients of vectors, sums that largely cancel, may differ ``SUM_FACTOR`` times as much.
    """
    tokens, labels = sequences()
    expected = model(tokens, labels=labels, cu_seqlens=bounds(tokens, isolated)).loss_sum
    expected.backward()
    whole = [expected.detach(), *gradients(model)]
    loss, _, found = in_windows(model, isolated)
    return [
        float((a - b).norm() / b.norm().clamp(min=1e-30)) / (SUM_FACTOR if b.ndim == 1 else 1)
        for a, b in zip([loss, *found], whole, strict=True)
    ]


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("name", SHOWN)
def test_four_windows_have_the_loss_and_gradient_of_a_sequence_four_times_as_long(name, isolated):
    assert max(errors(small_model(name), isolated)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("name", sorted({*RECURRENT, *OTHERS} - {*SHOWN}))
def test_so_have_those_of_every_other_mixer(name, isolated):
    assert max(errors(small_model(name), isolated)) < 1e-10


def test_the_reference_carries_states_of_rows_too():
    model = small_model("pgdn_tiny")
    ops.set_default_backend("reference")
    try:
        assert max(errors(model, isolated=True)) < 1e-10
    finally:
        ops.set_default_backend("auto")


def test_a_document_that_ended_leaves_nothing_to_the_next_window():
    """The second window of the first row begins a document: its state is as of a new row."""
    model = small_model("pgdn_tiny")
    tokens = sequences()[0][:, :TIME]
    found = model(tokens, cu_seqlens=bounds(tokens, True), state=model.init_state(ROWS))
    state = ended(found.state, tokens, EOS)
    for block in state:
        for tensor in (*block.conv, *block.recurrent):
            assert not tensor[0].any() and tensor[1].any()
