"""The trials of a sweep, checked before the first of them starts."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from pdn.cli.compose import Source, compose, hydra_loader
from pdn.cli.messages import Problem, problem, refuse_if
from pdn.cli.overrides import code_keys, parse_overrides
from pdn.cli.parse import parse
from pdn.errors import ConfigError
from pdn.store.local import storage_errors
from pdn.training.names import directory_of


def check_trials(overrides: Sequence[str], source: Source) -> None:
    """Compose and parse every trial.

    Raises:
        ConfigError: what is wrong with which trial, or trials that would share a run directory.
            Exit code 78.
        StorageError: a directory for the runs cannot be written. Exit code 74.
    """
    problems, trials, folders = [], defaultdict(list), set()
    for number, trial in enumerate(expand(overrides, source)):
        try:
            config = parse(compose(trial, source))
        except ConfigError as error:
            problems.append(Problem(error.code, error.args[0]))
            continue
        trials[directory_of(config)].append(f"#{number} ({' '.join(trial)})")
        folders.add(Path(config.output_dir).expanduser())
    refuse_if(problems)
    for directory, same in trials.items():
        if len(same) > 1:
            fix = (
                "they differ in nothing that defines a run: give each a name, e.g. "
                "'name=\"try-${optim.lr}\"'"
            )
            problems.append(
                Problem(
                    "SWEEP",
                    f"trials {' and '.join(same)} would share {directory}; expected a directory "
                    f"each; {fix}",
                )
            )
    refuse_if(problems)
    for folder in folders:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "multirun.yaml").touch()  # where Hydra records the sweep
    # The same name when the sweep is launched again; a name from the environment stays.
    digest = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:8]
    os.environ.setdefault("WANDB_RUN_GROUP", f"sweep-{digest}")


def for_trials_alone(overrides: Sequence[str]) -> list[str]:
    """Return overrides of which Hydra applies keys within groups to the trials and to nothing else.

    It first composes what is not swept. There a key may be missing that every trial has: those of a
    model's corpus, if models are swept. Hydra leaves out what is swept, if only over one value.
    """
    found = []
    for override in parse_overrides(overrides):
        key, _, value = str(override.input_line).partition("=")
        inside = "." in key and not override.is_hydra_override()
        swept = override.is_sweep_override() or override.is_delete() or not value
        found.append(f"{key}=choice({value})" if inside and not swept else str(override.input_line))
    return found


def expand(overrides: Sequence[str], source: Source) -> list[list[str]]:
    """Return the overrides of every trial, without Hydra's own settings."""
    parsed = parse_overrides(overrides)
    refuse_if(code_keys(parsed) + _foreign_settings(parsed, source))
    parsed = [override for override in parsed if not override.is_hydra_override()]
    with hydra_loader(source) as loader:
        parser = OverridesParser.create(config_loader=loader)  # it lists the options for glob()
        # one after the other they would have no loader
        lines = parser.parse_overrides([str(override.input_line) for override in parsed])
        refuse_if([_empty(line) for line in lines if _is_empty(line)])
        try:
            return [trial for batch in BasicSweeper.split_arguments(lines, None) for trial in batch]
        except HydraException as error:
            raise ConfigError(
                "SWEEP",
                f"command line: {error}; expected key=a,b,c or key=range(1,4) or key=glob(*)",
            ) from None


def _is_empty(override: Override) -> bool:
    return override.is_discrete_sweep() and next(override.sweep_iterator(), None) is None


def _empty(override: Override) -> Problem:
    key, _, values = str(override.input_line).partition("=")
    found = f"{values}, which no value fits"
    fix = "glob() chooses among the files of a group, range() counts up"
    return problem("SWEEP", f"{key} (command line)", found, "at least one", fix)


def _foreign_settings(parsed: Sequence[Override], source: Source) -> list[Problem]:
    """Find files that could set Hydra's own keys, as those name code."""
    problems = [
        Problem(
            "CONFIG-KEY",
            f"hydra.searchpath (command line): found {override.input_line}; expected none; use "
            "--config-dir",
        )
        for override in parsed
        if override.key_or_group == "hydra.searchpath"
    ]
    for folder in source.search:
        if (folder / "hydra").exists():
            text = (
                f"--config-dir: found {folder / 'hydra'}, settings of Hydra, which name code; "
                "expected none: remove that folder"
            )
            problems.append(Problem("CONFIG-UNSAFE", text))
    return problems
