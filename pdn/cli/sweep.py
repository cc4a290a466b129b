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
from pdn.cli.messages import given, problem, refuse_if
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
            problems.append(error)
            continue
        trials[directory_of(config)].append(f"#{number} ({' '.join(trial)})")
        folders.add(Path(config.output_dir).expanduser())
    refuse_if(problems)
    for directory, same in trials.items():
        if len(same) > 1:
            text = (
                f"trials {' and '.join(same)} would share {directory}; expected a directory each; "
                "they differ in nothing that defines a run: give each a name, e.g. "
                "'name=\"try-${optim.lr}\"'"
            )
            problems.append(ConfigError("SWEEP", text))
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
    with hydra_loader() as loader:
        parser = OverridesParser.create(config_loader=loader)  # it lists the options for glob()
        # one after the other they would have no loader
        lines = parser.parse_overrides([str(override.input_line) for override in parsed])
        refuse_if([mistake for line in lines for mistake in _without_values(line)])
        try:
            return [trial for batch in BasicSweeper.split_arguments(lines, None) for trial in batch]
        except HydraException as error:
            raise ConfigError(
                "SWEEP",
                f"command line: {error}; expected key=a,b,c or key=range(1,4) or key=glob(*)",
            ) from None


def _without_values(override: Override) -> list[ConfigError]:
    if not override.is_discrete_sweep() or next(override.sweep_iterator(), None) is not None:
        return []
    key, _, values = str(override.input_line).partition("=")
    fix = "glob() chooses among the files of a group, range() counts up"
    return [given("SWEEP", key, f"{values}, which no value fits", "at least one", fix)]


def _foreign_settings(parsed: Sequence[Override], source: Source) -> list[ConfigError]:
    """Find files that could set Hydra's own keys, as those name code."""
    problems = [
        given("CONFIG-KEY", "hydra.searchpath", str(one.input_line), "none", "use --config-dir")
        for one in parsed
        if one.key_or_group == "hydra.searchpath"
    ]
    for folder in source.search:
        if (own := folder / "hydra").exists():
            found, fix = f"{own}, settings of Hydra, which name code", "remove that folder"
            problems.append(problem("CONFIG-UNSAFE", "--config-dir", found, "none", fix))
    return problems
