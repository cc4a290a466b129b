"""Paths: honoured, or refused by name; none names another place than the one that was meant.

And numbers: each has an upper bound.
"""

import copy
import runpy
from functools import cache
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest
from pydantic import BaseModel

from pdn.cli.compose import compose
from pdn.cli.parse import parse
from pdn.errors import ConfigError
from pdn.training.config import RunConfig
from pdn.training.limits import LIMITS, no_place

ROOT = Path(__file__).parents[2]
KEYS = ("output_dir", "data.path", "data.cache_dir", "data.validation", "data.tokenizer")
KEYS += ("init_from", "eval.data_dir")
MISPLACED = {
    "": "found ",
    " ": "found ",
    "\u00a0s3://b/x": "white space at an end",
    "runs ": "white space at an end",
    "a\nb": "control character",
    "a\0b": "control character",
    "$HOME/runs": "a variable that nothing has replaced",
    "~nobody-of-that-name/runs": "a home directory that there is not",
    "S3://bucket/x": "found the scheme S3",
    "hdfs://host/x": "found the scheme hdfs",
    "file:/tmp/x": "found the scheme file",
    "hf://owner/name": "a hub id is owner/name",
}


@cache
def composed(*words: str):
    return compose(["model=pgdn_tiny", *words])


def parsed(key: str, value, *words: str):
    changed = copy.deepcopy(composed("data=text", "data.path=/tmp", *words))
    node = changed.values
    *groups, last = key.split(".")
    for group in groups:
        node = node[group]
    node[last] = value
    return parse(changed)


@pytest.mark.parametrize("value", MISPLACED)
def test_a_path_that_would_name_another_place_is_refused_under_every_key(value):
    for key in KEYS:
        with pytest.raises(ConfigError) as refused:
            parsed(key, value)
        said = str(refused.value)
        assert key in said and (MISPLACED[value] in said or "empty" in said), said
    for key, odd in (("branch_from", f"{value}@3"), ("name", value)):
        with pytest.raises(ConfigError, match=key):
            parsed(key, odd)
    with pytest.raises(ConfigError, match=r"validation_sets\.x\.path"):
        parsed("data.validation_sets", {"x": {"path": value, "text_field": "text"}})


@pytest.mark.parametrize(
    "value", ["a b/c", "/tmp/x/", "../x", "~/x", "a:b", "C:/x", "-", "é", "x$y"]
)
def test_any_other_path_may_be_one(value):
    assert no_place(value) is None
    for key in KEYS:
        parsed(key, value)


def test_data_may_lie_in_a_bucket_at_a_whole_address():
    for key in ("data.path", "data.validation"):
        parsed(key, "s3://bucket/x/train")
        with pytest.raises(ConfigError, match=f"{key} = s3://bucket: expected s3://bucket/prefix"):
            parsed(key, "s3://bucket")
    parsed("data.validation_sets", {"x": {"path": "s3://bucket/x", "text_field": "text"}})


@pytest.mark.parametrize("value", ["", "s3://bucket/x", "~/data", "file:///x", "$DATA"])
def test_a_dataset_is_the_id_of_one_on_the_hub(value):
    words = ("data=stream_local", "data.path=x")
    changed = copy.deepcopy(composed(*words))
    changed.values["data"] |= {"path": None, "dataset": value, "revision": "r"}
    with pytest.raises(ConfigError, match=r"data\.dataset.*owner/name.*data\.path"):
        parse(changed)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("fetch.py", ["replica=s3://b/x", "to=s3://b/y"]),
        ("compare.py", ["base=a", "other=b", "runs=s3://b/y"]),
        ("sweep.py", ["model=pgdn_tiny", "runs=s3://b/y"]),
        ("evidence.py", ["run=x", "corpus=s3://b/y"]),
        ("collect_sources.py", ["out=x.jsonl", "roots=/tmp,s3://b/y"]),
    ],
)
def test_every_path_of_a_script_is_local(script, words):
    main = runpy.run_path(str(ROOT / "scripts" / script))["main"]
    with pytest.raises(ConfigError, match="=s3://b/y: found the scheme s3"):
        main(words)


@pytest.mark.parametrize(
    ("flag", "scheme"),
    [("--path", "gs"), ("--validation", "az"), ("--tokenizer", "s3"), ("--out", "s3")],
)
def test_every_path_of_the_preparation_is_local_or_text_on_s3(flag, scheme, capsys):
    parser = runpy.run_path(str(ROOT / "data" / "prepare.py"))["arguments"]()
    with pytest.raises(SystemExit):
        parser.parse_args([f"{flag}={scheme}://bucket/x"])
    assert f"{flag}: {scheme}://bucket/x: found the scheme {scheme}" in capsys.readouterr().err
    found = parser.parse_args(["--path=~/a", "--out=~/b"])
    assert found.path == str(Path.home() / "a") and found.out == Path.home() / "b"


def numbers(annotation, path: str, bounded: bool = False):
    """Yield every number of a configuration class.

    Each comes with its path, and whether its type has an upper bound.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from numbers(field.annotation, f"{path}.{name}", has_bound(field.metadata))
    elif origin is Annotated:
        yield from numbers(inner[0], path, bounded or has_bound(inner[1:]))
    elif annotation in (int, float):
        yield path, bounded
    else:
        for one in inner:
            yield from numbers(one, path, bounded)


def has_bound(metadata) -> bool:
    parts = [part for item in metadata for part in getattr(item, "metadata", None) or [item]]
    return any(getattr(part, "le", None) or getattr(part, "lt", None) for part in parts)


def test_every_number_has_an_upper_bound():
    """Add ``le=`` to the class of a new number, or a line to ``pdn/training/limits.py``.

    The line gives the reason why it has no bound.
    """
    found = set(numbers(RunConfig, ""))
    assert len(found) > 60
    assert not {path for path, bounded in found
                if not bounded and path.rpartition(".")[2] not in LIMITS}  # fmt: skip
