"""The recurrences' internals: as the formulas of the preconditioner have them.

Nothing is changed by looking.
"""

import pytest
import torch

from pdn.models.language_model import LanguageModel
from pdn.ops.types import DiagonalPreconditioner
from pdn.reports.internals import _preconditioner, internals
from tests.presets import model_config, small_overrides

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


def model_of(preset: str, *overrides: str) -> LanguageModel:
    model = LanguageModel(model_config(preset, *small_overrides(preset)[1:], *overrides)).eval()
    model.init_weights(seed=1)
    return model


def test_looking_changes_nothing():
    model = model_of("pgdn_tiny")
    with torch.no_grad():
        before = model(TOKENS).logits
        internals(model, TOKENS)
        assert torch.equal(model(TOKENS).logits, before)
    assert all("solve" not in vars(block.mixer) for block in model.blocks)


def test_a_bound_of_one_is_no_preconditioner():
    rows = internals(model_of("pgdn_tiny", "model.mixers.pgdn.preconditioner.bound=1.0"), TOKENS)
    assert [row["layer"] for row in rows] == [0, 1]
    for row in rows:
        assert row["B"] == 1.0 and row["B_spread"] == 0.0
        assert row["kBk"] == pytest.approx(1.0, abs=0.02)  # l2norm has an eps
        assert "log_A" not in row


def test_a_centre_far_above_log_A_makes_a_gain_and_one_near_it_tells_channels_apart():
    far, near = (
        internals(model_of("pgdn_tiny", f"model.mixers.pgdn.preconditioner.mu_init={mu}"), TOKENS)[
            0
        ]
        for mu in (6.0, -2.0)
    )
    assert far["mu"] == 6.0 and near["mu"] == -2.0
    assert far["B"] > 1.4 > near["B"]
    assert near["B_spread"] > 5 * far["B_spread"]
    # the first layer's input does not depend on mu
    assert far["log_A"] == pytest.approx(near["log_A"], abs=0.05)
    assert far["write"] == pytest.approx(far["beta"] * far["kBk"], rel=0.05)


def test_a_model_without_preconditioner_has_gain_and_decay_alone():
    assert set(internals(model_of("gdn_tiny"), TOKENS)[0]) == {"layer", "beta", "decay"}


def test_the_spread_is_over_the_channels_of_a_head():
    k = torch.full((1, 5, 1, 4), 0.5)
    rule = DiagonalPreconditioner(
        torch.full((1, 5, 1), -0.1), torch.full((1, 5, 1), 0.5), torch.zeros(1)
    )
    even = _preconditioner(k, None, rule)
    assert even["B_spread"] == pytest.approx(0, abs=1e-6)
    assert even["kBk"] == pytest.approx(even["B"], rel=1e-5)
    uneven = _preconditioner(k * torch.tensor([1.9, 0.5, 0.3, 0.1]), None, rule)
    assert uneven["B_spread"] > 0.02
