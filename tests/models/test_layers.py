"""The shared layers against plain definitions."""

import pytest
import torch
import torch.nn.functional as F

from pdn.models import layers
from pdn.models.layers import RMSNorm, ShortConv, document_positions, linear_cross_entropy, rotary
from pdn.models.mixers.axes.decay import DecayParameters

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
def test_the_short_convolution_is_a_causal_depthwise_convolution_and_silu(bias):
    conv = ShortConv(6, 4, bias=bias).double()
    for parameter in conv.parameters():
        parameter.data.copy_(normal(*parameter.shape))
    x = normal(2, 9, 6)
    y, _ = conv(x)
    plain = F.conv1d(F.pad(x.mT, (3, 0)), conv.weight[:, None], conv.bias, groups=6).mT
    torch.testing.assert_close(y, F.silu(plain))


def test_the_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(8, eps=1e-3).double()
    norm.weight.data.copy_(normal(8))
    x = normal(3, 8)
    torch.testing.assert_close(
        norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    )


def test_rotary_scores_depend_on_distances_only():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8)
    table = layers.rotary_table(200, 4, 1e4, torch.device("cpu"), torch.float64)

    def score(i, j):
        return (rotary(q, table[None, i : i + 1]) * rotary(k, table[None, j : j + 1])).sum()

    torch.testing.assert_close(score(8, 3), score(108, 103))
    assert not torch.allclose(score(8, 3), score(103, 3))


def test_positions_restart_at_every_document():
    bounds = torch.tensor([0, 2, 5, 7, 10, 10], dtype=torch.int32)
    assert document_positions(bounds, 2, 5).tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 150, 400])
def test_the_sliced_loss_has_the_gradients_of_the_plain_one(rows, z_loss, monkeypatch):
    monkeypatch.setattr(layers, "LOGIT_ELEMENTS", rows * 11)
    hidden, weight = normal(2, 150, 5).requires_grad_(), normal(11, 5).requires_grad_()
    labels = torch.randint(0, 11, (2, 150), generator=GENERATOR)
    labels[0, 1] = -100
    total, losses, z_losses = linear_cross_entropy(hidden, weight, labels, z_loss)
    logits = (hidden @ weight.mT).flatten(0, 1)
    plain = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(losses.sum(), plain)
    squares = logits.logsumexp(-1).view(2, 150).square() * (labels >= 0)
    assert (z_losses is None) == (z_loss == 0)
    if z_losses is not None:
        torch.testing.assert_close(z_losses, z_loss * squares)
        plain = plain + z_loss * squares.sum()
    torch.testing.assert_close(total, plain)
    for found, expected in zip(
        torch.autograd.grad(total * 0.3, (hidden, weight)),
        torch.autograd.grad(plain * 0.3, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("tokens", "vocab", "rows"),
    [(32768, 32000, 4096), (32768, 50257, 2560), (100, 32000, 128), (1000, 10, 1024), (0, 9, 1)],
)
def test_slices_of_logits_are_as_equal_as_multiples_of_128_allow(tokens, vocab, rows):
    assert layers.slice_rows(tokens, vocab) == rows
    assert max(1, tokens * vocab) / layers.LOGIT_ELEMENTS <= -(-tokens // rows) or rows == 1


@pytest.mark.gpu
def test_on_a_gpu_the_weights_gradient_is_summed_over_slices_in_float32(monkeypatch):
    monkeypatch.setattr(layers, "LOGIT_ELEMENTS", 128 * 1024)
    hidden, weight = normal(2048, 256).float().cuda(), normal(1024, 256).float().cuda() / 16
    labels = torch.randint(0, 1024, (2048,), generator=GENERATOR).cuda()

    def gradient(dtype):
        w = weight.to(dtype).requires_grad_()
        return torch.autograd.grad(linear_cross_entropy(hidden.to(dtype), w, labels)[0], w)[0]

    expected = gradient(torch.float32)
    # the inputs' rounding to bfloat16 and one of the sum, not one for each of 16 slices
    error = (gradient(torch.bfloat16).float() - expected).norm()
    assert error < 2.8e-3 * expected.norm()  # 3.0e-3 if each slice were rounded


def parts_of_range(spread: bool, seed: int) -> tuple[list[int], list[int]]:
    """Return which quarter of their ranges A and dt of four heads are in."""
    rates = DecayParameters(4, spread=spread)
    rates.reset_parameters(torch.Generator().manual_seed(seed))
    dt = torch.nn.functional.softplus(rates.dt_bias)
    return (rates.A_log.exp() / 4).int().tolist(), (dt.div(1e-3).log10() * 2).int().tolist()


def test_decays_that_start_spread_have_a_part_of_the_range_each_and_the_same_of_A_and_dt():
    orders = [parts_of_range(True, seed) for seed in range(4)]
    assert all(dt == A and sorted(A) == [0, 1, 2, 3] for A, dt in orders)
    assert len({tuple(A) for A, _ in orders}) > 1
    assert any(sorted(A) != [0, 1, 2, 3] for A, _ in (parts_of_range(False, s) for s in range(4)))
