#!/usr/bin/env python
"""Compare two models over pairs of seeds, and train what is missing for it.

    python scripts/compare.py base=gdn other=pgdn seeds=5 rates=1e-3,2e-3,4e-3 trainer.steps=500
    python scripts/compare.py base=runs/a-1,runs/a-2 other=runs/b-1,runs/b-2   finished runs by seed

Each model searches its own learning rate with a seed of its own, then all seeds are trained at it,
on the same samples in the same order, which the ledgers prove; validation sequences are paired
within the seeds. Launching the same command again skips what is finished. Keys with a dot, and
groups of configs/, go to train.py.

base, other  models of configs/model without their size, or run directories with commas between
size         tiny
seeds        5; pairs: seeds 1 to this
rates        peak learning rates to search; needed for models: a comparison at one rate is none
match        null; parameters | flops: other's MLPs are made as wide as gives it those of base
data_seed    0; of the order that all runs share
metric       validation/loss; the last value of this key counts, and less is better
effect       0.01; the difference for which the pairs needed are named
runs         runs/compare; runs go to <runs>/<model>-lr<rate>-seed<seed>
slots        1; runs at a time
devices      null; such as 0,1,2,3: GPUs shared out over the slots; null: every run sees all
processes    null; of a run, by torchrun; null: one, without it
seconds      null; wall time after which nothing is started
"""

import pdn.cli.process  # noqa: F401 (before torch: see there)

# isort: split
from pathlib import Path
from typing import Literal

from pydantic import Field

from pdn.cli.compose import compose
from pdn.cli.options import Devices, Names, Place, Rates, parse, refuse_unused, run_script
from pdn.cli.parse import parse as parse_run
from pdn.config import Strict, config_root
from pdn.errors import ConfigError
from pdn.reports.compare import compare, lines, matched_size
from pdn.reports.evidence import Arm, Study, best_rates, record_of, unmeasured
from pdn.reports.trials import Trial, launcher, require_whole, run_trials
from pdn.runs.sequences import read_sequences
from pdn.wording import counted

SEARCH_SEED = 1000
SIZES = {file.stem for file in (config_root() / "model" / "size").glob("*.yaml")}
# By key: what a comparison sets itself, and by which options.
STUDIED = {
    "model": "base=<name> other=<name>",
    "optim.lr": "rates=<numbers>",
    "data.seed": "data_seed=<number>",
}


class Options(Strict):
    base: Names
    other: Names
    size: str = "tiny"
    seeds: int = Field(5, ge=1, lt=SEARCH_SEED)
    rates: Rates = ()
    match: Literal["parameters", "flops"] | None = None
    data_seed: int = 0
    metric: str = "validation/loss"
    effect: float = Field(0.01, gt=0)
    runs: Place = "runs/compare"
    slots: int = Field(1, ge=1)
    devices: Devices = ()
    processes: int | None = Field(None, ge=1)
    seconds: float | None = None


def main(arguments: list[str]) -> None:
    passed = [word for word in arguments if _is_for_training(word)]
    options = parse(Options, [word for word in arguments if word not in passed])
    if any(Path(name, "config.yaml").is_file() for name in (*options.base, *options.other)):
        read = {"base", "other", "metric", "effect"}
        ours = tuple(key for key in Options.model_fields if key not in read)
        refuse_unused(options, ours, "base= and other= name finished runs")
        if passed:
            raise ConfigError(
                "OPTION",
                f"{passed[0]}: without effect, as base= and other= name finished runs; leave it "
                "out",
            )
        base, other = (
            [_record(Path(run), Path(run).name, options.metric) for run in side]
            for side in (options.base, options.other)
        )
        names = "base", "other"
    else:
        base, other = _trained(options, passed)
        names = options.base[0], options.other[0]
    found = compare(base, other, options.metric)
    print(
        "\n".join(
            lines(
                found, base=names[0], other=names[1], metric=options.metric, effect=options.effect
            )
        )
    )


def _is_for_training(word: str) -> bool:
    key = word.partition("=")[0]
    return "." in key or (key != "" and (config_root() / key).is_dir())


def _record(run: Path, arm: str, metric: str) -> dict:
    record = record_of(run, arm=arm, trial=run.name)
    name, _, kind = metric.rpartition("/")
    sequences = read_sequences(run, record["steps"], name) if kind == "loss" else None
    return record | {"sequences": sequences}


def _trained(options: Options, words: list[str]) -> tuple[list[dict], list[dict]]:
    """Return records of both models at their best rates, after training what is missing."""
    study = _study(options, words)
    require_valid(study)
    records: dict[str, dict] = {}
    standing: dict[str, dict[str, str]] = {"failed": {}}

    def watch(running: set[str], failed: dict[str, str]) -> None:
        standing["failed"] = failed  # itself: what fails next is in it before ``ready`` is asked

    def ready(finished: set[str]) -> list[Trial]:
        return study.search_trials() + study.trials(_best(study, records, standing["failed"]))

    def on_finished(trial: Trial, run: Path) -> str | None:
        record = _record(run, study.arm_of(trial.name), study.metric)
        reason = unmeasured(record, study.metric)
        if reason is None:
            records[trial.name] = record
        return reason

    outcome = run_trials(
        ready,
        Path(options.runs),
        slots=options.slots,
        seconds=options.seconds,
        on_finished=on_finished,
        command=launcher(options.processes),
        devices=options.devices,
        watch=watch,
    )
    best = _best(study, records, outcome.failed)
    diverged = study.diverged(outcome.failed) if best.keys() == study.arms.keys() else []
    for record in diverged:
        print(f"{record['arm']} diverged at {record['lr']:g}, which is worse than any result")
    passed_over = {study.trial(r["arm"], r["lr"], r["seed"]).name for r in diverged}
    left = {name: why for name, why in outcome.failed.items() if name not in passed_over}
    if left:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise ConfigError("COMPARE", f"{reasons}; correct it and launch the same command again")
    if outcome.unfinished:
        raise ConfigError(
            "COMPARE",
            f"{counted(len(outcome.unfinished), 'run')} left; launch the same command again",
        )
    for arm in study.arms:  # not as they happened to finish
        rate = best[arm]
        edge = len(study.rates) > 1 and rate in (min(study.rates), max(study.rates))
        print(
            f"best learning rate of {arm}: {rate:g}"
            + (", at the edge of rates: search further" if edge else "")
        )
    sides = [
        [r for r in records.values() if r["arm"] == arm and r["seed"] in study.seeds]
        for arm in study.arms
    ]
    return sides[0], sides[1]


def require_valid(study: Study) -> None:
    """Raise ConfigError for a trial that could not start, before any other one does."""
    for arm in study.arms:
        for rate in study.rates:
            trial = study.trial(arm, rate, SEARCH_SEED)
            try:
                require_whole(parse_run(compose(list(trial.words))))
            except ConfigError as error:
                raise ConfigError(error.code, f"trial {trial.name}: {error.args[0]}") from None


def _best(study: Study, records: dict[str, dict], failed: dict[str, str]) -> dict[str, float]:
    """Return the best rate of each arm whose search is complete, and did not diverge throughout."""
    diverged = study.diverged(failed)
    never = {(record["arm"], record["lr"]) for record in diverged}
    found = best_rates(study, [*records.values(), *diverged])
    return {arm: rate for arm, rate in found.items() if (arm, rate) not in never}


def _study(options: Options, words: list[str]) -> Study:
    if len(options.base) != 1 or len(options.other) != 1 or options.base == options.other:
        raise ConfigError(
            "COMPARE",
            f"base={','.join(options.base)} other={','.join(options.other)}: expected two models, "
            "or run directories",
        )
    _require_models(options, words)
    if not options.rates:
        raise ConfigError(
            "COMPARE",
            "rates: none given; expected peak learning rates to search, e.g. rates=1e-3,2e-3,4e-3",
        )
    arms = {
        name: Arm(words=[f"model={name}_{options.size}"])
        for name in (options.base[0], options.other[0])
    }
    if options.match is not None:
        base, other = (
            parse_run(compose([*words, *arms[name].words]))
            for name in (options.base[0], options.other[0])
        )
        length = other.data.seq_len
        size = matched_size(base.model, other.model, what=options.match, seq_len=length)
        print(f"{options.other[0]}: model.intermediate_size={size} matches {options.match}")
        arms[options.other[0]].words.append(f"model.intermediate_size={size}")
    return Study(
        title="", words=words, metric=options.metric, baseline=options.base[0], arms=arms,
        rates=list(options.rates), search_seeds=[SEARCH_SEED],
        seeds=list(range(1, options.seeds + 1)), data_seed=options.data_seed,
    )  # fmt: skip


def _require_models(options: Options, words: list[str]) -> None:
    """Refuse names that are none of a model without its size, and words that have no effect."""
    for key, name in (("base", options.base[0]), ("other", options.other[0])):
        stem, _, size = name.rpartition("_")
        if size in SIZES:
            raise ConfigError(
                "COMPARE", f"{key}={name}: expected a model without its size: write {key}={stem} "
                f"size={size}"
            )  # fmt: skip
        if "/" in name:
            raise ConfigError(
                "COMPARE",
                f"{key}={name}: found no config.yaml in it; expected the directory of a run, or a "
                "model of configs/model",
            )
    for word in words:
        key = word.partition("=")[0].lstrip("+")
        if key in STUDIED:
            raise ConfigError(
                "OPTION",
                f"{word}: without effect, as a comparison sets {key} itself; write {STUDIED[key]}",
            )


if __name__ == "__main__":
    run_script(main, usage=__doc__)
