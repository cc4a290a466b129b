"""What every preset inherits, found by globbing configs/model/*_tiny.yaml."""

import itertools

import pytest
import torch

from pdn import ops
from pdn.models.language_model import LanguageModel
from tests.presets import TINY, small_config, small_model

TIME = 80  # more than one chunk of 64


def tokens(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, time), generator=torch.Generator().manual_seed(seed))


def logits(model, x, **kwargs):
    return model(x, **kwargs).logits


@pytest.fixture(params=TINY)
def name(request):
    return request.param


def test_no_output_depends_on_a_later_token(name):
    model = small_model(name)
    embedded = model.embedding(tokens(1, TIME)).detach().requires_grad_()
    model.embedding.forward = lambda _: embedded
    position = 66
    (gradient,) = torch.autograd.grad(logits(model, tokens(1, TIME))[0, position].sum(), embedded)
    size = gradient[0].abs().sum(-1)
    assert (size[position + 1 :] == 0).all()
    assert (size[: position + 1] > 0).all()


def test_tokens_after_a_boundary_ignore_the_previous_document(name):
    model = small_model(name)
    x = tokens(2, TIME)
    bounds = [0, 17, 70, TIME, TIME + 1, 2 * TIME]
    cu_seqlens = torch.tensor([*bounds, 2 * TIME, 2 * TIME], dtype=torch.int32)
    packed = logits(model, x, cu_seqlens=cu_seqlens).flatten(0, 1)
    for start, end in itertools.pairwise(bounds):
        alone = logits(model, x.flatten()[None, start:end])[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=0, atol=1e-10)


def test_chunkwise_equals_the_token_by_token_definition(name):
    model = small_model(name)
    x, results = tokens(2, TIME), []
    for backend in ("reference", "chunkwise"):
        ops.set_default_backend(backend)
        try:
            model.zero_grad()
            output = logits(model, x)
            output.square().mean().backward()
        finally:
            ops.set_default_backend("auto")
        results.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_prefill_and_decoding_equal_one_full_forward_pass(name):
    model = small_model(name)
    x = tokens(2, TIME)
    full = logits(model, x)
    state = model.init_state(2)
    pieces = []
    for part in (x[:, :70], x[:, 70:71], *x[:, 71:].split(1, 1)):
        output = model(part, state=state)
        pieces.append(output.logits)
        state = output.state
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-10)


def test_the_recurrent_state_does_not_grow(name):
    if "attention" in small_config(name).mixers:
        pytest.skip("softmax attention keeps all keys and values")
    model = small_model(name)
    sizes = []
    state = model.init_state(1)
    for part in tokens(1, 12).split(3, 1):
        state = model(part, state=state).state
        sizes.append([t.numel() for t in torch.utils._pytree.tree_leaves(state) if t is not None])
    assert sizes[0] == sizes[-1]


def test_the_configuration_counts_the_parameters(name):
    config = small_config(name)
    with torch.device("meta"):
        model = LanguageModel(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_params()


def test_every_parameter_is_initialised_and_reached_by_the_gradient(name):
    model = LanguageModel(small_config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights(seed=0)
    x = tokens(2, TIME + 1)
    model(x[:, :-1], labels=x[:, 1:]).loss_sum.backward()
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all(), key
        assert (
            parameter.grad is not None
            and parameter.grad.isfinite().all()
            and parameter.grad.abs().sum() > 0
        ), key


def test_saved_weights_give_the_same_logits(name, tmp_path):
    model, x = small_model(name, torch.float32), tokens(1, TIME)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = LanguageModel(small_config(name))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(logits(model, x), logits(other, x))


def test_losses_are_those_of_the_logits(name):
    model, x = small_model(name), tokens(2, TIME + 1)
    labels = x[:, 1:].clone()
    labels[0, 5:9] = -100
    output = model(x[:, :-1], labels=labels)
    expected = torch.nn.functional.cross_entropy(
        logits(model, x[:, :-1]).flatten(0, 1),
        labels.flatten(),
        ignore_index=-100,
        reduction="none",
    )
    torch.testing.assert_close(output.losses.flatten(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.loss_sum, expected.sum(), rtol=1e-10, atol=1e-10)
