"""Shapes beside those of the presets: grouped value heads, wide values, gates, windows.

Also untied heads. Each has what every preset inherits, in one pass over a small model.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from pydantic import BaseModel

from pdn import ops
from pdn.inference.generate import generate
from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel
from tests.presets import TINY, built, perturb, small_config

TIME = 70  # more than one chunk of 64
SWISH = {"kind": "swish", "rank": "full"}
GROUPED = {"num_value_heads": 4, "expand_v": 1.5}
SHAPES = {
    "gated and wide": ("gdn_tiny", {"expand_v": 2.0, "output_gate": SWISH}),
    "grouped": ("pgdn_tiny", GROUPED),
    "grouped with a curvature per value head": (
        "pkda_tiny",
        GROUPED | {"preconditioner": {"per_head_of": "values"}},
    ),
    "grouped householder steps": ("pdelta_product_tiny", GROUPED),
    "without convolutions": (
        "linear_attention_tiny",
        {"conv_size": 0, "activation": "none", "feature_map": "product", "qk_l2norm": False},
    ),
    "a window of grouped heads": (
        "transformer_tiny",
        {"num_kv_heads": 1, "window": 5, "qk_norm": True, "output_gate": "sigmoid"},
    ),
    "the ablation of the query": (
        "pla_tiny",
        {
            "decay": {"kind": "scalar"},
            "gain": {"kind": "beta", "range": 1.0},
            "preconditioner": {"form": "inverse"},
        },
    ),
    "a tied preconditioner, upwards by tanh": (
        "pgdn_tiny",
        {
            "preconditioner": {
                "tied": True,
                "squash": "tanh",
                "interval": "upper",
                "factor": "share",
            }
        },
    ),
    "sherman-morrison in groups": (
        "pkda_tiny",
        GROUPED | {"preconditioner": {"form": "sherman_morrison"}},
    ),
    "a query preconditioned downwards": (
        "pla_tiny",
        {"num_value_heads": 4, "preconditioner": {"interval": "lower"}},
    ),
    "longhorn": ("deltanet_tiny", {"qk_l2norm": False, "gain": {"kind": "longhorn"}}),
    "longhorn in groups, preconditioned": (
        "pdn_tiny",
        GROUPED | {"qk_l2norm": False, "gain": {"kind": "longhorn"}},
    ),
    "an exact flow with a fixed decay": (
        "gdn_tiny",
        {"gain": {"kind": "efla"}, "decay": {"kind": "fixed"}},
    ),
    "a learned scale of the write key, in groups": (
        "gdn_tiny",
        GROUPED | {"preconditioner": {"kind": "learned", "form": "scale", "bound": 1.5}},
    ),
    "a learned write key": (
        "deltanet_tiny",
        {"preconditioner": {"kind": "learned", "form": "projection", "bound": 1.0}},
    ),
    "mesa net": (
        "transformer_tiny",
        {
            "kind": "mesa_net",
            "num_heads": 2,
            "head_dim": 8,
            "conv_size": 4,
            "norm_eps": 1e-6,
            "lambda_min": 0.25,
            "iterations": 12,
            "output_gate": SWISH,
        },
    ),
    "no positions": ("transformer_tiny", {"positions": "nope"}),
}


def merged(old, new):
    if not isinstance(new, dict) or new.get("kind", "") != "":
        return new
    return old | {key: merged(old.get(key), value) for key, value in new.items()}


def shaped(preset: str, mixer: dict, **model) -> ModelConfig:
    """Return the small form of a preset with other keys of its mixer, and of the model."""
    dump = copy.deepcopy(small_config(preset).model_dump())
    (name,) = dump["mixers"]
    dump["mixers"][name] = merged(dump["mixers"][name], mixer)
    return ModelConfig.model_validate(dump | model)


def model_of(config: ModelConfig, dtype=torch.float64) -> LanguageModel:
    model = LanguageModel(config).to(dtype)
    model.init_weights(seed=1)
    return perturb(model)


def tokens(batch: int, time: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, time), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=SHAPES)
def model(request) -> LanguageModel:
    preset, mixer = SHAPES[request.param]
    return model_of(shaped(preset, mixer, tie_embeddings=False))


def test_the_configuration_counts_the_parameters(model):
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()


def test_no_output_depends_on_a_later_token_or_another_document(model):
    x = tokens(1, TIME)
    whole = model(x).logits
    torch.testing.assert_close(model(x[:, :40]).logits, whole[:, :40], rtol=0, atol=1e-10)
    bounds = torch.tensor([0, 17, 69, TIME, TIME], dtype=torch.int32)
    packed = model(x, cu_seqlens=bounds).logits[0]
    for start, end in ((0, 17), (17, 69), (69, TIME)):
        alone = model(x[:, start:end]).logits[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=0, atol=1e-10)


def test_prefill_and_decoding_equal_one_full_forward_pass(model):
    x = tokens(2, TIME)
    state, pieces = model.init_state(2), []
    for part in (x[:, :3], x[:, 3:60], *x[:, 60:].split(1, 1)):
        output = model(part, state=state)
        pieces.append(output.logits)
        state = output.state
    torch.testing.assert_close(torch.cat(pieces, 1), model(x).logits, rtol=0, atol=1e-10)


def test_generating_takes_the_likeliest_token_of_the_full_forward_pass(model):
    model.float()
    x = tokens(2, 9)
    found = torch.stack(list(generate(model, x.tolist(), max_new_tokens=6, temperature=0)), 1)
    for i in range(6):
        with torch.no_grad():
            logits = model(torch.cat([x, found[:, :i]], 1)).logits[:, -1]
        chosen = logits.gather(1, found[:, i : i + 1])
        torch.testing.assert_close(chosen, logits.amax(1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_chunkwise_equals_the_token_by_token_definition_and_every_parameter_learns(model):
    x, results = tokens(2, TIME), []
    for backend in ("reference", "chunkwise"):
        ops.set_default_backend(backend)
        try:
            model.zero_grad()
            model(x, labels=x.roll(-1, 1)).loss_sum.backward()
        finally:
            ops.set_default_backend("auto")
        results.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert a.abs().sum() > 0


@pytest.mark.parametrize(
    "name",
    [
        "grouped householder steps",
        "a tied preconditioner, upwards by tanh",
        "longhorn in groups, preconditioned",
        "a learned scale of the write key, in groups",
    ],
)
def test_a_block_is_one_graph_to_the_compiler(name):
    block = model_of(shaped(*SHAPES[name]), torch.float32).blocks[0]
    x = torch.randn(1, TIME, 64, generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    compiled = torch.compile(block.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], block(x)[0])


def test_windowed_attention_keeps_no_more_than_the_next_token_can_reach():
    model = model_of(shaped("transformer_tiny", {"window": 5}))
    state = model(tokens(1, 9), state=model.init_state(1)).state
    assert state[0].k.shape[1] == state[0].v.shape[1] == 4


def test_a_token_attends_to_its_window_in_groups_of_heads():
    config = shaped("transformer_tiny", {"num_kv_heads": 1, "window": 3, "qk_norm": True,
                                         "output_gate": "sigmoid",
                                         "positions": "nope"})  # fmt: skip
    mixer = built(config)
    x = torch.randn(1, 7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = (p(x).unflatten(-1, (-1, 16))[0] for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))

    def norm(y, weight):
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    q, k = norm(q, mixer.q_norm.weight), norm(k, mixer.k_norm.weight)
    outputs = []
    for i in range(7):
        reach = slice(max(0, i - 2), i + 1)
        scores = q[i] @ k[reach, 0].mT / 4
        outputs.append(scores.softmax(-1) @ v[reach, 0])
    o = torch.stack(outputs) * torch.sigmoid(mixer.output_gate.g_proj(x[0])).unflatten(-1, (2, 16))
    torch.testing.assert_close(mixer(x)[0][0], mixer.o_proj(o.flatten(-2)), rtol=1e-10, atol=1e-10)


def test_value_heads_of_a_group_share_their_key_and_the_gate_is_swish():
    config = shaped("gdn_tiny", GROUPED | {"output_gate": SWISH})
    mixer = built(config)
    x = torch.randn(1, 6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = (
        getattr(mixer, f"{c}_conv")(getattr(mixer, f"{c}_proj")(x))[0][0].unflatten(-1, (h, -1))
        for c, h in (("q", 2), ("k", 2), ("v", 4))
    )
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    rates = mixer.decay.rates
    decay = (-rates.A_log.exp() * F.softplus(mixer.decay.a_proj(x[0]) + rates.dt_bias)).exp()
    beta = torch.sigmoid(mixer.gain.b_proj(x[0]))
    outputs = torch.zeros(6, 4, 24, dtype=torch.float64)
    for h in range(4):
        S = torch.zeros(16, 24, dtype=torch.float64)
        for t in range(6):
            S = decay[t, h] * S
            S = S + beta[t, h] * torch.outer(k[t, h // 2], v[t, h] - S.mT @ k[t, h // 2])
            outputs[t, h] = S.mT @ q[t, h // 2] / 4
    o = mixer.o_norm(outputs) * F.silu(mixer.output_gate.g_proj(x[0])).unflatten(-1, (4, 24))
    torch.testing.assert_close(mixer(x)[0][0], mixer.o_proj(o.flatten(-2)), rtol=1e-10, atol=1e-10)


def test_the_residual_stream_keeps_float32_if_asked():
    found = {}
    for dtype in ("auto", "fp32"):
        model = model_of(shaped("pgdn_tiny", {}, residual_dtype=dtype), torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found[dtype] = model.hidden(tokens(1, 9))[0].dtype
    assert found == {"auto": torch.bfloat16, "fp32": torch.float32}


def test_the_released_init_of_mamba2_scales_its_output_by_the_depth():
    model = LanguageModel(shaped("mamba2_tiny", {}, init="released", num_layers=4))
    model.init_weights(seed=0)
    weight = model.blocks[3].mixer.out_proj.weight.detach()
    bound = (4 * weight.shape[1]) ** -0.5
    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not torch.equal(weight, model.blocks[2].mixer.out_proj.weight)


def test_an_untied_head_is_a_matrix_of_its_own():
    model = model_of(shaped("pgdn_tiny", {}, tie_embeddings=False))
    x = tokens(1, 5)
    hidden = model.hidden(x)[0]
    torch.testing.assert_close(model(x).logits, hidden @ model.head.weight.mT)
    assert not torch.allclose(model.head.weight, model.embedding.weight)


def unset_keys(config) -> list[str]:
    found = [key for key in type(config).model_fields if key not in config.model_fields_set]
    for value in vars(config).values():
        for inner in value.values() if isinstance(value, dict) else [value]:
            found += unset_keys(inner) if isinstance(inner, BaseModel) else []
    return found


@pytest.mark.parametrize("name", TINY)
def test_the_presets_show_every_key(name):
    assert unset_keys(small_config(name)) == []


@pytest.mark.parametrize(
    ("preset", "mixer", "message"),
    [
        ("gdn_tiny", {"num_value_heads": 3}, "num_value_heads = 3 is not a multiple"),
        ("gdn_tiny", {"expand_v": 1.03}, "expand_v = 1.03"),
        ("gdn_tiny", {"activation": "none"}, "activation = none"),
        ("transformer_tiny", {"num_kv_heads": 3}, "num_kv_heads = 3 does not divide"),
        ("transformer_tiny", {"head_dim": 15}, "even head_dim"),
    ],
)
def test_shapes_that_do_not_fit_together_are_refused_by_name(preset, mixer, message):
    with pytest.raises(ValueError, match=message):
        shaped(preset, mixer)
