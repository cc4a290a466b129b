"""`kind: text`: local text, or the standard library, tokenised into the cache once a node.

All processes of a node share it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pdn.data.codec import MAX_LOST, read_tokenizer_file
from pdn.data.config import NO_VALIDATION, TextSource
from pdn.data.documents import Files, discover, standard_library, status_of
from pdn.data.files import folder_name, lock, making, publish_bytes, remove_temporary
from pdn.data.holdout import held_out as choose
from pdn.data.holdout import tokens_needed
from pdn.data.prepare import Plan, Tokenisation, hashes_of, require_text_survives
from pdn.data.shards import MANIFEST, TOKENIZER, VERSION, read_manifest
from pdn.data.tokenizer import TokenizerFile, load, train
from pdn.errors import DataError
from pdn.store.local import remove_tree
from pdn.wording import Tell

BY_HASH = "share by hash"
BY_TOKENS = "tokens by hash"
VALIDATION_SHARD = 1 << 24  # tokens
TRAINING_BYTES = 16_000_000
"""Text that a tokenizer is trained on; of a larger corpus, every k-th document."""


class PreparedText(NamedTuple):
    train: Path
    validation: Path | None
    split: str | None
    """Which rule beside the share by hash chose the validation documents; part of the data's
    fingerprint.
    """
    files: str
    """How many were read, and what was left out."""


def prepare_text(
    config: TextSource,
    cache_dir: Path,
    tell: Tell,
    *,
    seq_len: int = 1,
    rule: str | None = None,
) -> PreparedText:
    """Tokenise the corpus of `config` unless the cache has it.

    Args:
        config: of the text.
        cache_dir: that all processes of a node share.
        tell: called with lines for the user.
        seq_len: tokens of a sample, of which a validation set has a certain number.
        rule: that a run was begun with: `BY_HASH`, however small the validation set is then, as
            in runs from before there was another, or a former `PreparedText.split`; None chooses.

    Raises:
        DataError: the corpus is missing or damaged, or the tokenizer does not fit it.
    """
    corpus, validation = corpora(config)
    key = {
        "version": VERSION,
        "corpus": corpus.identity(),
        "validation": validation.identity() if validation else config.share,
        "tokenizer": _tokenizer_key(config),
        "eos_token": config.eos_token,
        "plan": Plan(config.shard_tokens).identity(),
    }
    root = cache_dir / folder_name(corpus.label, _digest(key))
    if validation is not None or config.share == 0:
        held_out = _prepare(config, corpus, validation, root, tell, Plan(config.shard_tokens))
        return PreparedText(root / "train", held_out, None, corpus.describe())
    plan = Plan(config.shard_tokens, validation_fraction=config.share)
    held_out = _prepare(config, corpus, None, root, tell, plan)
    needed = _tokens_of(rule) if rule is not None else tokens_needed(root, config.share, seq_len)
    if needed is None:
        return PreparedText(root / "train", held_out, None, corpus.describe())
    rule = f"{needed} {BY_TOKENS}"
    plan = Plan(config.shard_tokens, held_out=choose(root, needed))
    cut = cache_dir / folder_name(corpus.label, _digest(key | {"split": rule}))
    if not (cut / "train" / MANIFEST).exists():
        tell(f"holding out {needed:,} tokens for validation, as {config.share:g} of the documents")
    held_out = _prepare(config, corpus, None, cut, tell, plan, tokenizer_from=root)
    return PreparedText(cut / "train", held_out, rule, corpus.describe())


def _tokens_of(rule: str) -> int | None:
    return None if rule == BY_HASH else int(rule.split()[0])


def _digest(key: dict) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _prepare(
    config: TextSource,
    corpus: Files,
    validation: Files | None,
    root: Path,
    tell: Tell,
    plan: Plan,
    tokenizer_from: Path | None = None,
) -> Path | None:
    """Tokenise into `root` what is not there yet; return the validation directory, if any."""
    split = validation is not None or plan.validation_fraction > 0 or plan.held_out is not None
    held_out = root / "validation" if split else None

    def is_there() -> bool:
        if not (_is_whole(root / "train") and (held_out is None or _is_whole(held_out))):
            return False
        require_text_survives(
            corpus, tokenizer_of(root / "train"), root, config.max_lost_characters, tell
        )
        return True

    if is_there():
        # No lock: the cache may be in a place that cannot be written.
        return held_out
    with lock(root / "lock", tell):
        if is_there():  # made by another process meanwhile, which may be reading it by now
            return held_out
        remove_temporary(root)
        tell(corpus.describe())
        tokenizer = _tokenizer(config, corpus, tokenizer_from or root, tell)
        require_text_survives(corpus, tokenizer, root, config.max_lost_characters, tell)

        def tokenise(source: Files, out: Path, plan: Plan, **keys) -> None:
            work = Tokenisation(source, out, tokenizer, plan, config.processes, **keys)
            for _ in work.run(lambda progress: tell(progress.line())):
                pass

        if validation is not None:
            assert held_out is not None
            tokenise(validation, held_out, plan, flat=True)
            plan = dataclasses.replace(plan, exclude=hashes_of(held_out))
        elif held_out is not None and _is_whole(root / "train"):
            # The validation half of the cache is gone: make both halves again, keep that one.
            again = root / "again"
            with making(again):
                remove_tree(again)
            tokenise(corpus, again, plan)
            with making(held_out):
                remove_tree(held_out)
                os.rename(again / "validation", held_out)
                remove_tree(again)
        tokenise(corpus, root, plan)
    return held_out


def _is_whole(split: Path) -> bool:
    return (split / MANIFEST).exists() and read_manifest(split).complete


def prepare_validation(text: Files, tokenizer: TokenizerFile, cache_dir: Path, tell: Tell) -> Path:
    """Tokenise `text` unless the cache has it; return the directory of its shards.

    Args:
        text: the validation files.
        tokenizer: of the run.
        cache_dir: where prepared data are kept.
        tell: called with a line now and then.
    """
    key = {
        "version": VERSION,
        "text": text.identity(),
        "tokenizer": tokenizer.identity.sha256,
        "eos": tokenizer.eos_id,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    root = cache_dir / folder_name(f"validation-{text.label}", digest)
    if _is_whole(root / "validation"):
        return root / "validation"
    with lock(root / "lock", tell):
        require_text_survives(text, tokenizer, root, MAX_LOST, tell)
        work = Tokenisation(
            text, root / "validation", tokenizer, Plan(VALIDATION_SHARD), 1, flat=True
        )
        for _ in work.run(lambda progress: tell(progress.line())):
            pass
    return root / "validation"


def tokenizer_of(split: Path) -> TokenizerFile:
    """Return the tokenizer of the shards in `split`."""
    manifest = read_manifest(split)
    return TokenizerFile(
        manifest.tokenizer.name,
        read_tokenizer_file(split / TOKENIZER),
        manifest.vocab_size,
        manifest.eos_id,
    )


def corpora(config: TextSource) -> tuple[Files, Files | None]:
    """Return the training files and, unless the split is by hash, the validation files.

    Files that `validation` names, or, if it is null, whose names start with "valid", never train.
    """
    if config.path is None:
        return standard_library(config.max_bytes or 1 << 62), _given(config)
    corpus = discover(config.path, config.text_field, skip_bad_rows=config.skip_bad_rows)
    validation = _given(config)
    if config.validation is None:
        named = [f for f in corpus.files if f.name.lower().startswith("valid")]
        validation = corpus.only(named) if named and len(named) < len(corpus.files) else None
        if validation is not None:
            corpus.left_out["valid*, validated on"] += len(named)
    held = {f.resolve() for f in validation.files} if validation else set()
    files = [f for f in corpus.files if f.resolve() not in held]
    if not files:
        raise DataError(
            "DATA-OVERLAP",
            f"{corpus.root}: every training file is also a validation file; give other files in "
            "data.validation",
        )
    return corpus.only(_capped(files, config.max_bytes)), validation


def _given(config: TextSource) -> Files | None:
    """Return the files that `validation` names, if it names any."""
    if config.validation in (None, NO_VALIDATION):
        return None
    return discover(config.validation, config.text_field, skip_bad_rows=config.skip_bad_rows)


def _capped(files: list[Path], max_bytes: int | None) -> list[Path]:
    total, kept = 0, []
    for file in files:
        total += status_of(file).st_size
        if max_bytes is not None and total > max_bytes and kept:
            break
        kept.append(file)
    return kept


def _tokenizer_key(config: TextSource) -> list:
    if config.tokenizer is None:
        return ["trained", config.vocab_size]
    return [
        load(
            config.tokenizer, revision=config.tokenizer_revision, eos_token=config.eos_token
        ).identity.sha256
    ]


def _tokenizer(config: TextSource, corpus: Files, root: Path, tell: Tell) -> TokenizerFile:
    if config.tokenizer is not None:
        return load(
            config.tokenizer, revision=config.tokenizer_revision, eos_token=config.eos_token
        )
    path = root / TOKENIZER
    if not path.exists():
        assert config.vocab_size is not None  # as the config demands without a tokenizer
        tell(f"training a tokenizer of {config.vocab_size:,} entries on {corpus.label}")
        publish_bytes(path, train(_sample(corpus), config.vocab_size).content)
    trained = load(str(path), revision=None, eos_token=config.eos_token)
    return dataclasses.replace(trained, name=f"bpe-{config.vocab_size}")


def _sample(corpus: Files) -> Iterator[str]:
    stride = max(1, -(-corpus.identity()["bytes"] // TRAINING_BYTES))
    number = 0
    for batch in corpus.batches(None):
        for text in batch.texts:
            if number % stride == 0:
                yield text
            number += 1
