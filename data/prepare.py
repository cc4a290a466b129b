#!/usr/bin/env python
"""Tokenise text into shards.

    python data/prepare.py (--path P | --dataset ID --revision R) --tokenizer T --out DIR [options]

Writes ``DIR/train`` and, if there are validation documents, ``DIR/validation``; train on them with
``python train.py data=shards data.path=DIR/train data.validation=DIR/validation``. The same command
after an interruption, SIGKILL included, goes on after the last whole shard.
"""

from pdn.cli.process import INTERRUPTED, restore_interrupts  # before all others: see there

# isort: split
import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pdn.data.codec import MAX_LOST
from pdn.data.documents import discover, standard_library
from pdn.data.encoders import text_hashes
from pdn.data.files import try_lock
from pdn.data.holdout import MOST
from pdn.data.hub import hub
from pdn.data.prepare import Plan, Tokenisation, hashes_of
from pdn.data.remote import is_remote, text_copy
from pdn.data.retry import Retrying
from pdn.data.shards import MANIFEST, TOKENIZER, read_manifest
from pdn.data.stream_prepare import preflight
from pdn.data.tokenizer import TokenizerFile, load, train
from pdn.errors import DataError
from pdn.store.s3 import problem_of_url
from pdn.training.limits import no_place
from pdn.wording import counted

VOCABULARY = 32000
console = Console(stderr=True)


def place(path: str) -> str:
    """Return a local path with ``~`` expanded, which shells do not do after ``--out=``."""
    problem = no_place(path)
    if problem is not None:
        raise argparse.ArgumentTypeError(f"{path}: {problem}")
    return os.path.expanduser(path)


def text_place(path: str) -> str:
    """Return the address of text in a bucket, or a local path as `place` does."""
    if not is_remote(path):
        return place(path)
    problem = problem_of_url(path)
    if problem is not None:
        raise argparse.ArgumentTypeError(f"{path}: {problem}")
    return path


def local(path: str) -> str:
    """Return a local path: of text in a bucket, that of a copy in the cache."""
    if not is_remote(path):
        return path
    cache = Path(os.environ.get("PDN_CACHE", "~/.cache/pdn")).expanduser()  # as in configs/data
    return str(text_copy(path, cache, print))


def arguments() -> argparse.ArgumentParser:
    usage = (
        "data/prepare.py (--path P | --dataset ID --revision R) --out DIR [options]; --help lists "
        "them"
    )
    parser = argparse.ArgumentParser(
        usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--path",
        type=text_place,
        help=(
            "file, directory or s3://bucket/prefix of .txt, .jsonl (.gz, .zst), .parquet; "
            "'stdlib': Python's own sources"
        ),
    )
    source.add_argument(
        "--dataset",
        help="id of a dataset on the Hugging Face hub (HF_TOKEN is read from the environment)",
    )
    parser.add_argument("--dataset-config", help="its configuration, e.g. sample-10BT")
    parser.add_argument("--revision", help="its commit; needed with --dataset")
    parser.add_argument("--split", default="train", help="its split (default: train)")
    parser.add_argument(
        "--text-field", default="text", help="key or column of the text (default: text)"
    )
    parser.add_argument(
        "--tokenizer",
        type=place,
        help="tokenizer.json, a directory with one, or a hub name; default: train one here",
    )
    parser.add_argument("--tokenizer-revision", help="commit of the tokenizer's hub repository")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=VOCABULARY,
        help=f"entries of the byte-level BPE that is trained (default: {VOCABULARY})",
    )
    parser.add_argument(
        "--eos-token", help="token that ends a document, if the tokenizer's files do not say"
    )
    parser.add_argument(
        "--validation",
        type=text_place,
        help="file, directory or s3://… of validation text; its documents are left out of training",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        help="else: share of the documents, by their hash",
    )
    parser.add_argument("--out", type=lambda path: Path(place(path)), help="output directory")
    parser.add_argument(
        "--processes", type=int, default=2, help="tokenising processes (default: 2)"
    )
    parser.add_argument(
        "--shard-tokens", type=int, default=1 << 27, help="tokens of a shard (default: 134217728)"
    )
    parser.add_argument(
        "--on-bad-row",
        choices=("stop", "skip"),
        default="stop",
        help="a row that is no text, or too long: stop, or leave it out and count it, up to a "
        "limit (default: stop)",
    )
    parser.add_argument(
        "--max-lost-characters",
        type=float,
        default=MAX_LOST,
        help=f"share of a sample's characters that the tokenizer may lose (default: {MAX_LOST})",
    )
    parser.add_argument("--max-documents", type=int, help="stop after so many documents")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only count: documents, characters, and tokens from a sample",
    )
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.dataset and not options.revision:
        parser.error(
            "--dataset needs --revision, a commit hash, so that the shards can be made again"
        )
    if not options.dry_run and options.out is None:
        parser.error("--out is needed (or --dry-run)")
    no_dataset, tokenizer = not options.dataset, options.tokenizer
    unused = {
        "--dataset-config": no_dataset and options.dataset_config and "--dataset is not given",
        "--revision": no_dataset and options.revision and "--dataset is not given",
        "--split": no_dataset and options.split != "train" and "--dataset is not given",
        "--tokenizer-revision": not tokenizer
        and options.tokenizer_revision
        and "--tokenizer is not given",
        "--vocab-size": tokenizer and options.vocab_size != VOCABULARY and "--tokenizer is given",
    }
    for flag, why in unused.items():
        if why:
            parser.error(f"{flag} has no effect, as {why}; leave it out")
    if options.validation and options.validation_fraction:
        parser.error("give --validation or --validation-fraction, not both")
    if not 0 <= options.validation_fraction < 1:
        parser.error(
            f"--validation-fraction {options.validation_fraction} must be at least 0 and below 1"
        )
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file; give a directory")
    for name, least in (
        ("processes", 1),
        ("shard_tokens", 1),
        ("max_documents", 1),
        ("vocab_size", 257),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least {least}")


def open_source(options: argparse.Namespace):
    skip = options.on_bad_row == "skip"
    if options.dataset:
        return hub(
            options.dataset,
            options.dataset_config,
            options.revision,
            options.split,
            options.text_field,
            skip_bad_rows=skip,
        )
    if options.path == "stdlib":
        return standard_library(1 << 62)
    return discover(local(options.path), options.text_field, skip_bad_rows=skip)


def open_tokenizer(options: argparse.Namespace, source) -> TokenizerFile:
    """Open the given tokenizer, or the one that an interrupted run trained, or train one.

    It is trained on the first 16 MB or so.
    """
    if options.tokenizer:
        return load(
            options.tokenizer, revision=options.tokenizer_revision, eos_token=options.eos_token
        )
    for split in ("train", "validation") if options.out else ():
        if (options.out / split / MANIFEST).exists():
            found = load(
                str(options.out / split / TOKENIZER), revision=None, eos_token=options.eos_token
            )
            return TokenizerFile(
                f"bpe-{options.vocab_size}", found.content, found.vocab_size, found.eos_id
            )
    console.print(f"training a tokenizer of {options.vocab_size:,} entries")
    return train(sample(source, 16_000_000), options.vocab_size)


def sample(source, characters: int):
    for batch in source.batches(None):
        for text in batch.texts:
            yield text
            characters -= len(text)
        if characters <= 0:
            return


def dry_run(options: argparse.Namespace, source) -> None:
    """Count the documents and characters, and say what the run would write.

    The first million characters are encoded for that.
    """
    tokenizer = open_tokenizer(options, source)
    built = tokenizer.build()
    documents = characters = held = probe_characters = probe_tokens = 0
    for batch in source.batches(None):
        documents += len(batch.texts)
        characters += sum(map(len, batch.texts))
        held += int((text_hashes(batch.texts) < options.validation_fraction * 2.0**64).sum())
        if probe_characters < 1_000_000:
            probe_characters += sum(map(len, batch.texts))
            probe_tokens += sum(len(ids) + 1 for ids in built.encode(batch.texts))
        if options.max_documents and documents >= options.max_documents:
            break
    tokens = round(characters * probe_tokens / max(1, probe_characters))
    size = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    print(
        f"source      {source.identity()['name']}: {counted(documents, 'document')}, "
        f"{characters:,} characters"
    )
    print(f"validation  {options.validation or counted(held, 'document')}")
    print(f"tokenizer   {tokenizer.name}, {tokenizer.vocab_size:,} entries")
    print(
        f"tokens      about {tokens:,} ({probe_characters / max(1, probe_tokens):.2f} characters a "
        f"token in the first {probe_characters:,})"
    )
    print(
        f"shards      about {-(-tokens // options.shard_tokens):,} of {options.shard_tokens:,} "
        f"tokens, {tokens * size / 1e6:,.1f} MB"
    )
    print("nothing was written")


def work(name: str, tokenisation: Tokenisation) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[line]}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(
            name,
            total=None,
            line="complete" if tokenisation.train.manifest.complete else "starting",
        )

        def report(progress) -> None:
            total = None if progress.fraction is None else 1.0
            bar.update(task, total=total, completed=progress.fraction or 0, line=progress.line())

        for manifest in tokenisation.run(report):
            bar.update(
                task,
                line=f"{counted(len(manifest.shards), 'shard')}, {manifest.tokens:,} tokens are "
                "safe",
            )
        bar.update(task, total=1.0, completed=1.0)


def prepare(options: argparse.Namespace) -> None:
    """Write the shards, or say what they would be; then say what there is, and whether it will do.

    Raises:
        DataError: another process writes them, or they cannot be trained on.
    """
    source = open_source(options)
    print(source.describe())
    if options.dry_run:
        dry_run(options, source)
        return
    with try_lock(options.out / "lock") as got:
        if not got:
            other = (options.out / "lock").read_text(encoding="utf-8").strip()
            raise DataError(
                "PREPARE-LOCKED",
                f"{options.out}: another process ({other}) prepares it; wait for it, or stop it",
            )
        write(options, source)
    report(options, source)


def write(options: argparse.Namespace, source) -> None:
    """Tokenise the validation text, if it has files of its own, and then the training text."""
    tokenizer = open_tokenizer(options, source)
    preflight(source, tokenizer, options.out, options.max_lost_characters, print)
    if options.dataset:
        source = Retrying(source, retry_seconds=600, stall_seconds=60, tell=console.print)
    exclude = None
    if options.validation:
        skip = options.on_bad_row == "skip"
        held_out = discover(local(options.validation), options.text_field, skip_bad_rows=skip)
        print(f"validation: {held_out.describe()}")
        out, plan = options.out / "validation", Plan(options.shard_tokens)
        work(
            "validation",
            Tokenisation(held_out, out, tokenizer, plan, options.processes, flat=True),
        )
        exclude = hashes_of(out)
    plan = Plan(
        options.shard_tokens,
        options.validation_fraction,
        exclude,
        max_documents=options.max_documents,
    )
    work("training", Tokenisation(source, options.out, tokenizer, plan, options.processes))


def report(options: argparse.Namespace, source) -> None:
    """Say what each split holds, and refuse what cannot be trained on or validated with."""
    for split in ("train", "validation"):
        folder = options.out / split
        if not folder.is_dir():
            continue
        manifest = read_manifest(folder)
        print(
            f"{folder}: {counted(manifest.documents, 'document')}, {manifest.tokens:,} tokens, "
            f"{counted(len(manifest.shards), 'shard')}, {manifest.dtype}"
        )
        for reason, count in manifest.left_out.items():
            print(f"  left out: {count:,} {reason}")
        if split == "validation" and manifest.complete and not manifest.tokens:
            raise DataError(
                "VALIDATION-EMPTY",
                f"{folder}: no document was held out, of so few; expected some: give a larger "
                "--validation-fraction, or --validation with text of its own",
            )
        if split == "validation" and options.validation_fraction:
            require_share(options, manifest.tokens)
        if split == "train" and not manifest.shards:
            raise DataError(
                "DATA-EMPTY",
                f"{source.identity()['name']}: no document to train on; expected text in "
                f"{options.text_field!r}, and not all of it held out; give other text",
            )


def require_share(options: argparse.Namespace, held: int) -> None:
    """Refuse a split in which a few large documents made the validation set the larger part.

    Args:
        options: of the command line.
        held: tokens of the validation set.
    """
    total = held + read_manifest(options.out / "train").tokens
    if held > max(MOST, 2 * options.validation_fraction) * total:
        raise DataError(
            "VALIDATION-SHARE",
            f"{options.out / 'validation'}: has {held:,} of {total:,} tokens, as the share goes by "
            f"whole documents; expected about {options.validation_fraction:g} of them: give "
            "--validation with text of its own, or train on the text with data=text, which cuts "
            "such a document",
        )


def main(argv: list[str] | None = None) -> int:
    try:
        restore_interrupts()
        parser = arguments()
        options = parser.parse_args(argv)
        check(parser, options)
        prepare(options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on after the last whole shard", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        from pdn.cli.launch import report

        return report(error, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
