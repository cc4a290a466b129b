"""Validation: losses a byte and by position, on any number of ranks' batches."""

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pdn.distributed.fsdp import World
from pdn.evals import validation
from pdn.evals.schedule import _line
from pdn.evals.sequences import SequenceLosses
from pdn.evals.token_bytes import token_bytes
from pdn.evals.validation import bucket_ends, evaluate
from pdn.models.language_model import LanguageModel
from tests.data.corpus import documents, make_shards, open_shards
from tests.presets import small_config, small_model
from tests.ranks import run_ranks

ALONE = World(0, 1, torch.device("cpu"))
TEXT = ["Es war einmal ein König. Ærø, naïve café\n" * 3, "def f(x):\n    return x  # π ≈ 3.14"]


def batch(time: int = 80) -> dict[str, torch.Tensor]:
    x = torch.randint(0, 256, (2, time + 1), generator=torch.Generator().manual_seed(3))
    labels = x[:, 1:].clone()
    labels[0, 10:20] = -100
    return {"tokens": x[:, :-1], "labels": labels}


def test_the_loss_is_the_mean_over_counted_tokens():
    model, data = small_model("pgdn_tiny", torch.float32), batch()
    result = evaluate(model, [data], ALONE, bf16=False)
    logits = model(data["tokens"]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"].flatten())
    assert result["tokens"] == 150
    assert result["loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_sequences_have_the_same_losses_and_names_whatever_the_batches_and_ranks(tmp_path):
    model, data = small_model("pgdn_tiny", torch.float32), batch()
    parts = [{key: value[i : i + 1] for key, value in data.items()} for i in (1, 0)]
    filled = {"tokens": data["tokens"][:1], "labels": torch.full((1, 80), -100)}

    def collected(batches: list[dict], world: World) -> dict:
        found = SequenceLosses()
        evaluate(model, batches, world, bf16=False, sequences=found)
        return found.result()

    whole = collected([data], ALONE)
    assert whole["tokens"] == [70, 80] or whole["tokens"] == [80, 70]
    loss = evaluate(model, [data], ALONE, bf16=False)["loss"]
    assert sum(whole["loss"]) / 150 == pytest.approx(loss, abs=1e-5)
    assert collected([*parts, filled], ALONE) == whole

    def work(rank: int) -> dict:
        return collected([parts[rank]], World(rank, 2, torch.device("cpu")))

    assert run_ranks(2, work, tmp_path) == [whole, whole]


def test_losses_by_position_add_up_to_the_loss_and_isolate_their_bucket():
    model, data = small_model("pgdn_tiny", torch.float32), batch()
    result = evaluate(model, [data], ALONE, bf16=False)
    assert [key for key in result if "@" in key] == [
        f"loss_by_position@{end}" for end in (16, 64, 80)
    ]
    counts = {16: 26, 64: 92, 80: 32}
    total = sum(result[f"loss_by_position@{end}"] * n for end, n in counts.items()) / 150
    assert total == pytest.approx(result["loss"], abs=1e-9)
    data["labels"][:, :64] = -100
    assert evaluate(model, [data], ALONE, bf16=False)["loss"] == pytest.approx(
        result["loss_by_position@80"], abs=1e-6
    )


def test_positions_restart_at_document_boundaries():
    model, data = small_model("pgdn_tiny", torch.float32), batch()
    data["cu_seqlens"] = torch.tensor(
        [0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160], dtype=torch.int32
    )
    result = evaluate(model, [data], ALONE, bf16=False)
    assert result["loss_by_position@16"] == pytest.approx(result["loss"], abs=1e-9)
    assert "loss_by_position@64" not in result


def test_buckets_end_at_the_window():
    assert bucket_ends(256) == [16, 64, 256]
    assert bucket_ends(300) == [16, 64, 256, 300]
    assert bucket_ends(8) == [8]


def test_accuracy_counts_likeliest_tokens():
    model, data = small_model("pgdn_tiny", torch.float32), batch()
    data["labels"] = model(data["tokens"]).logits.argmax(-1)
    data["labels"][:, ::2] = -100
    plain = evaluate(model, [data], ALONE, bf16=False)
    result = evaluate(model, [data], ALONE, bf16=False, accuracy=True)
    assert result["accuracy"] == 1 and "perplexity" not in result
    assert "accuracy 1.0000" in _line("validation", result)
    assert result["loss"] == pytest.approx(plain["loss"], abs=1e-5)


def test_losses_and_likeliest_tokens_are_read_in_slices_with_equal_bits(monkeypatch):
    model, data = small_model("pgdn_tiny", torch.float32), batch()
    data["labels"][:, ::3] = model(data["tokens"]).logits.argmax(-1)[:, ::3]
    whole = evaluate(model, [data], ALONE, bf16=False, accuracy=True)
    sizes, cross_entropy = [], validation.F.cross_entropy

    def note_size(logits, labels, **options):
        sizes.append(len(labels))
        return cross_entropy(logits, labels, **options)

    monkeypatch.setattr(validation, "SLICE_TOKENS", 7)
    monkeypatch.setattr(validation.F, "cross_entropy", note_size)
    assert evaluate(model, [data], ALONE, bf16=False, accuracy=True) == whole
    assert max(sizes) == 7 and sum(sizes) == data["labels"].numel()


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet),
    )
    return tokenizer


def sentencepiece() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    ascii_only = ["".join(c for c in text if ord(c) < 128) for text in TEXT]
    tokenizer.train_from_iterator(
        ascii_only, trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_bytes_of_the_tokens_are_those_of_the_text(make, tmp_path):
    tokenizer = make()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sizes = token_bytes(tmp_path / "tokenizer.json", tokenizer.get_vocab_size() + 7)
    if make is sentencepiece:
        # the trainer marks byte tokens as special, a converted vocabulary does not
        for byte in range(256):
            sizes[tokenizer.token_to_id(f"<0x{byte:02X}>")] = 1
    for text in TEXT:
        assert sizes[tokenizer.encode(text).ids].sum() == len(text.encode())
    assert sizes[-7:].sum() == 0


def test_bits_per_byte_counts_only_counted_labels():
    model, data = small_model("pgdn_tiny", torch.float32), batch()
    sizes = torch.full((256,), 3)
    result = evaluate(model, [data], ALONE, bf16=False, token_bytes=sizes)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / 3 / math.log(2), abs=1e-12)


@pytest.mark.parametrize("isolated", [False, True])
def test_windows_with_carried_states_are_one_long_window(isolated, tmp_path):
    held = make_shards(tmp_path / "held", documents(12, seed=5))
    train = make_shards(tmp_path / "train", documents(12, seed=6))
    config = small_config("gdn_tiny").model_copy(update={"vocab_size": 300})
    model = LanguageModel(config).double()
    model.init_weights(seed=1)
    found = {}
    for length, carry in ((64, {}), (16, {"carry_windows": 4})):
        data = open_shards(
            train, tmp_path, validation=str(held), seq_len=length, isolation_min_tokens=1,
            document_isolation=isolated, **carry,
        )  # fmt: skip
        batches = data.validation(batch_size=3, max_samples=16 * 64 // length, carried=True)
        found[length] = evaluate(
            model, batches, ALONE, bf16=False, windows=data.windows_carried, eos_id=data.eos_id
        )
        reset = evaluate(
            model, data.validation(batch_size=3, max_samples=16 * 64 // length), ALONE, bf16=False
        )
    assert found[16] == pytest.approx(found[64], rel=1e-9)
    assert found[16]["loss"] != pytest.approx(reset["loss"], rel=1e-6)
    assert "loss_by_position@64" in found[16] and "loss_by_position@64" not in reset
