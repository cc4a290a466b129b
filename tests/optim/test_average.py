"""The moving average of the weights."""

import pytest
import torch

from pdn.optim.average import UPDATES
from pdn.optim.optimizers import build_optimizer
from tests.optim.test_optim import adamw, backward
from tests.presets import small_model

DECAY = 0.8


def averaged(steps: int):
    """Return a model, its optimiser with an average, and its weights after each step in float64."""
    model = small_model("pgdn_tiny", torch.float32)
    optimizer, seen = build_optimizer(model, adamw(ema=DECAY, lr=1e-2)), []
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        seen.append({name: p.detach().double() for name, p in model.named_parameters()})
    return model, optimizer, seen


def test_the_average_forgets_at_its_decay_and_faster_in_the_beginning():
    _, optimizer, seen = averaged(50)
    found = optimizer.average.tensors()
    assert found.pop(UPDATES) == 50 and found.keys() == seen[0].keys()
    moves = [1.0, 0.9, 9 / 11]  # then 9 / (n + 8), until 1 - decay is more
    assert [max(1 - DECAY, 9 / (n + 8)) for n in (1, 2, 3, 37, 38)] == [*moves, 0.2, 1 - DECAY]
    for name, average in found.items():
        expected = torch.zeros_like(seen[0][name])
        for n, weights in enumerate(seen, start=1):
            expected += max(1 - DECAY, 9 / (n + 8)) * (weights[name] - expected)
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_model_computes_with_the_average_and_has_its_own_weights_again_after_a_failure():
    model, optimizer, seen = averaged(3)
    kept = {name: tensor.clone() for name, tensor in optimizer.average.tensors().items()}

    def holds(expected: dict) -> bool:
        return all(torch.equal(p, expected[name]) for name, p in model.named_parameters())

    own = {name: weight.float() for name, weight in seen[-1].items()}
    with pytest.raises(RuntimeError), optimizer.average.in_place(model):
        assert holds(kept) and not holds(own)
        raise RuntimeError
    assert holds(own)
    assert all(torch.equal(t, kept[name]) for name, t in optimizer.average.tensors().items())


def test_the_average_counts_among_the_state_that_a_rank_keeps():
    plain, optimizer = (
        build_optimizer(small_model("pgdn_tiny", torch.float32), adamw(ema=ema))
        for ema in (None, DECAY)
    )
    assert not optimizer.average.exists
    parameters = 4 * sum(p.numel() for p in optimizer.names)
    assert optimizer.state_bytes() - plain.state_bytes() == parameters
    more = sum(optimizer.local_state_sizes()) - sum(plain.local_state_sizes())
    assert more == parameters + 4  # and the number of updates
