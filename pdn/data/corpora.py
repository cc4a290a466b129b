"""Corpora by name: what data/corpora/<name>.yaml says of a hub dataset, and where it can be had.

This module imports only the base of configurations, so that these can use it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pdn.config import Strict

PLACE = ("dataset", "revision", "dataset_config")
FILLED = (*PLACE, "split", "text_field", "tokenizer", "tokenizer_revision", "eos_token")
"""Keys of a stream that a corpus gives where they are null."""


class Place(Strict):
    """Names a hub dataset at a commit; null: the commit of its first use."""

    dataset: str
    revision: str | None


class Corpus(Strict):
    dataset: str
    revision: str | None
    mirrors: list[Place]
    dataset_config: str | None
    split: str
    text_field: str
    tokenizer: str
    tokenizer_revision: str | None
    eos_token: str | None
    license: str
    size: str

    @property
    def places(self) -> list[Place]:
        """Return where the corpus can be had, in the order in which to try."""
        return [Place(dataset=self.dataset, revision=self.revision), *self.mirrors]


def corpora_root() -> Path:
    """Return the directory of the entries: inside an installed package, else in the checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "corpora"
    return inside if inside.is_dir() else package.parent / "data" / "corpora"


def names() -> list[str]:
    return sorted(path.stem for path in corpora_root().glob("*.yaml"))


@cache
def corpus(name: str) -> Corpus:
    """Read an entry.

    Raises:
        ValueError: there is none, or it is malformed.
    """
    path = corpora_root() / f"{name}.yaml"
    if name not in names():
        raise ValueError(f"{name!r}: no such corpus; expected one of {names()}, or dataset=")
    try:
        return Corpus.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ValueError(f"{path}: {error}; restore the file") from None


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a stream with what its corpus says in place of nulls.

    Of a dataset or a path of the user's own, the place is not filled in, and no mirror stands for
    it.
    """
    if values.get("corpus") is None:
        return values
    entry = corpus(values["corpus"])
    found = dict(values)
    own = values.get("path") is not None or values.get("dataset") not in (None, entry.dataset)
    if own:
        found["corpus"] = None
    for key in FILLED:
        if found.get(key) is None and not (own and key in PLACE):
            found[key] = getattr(entry, key)
    return found
