"""The configuration of the data, one class per `kind`.

Values and units stand in configs/data/<kind>.yaml. This module imports only the base of
configurations and the corpora's entries, so that the run's configuration can use it.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from pdn.config import Strict
from pdn.data.corpora import filled

NO_VALIDATION = "none"
"""What `validation` says for training without a validation set."""
LARGEST_TRAINED_VOCABULARY = 1 << 20
"""The largest vocabularies in use have about a million entries."""
MOST_PROCESSES = 1024
UNASKED_EPOCHS = 4.0
"""Of the embedded text: more of it teaches little, and nobody means to train on it for long."""
UNLIMITED = 1e6

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Processes = Annotated[int, Field(ge=1, le=MOST_PROCESSES)]


_SETTLED_ELSEWHERE = ("seed", "unit_tokens", "pool_units", "carry_windows", "carry_horizon")


class _Identified(Strict):
    """Tells what of it defines the data."""

    model_config = ConfigDict(validate_default=True)

    operational: ClassVar[frozenset[str]] = frozenset()
    """Names of keys that change speed, places or patience, but never which token comes when."""

    def identity(self) -> dict:
        """Return what defines the content and the order of the data, as JSON values.

        That is every key but the operational ones.
        """
        found = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            # null means what is known otherwise, as the run's seed, which is part of its identity
            # already; or what runs did before there was the key
            unset = name in _SETTLED_ELSEWHERE and value is None
            if name in self.operational or unset:
                continue
            if isinstance(value, _Identified):
                value = value.identity()
            elif isinstance(value, dict):
                value = {
                    k: v.identity() if isinstance(v, _Identified) else v for k, v in value.items()
                }
            found[name] = value
        return found


class _Loading(_Identified):
    """Adds the keys that every kind has: the windows, the epochs, and the loader."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {"workers", "prefetch_steps", "timeout_seconds", "max_epochs"}
    )

    # Orders the samples; null: the run's seed. It has a default since older runs recorded none.
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    seq_len: Annotated[int, Field(ge=2)]  # tokens of a sample
    max_epochs: Annotated[float, Field(gt=0)] | None
    workers: Annotated[int, Field(ge=0, le=64)]
    prefetch_steps: Count
    timeout_seconds: Annotated[float, Field(gt=0)]

    @property
    def epochs_allowed(self) -> float:
        """Return how often a source may be read; null repeats only what the user gave."""
        return UNLIMITED if self.max_epochs is None else self.max_epochs


def _metric_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(
            f"{name!r}: expected letters, digits, and _ . - after the first; it becomes part of "
            "names of metrics, validation/<name>/loss; rename it"
        )
    return name


def _place(path: str) -> str:
    if not path.strip():
        raise ValueError(
            "found an empty path; expected a file or directory; write . for the working directory"
        )
    return path


def _no_validation(value: object) -> object:
    """Refuse what is meant to say that there is no validation set and is not the word for it."""
    text = str(value).lower()
    meant = value is False or text in ("none", "null", "false", "no", "off")
    if meant and value not in (None, NO_VALIDATION):
        raise ValueError(
            f"found {value!r}; expected a file or directory, or the word for no validation set; "
            f"write {NO_VALIDATION}"
        )
    return value


def _cache(path: str) -> str:
    if not path.strip():
        raise ValueError(
            "found an empty path; expected a directory for caches; unset PDN_CACHE for "
            "~/.cache/pdn, or give data.cache_dir"
        )
    return path


Name = Annotated[str, AfterValidator(_metric_name)]
Place = Annotated[str, AfterValidator(_place)]
Validation = Annotated[Place | None, BeforeValidator(_no_validation)]


class NamedValidation(_Identified):
    """Names a text that a run is validated on beside the data's own validation set."""

    path: Place
    text_field: str = Field("text", min_length=1)  # of .jsonl and .parquet


class _Rows(_Identified):
    """Says what is done about rows and characters that cannot be used.

    Older runs recorded neither.
    """

    operational: ClassVar[frozenset[str]] = frozenset({"on_bad_row", "max_lost_characters"})

    on_bad_row: Literal["stop", "skip"] = "stop"
    max_lost_characters: Annotated[float, Field(ge=0, le=1)] = 0.01  # share of a sample

    @property
    def skip_bad_rows(self) -> bool:
        return self.on_bad_row == "skip"


class _Packing(_Identified):
    """Says how documents share a window, where prepared data are kept, and what else validates."""

    operational: ClassVar[frozenset[str]] = frozenset({"cache_dir", "validation_sets", "repeat"})

    # Older runs recorded none of these five.
    # U: tokens of the pieces whose order is random; null: seq_len, in a branch its parent's
    unit_tokens: Count | None = None
    # P: units whose windows are permuted together; null: 1, in a branch its parent's
    pool_units: Count | None = None
    # what if a new length does not divide the unit
    repeat: Literal["refuse", "allow"] = "refuse"
    # R: consecutive windows that a row of the batch takes with the recurrences' states carried on;
    # null: each starts from zero
    carry_windows: Annotated[int, Field(ge=2)] | None = None
    # of them, in one step, with the gradient through the states; divides carry_windows; null: 1
    carry_horizon: Count | None = None
    cache_dir: Annotated[str, AfterValidator(_cache)]
    validation_sets: dict[Name, NamedValidation] | None
    document_isolation: bool
    isolation_min_tokens: Count

    @model_validator(mode="after")
    def _whole_horizons(self):
        windows, horizon = self.carry_windows, self.carry_horizon
        if horizon is not None and windows is None:
            raise ValueError(
                f"carry_horizon = {horizon} without carry_windows: no state is carried; expected "
                "both or neither"
            )
        if windows is not None and windows % (horizon or 1):
            raise ValueError(
                f"carry_horizon = {horizon} does not divide carry_windows = {windows}; expected "
                "whole steps of a segment's windows"
            )
        return self


class TextSource(_Rows):
    """Reads text files, which are tokenised into the cache before the first step."""

    operational: ClassVar[frozenset[str]] = _Rows.operational | {"processes"}

    kind: Literal["text"]
    path: Place | None
    text_field: str = Field(min_length=1)
    max_bytes: Count | None
    tokenizer: str | None
    tokenizer_revision: str | None
    vocab_size: Annotated[int, Field(ge=257, le=LARGEST_TRAINED_VOCABULARY)] | None
    eos_token: str | None
    validation: Validation
    validation_fraction: Annotated[float, Field(ge=0, lt=1)]
    processes: Processes
    shard_tokens: Count

    @property
    def share(self) -> float:
        """Return the share of documents to validate on where no files are named for that."""
        return 0.0 if self.validation == NO_VALIDATION else self.validation_fraction

    @model_validator(mode="after")
    def _a_trained_tokenizer_has_a_size(self):
        if self.tokenizer is None and self.vocab_size is None:
            raise ValueError(
                "vocab_size is null: it is needed when tokenizer is null, as one is trained then; "
                "e.g. 4096"
            )
        return self


class ShardsSource(_Identified):
    """Reads directories that data/prepare.py has written."""

    kind: Literal["shards"]
    path: Place
    validation: Validation


class StreamSource(_Rows):
    """Reads a hub dataset or a local directory, tokenised in the background while training runs."""

    operational: ClassVar[frozenset[str]] = _Rows.operational | {
        "corpus",
        "processes",
        "max_cache_bytes",
        "retry_seconds",
        "stall_seconds",
    }

    kind: Literal["stream"]
    corpus: str | None = None  # name in data/corpora, whose entry gives what is null here
    path: Place | None
    dataset: str | None
    dataset_config: str | None
    revision: str | None
    split: str
    text_field: str = Field(min_length=1)
    tokenizer: str
    tokenizer_revision: str | None
    eos_token: str | None
    validation: Validation
    validation_split: str | None
    validation_documents: CountOrZero
    processes: Processes
    shard_tokens: Count
    block_shards: Count
    max_cache_bytes: Count
    retry_seconds: Annotated[float, Field(gt=0)]
    stall_seconds: Annotated[float, Field(gt=0)]

    @model_validator(mode="before")
    @classmethod
    def _from_corpus(cls, values):
        return filled(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _one_source(self):
        if (self.path is None) == (self.dataset is None):
            raise ValueError(
                "give path (a local directory) or dataset (a hub id), one of them; found "
                f"{self.path=}, {self.dataset=}"
            )
        if self.dataset is not None and self.revision is None and self.corpus is None:
            raise ValueError(
                "revision is null: a hub dataset needs a pinned revision (a commit hash), so that "
                "the run can be repeated"
            )
        smallest = 4 * 4 * self.block_shards * self.shard_tokens
        if self.max_cache_bytes < smallest:
            raise ValueError(
                f"max_cache_bytes={self.max_cache_bytes}: must hold four blocks, {smallest} bytes "
                f"with block_shards={self.block_shards} and shard_tokens={self.shard_tokens}"
            )
        if self.path is not None and self.validation_split is not None:
            raise ValueError(
                "validation_split is for hub datasets; with path, give validation (a path) or "
                "validation_documents"
            )
        return self


Weight = Annotated[float, Field(gt=0)]


class WeightedText(TextSource):
    weight: Weight


class WeightedShards(ShardsSource):
    weight: Weight


class WeightedStream(StreamSource):
    weight: Weight


WeightedSource = Annotated[
    WeightedText | WeightedShards | WeightedStream, Field(discriminator="kind")
]


class TextConfig(TextSource, _Packing, _Loading):
    operational: ClassVar[frozenset[str]] = (
        TextSource.operational | _Packing.operational | _Loading.operational
    )

    @property
    def epochs_allowed(self) -> float:
        if self.max_epochs is None and self.path is None:
            return UNASKED_EPOCHS
        return super().epochs_allowed


class ShardsConfig(ShardsSource, _Packing, _Loading):
    operational: ClassVar[frozenset[str]] = _Packing.operational | _Loading.operational


class StreamConfig(StreamSource, _Packing, _Loading):
    operational: ClassVar[frozenset[str]] = (
        StreamSource.operational | _Packing.operational | _Loading.operational
    )


class MixtureConfig(_Packing, _Loading):
    operational: ClassVar[frozenset[str]] = _Packing.operational | _Loading.operational

    kind: Literal["mixture"]
    sources: Annotated[dict[Name, WeightedSource], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_set_a_name(self):
        for name in self.sources.keys() & (self.validation_sets or {}).keys():
            raise ValueError(
                f"validation_sets.{name}: sources.{name} has that name for its own validation set; "
                "rename one"
            )
        return self


class MqarConfig(_Loading):
    """Generates multi-query associative recall (arXiv 2312.04927) on the fly."""

    kind: Literal["mqar"]
    vocab_size: Annotated[int, Field(ge=4)]
    num_pairs: Count
    power_a: Annotated[float, Field(gt=0)]
    random_filler: bool
    train_examples: Count
    validation_examples: CountOrZero

    @model_validator(mode="after")
    def _fits(self):
        if self.seq_len % 2:
            raise ValueError(
                f"seq_len={self.seq_len}: must be even, as a gap counts pairs of positions"
            )
        if 4 * self.num_pairs > self.seq_len:
            raise ValueError(
                f"num_pairs={self.num_pairs} needs seq_len >= {4 * self.num_pairs}; found "
                f"{self.seq_len}"
            )
        if self.vocab_size <= self.seq_len or self.num_pairs > self.vocab_size // 2 - 1:
            raise ValueError(
                f"vocab_size={self.vocab_size}: must exceed seq_len={self.seq_len} and hold "
                f"{self.num_pairs} keys"
            )
        return self


DataConfig = Annotated[
    TextConfig | ShardsConfig | StreamConfig | MixtureConfig | MqarConfig,
    Field(discriminator="kind"),
]
