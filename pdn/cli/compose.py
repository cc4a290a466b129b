"""From command-line overrides to a composed, resolved dict, with the place that set each key."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import hydra
import yaml
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pdn.cli.messages import (
    Problem,
    did_you_mean,
    no_group,
    one_of,
    refusal,
    refuse_if,
    show,
    unknown_key,
)
from pdn.cli.overrides import code_keys, parse_overrides
from pdn.cli.paths import at, leaves
from pdn.cli.unsafe import forbidden
from pdn.cli.yaml_source import Origins, shorten
from pdn.config import config_root

CONFIGS = config_root()
MISSING = object()
_FAILURES = (
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
    ValueError,
    OSError,
    RecursionError,
)


@dataclass(frozen=True)
class Source:
    """Where configurations come from."""

    config_dir: Path = CONFIGS
    config_name: str = "train"
    search: tuple[Path, ...] = ()  # further directories, after config_dir

    def options(self, group: str) -> list[str]:
        """Return the names that a group offers; none if there is no such group."""
        folders = (
            [folder / group for folder in (self.config_dir, *self.search)]
            if group and "." not in group
            else []
        )
        return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})

    def choices_with(self, path: str) -> list[str]:
        """Return the choices of a key's group that have the key, such as ``data=text``."""
        group, _, key = path.partition(".")
        found = []
        for name in self.options(group) if key else ():
            for folder in (self.config_dir, *self.search):
                with contextlib.suppress(OSError, yaml.YAMLError):
                    content = yaml.safe_load((folder / group / f"{name}.yaml").read_bytes())
                    found += [f"{group}={name}"] if key in leaves(content) else []
        return found


@dataclass(frozen=True)
class Composed:
    """A configuration as plain containers, before it is typed.

    Attributes:
        values: every interpolation resolved.
        raw: as written.
        overrides: of the command line.
    """

    values: dict[str, Any]
    raw: dict[str, Any]
    origins: Origins
    source: Source
    overrides: tuple[Override, ...]

    def shipped(self) -> dict[str, Any]:
        """Return what the same groups hold without any override of a single key, unresolved."""
        return _without_values(_group_choices(self.overrides, self.source), self.source)


def compose(overrides: Sequence[str], source: Source = Source()) -> Composed:
    """Compose, check and resolve.

    Args:
        overrides: ``key=value`` and ``group=name``, as on the command line.

    Raises:
        ConfigError: what is wrong, where it was written, and how to correct it. Exit code 78.
    """
    parsed = parse_overrides(overrides)
    refuse_if(_unlawful(parsed) + _several_options(parsed, source))
    with hydra_loader(source) as loader:
        defaults = _remember_defaults(loader)
        config = _compose(parsed, source)
        raw = _plain(config)
        if mixers := _mixers_of_pattern(raw, parsed, source):
            parsed = [*parsed, *parse_overrides(mixers)]
            config = _compose(parsed, source)
            raw = _plain(config)
        origins, problems = _trace(parsed, defaults, config)
        refuse_if(problems + list(forbidden(raw, origins)) + _unpackaged(raw, parsed, source))
        values = _resolve(config, raw, origins, source)
    return Composed(values, raw, origins, source, tuple(parsed))


def _mixers_of_pattern(
    raw: dict[str, Any], parsed: Sequence[Override], source: Source
) -> list[str]:
    """Return overrides that make the model's mixers those that ``model.pattern`` names.

    They add the presets that the model has not, and take away those that the pattern does not name:
    ``model.pattern=[gdn,attention]`` is enough.
    """
    pattern, mixers = at("model.pattern", raw), at("model.mixers", raw)
    if not isinstance(pattern, list) or not isinstance(mixers, dict):
        return []
    named = list(dict.fromkeys(name for name in pattern if isinstance(name, str)))
    absent = [name for name in named if name not in mixers]
    if not named:
        return []  # reported later
    presets = source.options("mixer")
    refuse_if([_no_mixer(name, {*mixers, *presets}) for name in absent if name not in presets])
    touched = {o.key_or_group.split(".")[2] for o in parsed
               if o.key_or_group.startswith("model.mixers.")}  # fmt: skip
    unused = [name for name in mixers if name not in named and name not in touched]
    added = [f"+mixer@model.mixers.{name}={name}" for name in absent]
    return added + [f"~mixer@model.mixers.{name}" for name in unused]


def _no_mixer(name: str, known: Iterable[str]) -> Problem:
    fix = did_you_mean(name, known) or "see configs/mixer"
    return Problem(
        "CONFIG-VALUE",
        f"model.pattern: found {show(name)}; expected names of configs/mixer, or of model.mixers; "
        f"{fix}",
    )


def _unlawful(parsed: Sequence[Override]) -> list[Problem]:
    """Find overrides that Hydra would accept, some of them in silence, and that cannot be meant."""
    problems = code_keys(parsed)
    for override in parsed:
        key = override.key_or_group
        if override.is_sweep_override():
            values = override.input_line.partition("=")[2]
            fix = (
                f"add -m to run one trial for each, or write {key}=[{values}] for a list, or quote "
                f"it: '{key}=\"{values}\"'"
            )
            problems.append(
                Problem(
                    "CONFIG-VALUE",
                    f"{key} (command line): found several values {values}; expected one; {fix}",
                )
            )
        elif override.is_hydra_override():
            fix = (
                "leave it out (a run lives in output_dir/<name>; --config-dir adds a directory of "
                "YAML), or add -m for a sweep"
            )
            problems.append(
                Problem(
                    "CONFIG-KEY",
                    f"{key} (command line): found a setting of Hydra; expected none without -m; "
                    f"{fix}",
                )
            )
    return problems


def _several_options(parsed: Sequence[Override], source: Source) -> list[Problem]:
    """Find groups that are given a list or a dict; Hydra would merge, or fail halfway."""
    return [
        _no_option(override.key_or_group, override.value(), options)
        for override in parsed
        if not override.is_sweep_override()
        and isinstance(override.value(), list | dict)
        and (options := source.options(override.key_or_group))
    ]


@contextlib.contextmanager
def hydra_loader(source: Source) -> Iterator[ConfigLoader]:
    """Yield Hydra's loader for one composition.

    Its global state, which an outer Hydra may own, is put back at the end.
    """
    outer, settings = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(
            str(source.config_dir.absolute()), job_name="train", version_base="1.3"
        ):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer
        HydraConfig.instance().cfg = settings


def _lines(parsed: Sequence[Override], source: Source) -> list[str]:
    lines = [override.input_line or "" for override in parsed]
    if source.search:
        paths = ",".join(f"'file://{path.absolute()}'" for path in source.search)
        lines.append(f"hydra.searchpath=[{paths}]")
    return lines


def _compose(parsed: Sequence[Override], source: Source) -> DictConfig:
    try:
        return hydra.compose(source.config_name, _lines(parsed, source), return_hydra_config=True)
    except _FAILURES as error:
        refuse_if(_explain_yaml(error) or _explain_overrides(parsed, source))
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise refusal(
            [
                Problem(
                    "CONFIG",
                    f"the configuration cannot be composed: {reason}; expected files as in "
                    "configs/",
                )
            ]
        ) from None


def _explain_yaml(error: BaseException | None) -> list[Problem]:
    while error is not None:
        mark = getattr(error, "problem_mark", None)
        if mark is not None:
            place = f"{shorten(Path(mark.name))}:{mark.line + 1}:{mark.column + 1}"
            problem = str(error.problem)
            if problem.startswith("found duplicate key"):
                fix = "expected each key once; remove all but one"
            elif "tag" in problem:
                fix = "expected plain values; remove the tag"
            else:
                fix = (
                    "expected YAML; correct the "
                    f"line{f' ({error.context})' if error.context else ''}"
                )
            return [Problem("CONFIG-YAML", f"{place}: {problem}; {fix}")]
        error = error.__cause__ or error.__context__
    return []


def _explain_overrides(parsed: Sequence[Override], source: Source) -> list[Problem]:
    """Find the overrides that name no group option and no key; Hydra has refused one of them."""
    problems = []
    for override in parsed:
        group = override.key_or_group
        options = source.options(group)
        if not options or override.is_delete():
            continue
        choice = None if override.is_sweep_override() else override.value()
        if "/" in group and override.package is None and not override.is_hydra_override():
            # a folder of files that a key names, such as eval.suite
            problems.append(_folder(group, choice, options))
        elif not (isinstance(choice, str) and choice in options):
            problems.append(_no_option(group, choice, options))
    if problems:
        return problems
    try:
        base = _without_values(_group_choices(parsed, source), source)
    except _FAILURES:
        return []  # Hydra's own reason says more
    for override in parsed:
        key = override.key_or_group
        if source.options(key) or override.is_add() or at(key, base, MISSING) is not MISSING:
            continue
        parent = key.rpartition(".")[0]
        beside = at(parent, base)
        problems.append(
            unknown_key(
                key,
                key,
                "command line",
                beside if isinstance(beside, dict) else (),
                leaves(base),
                source.choices_with(key),
            )
        )
    return problems


def _no_option(group: str, choice: Any, options: list[str]) -> Problem:
    name = PurePath(choice).stem if isinstance(choice, str) else None  # of a path: completed
    meant = (
        f"write {group}={name}"
        if name in options
        else did_you_mean(name, options) or "see configs/"
    )
    fix = "leave it out" if choice is None else meant
    expected = one_of(options, f"configs/{group}")
    return Problem(
        "CONFIG-GROUP", f"{group} (command line): found {show(choice)}; expected {expected}; {fix}"
    )


def _folder(group: str, choice: Any, options: list[str]) -> Problem:
    parent, _, folder = group.rpartition("/")
    key = f"{parent.replace('/', '.')}.{folder.removesuffix('s')}"
    return Problem(
        "CONFIG-GROUP",
        f"{group} (command line): found {show(choice)}; expected no choice here: configs/{group} "
        f"holds what {key} names ({', '.join(options)}); write {key}=<name>",
    )


def _group_choices(parsed: Sequence[Override], source: Source) -> list[Override]:
    return [
        override
        for override in parsed
        if source.options(override.key_or_group) and not override.is_delete()
    ]


def _without_values(groups: Sequence[Override], source: Source) -> dict[str, Any]:
    """Return the composition by groups alone, unresolved."""
    with hydra_loader(source):
        return _plain(hydra.compose(source.config_name, _lines(groups, source)))


def _plain(config: DictConfig) -> dict[str, Any]:
    found = OmegaConf.to_container(config, resolve=False)
    found.pop("hydra", None)
    return found


def _remember_defaults(loader: Any) -> list[ResultDefault]:
    """Return a list that holds, after each composition, the files that it was made of.

    Hydra would say them if asked, by reading all files a second time.
    """
    found, join = [], loader._compose_config_from_defaults_list

    def remember(defaults: list[ResultDefault], **rest) -> DictConfig:
        found[:] = defaults
        return join(defaults=defaults, **rest)

    loader._compose_config_from_defaults_list = remember
    return found


def _trace(
    parsed: Sequence[Override], defaults: list[ResultDefault], config: DictConfig
) -> tuple[Origins, list[Problem]]:
    """Return the place of every key, and what the YAML files hold that is not allowed."""
    origins, problems = Origins(), []
    folders = [
        Path(place.path) for place in config.hydra.runtime.config_sources if place.schema == "file"
    ]
    for default in defaults:
        if default.config_path is None or default.config_path.startswith("hydra/"):
            continue
        for folder in folders:
            file = folder / f"{default.config_path}.yaml"
            if file.is_file():
                problems += origins.add_file(file, default.package or "")
                break
    for override in parsed:
        origins.add_override(override.key_or_group, override.value())
    return origins, problems


def _unpackaged(raw: dict[str, Any], parsed: Sequence[Override], source: Source) -> list[Problem]:
    """Find an experiment whose keys lie below ``experiment``, as its file names no package."""
    if not isinstance(raw.get("experiment"), dict):
        return []
    names = [o.value() for o in parsed if o.key_or_group == "experiment"]
    files = [
        folder / "experiment" / f"{name}.yaml"
        for folder in (source.config_dir, *source.search)
        for name in names
    ]
    return [
        Problem(
            "CONFIG-YAML",
            f"{shorten(file)}:1: found no package; expected the first line to be "
            "'# @package _global_', so that its keys are those of the run",
        )
        for file in files
        if file.is_file() and "@package" not in file.read_text("utf-8", errors="replace")
    ]


def _resolve(
    config: DictConfig, raw: dict[str, Any], origins: Origins, source: Source
) -> dict[str, Any]:
    HydraConfig.instance().set_config(config)
    try:
        return OmegaConf.to_container(
            OmegaConf.masked_copy(config, list(raw)), resolve=True, throw_on_missing=True
        )
    except (OmegaConfBaseException, RecursionError) as error:
        problems = _unresolved(config, raw, origins, source)
        raise refusal(problems or [Problem("CONFIG-INTERPOLATION", str(error))]) from None


def _unresolved(config: DictConfig, raw: dict, origins: Origins, source: Source) -> list[Problem]:
    problems = []
    for path in leaves(raw):
        try:
            OmegaConf.select(config, path, throw_on_missing=True)
        except (OmegaConfBaseException, RecursionError) as error:
            problems.append(_interpolation(path, str(error), raw, origins, source))
    return problems


def _interpolation(path: str, reason: str, raw: dict, origins: Origins, source: Source) -> Problem:
    written = at(path, raw)
    item = f"{path} ({origins.of(path)}): found {show(written)}"
    if holder := re.search(r"node `(.*?)` is not a container", reason):
        key = holder.group(1)
        text = (
            f"{key} ({origins.of(key)}): found {show(at(key, raw))}; expected a group of keys; "
            "remove this setting"
        )
    elif variable := re.search(r"Environment variable '(.*?)' not found", reason):
        name = variable.group(1)
        text = (
            f"{item}, but {name} is not set; expected a value; export {name}=<value>, or give one: "
            f"${{oc.env:{name},<value>}}"
        )
    elif missing := re.search(r"Interpolation key '(.*?)' not found", reason):
        key = missing.group(1)
        group = key.partition(".")[0]
        if not raw.get(group) and (options := source.options(group)):
            return no_group(group, origins.of(group), options)
        fix = did_you_mean(key, leaves(raw)) or "write a value instead"
        text = f"{item}, but there is no key {key}; expected the full path of a key; {fix}"
    elif "ecursi" in reason:
        text = (
            f"{item}, which refers back to itself; expected a value at the end; write one instead "
            "of a reference"
        )
    elif written == "???":
        text = f"{item}, which stands for a value to be given; expected one; set {path}=<value>"
    else:
        text = (
            f"{item}, which cannot be resolved: {reason.splitlines()[0]}; expected a value; write "
            "one instead of a reference"
        )
    return Problem("CONFIG-INTERPOLATION", text)
