"""`kind: text`: local text, or the standard library, tokenised into the cache once and shared by
all processes of a node.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from pdn.data.config import TextSource
from pdn.data.documents import Files, discover, standard_library
from pdn.data.files import lock, publish_bytes, remove_temporary
from pdn.data.prepare import Plan, Tokenisation, hashes_of
from pdn.data.shards import MANIFEST, TOKENIZER, VERSION, read_manifest
from pdn.data.tokenizer import TokenizerFile, load, parse, train
from pdn.errors import DataError

VALIDATION_SHARD = 1 << 24  # tokens
TRAINING_BYTES = 16_000_000
"""Text that a tokenizer is trained on; of a larger corpus, every k-th document."""


def prepare_text(
    config: TextSource, cache_dir: Path, progress: Callable[[str], None] | None
) -> tuple[Path, Path | None]:
    """Tokenise the corpus of `config` unless the cache has it.

    Returns:
        the train directory and the validation directory (None without a validation set).
    """
    corpus, validation = corpora(config)
    key = {
        "version": VERSION,
        "corpus": corpus.identity(),
        "validation": validation.identity() if validation else config.validation_fraction,
        "tokenizer": _tokenizer_key(config),
        "eos_token": config.eos_token,
        "plan": Plan(config.shard_tokens).identity(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    root = cache_dir / f"{corpus.label}-{digest}"
    with lock(root / "lock", progress):
        remove_temporary(root)
        tokenizer = _tokenizer(config, corpus, root, progress)
        report = (lambda p: progress(p.line())) if progress else None
        exclude, held_out = None, None
        if validation is not None:
            held_out = root / "validation"
            work = Tokenisation(
                validation,
                held_out,
                tokenizer,
                Plan(config.shard_tokens),
                config.processes,
                flat=True,
            )
            for _ in work.run(report):
                pass
            exclude = hashes_of(held_out)
        fraction = 0.0 if validation is not None else config.validation_fraction
        plan = Plan(config.shard_tokens, validation_fraction=fraction, exclude=exclude)
        for _ in Tokenisation(corpus, root, tokenizer, plan, config.processes).run(report):
            pass
    if fraction and (root / "validation" / MANIFEST).exists():
        held_out = root / "validation"
    return root / "train", held_out


def prepare_validation(
    text: Files, tokenizer: TokenizerFile, cache_dir: Path, progress: Callable[[str], None] | None
) -> Path:
    """Tokenise `text` unless the cache has it; returns the directory of its shards."""
    key = {
        "version": VERSION,
        "text": text.identity(),
        "tokenizer": tokenizer.identity.sha256,
        "eos": tokenizer.eos_id,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    root = cache_dir / f"validation-{text.label}-{digest}"
    with lock(root / "lock", progress):
        work = Tokenisation(
            text, root / "validation", tokenizer, Plan(VALIDATION_SHARD), 1, flat=True
        )
        for _ in work.run((lambda p: progress(p.line())) if progress else None):
            pass
    return root / "validation"


def tokenizer_of(split: Path) -> TokenizerFile:
    """The tokenizer of the shards in `split`."""
    manifest = read_manifest(split)
    return TokenizerFile(
        manifest.tokenizer.name,
        (split / TOKENIZER).read_bytes(),
        manifest.vocab_size,
        manifest.eos_id,
    )


def corpora(config: TextSource) -> tuple[Files, Files | None]:
    """The training files and, unless the split is by hash, the validation files.

    Files that `validation` names, or, if it is null, whose names start with "valid", never train.
    """
    if config.path is None:
        corpus = standard_library(config.max_bytes or 1 << 62)
        return corpus, discover(config.validation, config.text_field) if config.validation else None
    corpus = discover(config.path, config.text_field)
    if config.validation is not None:
        validation = discover(config.validation, config.text_field)
    else:
        named = [f for f in corpus.files if f.name.lower().startswith("valid")]
        validation = (
            Files(corpus.root, named, config.text_field, corpus.label)
            if named and len(named) < len(corpus.files)
            else None
        )
    held = {f.resolve() for f in validation.files} if validation else set()
    files = [f for f in corpus.files if f.resolve() not in held]
    if not files:
        raise DataError(
            "DATA-OVERLAP",
            f"{corpus.root}: every training file is also a validation file; give other files in "
            "data.validation",
        )
    return Files(
        corpus.root, _capped(files, config.max_bytes), config.text_field, corpus.label
    ), validation


def _capped(files: list[Path], max_bytes: int | None) -> list[Path]:
    total, kept = 0, []
    for file in files:
        total += file.stat().st_size
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


def _tokenizer(
    config: TextSource, corpus: Files, root: Path, progress: Callable[[str], None] | None
) -> TokenizerFile:
    if config.tokenizer is not None:
        return load(
            config.tokenizer, revision=config.tokenizer_revision, eos_token=config.eos_token
        )
    path = root / TOKENIZER
    if not path.exists():
        if progress:
            progress(f"training a tokenizer of {config.vocab_size:,} entries on {corpus.label}")
        publish_bytes(path, train(_sample(corpus), config.vocab_size).content)
    content = path.read_bytes()
    vocab = parse(content, str(path)).get_vocab(with_added_tokens=True)
    trained = load(str(path), revision=None, eos_token=config.eos_token)
    return TokenizerFile(
        f"bpe-{config.vocab_size}", content, max(vocab.values()) + 1, trained.eos_id
    )


def _sample(corpus: Files) -> Iterator[str]:
    stride = max(1, -(-corpus.identity()["bytes"] // TRAINING_BYTES))
    number = 0
    for batch in corpus.batches(None):
        for text in batch.texts:
            if number % stride == 0:
                yield text
            number += 1
