"""`kind: stream`, before its tokeniser starts: from a configuration to a directory ready for it.

The source is looked at, so that what is not to be had is said within seconds; its validation set is
tokenised and held out; and the directory gets its name from all that its shards depend on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path

from pdn.data import files
from pdn.data.config import NO_VALIDATION, StreamSource
from pdn.data.documents import Files, Source, discover
from pdn.data.failures import is_passing
from pdn.data.holdout import MOST, documents_needed, validation_tokens
from pdn.data.hub import Hub, explained, hub
from pdn.data.prepare import Plan, Tokenisation, hashes_of, require_text_survives
from pdn.data.retry import Retrying
from pdn.data.shards import VERSION, read_index, read_manifest
from pdn.data.tokenizer import TokenizerFile, load
from pdn.errors import DataError
from pdn.wording import Tell, counted

PREFLIGHT_PAUSES = (1, 2)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Describes a stream's directory that is ready for its tokeniser."""

    root: Path
    source: Files | Hub
    tokenizer: TokenizerFile
    plan: Plan
    validation: Path | None


def resolve(config: StreamSource, cache_dir: Path, tell: Tell) -> Prepared:
    """Name the stream's directory and tokenise its validation set, whose documents never train.

    Args:
        config: of the stream.
        cache_dir: where directories of streams are kept.
        tell: called with a line about what is being done.
    """
    source = _train_source(config)  # first: what is wrong with a path is said without a network
    tokenizer = load(
        config.tokenizer, revision=config.tokenizer_revision, eos_token=config.eos_token
    )
    held = _validation_source(config, source)
    key = {
        "version": VERSION,
        "source": source.identity(),
        "validation": None if held is None else [part.identity() for part in held],
        "tokenizer": tokenizer.identity.sha256,
        "eos": tokenizer.eos_id,
        "shard_tokens": config.shard_tokens,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    root = cache_dir / files.folder_name(f"stream-{source.label.replace('/', '-')}", digest)
    with files.making(root):
        root.mkdir(parents=True, exist_ok=True)
    with files.lock(root / "validation.lock", tell):
        preflight(source, tokenizer, root, config.max_lost_characters, tell)
    plan = Plan(config.shard_tokens)
    if held is not None:
        held_out, held_plan = held
        with files.lock(root / "validation.lock", tell):
            work = Tokenisation(
                retrying(held_out, config, tell),
                root / "validation",
                tokenizer,
                held_plan,
                1,
                flat=True,
            )
            for _ in work.run(lambda p: tell("validation set: " + p.line())):
                pass
        plan = Plan(config.shard_tokens, exclude=hashes_of(root / "validation"))
    return Prepared(root, source, tokenizer, plan, root / "validation" if held else None)


def preflight(
    source: Files | Hub, tokenizer: TokenizerFile, root: Path, most_lost: float, tell: Tell
) -> None:
    """Read a little of the source, with few retries: what is not to be had is said within seconds.

    Args:
        source: a hub dataset or local files, without retries of its own.
        tokenizer: that must not lose its text.
        root: where it is remembered that all was well.
        most_lost: share of the characters that may be lost.
        tell: called with lines for the user.

    Raises:
        DataError: it is missing, gated or damaged, or the tokenizer does not fit it.
        DataStorageError: it cannot be reached.
    """
    for pause in (*PREFLIGHT_PAUSES, None):
        try:
            require_text_survives(source, tokenizer, root, most_lost, tell)
            return
        except Exception as error:
            if pause is None or not is_passing(error):
                if isinstance(source, Hub):
                    raise explained(error, source.label, source.revision, source.split) from error
                raise
            tell(f"{source.label}: {type(error).__name__}: {error}; trying again in {pause} s")
            time.sleep(pause)


def validates_on_its_own(config: StreamSource) -> bool:
    """Return whether the validation set is the first documents of what would train."""
    elsewhere = config.validation is not None or config.validation_split is not None
    return not elsewhere and config.validation_documents > 0


def require_rest(prepared: Prepared, train: int, seq_len: int) -> None:
    """Refuse to hold out more than half of a source that has ended.

    Args:
        prepared: the stream, whose validation set is its own first documents.
        train: tokens of all other documents.
        seq_len: tokens of a sample.

    Raises:
        DataError: with the number of documents that would do, if there is one.
    """
    assert prepared.validation is not None
    manifest = read_manifest(prepared.validation)
    half = MOST * (manifest.tokens + train)
    if manifest.tokens <= half:
        return
    before, ends = 0, []
    for entry in manifest.shards:
        ends += (before + read_index(prepared.validation, entry, manifest.dtype)[0]).tolist()
        before = ends[-1]
    needed = validation_tokens(seq_len)
    fewer = sum(end <= half for end in ends)
    if needed <= half:  # with less than that, more documents would be held out again
        enough = 1 + sum(end < needed for end in ends)
        fewer = enough if enough <= fewer else 0
    raise DataError(
        "VALIDATION-SHARE",
        f"{prepared.source.label}: the first {counted(len(ends), 'document')} "
        f"(data.validation_documents) would be validated on, {manifest.tokens:,} of all "
        f"{manifest.tokens + train:,} tokens; expected at most half: give "
        f"{f'data.validation_documents={fewer}, ' if fewer else ''}data.validation with text of "
        "its own, or data=text, which cuts a document",
    )


def wider_split(prepared: Prepared, config: StreamSource, seq_len: int, tell: Tell) -> str | None:
    """Return ``N documents`` where more than `validation_documents` are needed, or None.

    That is where the first documents are short: the set then has fewer samples than it must.
    """
    if prepared.validation is None or config.validation is not None:
        return None
    needed = validation_tokens(seq_len)
    held = _validation_source(config, prepared.source)
    assert prepared.validation is not None and held is not None  # see above
    if read_manifest(prepared.validation).tokens >= needed:
        return None
    source, _ = held
    own = source is not prepared.source
    documents = documents_needed(
        retrying(source, config, tell), prepared.tokenizer.build(), needed, whole=own
    )
    if documents <= config.validation_documents:
        return None
    tell(
        f"holding out {counted(documents, 'document')} for validation, as the first "
        f"{config.validation_documents:,} have fewer than {needed:,} tokens"
    )
    return counted(documents, "document")


def retrying(source: Source, config: StreamSource, tell: Tell) -> Retrying:
    return Retrying(
        source, retry_seconds=config.retry_seconds, stall_seconds=config.stall_seconds, tell=tell
    )


def _train_source(config: StreamSource) -> Files | Hub:
    skip = config.skip_bad_rows
    if config.path is not None:
        return discover(config.path, config.text_field, skip_bad_rows=skip)
    assert config.dataset is not None  # as the config demands without a path
    return hub(
        config.dataset,
        config.dataset_config,
        config.revision,
        config.split,
        config.text_field,
        skip_bad_rows=skip,
    )


def _validation_source(config: StreamSource, train: Files | Hub) -> tuple[Files | Hub, Plan] | None:
    """Return where validation documents come from and the plan for them; None if there are none."""
    if config.validation == NO_VALIDATION:
        return None
    if config.validation is not None:
        return discover(
            config.validation, config.text_field, skip_bad_rows=config.skip_bad_rows
        ), Plan(config.shard_tokens)
    if config.validation_documents == 0:
        return None
    plan = Plan(config.shard_tokens, max_documents=config.validation_documents)
    if config.validation_split is not None:
        assert config.dataset is not None
        return hub(
            config.dataset,
            config.dataset_config,
            config.revision,
            config.validation_split,
            config.text_field,
            skip_bad_rows=config.skip_bad_rows,
        ), plan
    return train, plan
