#!/usr/bin/env python
"""Print what the model saw, or whether a corpus can be had.

    python data/show.py (RUN | [data=NAME] [overrides]) --step S [--sample I]
    python data/show.py corpus=NAME --check

RUN is a run's directory: the samples of step S are those of its ledger, and the tokens are compared
with the ledger's hash. Without one, the data are those that `train.py` would train on with these
overrides, and step S, counted from 1, has the samples [(S-1)·G, S·G).
"""

import pdn.cli.process  # noqa: F401 (before torch: see there)

# isort: split
import argparse
import sys
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from pdn.checkpoint.recorded import recorded_history
from pdn.cli.compose import compose
from pdn.cli.options import run_script
from pdn.cli.parse import parse
from pdn.data import corpora, locate, open_data
from pdn.data.codec import Codec, open_codec
from pdn.data.config import DataConfig
from pdn.data.history import begun
from pdn.data.tokenizer import load
from pdn.errors import DataError, PdnError
from pdn.runs.records import read_lines
from pdn.runs.schema import recorded_config
from pdn.wording import counted, first_line


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", nargs="+", help="a run's directory, or Hydra overrides such as data=text seed=1"
    )
    parser.add_argument("--step", type=int, help="optimiser step, from 1")
    parser.add_argument(
        "--check",
        action="store_true",
        help="with corpus=NAME: read a little of it at each of its places, and its tokenizer",
    )
    parser.add_argument(
        "--sample", type=int, help="number of one sample within the step; default: all"
    )
    parser.add_argument("--ids", action="store_true", help="print token ids instead of text")
    return parser


def configuration_of(run: Path) -> tuple[DataConfig, int, int]:
    """Return data, global batch and seed that a run was configured with."""
    path = run / "config.yaml"
    try:
        values = recorded_config(run, {"trainer.global_batch_size": int, "seed": int})
        data = TypeAdapter(DataConfig).validate_python(values["data"])
        return (
            data,
            values["trainer"]["global_batch_size"],
            values["seed"] if data.seed is None else data.seed,
        )
    except (PdnError, ValueError, KeyError, TypeError, ValidationError) as error:
        reason = first_line(error)
        raise DataError(
            "INSPECT-RUN",
            f"{path}: {reason}; expected the configuration of a run; give runs/<name>",
        ) from None


def ledger_entry(run: Path, step: int) -> tuple[dict, str | None]:
    """Return the ledger's line of a step, and the hash before it (None at the first step)."""
    path, before, last = run / "ledger.jsonl", None, 0
    for entry in read_lines(path):
        if not {"step", "first", "end", "hash"} <= entry.keys():
            continue
        if entry["step"] == step and "parent" not in entry:
            return entry, before
        before, last = entry["hash"], entry["step"]
    raise DataError(
        "INSPECT-STEP",
        f"{path}: has no step {step}; expected one of the {last} that were made; give another "
        "--step",
    )


def show(
    sample: int,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    digest: int,
    data,
    tokenizer: Codec | None,
) -> None:
    source, place, epoch = data.origin(sample)
    parts = (
        f"parts of {counted(int((tokens == data.eos_id).sum()) + 1, 'document')}, "
        if tokenizer
        else ""
    )
    print(
        f"--- sample {sample}: {source} sample {place}, epoch {'?' if epoch is None else epoch}, "
        f"{len(tokens)} tokens, {parts}{int((labels != -100).sum())} labels, digest "
        f"{digest & (1 << 64) - 1:016x}"
    )
    print(tokenizer.decode(tokens.tolist(), special=True) if tokenizer else tokens.tolist())


def check(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Say of each place of a corpus whether it can be read, and of its tokenizer.

    Raises:
        DataError: no place can be read, or the tokenizer cannot be had.
    """
    key, _, name = words[0].partition("=")
    if len(words) > 1 or key != "corpus":
        parser.error(f"--check: expected corpus=NAME, one of {corpora.names()}")
    try:
        entry = corpora.corpus(name)
    except ValueError as error:
        parser.error(str(error))
    print(f"{name}: {entry.size}; licence {entry.license}; text in {entry.text_field!r}")
    failures: list[DataError] = []
    for place in entry.places:
        try:
            found = locate.check(place, entry)
        except DataError as error:
            failures.append(error)
            print(f"{place.dataset}: {error}")
        else:
            print(f"{place.dataset}: reachable, at {found.revision}")
    if len(failures) == len(entry.places):
        raise failures[0]
    file = load(entry.tokenizer, revision=entry.tokenizer_revision, eos_token=entry.eos_token)
    print(f"tokenizer {entry.tokenizer}: {file.vocab_size:,} entries, {file.identity.sha256[:12]}")


def main(words: list[str]) -> None:
    parser = arguments()
    options = parser.parse_args(words)
    if options.check:
        if options.step is not None or options.sample is not None or options.ids:
            parser.error("--check reads a corpus: --step, --sample and --ids have no effect there")
        check(parser, options.run)
        return
    if options.step is None:
        parser.error("--step is needed, or --check with corpus=NAME")
    if options.step < 1:
        parser.error(f"--step {options.step}: steps count from 1")
    show_step(parser, options)


def show_step(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Print the samples of a step, of a run after comparing them with its ledger.

    Raises:
        DataError: the data are not those that the run was trained on.
    """
    run = None if "=" in options.run[0] else Path(options.run[0])
    if run is None:
        config = parse(compose(options.run))
        config, batch, seed = config.data, config.trainer.global_batch_size, config.data_seed
        entry, before = {"first": (options.step - 1) * batch}, None
    else:
        config, batch, seed = configuration_of(run)
        entry, before = ledger_entry(run, options.step)
    first = entry["first"]
    batch = entry.get("end", first + batch) - first  # phases may differ in it
    if options.sample is not None and not 0 <= options.sample < batch:
        parser.error(
            f"--sample {options.sample}: expected 0 to {batch - 1}, as a step has "
            f"{counted(batch, 'sample')}"
        )
    data = open_data(
        config,
        global_batch_size=batch,
        seed=seed,
        progress=lambda line: print(line, file=sys.stderr),
    )
    history = begun(recorded_history(run / "checkpoints"), options.step) if run else []
    if history:
        data.recall(history)
    step, _ = next(data.steps(first, micro_batch_size=batch, stop_sample=first + batch))
    if run:
        require_ledger(run, options.step, entry, data, before, step["sample_digests"])
    by_id = options.ids or data.tokenizer_path is None
    tokenizer = None if by_id else open_codec(data.tokenizer_path, data.eos_id)
    for i in range(batch) if options.sample is None else [options.sample]:
        digest = int(step["sample_digests"][0, i])
        show(first + i, step["tokens"][0, i], step["labels"][0, i], digest, data, tokenizer)
    data.close()


def require_ledger(run: Path, step: int, entry: dict, data, before: str | None, digests) -> None:
    """Compare the samples of a step with the ledger.

    Args:
        entry: the ledger's line of the step.
        before: its hash after the step before; None for the first.
        digests: of the step's samples, as the data have them now.
    """
    found = data.roll_ledger(before or data.empty_ledger, digests)
    if found != entry["hash"]:
        raise DataError(
            "INSPECT-LEDGER",
            f"{run}: step {step} gives the hash {found}, the ledger has {entry['hash']}: these are "
            "not the data that the run was trained on; restore them",
        )
    print(f"step {step}: samples {entry['first']} to {entry['end'] - 1}, as the ledger has them")


if __name__ == "__main__":
    run_script(main)
