"""The check for kernels that are wrong now and then names what was wrong."""

from pathlib import Path

import pytest
import torch

from tests.presets import small_model

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize("spoilt", [None, 1], ids=["equal", "one sequence in the second block"])
def test_a_pass_that_differs_names_its_block_and_sequences(spoilt, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from benchmarks.repeat import difference, one_pass

    model = small_model("pgdn_tiny", torch.float32)
    drawn = torch.randint(0, 256, (3, 25), generator=torch.Generator().manual_seed(0))
    tokens, labels = drawn[:, :-1], drawn[:, 1:]
    first = one_pass(model, tokens, labels)
    if spoilt is not None:

        def wrong(module, inputs, output):
            x, state = output
            return x + torch.eye(3)[2, :, None, None] * 1e-3, state

        model.blocks[spoilt].register_forward_hook(wrong)
    said = difference(first, one_pass(model, tokens, labels))
    if spoilt is None:
        assert said == ""
    else:
        assert said.startswith("forward, first in block 1, sequences [2]; gradients of ")
