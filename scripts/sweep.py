#!/usr/bin/env python
"""Train every combination of some values, several at a time, and tell the best learning rate.

    python scripts/sweep.py model=gdn_tiny,pgdn_tiny optim.lr=1e-3,2e-3,4e-3 seed=1,2 slots=4

With devices=0,1,2,3 a trial has a GPU of its own; with slots=2 and processes=2 besides, torchrun
starts it on two.

Launching the same command again skips what is finished, continues what was interrupted and tries
again what failed. All other keys, with several values or one, go to train.py. The table is
<runs>/sweep.csv, written anew as trials go on; <runs>/rates.png shows the results over the rates.

runs       runs/sweep; runs go to <runs>/<values>, their output to <runs>/<values>.log
slots      1; trials at a time
devices    null; numbers of GPUs, shared out over the slots
processes  null; of each trial, by torchrun
metric     validation/loss; the last value of this key counts, and less is better
tries      null; trials of each choice of listed values, where ranges are searched (needs optuna):
           optim.lr=log(1e-4,1e-2) model.norm_eps=log(1e-7,1e-5) trainer.grad_clip=uniform(0.5,2)
stop       null; median | halving: trials of one model that others leave behind are stopped early
stop_after 0; steps before which none is: the first rung of halving; needed with stop=
array      null; a file: a batch script for Slurm is written there, a task for each trial
only       null; numbers of trials, from 0: nothing else runs, as a task of an array; none: the
           table alone
seconds    null; wall time after which nothing is started, and what runs is saved and stopped
"""

import pdn.cli.process  # noqa: F401 (before torch: see there)

# isort: split
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from pdn.cli.compose import compose
from pdn.cli.options import Devices, Names, Place, parse, run_script
from pdn.cli.parse import parse as parse_config
from pdn.config import Strict
from pdn.errors import ConfigError, PdnError
from pdn.reports import array
from pdn.reports.live import LiveTable
from pdn.reports.search import Search, spaces_of
from pdn.reports.stopping import EarlyStopping, Kind
from pdn.reports.sweep import Best, Grid, Row, best_rates, grid_of, plot_rates, rows, write_csv
from pdn.reports.trials import Outcome, Trial, launcher, require_whole, run_trials
from pdn.runs.records import read_object
from pdn.store.local import storage_errors

TABLE_SECONDS = 5.0  # between two looks of sweep.csv at what runs


class Options(Strict):
    runs: Place = "runs/sweep"
    slots: int = Field(1, ge=1)
    devices: Devices = ()
    processes: int | None = Field(None, ge=1)
    metric: str = "validation/loss"
    tries: int | None = Field(None, ge=1)
    stop: Kind | None = None
    stop_after: int = Field(0, ge=0)
    array: str | None = None
    only: Names | None = None
    seconds: float | None = None

    @model_validator(mode="after")
    def _knows_from_when_on(self):
        if (self.stop is None) != (self.stop_after == 0):
            raise ValueError(
                f"stop = {self.stop} with stop_after = {self.stop_after}; expected both, such as "
                "stop=median stop_after=200, or neither"
            )
        return self


class SweepFailed(PdnError):
    """Tells that some trials failed, or are left."""

    exit_code = 70


def main(arguments: list[str]) -> None:
    own = [word for word in arguments if word.partition("=")[0] in Options.model_fields]
    options = parse(Options, own)
    plan = _plan([word for word in arguments if word not in own], options)
    if options.array is not None or options.only is not None:
        _require_grid(plan, options)
    if options.array is not None:
        words = [word for word in arguments if not word.startswith(("array=", "slots="))]
        text = array.script(words, trials=len(plan.trials), slots=options.slots)
        with storage_errors(Path(options.array)):
            Path(options.array).write_text(text, encoding="utf-8")
        print(f"written, not submitted: {options.array}")
        return
    run(plan, options)


def _plan(words: list[str], options: Options) -> Grid | Search:
    """Return the trials; a slip in any of them ends the sweep before anything starts."""
    spaces, others = spaces_of(words)
    if (options.tries is None) != (not spaces):
        raise ConfigError(
            "SWEEP",
            f"tries = {options.tries} with {len(spaces)} ranges; expected both, such as "
            "tries=20 optim.lr=log(1e-4,1e-2), or neither",
        )
    grid = grid_of(others)
    for end in ("low", "high") if spaces else (None,):
        ends = [f"{key}={s.text(getattr(s, str(end)))}" for key, s in spaces.items()]
        for name, values in grid.trials.items():
            try:
                own = [f"{k}={v}" for k, v in values.items()]
                require_whole(parse_config(compose([*grid.words, *own, *ends])))
            except ConfigError as error:
                raise ConfigError(error.code, f"trial {name}: {error.args[0]}") from None
    if options.tries is None:
        return grid
    directory = Path(options.runs)
    directory.mkdir(parents=True, exist_ok=True)
    return Search(
        words, tries=options.tries, slots=options.slots, directory=directory, metric=options.metric
    )


def _require_grid(plan: Grid | Search, options: Options) -> None:
    numbers = {str(number) for number in range(len(plan.trials))}
    wrong = sorted(set(options.only or ()) - numbers - {"none"})
    if isinstance(plan, Search) or wrong:
        what = "a search asks for its trials one after the other" if not wrong else ""
        raise ConfigError(
            "SWEEP",
            f"array, only: {what or 'found ' + ', '.join(wrong)}; expected numbers of a grid's "
            f"trials, 0 to {len(plan.trials) - 1}, or none",
        )


def run(plan: Grid | Search, options: Options, command: tuple[str, ...] | None = None) -> None:
    """Run what is not finished, keep the table, and say what came of it.

    Args:
        plan: the trials.
        options: of this script.
        command: starts a trial; None: ``train.py``, as ``processes`` says.
    """
    directory = Path(options.runs)
    directory.mkdir(parents=True, exist_ok=True)
    search = plan if isinstance(plan, Search) else None
    # Tasks of an array leave the table to whoever asks for it: they would all write it.
    chosen = None if options.only is None else [n for n in options.only if n != "none"]
    shown: dict = {"at": 0.0, "standing": None}

    def watch(running: set[str], failed: dict[str, str]) -> None:
        if search is not None:
            search.failed = failed
        if chosen is not None:
            return
        standing = (frozenset(running), len(failed))
        if standing == shown["standing"] and time.monotonic() - shown["at"] < TABLE_SECONDS:
            return
        shown.update(at=time.monotonic(), standing=standing)
        table = rows(plan, directory, options.metric, running=running, failed=failed)
        write_csv(table, directory / "sweep.csv")
        live.show(table)

    stopping = None
    if options.stop is not None:
        stopping = EarlyStopping(options.stop, options.stop_after, directory, options.metric)
    with LiveTable(options.metric) as live:
        outcome = run_trials(
            lambda finished: _chosen(plan.ready(finished), chosen),
            directory,
            slots=options.slots,
            seconds=options.seconds,
            command=command or launcher(options.processes),
            say=live.say,
            devices=options.devices,
            watch=watch,
            stopping=stopping,
            groups=plan.groups,
        )
    if not chosen:
        elsewhere = () if chosen is None else _running(plan, directory)
        table = rows(plan, directory, options.metric, running=elsewhere, failed=outcome.failed)
        write_csv(table, directory / "sweep.csv")
        _print_table(table, options.metric)
        found = _print_best(plan, table, options.metric)
        if found:
            plot_rates(found, options.metric, directory / "rates.png")
        print(directory / "sweep.csv")
    _require_all(outcome)


def _print_table(table: Sequence[Row], metric: str) -> None:
    """Print a line for each trial, the best result first."""
    for row in sorted(table, key=lambda row: (row[metric] is None, row[metric])):
        value = row[metric]
        text = "" if value is None else f"{value:.5f}"
        why = f"  {row['reason']}" if row["state"] == "stopped early" else ""
        print(f"{row['state']:<13} {text:>10}  {row['trial']}{why}")


def _print_best(plan: Grid | Search, table: Sequence[Row], metric: str) -> list[Best]:
    """Print the best values of each arm; return what there is to plot about learning rates."""
    if isinstance(plan, Search):
        for arm, best, edges in plan.best(table, metric):
            values = " ".join(f"{key}={best[key]}" for key in plan.spaces)
            edge = f"; {', '.join(edges)} at the edge of the range: search further" if edges else ""
            print(f"best of {arm}: {values}{edge}")
        return plan.rates(table, metric)
    found = best_rates(table, plan, metric)
    for best in found:
        edge = ", at the edge of those tried: search further" if best.at_edge else ""
        print(f"best learning rate of {best.arm}: {best.rate:g}{edge}")
    return found


def _chosen(trials: Sequence[Trial], numbers: list[str] | None) -> Sequence[Trial]:
    return trials if numbers is None else [trials[int(number)] for number in numbers]


def _running(plan: Grid | Search, directory: Path) -> set[str]:
    """Return the names of trials that say of themselves that they run, here or elsewhere."""
    return {
        name
        for name in plan.trials
        if read_object(directory / name / "status.json").get("state") == "running"
    }


def _require_all(outcome: Outcome) -> None:
    if outcome.failed or outcome.unfinished:
        reasons = [f"{name}: {reason}" for name, reason in outcome.failed.items()]
        reasons += [f"{name}: not finished" for name in outcome.unfinished]
        raise SweepFailed("SWEEP", "; ".join(reasons) + "; launch the same command again")


if __name__ == "__main__":
    run_script(main, usage=__doc__)
