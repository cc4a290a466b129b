"""The kernels of a decoding step against PyTorch in float64.

They run under Triton's interpreter or on a GPU.
"""

import pytest
import torch

from pdn.certification.decoding import KERNELS, DecodingProblem, sample_decoding
from pdn.certification.problems import relative_error
from pdn.ops import decoding as plain

kernels = pytest.importorskip("pdn.ops.triton.decoding", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
CASES = [  # name, batch, sizes as `pdn.ops.decoding` gives them to the certifier
    ("project", 1, (40, 64, 64, 0, 0, 0)),
    ("project", 3, (24, 96, 96, 0, 0, 1)),
    ("project", 2, (24, 64, 16, 0, 0, 1)),
    ("project", 2, (24, 64, 16, 1, 0, 1)),
    ("project", 1, (24, 1100, 0, 0, 1, 1)),
    ("project", 1, (2100, 24, 0, 0, 0, 0)),
    ("prepare", 3, (600, 0, 0, 1)),
    ("prepare", 2, (1100, 0, 1, 0)),
    ("prepare", 3, (96, 96, 0, 0)),
    ("prepare", 3, (64, 16, 1, 0)),
    ("split_and_convolve", 3, (96, 4, 2, 32, 32, 32, 2, 5)),
    ("split_and_convolve", 1, (300, 2, 4, 300)),
    ("split_and_convolve", 2, (1056, 4, 2, 528, 528, 8, 16)),
    ("draw", 2, (4200, 50)),
    ("draw", 3, (300, 0)),
    ("attend", 3, (2, 2, 16, 0)),
    ("attend", 2, (4, 2, 24, 0)),
    ("attend", 3, (2, 2, 16, 50)),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name,batch,sizes", CASES)
def test_a_kernel_equals_the_plain_form(name, batch, sizes, dtype):
    p = sample_decoding(name, dtype, batch, sizes, DEVICE)
    exact, found = p.to(torch.float64).run(plain), p.run(kernels)
    factor = 3 if name == "attend" else 1  # its scores are of a rounded query and rounded keys
    assert exact.keys() == found.keys()
    for key, x in exact.items():
        assert relative_error(found[key], x) < factor * TOLERANCE[dtype], key


def test_one_program_may_attend_to_all_tokens_of_a_head(monkeypatch):
    """Run as with many sequences, where each head's tokens need not be shared out."""
    monkeypatch.setattr(kernels, "SPLITS", 1)
    p = sample_decoding("attend", torch.float32, 3, (4, 2, 16, 0), DEVICE)
    exact, found = p.to(torch.float64).run(plain), p.run(kernels)
    assert all(relative_error(found[key], x) < 1e-5 for key, x in exact.items())


@pytest.mark.parametrize(
    "temperature,top_k,dtype",
    [(1.0, 7, torch.bfloat16), (4.0, 100, torch.float32), (2.0**-90, None, torch.float16)],
)
def test_the_tokens_drawn_are_those_of_the_plain_form(temperature, top_k, dtype):
    """Of logits that are often equal in 16 bits, some of them of no chance, in two blocks.

    Temperatures are powers of two, by which a CPU divides as a GPU does.
    """
    p = sample_decoding("draw", torch.float64, 5, (4200, 0), DEVICE)
    logits = p.tensors["logits"]
    logits = logits.float() if dtype == torch.float32 else (4 * logits).round().div(4).to(dtype)
    logits[:, 2000:2010], logits[:, :5], logits[:, -5:] = 4, -torch.inf, -torch.inf
    uniform = p.tensors["uniform"]
    uniform[0] = 0
    arguments = dict(temperature=temperature, top_k=top_k)
    found = kernels.draw(logits, uniform, **arguments)
    assert torch.equal(found, plain.draw(logits, uniform, **arguments))


def test_what_has_no_chance_is_not_drawn_however_a_block_is_added_up():
    """By numbers so near to 1 that the sum of the block, in another order, may be below them."""
    p = sample_decoding("draw", torch.float32, 8, (kernels.DRAWN, 0), DEVICE)
    logits, uniform = p.tensors["logits"], p.tensors["uniform"].fill_(1 - 2**-53)
    logits[:, -5:] = -torch.inf
    found = kernels.draw(logits, uniform, temperature=1.0, top_k=None)
    assert (logits.gather(1, found[:, None]) > -torch.inf).all()


def test_every_kernel_has_a_case():
    assert {name for name, *_ in CASES} == set(KERNELS)


def test_states_and_caches_move_on_by_one_token_in_place():
    p = sample_decoding("split_and_convolve", torch.float32, 2, (8, 4, 4, 8), "cpu")
    before, x = p.tensors["state"].clone(), p.tensors["x"]
    state = p.tensors["state"]
    plain.split_and_convolve(x, p.tensors["weight"], state, [8])
    assert torch.equal(state, torch.cat([before[:, 1:], x[:, None]], 1))


def test_groups_that_do_not_fit_a_block_are_refused():
    p = sample_decoding("project", torch.float32, 1, (8, 60, 12, 0, 0, 0), "cpu")
    with pytest.raises(ValueError, match="power of two"):
        p.run(kernels)


def test_a_problem_says_which_kernel_it_is_for():
    assert isinstance(
        sample_decoding("attend", torch.float32, 1, (1, 1, 16, 0), "cpu"), DecodingProblem
    )
