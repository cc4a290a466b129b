"""A model in a program of one's own: what torch does to modules, and losses asked for otherwise."""

import copy

import pytest
import torch
from torch import nn

import pdn
from pdn.inference.generate import generate
from pdn.models.language_model import LanguageModel
from pdn.models.layers import Linear
from pdn.models.mixers.mesa_net import _Inverse
from pdn.ops.triton import convolution, launch
from tests.presets import released_model, small_model

TOKENS = torch.arange(12).view(2, 6) % 7


def test_shapes_are_computed_on_the_meta_device():
    for name in ("pgdn_tiny", "transformer_tiny"):
        model = copy.deepcopy(small_model(name)).to("meta")
        tokens = TOKENS.to("meta")
        assert model(tokens, state=model.init_state(2)).logits.shape[:2] == TOKENS.shape
        model(tokens, labels=tokens).loss_sum.backward()
        assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_labels_of_another_shape_are_refused_though_there_are_as_many():
    model = small_model("gdn_tiny")
    for labels in (TOKENS.mT, TOKENS.flatten(), TOKENS[:, :5]):
        with pytest.raises(ValueError, match=r"labels .*: expected \(2, 6\)"):
            model(TOKENS, labels=labels)


def test_a_z_loss_that_would_reward_is_refused():
    with pytest.raises(ValueError, match=r"z_loss = -1\.0: expected 0 or more"):
        small_model("gdn_tiny")(TOKENS, labels=TOKENS, z_loss=-1.0)


def test_a_state_of_another_number_of_blocks_is_refused():
    model = small_model("gdn_tiny")
    for state in (model.init_state(2) * 2, model.init_state(2)[:1], []):
        with pytest.raises(ValueError, match="expected one for each of 2 blocks"):
            model(TOKENS, state=state)


def test_second_derivatives_are_right_or_refused():
    model = small_model("gdn_tiny")
    weight = model.blocks[0].mixer.q_proj.weight

    def curvature(loss):
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), weight)[0]

    def by_logits():
        logits = model(TOKENS).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten(), reduction="sum")

    found = curvature(by_logits())
    with torch.no_grad():  # along one direction, by differences of the gradient's square
        step = 1e-5 * torch.ones_like(weight)
        squares = []
        for sign in (1, -1):
            weight += sign * step
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(by_logits(), weight)
            squares.append(gradient.square().sum())
            weight -= sign * step
    expected = (squares[0] - squares[1]) / 2e-5
    torch.testing.assert_close(found.sum(), expected, rtol=1e-4, atol=0)
    with pytest.raises(RuntimeError, match="loss_sum: found create_graph=True"):
        curvature(model(TOKENS, labels=TOKENS).loss_sum)


def test_second_derivatives_through_other_solvers_are_refused_too():
    for kind in (_Inverse, launch._Eager, convolution._Eager):
        with pytest.raises(RuntimeError, match="expected first derivatives only"):
            kind.backward(None, torch.ones(()))
        with torch.no_grad(), pytest.raises((AttributeError, ValueError)):
            kind.backward(None, torch.ones(()))  # goes on, to its context


class Adapter(nn.Module):
    """Adds a low-rank product to a linear map, and shows its weight as PEFT's LoRA does."""

    def __init__(self, base: Linear):
        super().__init__()
        self.base, self.out_features = base, base.out_features
        self.a = nn.Parameter(torch.ones(2, base.in_features, dtype=torch.float64) / 8)
        self.b = nn.Parameter(torch.ones(base.out_features, 2, dtype=torch.float64) / 8)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + x @ self.a.mT @ self.b.mT

    def merged(self) -> Linear:
        self.base.weight.data += self.b.detach() @ self.a.detach()
        return self.base


@pytest.mark.parametrize("name", ["pkda_tiny", "pmamba2_tiny", "hybrid_tiny", "comba_tiny"])
def test_adapters_around_any_linear_map_count_and_learn(name):
    model = small_model(name)
    before = model(TOKENS).logits
    adapters = {}
    for path, module in list(model.blocks.named_modules()):
        if isinstance(module, Linear):
            parent, _, child = path.rpartition(".")
            adapters[path] = Adapter(module)
            setattr(model.blocks.get_submodule(parent), child, adapters[path])
    adapted = model(TOKENS).logits
    adapted.square().sum().backward()
    assert all(x.a.grad.abs().sum() > 0 and x.b.grad.abs().sum() > 0 for x in adapters.values())
    with pytest.raises(ValueError, match=r"Adapter: .*merged"):
        list(generate(model, [[1]], max_new_tokens=1, temperature=0))
    for path, adapter in adapters.items():
        parent, _, child = path.rpartition(".")
        setattr(model.blocks.get_submodule(parent), child, adapter.merged())
    torch.testing.assert_close(adapted, model(TOKENS).logits)
    assert (adapted - before).abs().max() > 1e-3


def test_hooks_of_every_part_are_called_and_change_nothing():
    model = small_model("pgdn_tiny")
    expected, seen = model(TOKENS, state=model.init_state(2)), set()
    parts = {n: m for n, m in model.blocks.named_modules() if isinstance(m, nn.Module) and n}
    for name, module in parts.items():
        module.register_forward_hook(lambda _, __, ___, name=name: seen.add(name))
    found = model(TOKENS, state=model.init_state(2))
    torch.testing.assert_close(found, expected)
    assert parts.keys() == seen


def test_an_adapted_head_gives_logits_and_refuses_losses_that_would_leave_it_out():
    model = released_model("gdn_tiny", "model.tie_embeddings=false").double()
    before = model(TOKENS).logits
    model.head = Adapter(model.head)
    assert (model(TOKENS).logits - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="head: found a Adapter"):
        model(TOKENS, labels=TOKENS)


def test_a_model_on_the_meta_device_takes_weights():
    empty = pdn.build_model("gdn_tiny", vocab_size=8, device="meta")
    model = LanguageModel(empty.config)
    model.init_weights(seed=3)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(TOKENS).logits, model(TOKENS).logits)


def test_attention_refuses_documents_beside_a_cache():
    model = small_model("hybrid_tiny")
    documents = torch.tensor([0, 2, 6, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match="expected one of the two"):
        model(TOKENS, state=model.init_state(2), cu_seqlens=documents)
