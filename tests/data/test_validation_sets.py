"""Validation sets: spread evenly, the same on any number of ranks, under names.

They are never what is trained on.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pdn.data import open_data
from pdn.data.pack import IGNORE
from pdn.data.shards import read_manifest
from pdn.data.sources import ValidationSet
from pdn.errors import DataError
from pdn.reports.plots import panels
from tests.data.corpus import (
    documents,
    make_shards,
    mixture,
    open_mixture,
    open_shards,
    parse,
    tokenizer,
)
from tests.small_runs import train, train_on_ranks


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Return ten times as many tokens as in `few`."""
    return make_shards(tmp_path_factory.mktemp("held_out"), documents(50, seed=2))


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("few"), documents(5, seed=3))


def test_samples_are_spread_over_each_split_in_its_share(held_out, few):
    both = ValidationSet([held_out, few])
    total = len(both.places(16, None, spread=True))
    first = len(ValidationSet([held_out]).places(16, None, spread=True))
    for most in (2, 3, 10, 37, total - 1):
        places = both.places(16, most, spread=True)
        assert len(places) == most and (np.diff(places) > 0).all()
        inside, outside = places[places < first], places[places >= first]
        assert len(outside) == pytest.approx(most * (total - first) / total, abs=1)
        assert len(inside) and len(outside)
        for part, size in ((inside, first), (outside - first, total - first)):
            assert part.max() < size and np.ptp(np.diff(part)) <= 1 if len(part) > 1 else True
    for most in (total, total + 1, None):
        assert both.places(16, most, spread=True).tolist() == list(range(total))
    assert both.places(16, 5, spread=False).tolist() == [0, 1, 2, 3, 4]
    assert len(both.places(16, 1, spread=True)) == 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_same_samples_are_taken_on_any_number_of_ranks(shards, held_out, cache, world):
    expected = ValidationSet([held_out])
    windows, _ = expected.windows(expected.places(16, 20, spread=True), 16)
    batches = []
    for rank in range(world):
        data = open_shards(shards, cache, batch=6, rank=rank, world=world, validation=str(held_out))
        batches.append(list(data.validation(batch_size=4, max_samples=20, spread=True)))
    assert len({len(b) for b in batches}) == 1
    rows = torch.cat([b[i]["tokens"] for i in range(len(batches[0])) for b in batches])
    labels = torch.cat([b[i]["labels"] for i in range(len(batches[0])) for b in batches])
    assert rows[:20].tolist() == windows[:, :-1].tolist() and (labels[20:] == IGNORE).all()


def test_a_named_set_is_shards_or_text_that_is_tokenised_once(shards, held_out, cache, tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"body": t}) + "\n" for t in documents(50, seed=2))
    )
    sets = {
        "prepared": {"path": str(held_out)},
        "text-1": {"path": str(tmp_path / "text.jsonl"), "text_field": "body"},
    }
    said = []
    for _ in range(2):
        data = open_shards(shards, cache, validation_sets=sets)
        assert data.validation_sets == ("prepared", "text-1")
        one, other = (
            list(data.validation(batch_size=4, max_samples=None, name=n))
            for n in data.validation_sets
        )
        assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(one, other, strict=True))
        assert list(data.validation(batch_size=4, max_samples=None)) == []
        said.append(
            sorted(p.stat().st_mtime_ns for p in cache.glob("validation-*/validation/*.bin"))
        )
    assert said[0] == said[1] and "validation set text-1: 50 documents" in data.describe()


def test_each_source_of_a_mixture_is_a_set_of_its_own(shards, more_shards, held_out, few, cache):
    sources = mixture(shards, more_shards, weights=[1.0, 1.0])
    for part, directory in zip(sources["sources"].values(), (held_out, few)):
        part["validation"] = str(directory)
    data = open_mixture(cache, sources, batch=4)
    assert data.validation_sets == ("s0", "s1")
    whole, *parts = (
        list(data.validation(batch_size=1, max_samples=None, name=n)) for n in (None, "s0", "s1")
    )
    assert all(
        torch.equal(a["tokens"], b["tokens"])
        for a, b in zip(whole, parts[0] + parts[1], strict=True)
    )


def test_named_sets_do_not_define_the_run(cache, held_out):
    keys = {"kind": "shards", "path": "p", "validation": None}
    named = parse(cache, **keys, validation_sets={"a": {"path": str(held_out)}})
    assert named.identity() == parse(cache, **keys).identity()


@pytest.mark.parametrize("name", ["a/b", "", "a b", "loss@16", "-a", "ä", "../x"])
def test_a_name_that_is_none_for_a_metric_is_refused(cache, name):
    with pytest.raises(ValidationError, match=r"expected letters, digits.*validation/<name>/loss"):
        parse(
            cache, kind="shards", path="p", validation=None, validation_sets={name: {"path": "v"}}
        )
    with pytest.raises(ValidationError, match="expected letters, digits"):
        sources = mixture(Path("a"), weights=[1.0])["sources"]
        parse(cache, kind="mixture", sources={name: sources["s0"]})


def test_a_name_that_a_source_has_is_refused(cache):
    with pytest.raises(ValidationError, match=r"validation_sets\.s0: sources\.s0 has that name"):
        parse(cache, **mixture(Path("a"), weights=[1.0]), validation_sets={"s0": {"path": "v"}})


def refusal(shards: Path, cache: Path, **keys) -> str:
    with pytest.raises(DataError) as caught:
        open_shards(shards, cache, **keys)
    return str(caught.value)


def named(path: Path) -> dict:
    return {"validation_sets": {"web": {"path": str(path)}}}


def test_a_path_without_a_set_is_refused(shards, held_out, cache, tmp_path):
    assert "data.validation_sets.web: /nowhere: no such file" in refusal(
        shards, cache, **named(Path("/nowhere"))
    )
    message = refusal(shards, cache, **named(held_out.parent))
    assert (
        f"holds train; expected shards of one split (with manifest.json), or text; give {held_out}"
        in message
    )
    assert "E-DATA-EMPTY" in refusal(shards, cache, **named(tmp_path))
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    assert "data.validation_sets.web" in (
        message := refusal(shards, cache, **named(tmp_path / "blank.jsonl"))
    )
    assert "no tokens; expected text" in message


def test_a_set_of_another_tokenizer_or_half_prepared_is_refused(shards, held_out, cache, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(held_out, copy)
    manifest = read_manifest(copy)
    content = tokenizer().content + b"\n"
    (copy / "tokenizer.json").write_bytes(content)
    sha = hashlib.sha256(content).hexdigest()
    other = manifest.tokenizer.model_copy(update={"sha256": sha})
    manifest.model_copy(update={"tokenizer": other}).write(copy)
    for keys in (named(copy), {"validation": str(copy)}):
        assert (
            "E-TOKENIZER-DATA" in (message := refusal(shards, cache, **keys))
            and "expected one tokenizer" in message
        )
    manifest.model_copy(update={"complete": False}).write(copy)
    for keys in (named(copy), {"validation": str(copy)}):
        assert "E-SHARD-INCOMPLETE" in refusal(shards, cache, **keys)


def test_a_named_set_of_what_is_trained_on_is_refused(shards, held_out, cache, tmp_path):
    assert "holds shards of the training set" in refusal(
        shards, cache, validation=str(held_out), **named(shards)
    )
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["new", documents(120)[7]]))
    assert "E-DATA-OVERLAP" in (
        message := refusal(shards, cache, validation=str(held_out), **named(text))
    )
    assert "validation-text.jsonl" in message and str(held_out) not in message


def test_a_run_validates_on_named_sets_alike_on_one_rank_and_two(tmp_path):
    text = tmp_path / "held.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(40, seed=8)))
    options = (
        "trainer.steps=2",
        "schedule.warmup_steps=1",
        "eval=validation",
        "eval.batch_size=4",
        "eval.max_samples=6",
    )
    options += ("data.validation_fraction=0.2", f"data.validation_sets={{tides: {{path: {text}}}}}")
    records = [r for r in train(tmp_path / "one", "pgdn_tiny", *options) if "validation/loss" in r]
    assert [r["step"] for r in records] == [0, 2]
    for record in records:
        assert {
            f"validation/tides/{k}" for k in ("loss", "perplexity", "bits_per_byte", "tokens")
        } <= record.keys()
        assert (
            "validation/tides/loss_by_position@16" in record
            and record["validation/tides/loss"] != record["validation/loss"]
        )
    shown = panels({"run": records})
    assert ("series", "validation/tides/loss") in shown and (
        "curve",
        "validation/tides/loss_by_position",
    ) in shown
    for sets in ("null", f"{{other: {{path: {text}}}}}"):
        # a launch with other sets goes on with the same run
        assert train(tmp_path / "one", "pgdn_tiny", *options[:-1], f"data.validation_sets={sets}")
    other = [
        r
        for r in train_on_ranks(2, tmp_path / "two", "pgdn_tiny", *options)
        if "validation/loss" in r
    ]
    for a, b in zip(records, other, strict=True):
        assert a["validation/tides/tokens"] == b["validation/tides/tokens"]
        assert a["validation/tides/loss"] == pytest.approx(b["validation/tides/loss"], abs=1e-5)


def on_its_own_text(config, *, rank: int, **keys):
    own = {"own": {"path": f"{config.validation_sets['own'].path}/{rank}"}}
    return open_data(
        config.model_validate({**config.model_dump(), "validation_sets": own}), rank=rank, **keys
    )


def test_ranks_with_other_validation_text_are_refused(tmp_path, monkeypatch, capfd):
    """Refuse them: they would evaluate different numbers of batches, and wait for ever."""
    for rank in "01":
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "held.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in documents(20 + int(rank)))
        )
    monkeypatch.setattr("tests.small_runs.open_data", on_its_own_text)
    options = (
        "trainer.steps=2",
        "schedule.warmup_steps=1",
        f"data.validation_sets={{own: {{path: {tmp_path}}}}}",
    )
    with pytest.raises(AssertionError):
        train_on_ranks(2, tmp_path / "runs", "pgdn_tiny", *options, start="fork")
    assert capfd.readouterr().err.count("pdn[E-DATA-RANKS] validation_sets.own: rank 0 found") == 2


def test_a_small_named_set_is_said_to_be_noisy(shards, cache, tmp_path):
    (tmp_path / "few.txt").write_text("A sentence.")
    sets, said = {"few": {"path": str(tmp_path / "few.txt"), "text_field": "text"}}, []
    config = parse(cache, kind="shards", path=str(shards), validation=None, validation_sets=sets)
    open_data(config, global_batch_size=4, seed=0, progress=said.append)
    assert any(line.startswith("few: the validation set has only 1 sample of") for line in said)
