"""The decoder's step over fixed buffers gives the tokens of the model itself.

It does so in every row, whatever the other rows do.
"""

import pytest
import torch
import yaml

from pdn.inference import decode
from pdn.inference.decode import Decoder
from pdn.inference.sampling import Sampling
from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel
from tests.presets import TINY, small_config, small_model

PROMPTS = [[5, 6, 7], [9], list(range(20, 90)), [11, 12, 13], list(range(100, 117))]


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """Decode by the model alone, out of place, one token at a time."""
    found: list[int] = []
    with torch.no_grad():
        output = model(torch.tensor([prompt]), state=model.init_state(1))
        for _ in range(count):
            found.append(int(output.logits[0, -1].argmax()))
            output = model(torch.tensor([found[-1:]]), state=output.state)
    return found


def decoded(decoder: Decoder, prompts, count: int) -> list[list[int]]:
    decoder.begin(range(len(prompts)), prompts)
    found: list[list[int]] = [[] for _ in prompts]
    while any(len(row) < count for row in found):
        for row, tokens in zip(found, decoder.burst(3), strict=True):
            row += tokens
    return [row[:count] for row in found]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", TINY)
def test_every_row_equals_the_model_alone(name, dtype):
    model = small_model(name, dtype)
    expected = [greedy(model, prompt, 9) for prompt in PROMPTS]
    assert decoded(Decoder(model, len(PROMPTS)), PROMPTS, 9) == expected
    assert len({tuple(row) for row in expected}) > 1


SHAPES = {
    "grouped values": ("pgdn_tiny", ["expand_v=2.0", "num_value_heads=4"]),
    "low-rank gate": ("pgdn_tiny", ["output_gate.kind=swish", "+output_gate.rank=low"]),
    "full gate": ("gdn_tiny", ["output_gate.kind=swish", "+output_gate.rank=full"]),
    "no convolution": ("gla_tiny", ["conv_size=0"]),
    "feature map": ("linear_attention_tiny", ["feature_map=elu"]),
    "grouped keys": ("transformer_tiny", ["num_kv_heads=1"]),
    "window": ("transformer_tiny", ["window=9"]),
    "no positions": ("transformer_tiny", ["positions=nope"]),
    "normalised keys": ("transformer_tiny", ["qk_norm=true"]),
    "gated attention": ("transformer_tiny", ["output_gate=sigmoid"]),
}


def shaped(preset: str, *overrides: str):
    """Return a small model whose mixer has other keys."""
    config = small_config(preset)
    (name,) = config.mixers
    values = config.model_dump()
    for override in overrides:
        path, _, value = override.lstrip("+").partition("=")
        *parents, key = path.split(".")
        place = values["mixers"][name]
        for parent in parents:
            place = place[parent]
        place[key] = yaml.safe_load(value)
    return perturbed(LanguageModel(ModelConfig.model_validate(values)))


def perturbed(model: LanguageModel) -> LanguageModel:
    """Convert to float64, away from the symmetric points of the initialisation."""
    model = model.double()
    model.init_weights(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(2)
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).double()
    return model


@pytest.mark.parametrize("steps", [False, True], ids=["passes", "steps"])
@pytest.mark.parametrize("shape", SHAPES)
def test_models_of_other_shapes_decode_alike(shape, steps, request):
    if steps:
        request.getfixturevalue("read_by_steps")
    preset, overrides = SHAPES[shape]
    model = shaped(preset, *overrides)
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[4]]
    expected = [greedy(model, prompt, 14) for prompt in prompts]
    assert decoded(Decoder(model, len(prompts)), prompts, 14) == expected


@pytest.mark.parametrize("change", [{"tie_embeddings": False}, {"residual_dtype": "fp32"}])
def test_an_untied_head_and_a_wide_residual_stream_decode_alike(change):
    config = small_config("pgdn_tiny")
    model = perturbed(LanguageModel(config.model_copy(update=change)))
    expected = [greedy(model, prompt, 9) for prompt in PROMPTS]
    assert decoded(Decoder(model, len(PROMPTS)), PROMPTS, 9) == expected
    narrow = Decoder(model.float(), 1, dtype=torch.bfloat16)
    assert len(decoded(narrow, [[1, 2, 3]], 3)[0]) == 3


@pytest.fixture
def read_by_steps(monkeypatch):
    """Read prompts as on a GPU: by passes of whole blocks, and their ends by steps."""
    monkeypatch.setattr(decode, "READ_BY_STEPS", 16)
    ends = lambda self, lengths: [(n - 1) // 16 * 16 for n in lengths]  # noqa: E731
    monkeypatch.setattr(Decoder, "_read_by_passes", ends)


@pytest.mark.parametrize("name", ["pgdn_tiny", "hybrid_tiny", "mamba2_tiny", "pkda_tiny"])
def test_the_end_of_a_prompt_may_be_read_by_steps(name, read_by_steps):
    model = small_model(name)
    expected = [greedy(model, prompt, 9) for prompt in PROMPTS]
    assert decoded(Decoder(model, len(PROMPTS)), PROMPTS, 9) == expected


@pytest.mark.parametrize("steps", [False, True], ids=["passes", "steps"])
@pytest.mark.parametrize("name", ["pgdn_tiny", "hybrid_tiny", "mamba2_tiny"])
def test_rows_that_are_done_take_the_next_prompt(name, steps, request):
    if steps:
        request.getfixturevalue("read_by_steps")
    model = small_model(name)
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS * 2]
    eos = expected[2][5]
    for row in expected:
        row[:] = row[: row.index(eos)] if eos in row else row
    done = []
    decoder = Decoder(model, 2)
    found = decoder.complete(PROMPTS * 2, max_new_tokens=8, eos_id=eos, progress=done.append)
    assert found == expected and sum(done) == 10
    short = decoder.complete(PROMPTS, max_new_tokens=8, done=lambda tokens: len(tokens) == 2)
    assert [len(row) for row in short] == [2] * 5


def test_the_cache_of_attention_grows_with_a_sequence(monkeypatch):
    monkeypatch.setattr(decode, "SHORTEST_CACHE", 16)
    model = small_model("hybrid_tiny")
    decoder = Decoder(model, 2, length=16)
    prompts = [[3, 4], list(range(12))]
    assert decoded(decoder, prompts, 40) == [greedy(model, prompt, 40) for prompt in prompts]
    assert decoder.model.length == 64


def test_a_row_not_in_use_stays_within_its_cache(monkeypatch):
    monkeypatch.setattr(decode, "SHORTEST_CACHE", 16)
    model = small_model("transformer_tiny")
    decoder = Decoder(model, 2, length=16)
    for _ in range(3):
        decoder.begin([0], [[1, 2]])
        decoder.burst(9)
        decoder.end(0)
    assert decoder.model.length == 16


def test_the_weights_may_be_narrower_than_the_models():
    model = small_model("pgdn_tiny", torch.float32)
    decoder = Decoder(model, 1, dtype=torch.bfloat16)
    assert decoder.model.embedding.dtype == torch.bfloat16
    rates = decoder.model.mixers[0].axes[0].rates
    assert rates.A_log.dtype == torch.float32  # of gates, which are float32 inside
    with torch.autocast("cpu", torch.bfloat16):
        assert Decoder(model, 1).model.embedding.dtype == torch.bfloat16
    assert len(decoded(decoder, [[1, 2, 3]], 5)[0]) == 5
    assert model.blocks[0].mixer.q_proj.weight.dtype == torch.float32


def test_samples_follow_from_their_own_seed_in_any_row_at_any_time(request):
    model, how = small_model("pgdn_tiny"), Sampling(temperature=1.0, top_k=50, top_p=0.9)
    settings = dict(how=how, max_new_tokens=8)

    def together() -> list[list[int]]:
        decoder = Decoder(model, 2, **settings)
        return decoder.complete(PROMPTS, max_new_tokens=8, seeds=range(len(PROMPTS)))

    expected = together()
    for seed, (prompt, row) in enumerate(zip(PROMPTS, expected, strict=True)):
        alone = Decoder(model, 1, **settings)
        assert alone.complete([prompt], max_new_tokens=8, seeds=[seed]) == [row]
    with pytest.raises(ValueError, match="0 seeds: expected one for each of 1"):
        Decoder(model, 1, **settings).begin([0], [[1]])
    request.getfixturevalue("read_by_steps")
    assert together() == expected
