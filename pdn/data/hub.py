"""Datasets on the Hugging Face hub, read in their own order without downloading them whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from pdn.data.documents import BATCH_CHARACTERS, BATCH_DOCUMENTS, Batch
from pdn.data.failures import WAYS_OUT, chain, is_passing, switched_off, unanswered
from pdn.data.parquet import holds_text
from pdn.data.row import SET_FIELD, BadRow, text_of
from pdn.errors import DataError, DataStorageError

NO_COLUMN = re.compile(r"No match for FieldRef\.Name\((.*?)\) in (.*)", re.S)  # pyarrow's words
NOT_TEXT = "\0pdn: not text: "
"""What stands for a value that is no text, before its type, between `datasets` and `Hub`."""


class Hub:
    """Reads a dataset on the Hugging Face hub in its own order, without downloading it whole.

    The cursor is the state of `datasets`' iterator, which is exact as long as no shuffle buffer is
    used.

    Args:
        load: makes the iterable dataset; called again after a failure.
        label, revision, split, text_field: what is read.
        skip_bad_rows: leave out rows that cannot be used, and count them, instead of stopping.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        label: str,
        revision: str | None,
        split: str,
        text_field: str,
        *,
        skip_bad_rows: bool = False,
    ):
        self._load, self.label, self.revision, self.split, self.text_field = (
            load,
            label,
            revision,
            split,
            text_field,
        )
        self.skip_bad_rows = skip_bad_rows

    def identity(self) -> dict[str, Any]:
        found = {
            "kind": "hub",
            "name": self.label,
            "revision": self.revision,
            "split": self.split,
            "text_field": self.text_field,
        }
        return found | ({"on_bad_row": "skip"} if self.skip_bad_rows else {})

    def describe(self) -> str:
        return f"{self.label}, {self.split}, at {self.revision}"

    def batches(self, cursor: dict[str, Any] | None) -> Iterator[Batch]:
        dataset = self._load()
        if cursor is not None:
            dataset.load_state_dict(json.loads(cursor["state"]))
        begin, pending, characters = cursor or {"state": json.dumps(dataset.state_dict())}, [], 0
        places: list[int] = []
        bad: list[str] = []
        for number, row in enumerate(dataset):
            text = self._text(row, number)
            if isinstance(text, BadRow):
                if not self.skip_bad_rows:
                    raise text
                bad.append(text.args[0])
            elif text:
                pending.append(text)
                places.append(number)
                characters += len(text)
            full = characters >= BATCH_CHARACTERS or len(pending) >= BATCH_DOCUMENTS
            if full or len(bad) >= BATCH_DOCUMENTS:
                yield Batch(begin, pending, None, tuple(bad), self._where(places))
                begin, pending, characters = {"state": json.dumps(dataset.state_dict())}, [], 0
                places, bad = [], []
        if pending or bad:
            yield Batch(begin, pending, None, tuple(bad), self._where(places))

    def _text(self, row: dict[str, Any], number: int) -> str | BadRow:
        if self.text_field not in row:
            return BadRow(
                "DATA-FIELD",
                f"{self.label}: no field {self.text_field!r}; found {sorted(row)}; {SET_FIELD}, to "
                "one of them",
            )
        where = f"row {number} of this reading"
        value = row[self.text_field]
        if isinstance(value, str) and value.startswith(NOT_TEXT):
            kind = value.removeprefix(NOT_TEXT)
            return BadRow(
                "DATA-FIELD",
                f"{self.label}: {where}: {self.text_field!r} is {kind}, expected a string; "
                f"{SET_FIELD}",
            )
        text = text_of(value, self.label, where, self.text_field)
        return text.removeprefix("\ufeff") if isinstance(text, str) else text

    def _where(self, places: list[int]) -> Callable[[int], str]:
        return lambda index: f"{self.label}: row {places[index]} of this reading"


def hub(
    name: str,
    config: str | None,
    revision: str | None,
    split: str,
    text_field: str,
    *,
    skip_bad_rows: bool = False,
) -> Hub:
    """Return a hub dataset at a pinned revision.

    The hub's client reads `HF_TOKEN` from the environment.

    Args:
        name: ``owner/name`` of the dataset.
        config: its configuration, if it has several.
        revision: commit, branch or tag.
        split: of the dataset.
        text_field: column of the text.
        skip_bad_rows: leave out and count rows that cannot be used, instead of stopping.
    """

    def load():
        import datasets
        from datasets import config as client

        # The client alone would try for twenty minutes; the pipeline limits the retries itself.
        client.STREAMING_READ_MAX_RETRIES = 2
        client.STREAMING_READ_RETRY_INTERVAL = 1
        client.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 1
        client.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 1
        try:
            builder = datasets.load_dataset_builder(name, config, revision=revision)
            _read_only(builder, text_field)
            return builder.as_streaming_dataset(split=split)
        except Exception as error:
            raise explained(error, name, revision, split) from error

    label = f"{name}/{config}" if config else name
    return Hub(load, label, revision, split, text_field, skip_bad_rows=skip_bad_rows)


def _read_only(builder, field: str) -> None:
    """Have a `datasets` builder read one column, where its format allows that.

    A column that is not used may change its type from file to file.
    """
    import datasets
    from datasets.packaged_modules.json.json import Json

    cast = getattr(builder, "_cast_table", None)
    if hasattr(builder.config, "columns"):
        features = builder.info.features
        if features is None or field in features:
            builder.config.columns = [field]
        if cast is not None:
            builder._cast_table = lambda table: cast(_marked(table, field))
    elif isinstance(builder, Json):
        features = datasets.Features({field: datasets.Value("string")})
        own = builder._cast_table

        def cast_text(pa_table, json_field_paths=()):
            if field not in pa_table.column_names:
                raise BadRow(
                    "DATA-FIELD",
                    f"{builder.repo_id or builder.dataset_name}: no field {field!r}; found "
                    f"{sorted(pa_table.column_names)}; {SET_FIELD}, to one of them",
                )
            encoded = any(list(path) == [field] for path in json_field_paths)
            return own(_marked(pa_table.select([field]), field, encoded=encoded))

        builder._cast_table = cast_text
        builder.info.features = features


def _marked(table, field: str, *, encoded: bool = False):
    """Return a table whose column of texts has a mark, `NOT_TEXT`, for each value that is no text.

    `datasets` would make text of it: of a number its digits, and where one row of a .jsonl file is
    no string it gives every string of the file as JSON, in quotes.

    Args:
        table: of `pyarrow`.
        field: the column.
        encoded: each of its values is JSON.
    """
    import pyarrow as pa

    number = table.column_names.index(field) if field in table.column_names else None
    if number is None:
        return table
    column = table.column(number)
    if encoded:
        values = [None if value is None else json.loads(value) for value in column.to_pylist()]
    elif holds_text(column.type):
        return table
    else:
        values = column.to_pylist()
    texts = [
        value if value is None or isinstance(value, str) else f"{NOT_TEXT}{type(value).__name__}"
        for value in values
    ]
    return table.set_column(number, field, pa.array(texts, pa.large_string()))


def explained(error: Exception, name: str, revision: str | None, split: str) -> DataError:
    """Return why a hub dataset cannot be opened, as an error that says what helps.

    Args:
        error: what the hub's client raised.
        name, revision, split: of the dataset; no revision before its newest commit is known.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, DataError):
        return error
    causes, at = chain(error), name if revision is None else f"{name}@{revision}"
    missing_column = next((found for e in causes if (found := NO_COLUMN.search(str(e)))), None)
    if missing_column:
        return _no_column(name, *missing_column.groups())
    # `datasets` may cut off the cause, and then only its words are left.
    missing = any(type(e).__name__ == "DatasetNotFoundError" for e in causes)
    gated = missing and "gated dataset" in str(error)
    gone = missing and "cannot be accessed" in str(error)
    if gated or any(isinstance(e, GatedRepoError) for e in causes):
        return DataError(
            "HUB-GATED",
            f"{at}: gated; expected an account that may read it: accept its terms at "
            f"https://huggingface.co/datasets/{name} and set HF_TOKEN, {WAYS_OUT}",
        )
    # A missing repository is an HTTP error, too: check for it before errors that may pass.
    if gone or any(isinstance(e, RepositoryNotFoundError) for e in causes):
        return DataError(
            "HUB-GONE",
            f"{at}: found no such dataset on the hub, or a private one; expected one that may be "
            f"read: check the name, set HF_TOKEN if it is private, {WAYS_OUT}",
        )
    if any(isinstance(e, RevisionNotFoundError) for e in causes):
        return DataError(
            "HUB-REVISION",
            f"{at}: the hub has this dataset, but no such revision; expected a commit, branch or "
            f"tag of it: correct data.revision, {WAYS_OUT}",
        )
    # What the client says of a hub that did not answer; `datasets` reports it as a missing file.
    if "LocalEntryNotFoundError" in str(error) or is_passing(error):
        switch = switched_off(error)
        fix = f"unset {switch}" if switch else "check the network"
        return DataStorageError(
            "HUB-UNREACHABLE",
            f"{name}: the hub {unanswered(error)}; expected its answer: {fix}, {WAYS_OUT}",
        )
    return DataError(
        "HUB-DATASET",
        f"{at} split {split!r}: {error}; check dataset, revision, split and HF_TOKEN",
    )


def _no_column(name: str, field: str, schema: str) -> DataError:
    """Return what the reader of parquet means; ``schema`` is its list, one column a line, with
    columns of its own that begin with two underscores.
    """
    columns = re.findall(r"^(?!__)(\S[^:\n]*): ", schema, re.M)
    return DataError(
        "DATA-FIELD",
        f"{name}: no column {field!r}; found {sorted(columns)}; {SET_FIELD}, to one of them",
    )
