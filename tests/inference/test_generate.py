"""Decoding: ragged batches continue as if each sequence were alone.

Sampling keeps to its limits; streaming cuts no character.
"""

import gzip
import json

import pytest
import torch

import scripts.generate
from pdn.errors import ConfigError
from pdn.inference.generate import generate, stream_text
from pdn.inference.sampling import Sampling, sample, stream_seed
from tests.presets import TINY, small_model

PROMPTS = [[5, 6, 7], [9], list(range(20, 90)), [11, 12, 13], list(range(100, 117))]


def continuations(model, prompts, **options) -> list[list[int]]:
    steps = list(generate(model, prompts, max_new_tokens=12, temperature=0, **options))
    return torch.stack(steps, 1).tolist()


@pytest.mark.parametrize("name", TINY)
def test_a_ragged_batch_equals_each_prompt_alone(name):
    model = small_model(name)
    together = continuations(model, PROMPTS, prefill_tokens=64)
    alone = [continuations(model, [prompt])[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(row) for row in alone}) > 1


def test_prompt_and_continuation_equal_the_full_forward_pass():
    model = small_model("hybrid_tiny")
    (row,) = continuations(model, [PROMPTS[2]])
    full = model(torch.tensor([PROMPTS[2] + row])).logits[0].argmax(-1)
    assert full[len(PROMPTS[2]) - 1 : -1].tolist() == row


def test_a_finished_sequence_keeps_yielding_eos_and_the_last_one_ends_the_batch():
    model = small_model("pgdn_tiny")
    free = continuations(model, PROMPTS)
    eos = free[0][3]
    ended = continuations(model, PROMPTS, eos_id=eos)
    for without, with_eos in zip(free, ended, strict=True):
        cut = without.index(eos) if eos in without else 12
        assert with_eos == (without[: cut + 1] + [eos] * 12)[: len(with_eos)]
    assert len(continuations(model, PROMPTS[:1], eos_id=eos)[0]) == free[0].index(eos) + 1


def test_empty_prompts_and_impossible_settings_are_refused():
    model = small_model("pgdn_tiny")
    for prompts, options in [
        ([], {}),
        ([[1], []], {}),
        ([[1]], {"top_k": 0}),
        ([[1]], {"top_p": 0.0}),
    ]:
        with pytest.raises(ValueError, match="expected"):
            next(generate(model, prompts, max_new_tokens=1, **options))


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.55}, {0, 1}), ({"top_p": 0.4}, {0})],
)
def test_samples_come_from_the_likeliest_tokens_only(options, allowed):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(500, 1)
    drawn = sample(logits, Sampling(**options), torch.linspace(0, 1, 501).double()[:-1])
    assert set(drawn.tolist()) == allowed


def test_samples_have_the_distribution_that_the_logits_say():
    shares = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    drawn = sample(
        shares.log().repeat(2000, 1),
        Sampling(),
        torch.rand(2000, generator=torch.Generator().manual_seed(0)).double(),
    )
    found = drawn.bincount(minlength=5) / 2000
    assert found[1] == 0 and found.sub(shares).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [1e-3, 1e-39, 1e-300])
def test_a_low_temperature_takes_the_likeliest_token(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -7.0, -6.0]])
    for how in (Sampling(temperature), Sampling(temperature, top_k=2, top_p=0.9)):
        assert sample(logits, how, torch.tensor([0.1, 0.9]).double()).tolist() == [1, 0]


def test_a_sequences_samples_follow_from_its_own_seed_whatever_is_decoded_beside_it():
    model = small_model("pgdn_tiny")
    settings = dict(max_new_tokens=12, temperature=1.0)
    seeds = [stream_seed(0, "task", document, 1) for document in range(len(PROMPTS))]
    together = torch.stack(list(generate(model, PROMPTS, seeds=seeds, **settings)), 1).tolist()
    for prompt, seed, row in zip(PROMPTS, seeds, together, strict=True):
        (alone,) = torch.stack(list(generate(model, [prompt], seeds=[seed], **settings)), 1)
        assert alone.tolist() == row
    again = torch.stack(list(generate(model, [PROMPTS[0]] * 3, seeds=seeds[:3], **settings)), 1)
    assert len({tuple(row) for row in again.tolist()}) == 3
    with pytest.raises(ValueError, match=r"temperature=1.0, 0 seeds: expected one for each of 1"):
        next(generate(model, [[1]], max_new_tokens=1))


def test_streaming_never_cuts_a_character():
    text = "naïve café 😀 end"
    tokens = list(text.encode())
    pieces = list(stream_text(iter(tokens), lambda ids: bytes(ids).decode(errors="replace")))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_prompt_file_holds_one_text_or_many_json_lines(tmp_path):
    from scripts.generate import read_prompts

    (tmp_path / "one.txt").write_text("two\nlines")
    (tmp_path / "many.jsonl").write_text(
        "\n".join([json.dumps({"prompt": "a\nb"}), json.dumps("c"), ""])
    )
    assert read_prompts(str(tmp_path / "one.txt")) == ["two\nlines"]
    assert read_prompts(str(tmp_path / "many.jsonl")) == ["a\nb", "c"]
    packed = gzip.compress(b'\xef\xbb\xbf"d"\n"\\ufeffe"\n')
    (tmp_path / "packed.JSONL.gz").write_bytes(packed)
    assert read_prompts(str(tmp_path / "packed.JSONL.gz")) == ["d", "e"]
    with pytest.raises(ConfigError, match=r"a\.parquet: found parquet; expected a \.txt"):
        read_prompts("a.parquet")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(Exception, match=r"bad\.jsonl, line 1"):
        read_prompts(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("word", ["top_k=3", "top_p=0.5", "seed=1", "samples=2"])
def test_what_changes_nothing_at_temperature_0_is_refused(word):
    with pytest.raises(ConfigError, match=rf"{word.partition('=')[0]}: found with temperature=0"):
        scripts.generate.main(["run=nowhere", "temperature=0", word])
