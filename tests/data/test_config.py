"""Data configs: every file parses, shows every key, and nothing else is accepted."""

from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from pdn.data.config import DataConfig, WeightedShards, WeightedStream, WeightedText
from pdn.data.corpora import FILLED, corpus, names
from tests.data.corpus import LOADING, STREAM, TEXT, mixture, parse

FILES = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))
PARSED_BY = (
    WeightedText,
    WeightedShards,
    WeightedStream,
    *(a for a in DataConfig.__args__[0].__args__),
)


LATER = {"seed", "on_bad_row", "max_lost_characters", "corpus"}
LATER |= {"unit_tokens", "pool_units", "repeat", "carry_windows", "carry_horizon"}
UNSET = LATER - {
    "on_bad_row",
    "max_lost_characters",
    "corpus",
    "repeat",
}  # at null no part of the data's identity


def read(path: Path) -> dict:
    values = yaml.safe_load(path.read_text())
    values["seq_len"] = values["seq_len"] if isinstance(values["seq_len"], int) else 256
    return values


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_file_parses(path):
    config = TypeAdapter(DataConfig).validate_python(read(path))
    assert config.seed is None  # then it is the run's, and no part of the data's identity
    keys = set(type(config).model_fields)
    assert set(config.identity()) | type(config).operational == keys - UNSET


@pytest.mark.parametrize("model", PARSED_BY, ids=lambda m: m.__name__)
def test_no_key_has_a_default_outside_the_files(model):
    optional = {name for name, field in model.model_fields.items() if not field.is_required()}
    assert optional <= LATER  # records of older runs lack them


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_an_unknown_key_is_refused(path):
    with pytest.raises(ValidationError, match="Extra inputs"):
        TypeAdapter(DataConfig).validate_python({**read(path), "sequence_length": 5})


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_a_bad_weight_is_refused_by_its_name(tmp_path, weight):
    with pytest.raises(ValidationError, match=r"s1\.shards\.weight"):
        parse(tmp_path, **mixture(Path("a"), Path("b"), weights=[1.0, weight]))


def test_identity_leaves_out_what_only_changes_speed_and_place(tmp_path):
    stream = {**STREAM, "path": "text", "tokenizer": "t.json"}
    base = parse(tmp_path, **stream).identity()
    assert (
        parse(
            tmp_path / "other",
            **{**stream, "workers": 3, "processes": 5, "max_cache_bytes": 1 << 40},
        ).identity()
        == base
    )
    assert parse(tmp_path, **{**stream, "block_shards": 3}).identity() != base


def test_a_record_without_a_seed_of_the_data_keeps_its_identity(tmp_path):
    old = parse(tmp_path, **{**STREAM, "path": "text", "tokenizer": "t.json"})
    assert "seed" not in old.identity()
    assert old.model_copy(update={"seed": 1}).identity() == {**old.identity(), "seed": 1}


def test_a_trained_tokenizer_needs_a_size(tmp_path):
    with pytest.raises(ValidationError, match="vocab_size is null"):
        parse(tmp_path, **{**TEXT, **LOADING, "path": None, "vocab_size": None})


def test_the_embedded_text_is_not_repeated_often_unless_that_is_asked_for(tmp_path):
    text = {**LOADING, **TEXT, "max_epochs": None}
    assert parse(tmp_path, **{**text, "path": None}).epochs_allowed == 4
    assert parse(tmp_path, **{**text, "path": "novels"}).epochs_allowed > 1e5
    assert parse(tmp_path, **{**text, "path": None, "max_epochs": 9.0}).epochs_allowed == 9


def test_a_corpus_fills_in_what_is_null_and_nothing_else(tmp_path):
    nulls = dict.fromkeys((*FILLED, "path"))
    hub = {**LOADING, **STREAM, **nulls, "corpus": "slimpajama"}
    found = parse(tmp_path, **hub)
    assert (found.dataset, found.corpus) == ("gmongaras/SlimPajama-627B_Reupload", "slimpajama")
    assert (found.split, found.text_field, found.eos_token) == ("train", "text", "</s>")
    local = parse(tmp_path, **{**hub, "path": "novels", "tokenizer": "t.json"})
    assert (local.dataset, local.corpus, local.tokenizer) == (None, None, "t.json")
    own = parse(tmp_path, **{**hub, "dataset": "my/set", "revision": "main"})
    assert (own.dataset, own.revision, own.corpus) == ("my/set", "main", None)
    with pytest.raises(ValidationError, match="revision is null"):
        parse(tmp_path, **{**hub, "dataset": "my/set"})
    with pytest.raises(ValidationError, match=r"'slim': no such corpus; expected one of.*pg19"):
        parse(tmp_path, **{**hub, "corpus": "slim"})


@pytest.mark.parametrize("name", names())
def test_every_corpus_is_whole_and_is_a_stream(tmp_path, name):
    nulls = dict.fromkeys((*FILLED, "path"))
    found = parse(tmp_path, **{**LOADING, **STREAM, **nulls, "corpus": name})
    assert found.tokenizer and found.split and corpus(name).license and corpus(name).size


@pytest.mark.parametrize("value", ["None", "null", "off", False])
def test_what_means_no_validation_set_is_told_the_word_for_it(tmp_path, value):
    with pytest.raises(ValidationError, match=f"found {value!r}; .*write none"):
        parse(tmp_path, **{**TEXT, "path": "x", "validation": value})


def test_an_empty_cache_directory_is_refused(tmp_path):
    with pytest.raises(ValidationError, match=r"cache_dir\n.*found an empty path.*unset PDN_CACHE"):
        parse(tmp_path, **{**LOADING, **TEXT, "path": None, "cache_dir": ""})


@pytest.mark.parametrize(("key", "value"), [("vocab_size", 10**10), ("processes", 10**6)])
def test_absurd_numbers_are_refused(tmp_path, key, value):
    with pytest.raises(ValidationError, match="less than or equal to"):
        parse(tmp_path, **{**LOADING, **TEXT, "path": None, key: value})
