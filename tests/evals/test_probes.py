"""Tests of our own: needles, state tracking, recall and perplexity beyond the training length."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import scripts.evaluate
from pdn.cli.compose import compose
from pdn.cli.parse import parse
from pdn.data import open_data
from pdn.distributed.fsdp import World
from pdn.errors import ConfigError
from pdn.evals.in_loop import validation_batches
from pdn.evals.probes import state_tracking
from pdn.evals.probes.base import Subject
from pdn.evals.probes.needle import NeedleProbe
from pdn.evals.probes.positions import PositionsProbe
from pdn.evals.probes.state_tracking import group_table, words
from pdn.evals.scoring import Scorer
from pdn.evals.suites import CONFIGS, plan
from pdn.evals.validation import evaluate
from tests.presets import model_config, small_model

ALONE = World(0, 1, torch.device("cpu"))


def subject(model=None, **changes) -> Subject:
    model = model or small_model("pgdn_tiny")
    scorer = Scorer(model=model, world=ALONE, max_length=64, batch_size=4, bf16=False)
    return replace(
        Subject(
            scorer=scorer,
            config=getattr(model, "config", None),
            tokenizer=None,
            eos_id=0,
            seq_len=32,
        ),
        **changes,
    )


def probe(name: str, **changes):
    return plan(suite=None, tasks=[name], data_dir=None).probes[name].model_copy(update=changes)


# ---------------------------------------------------------------- needles


@pytest.fixture
def bytes_tokenizer(tmp_path) -> Path:
    """Make one token a byte, so that lengths can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


class Reader:
    """Stands in for a model: finds the sentence that the question is about.

    It copies that sentence's value, or answers wrongly.
    """

    def __init__(self, tokenizer: Path, right: bool):
        self.tokenizer, self.right, self.prompts = Tokenizer.from_file(str(tokenizer)), right, []

    def continuations(self, prompts, **options) -> list[list[int]]:
        found = []
        for prompt in prompts:
            text = self.tokenizer.decode(list(prompt))
            self.prompts.append((len(prompt), text))
            key = text.rpartition(" for ")[2].partition(" mentioned")[0]
            value = text.partition(f" for {key} is: ")[2].partition(".")[0]
            found.append(self.tokenizer.encode(f" {value if self.right else value[::-1]}.").ids)
        return found

    def whole(self):
        return self

    def loglikelihoods(self, pairs) -> list[tuple[float, bool]]:
        return [(-0.5 * len(continuation), True) for _, continuation in pairs]


@pytest.mark.parametrize("name", ["needle_1", "needle_2", "needle_3"])
def test_a_reader_finds_the_needle_and_a_guesser_does_not(name, bytes_tokenizer, tmp_path):
    (tmp_path / "hay.txt").write_text(
        ". ".join(f"Sentence {i} is about nothing at all" for i in range(300))
    )
    options = dict(tokenizer=bytes_tokenizer, text=tmp_path / "hay.txt", lengths=(1000, 3000))
    for right in (True, False):
        reader = Reader(bytes_tokenizer, right)
        found = probe(name, examples=6).run(subject(**options, scorer=reader))
        assert values(found) == {f"accuracy@{n}": float(right) for n in (1000, 3000)} | {
            f"loss@{n}": 0.5 for n in (1000, 3000)
        }
        for (size, text), length in zip(reader.prompts, [1000] * 6 + [3000] * 6, strict=True):
            assert length - 150 < size <= length
            assert text.count(" is: ") == 1
    depths = {round(text.index(" is: ") / size, 1) for size, text in reader.prompts}
    assert len(depths) > 3


def test_a_prompt_is_continued_whole_whatever_its_tokenizer_was_cut_to(bytes_tokenizer):
    saved = Tokenizer.from_file(str(bytes_tokenizer))
    saved.enable_truncation(4)
    saved.enable_padding(length=4)
    saved.save(str(bytes_tokenizer))
    reader = Reader(bytes_tokenizer, True)
    reader.tokenizer.no_truncation()
    prompts = ["Once upon a time", ""]
    probe("continuations", prompts=prompts).run(
        subject(tokenizer=bytes_tokenizer, eos_id=7, scorer=reader)
    )
    assert [size for size, _ in reader.prompts] == [16, 1]


def test_the_same_seed_gives_the_same_examples(bytes_tokenizer):
    readers = [Reader(bytes_tokenizer, True) for _ in range(3)]
    for reader, seed in zip(readers, (0, 0, 1), strict=True):
        probe("needle_1", examples=3, seed=seed).run(
            subject(tokenizer=bytes_tokenizer, lengths=(900,), scorer=reader)
        )
    assert readers[0].prompts == readers[1].prompts != readers[2].prompts


def test_a_model_scores_on_needles(bytes_tokenizer):
    found = probe("needle_1", examples=2).run(subject(tokenizer=bytes_tokenizer, lengths=(700,)))
    assert found["accuracy@700"].value == 0 and found["loss@700"].value > 1


def test_needles_that_cannot_be_hidden_are_refused(bytes_tokenizer, tmp_path):
    for name, changes, message in [
        ("needle_1", {}, "no tokenizer"),
        ("needle_2", {"tokenizer": bytes_tokenizer}, "text=<file>"),
        ("needle_2", {"tokenizer": bytes_tokenizer, "text": tmp_path / "none"}, "readable UTF-8"),
    ]:
        with pytest.raises(ConfigError, match=message):
            probe(name).check(subject(**changes))
    with pytest.raises(
        ConfigError,
        match=r"found a length of 100 tokens, and the question alone takes .*; expected at least",
    ):
        probe("needle_1").check(subject(tokenizer=bytes_tokenizer, lengths=(3000, 100)))


# ---------------------------------------------------------------- lengths


def windows(changes, batch_size, max_samples):
    """Yield 8,192 tokens of a validation text, in windows of whatever length."""
    length = changes.get("seq_len", 32)
    text = torch.randint(0, 256, (8193,), generator=torch.Generator().manual_seed(0))
    count = 8192 // length if max_samples is None else min(max_samples, 8192 // length)
    rows = [
        (text[i * length : (i + 1) * length], text[i * length + 1 : (i + 1) * length + 1])
        for i in range(count)
    ]
    for start in range(0, count, batch_size):
        tokens, labels = zip(*rows[start : start + batch_size], strict=True)
        yield {"tokens": torch.stack(tokens), "labels": torch.stack(labels)}


def values(found: dict) -> dict[str, float]:
    return {key: estimate.value for key, estimate in found.items()}


def test_perplexity_by_length_reads_the_same_text_at_every_length(bytes_tokenizer):
    model = small_model("pgdn_tiny")
    who = subject(model, tokenizer=bytes_tokenizer, validation=windows)
    found = values(probe("length", multiples=[1, 4], max_tokens=512).run(who))
    assert set(found) == {
        f"{name}@{n}"
        for name in ("loss", "perplexity", "tail_loss", "position_loss")
        for n in (32, 128)
    }
    for length in (32, 128):
        result = evaluate(
            model,
            windows({"seq_len": length}, 2, 512 // length),
            ALONE,
            bf16=False,
            ends=[length - 32, length],
        )
        assert found[f"loss@{length}"] == pytest.approx(result["loss"], abs=1e-9)
        assert found[f"tail_loss@{length}"] == pytest.approx(
            result[f"loss_by_position@{length}"], abs=1e-9
        )
    assert found["tail_loss@32"] == pytest.approx(found["loss@32"], abs=1e-9)
    ends = {"ends": [32, 128], "bf16": False}
    whole = evaluate(model, windows({"seq_len": 128}, 4, 4), ALONE, **ends)
    for end in (32, 128):
        expected = whole[f"loss_by_position@{end}"]
        assert found[f"position_loss@{end}"] == pytest.approx(expected, abs=1e-9)


def test_a_text_shorter_than_the_longest_window_is_refused(bytes_tokenizer):
    who = subject(tokenizer=bytes_tokenizer, validation=windows, lengths=(16000,))
    for refuse in (probe("length").check, probe("length").run):
        with pytest.raises(
            ConfigError, match=r"found 8,192 tokens of validation text .*; expected at least 16,000"
        ):
            refuse(who)
    with pytest.raises(ConfigError, match=r"\(max_tokens = 100\); expected at least 128"):
        probe("length", multiples=[1, 4], max_tokens=100).check(
            subject(tokenizer=bytes_tokenizer, validation=windows)
        )
    probe("length", multiples=[1, 4]).check(subject(tokenizer=bytes_tokenizer, validation=windows))
    with pytest.raises(ConfigError, match="run=runs/<name>"):
        probe("length").check(subject(tokenizer=bytes_tokenizer))


class LaterIsEasier(torch.nn.Module):
    """Loses 1 / (tokens it has seen), and 100 more where a document has ended."""

    def forward(self, tokens, labels):
        seen = torch.arange(1, tokens.shape[1] + 1)
        return SimpleNamespace(losses=1 / seen + 100.0 * (tokens == 0).cumsum(1).clamp(max=1))


def documents(changes, batch_size, max_samples):
    """Yield four windows: within a document, with an end in the middle, with one as the last
    label, and a row that fills a batch up.
    """
    tokens = torch.ones(4, changes["seq_len"], dtype=torch.long)
    labels = tokens.clone()
    tokens[1, 5], labels[2, -1], labels[3] = 0, 0, -100
    for row in range(min(4, max_samples)):
        yield {"tokens": tokens[row : row + 1], "labels": labels[row : row + 1]}


def test_loss_by_position_is_of_windows_within_one_document_with_and_without_reset(bytes_tokenizer):
    who = subject(LaterIsEasier(), tokenizer=bytes_tokenizer, validation=documents)
    task = probe("positions", length=16, reset=4, first_end=3)
    task.check(who)
    found = task.run(who)
    ends = [3, 6, 12, 16]
    names = [name + at for name in ("loss", "reset_loss") for at in ("", *(f"@{e}" for e in ends))]
    assert list(found) == names
    whole = [1 / n for n in range(1, 17)]
    for name, losses in (("loss", whole), ("reset_loss", whole[:4] * 4)):
        assert found[name].value == pytest.approx(sum(losses) / 16)
        for start, end in itertools.pairwise([0, *ends]):
            expected = sum(losses[start:end]) / (end - start)
            assert found[f"{name}@{end}"].value == pytest.approx(expected)
            assert found[f"{name}@{end}"].n == 2 * (end - start)  # of two windows


def test_text_without_a_window_within_a_document_is_refused(bytes_tokenizer):
    who = subject(
        tokenizer=bytes_tokenizer,
        validation=lambda *asked: itertools.islice(documents(*asked), 1, 2),
    )
    with pytest.raises(ConfigError, match="no window of 16 tokens within one document"):
        probe("positions", length=16, reset=4).check(who)
    with pytest.raises(ConfigError, match="run=runs/<name>"):
        probe("positions").check(subject(tokenizer=bytes_tokenizer))
    with pytest.raises(ValidationError, match="reset = 5 does not divide length = 16"):
        PositionsProbe(kind="positions", length=16, reset=5, first_end=3, max_tokens=16)


# ---------------------------------------------------------------- recall


def test_mqar_is_scored_on_its_queries_at_every_length(tmp_path):
    sizes = [
        "vocab_size=256",
        "num_pairs=4",
        "train_examples=8",
        "validation_examples=8",
        "seq_len=32",
    ]
    config = parse(
        compose(["data=mqar", f"output_dir={tmp_path}", *(f"data.{size}" for size in sizes)]),
        world_size=1,
    ).data
    validation = validation_batches(open_data, config, 0, ALONE)
    found = values(probe("mqar", multiples=[1, 2], examples=8).run(subject(validation=validation)))
    assert set(found) == {"accuracy@32", "accuracy@64"} and all(
        value < 0.2 for value in found.values()
    )

    class Lookup(torch.nn.Module):
        """Answers every key with what followed it the first time."""

        def forward(self, tokens, cu_seqlens=None):
            logits = torch.zeros(*tokens.shape, 256)
            for row, line in enumerate(tokens.tolist()):
                for t, token in enumerate(line):
                    logits[
                        row,
                        t,
                        line[line.index(token) + 1 if line.index(token) + 1 < len(line) else 0],
                    ] = 1.0
            return type("Output", (), {"logits": logits})

    perfect = subject(Lookup(), validation=validation)
    assert values(probe("mqar", multiples=[1, 2], examples=8).run(perfect)) == {
        "accuracy@32": 1.0,
        "accuracy@64": 1.0,
    }
    with pytest.raises(ConfigError, match="data=mqar"):
        probe("mqar").check(subject())
    with pytest.raises(
        ConfigError, match=r"seq_len = 512, .*must exceed seq_len=512.*expected other lengths"
    ):
        probe("mqar").check(subject(validation=validation, lengths=(512,)))


# ---------------------------------------------------------------- state tracking


@pytest.mark.parametrize(("n", "order"), [(2, 2), (3, 6), (5, 120)])
def test_the_tables_are_groups(n, order):
    table = group_table(n)
    assert table.shape == (order, order)
    assert all(sorted(row) == list(range(order)) for row in table.tolist())
    assert torch.equal(table[0], torch.arange(order)) and torch.equal(
        table[:, 0], torch.arange(order)
    )
    a, b, c = torch.randint(0, order, (3, 200), generator=torch.Generator().manual_seed(0))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    assert n == 2 or not torch.equal(table, table.T)


def test_words_ask_for_the_product_so_far():
    letters, products = words(group_table(2), 4, 50, torch.Generator().manual_seed(0))
    assert torch.equal(products, letters.cumsum(1) % 2)


@pytest.mark.parametrize("name", ["pgdn_tiny", "hybrid_tiny", "mamba2_tiny", "transformer_tiny"])
def test_a_small_fresh_model_with_the_runs_mixers_learns(name):
    task = probe(
        "parity", steps=2, batch_size=4, train_length=6, lengths=[6, 9], num_layers=4, d_model=32
    )
    config = task.small(model_config(name, "model.vocab_size=64"), 2)
    assert (
        config.mixers == model_config(name, "model.vocab_size=64").mixers and config.vocab_size == 2
    )
    found = task.run(subject(small_model(name, torch.float32)))
    assert set(found) == {"accuracy@6", "accuracy@9"}


def test_another_seed_of_the_run_trains_on_other_words_and_is_tested_on_the_same(monkeypatch):
    asked: dict[int, list[torch.Tensor]] = {}
    task = probe(
        "parity", steps=2, batch_size=4, train_length=6, lengths=[9], examples=4, d_model=32
    )
    for seed in (0, 1):
        seen = asked.setdefault(seed, [])

        def recorded(*arguments, seen=seen):
            letters, products = words(*arguments)
            seen.append(letters)
            return letters, products

        monkeypatch.setattr(state_tracking, "words", recorded)
        task.run(subject(small_model("gdn_tiny", torch.float32), seed=seed))
    *training, tested = zip(asked[0], asked[1], strict=True)
    assert len(training) == 2 and not any(torch.equal(a, b) for a, b in training)
    assert torch.equal(*tested)


def test_fewer_layers_than_a_pattern_are_refused():
    with pytest.raises(ConfigError, match="less than one round"):
        probe("parity", num_layers=2).check(subject(small_model("hybrid_tiny", torch.float32)))


@pytest.mark.slow
def test_negative_eigenvalues_track_parity_where_positive_ones_do_not():
    found = {}
    for name in ("deltanet_neg_tiny", "deltanet_tiny"):
        who = subject(small_model(name, torch.float32))
        found[name] = (
            probe("parity", steps=500, batch_size=64, lengths=[80]).run(who)["accuracy@80"].value
        )
    assert found["deltanet_neg_tiny"] > 0.95 > 0.8 > found["deltanet_tiny"]


def test_every_task_file_is_a_probe_or_a_task():
    for path in sorted((CONFIGS / "tasks").glob("*.yaml")):
        chosen = plan(
            suite=None,
            tasks=[path.stem],
            data_dir=str(Path(__file__).parent.parent / "fixtures" / "eval"),
        )
        assert path.stem in chosen.probes or path.stem in chosen.local
    assert isinstance(probe("needle_1"), NeedleProbe)


@pytest.mark.parametrize(
    "words",
    [
        ("tasks=parity", "limit=3"),
        ("tasks=parity", "text=book.txt"),
        ("tasks=needle_1", "num_fewshot=2"),
        ("tasks=needle_1", "text=book.txt"),
        ("tasks=continuations", "lengths=64"),
    ],
)
def test_an_option_that_no_task_reads_is_refused(words):
    name = words[1].partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{name}: found for tasks that do not read it"):
        scripts.evaluate.main(["run=nowhere", *words])
