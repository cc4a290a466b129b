"""From command-line overrides to a composed, resolved dict, with the place that set each key."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import hydra
import yaml
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pdn.cli.messages import (
    did_you_mean,
    given,
    no_group,
    one_of,
    problem,
    refusal,
    refuse_if,
    show,
)
from pdn.cli.overrides import code_keys, element, parse_overrides
from pdn.cli.paths import ABSENT, at, leaf_paths
from pdn.cli.unsafe import forbidden
from pdn.cli.yaml_source import Origins, shorten
from pdn.config import config_root
from pdn.errors import ConfigError

CONFIGS = config_root()
MAIN = "train"  # the file of configs/ that every run is composed from
ADDED = (OverrideType.ADD, OverrideType.FORCE_ADD)
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
    """Names the directories that a configuration is composed from: ``configs/``, and others."""

    search: tuple[Path, ...] = ()  # further directories, after configs/

    def options(self, group: str) -> list[str]:
        """Return the names that a group offers; none if there is no such group."""
        return sorted({file.stem for file in self._files(group)})

    def groups_with(self, choice: str) -> list[str]:
        """Return the groups that offer a choice of that name, such as ``logger`` for wandb."""
        found = {
            f.parent.name for folder in self._folders() for f in folder.glob(f"*/{choice}.yaml")
        }
        return sorted(found)

    def offers(self, group: str, choice: str) -> bool:
        """Return whether a group has a file of that name, which may lie in a folder of it."""
        return any((folder / group / f"{choice}.yaml").is_file() for folder in self._folders())

    def choices_with(self, path: str) -> list[str]:
        """Return the choices of a key's group that have the key, such as ``data=text``."""
        group, _, key = path.partition(".")
        found = set()
        for file in self._files(group) if key else ():
            with contextlib.suppress(OSError, yaml.YAMLError):
                if key in leaf_paths(yaml.safe_load(file.read_bytes())):
                    found.add(f"{group}={file.stem}")
        return sorted(found)

    def _folders(self) -> tuple[Path, ...]:
        return (CONFIGS, *self.search)

    def _files(self, group: str) -> list[Path]:
        folders = self._folders() if group and "." not in group else ()
        return [file for folder in folders for file in (folder / group).glob("*.yaml")]


@dataclass(frozen=True)
class Composed:
    """Holds a configuration as plain containers, before it is typed.

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

    def item(self, path: str) -> str:
        """Return how a message names a key: with its place."""
        return f"{path} ({self.origins.of(path)})"

    def shipped(self) -> dict[str, Any]:
        """Return what the same groups hold without any override of a single key, unresolved."""
        groups = [one for one in self.overrides if self.source.options(one.key_or_group)]
        with hydra_loader():
            return _plain(_hydra_compose(groups, self.source))


def compose(overrides: Sequence[str], source: Source = Source()) -> Composed:
    """Compose, check and resolve.

    A key that no file has is composed all the same: ``pdn.cli.parse`` names it, and the nearest.

    Args:
        overrides: ``key=value`` and ``group=name``, as on the command line.

    Raises:
        ConfigError: what is wrong, where it was written, and how to correct it. Exit code 78.
    """
    parsed = parse_overrides(overrides)
    refuse_if(_unlawful(parsed, source))
    with hydra_loader() as loader:
        files = _remember_files(loader)
        config = _compose(parsed, source)
        if mixers := _mixers_of_pattern(_plain(config), parsed, source):
            parsed = [*parsed, *parse_overrides(mixers)]
            config = _compose(parsed, source)
        raw = _plain(config)
        origins, problems = _trace(parsed, files, config)
        refuse_if(problems + list(forbidden(raw, origins)))
        written = Composed(raw, raw, origins, source, tuple(parsed))
        return replace(written, values=_resolve(config, written))


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
    expected = "names of configs/mixer, or of model.mixers"
    refuse_if(
        [
            problem("CONFIG-VALUE", "model.pattern", show(name), expected,
                    did_you_mean(name, {*mixers, *presets}) or "see configs/mixer")
            for name in absent
            if name not in presets
        ]
    )  # fmt: skip
    touched = {o.key_or_group.split(".")[2] for o in parsed
               if o.key_or_group.startswith("model.mixers.")}  # fmt: skip
    unused = [name for name in mixers if name not in named and name not in touched]
    added = [f"+mixer@model.mixers.{name}={name}" for name in absent]
    return added + [f"~mixer@model.mixers.{name}" for name in unused]


def _unlawful(parsed: Sequence[Override], source: Source) -> list[ConfigError]:
    """Find overrides that Hydra would accept, some of them in silence, and that cannot be meant.

    And choices that their groups do not offer: of several Hydra tells the first.
    """
    problems = code_keys(parsed)
    for override in parsed:
        key, options = override.key_or_group, source.options(override.key_or_group)
        if override.is_sweep_override():
            values = str(override.input_line).partition("=")[2]
            fix = "add -m to run one trial for each"
            if not options and "(" not in values:  # a group takes neither
                fix += f", or write {key}=[{values}] for a list, or quote it: '{key}=\"{values}\"'"
            problems.append(given("CONFIG-VALUE", key, f"several values {values}", "one", fix))
        elif override.is_hydra_override() or key == "hydra":
            fix = (
                "leave it out (a run lives in output_dir/<name>; --config-dir adds a directory of "
                "YAML), or add -m for a sweep"
            )
            problems.append(given("CONFIG-KEY", key, "a setting of Hydra", "none without -m", fix))
        elif options and not override.is_delete():
            problems += _wrong_choice(override, options, source)
    return problems


def _wrong_choice(override: Override, options: list[str], source: Source) -> list[ConfigError]:
    group, choice = override.key_or_group, override.value()
    if override.package is None and override.type in ADDED:
        fix = _as_one_choice(override)
        line = str(override.input_line)
        return [given("CONFIG-GROUP", line, "an addition", "one choice", fix)]
    if "/" in group and override.package is None:
        # a folder of files that a key names, such as eval.suite
        key = group.replace("/", ".").removesuffix("s")
        expected = f"no choice here: configs/{group} holds what {key} names ({', '.join(options)})"
        return [given("CONFIG-GROUP", group, show(choice), expected, f"write {key}=<name>")]
    if isinstance(choice, str) and source.offers(group, choice):
        return []
    name = PurePath(choice).stem if isinstance(choice, str) else None  # of a path: completed
    fix = f"write {group}={name}" if name in options else did_you_mean(name, options)
    if "none" in options and (not choice or choice in ("off", "no", "null", "disabled")):
        fix = f"write {group}=none"
    yaml_file = name in options and PurePath(str(choice)).suffix in ("", ".yaml", ".yml")
    if group == "data" and name not in (None, choice) and not yaml_file:  # a corpus
        fix = f"write data=text data.path={choice}"
    fix = fix or ("leave it out" if choice is None else "see configs/")
    expected = one_of(options, f"configs/{group}")
    return [given("CONFIG-GROUP", group, show(choice), expected, fix)]


@contextlib.contextmanager
def hydra_loader() -> Iterator[ConfigLoader]:
    """Yield Hydra's loader for one composition.

    Its global state, which an outer Hydra may own, is put back at the end.
    """
    outer, settings = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIGS.absolute()), job_name="train", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer
        HydraConfig.instance().cfg = settings


def _hydra_compose(parsed: Sequence[Override], source: Source, **options: bool) -> DictConfig:
    lines = [_line(override, source) for override in parsed]
    if source.search:
        paths = ",".join(f"'file://{path.absolute()}'" for path in source.search)
        lines.append(f"hydra.searchpath=[{paths}]")
    return hydra.compose(MAIN, lines, **options)


def _line(override: Override, source: Source) -> str:
    """Return the override for Hydra, with leave to set a key that no file has."""
    sets_key = override.type is OverrideType.CHANGE and not source.options(override.key_or_group)
    return f"{'++' if sets_key else ''}{override.input_line}"


def _compose(parsed: Sequence[Override], source: Source) -> DictConfig:
    try:
        return _hydra_compose(parsed, source, return_hydra_config=True)
    except _FAILURES as error:
        refuse_if(
            _explain_yaml(error) or _undeletable(error, parsed, source) or _misplaced(error, parsed)
        )
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        text = f"the configuration cannot be composed: {reason}; expected files as in configs/"
        raise ConfigError("CONFIG", text) from None


def _undeletable(error: Exception, parsed: Sequence[Override], source: Source) -> list[ConfigError]:
    """Find what ``~`` is to take away and is not there, if that is what Hydra complains of."""
    if "Could not delete" not in str(error):
        return []
    whole = [override for override in parsed if not override.is_delete()]
    config = _hydra_compose(whole, source, return_hydra_config=True)
    choices, keys, problems = dict(config.hydra.runtime.choices), _plain(config), []
    for override in parsed:
        key, value = element(override), override.value()
        group = bool(source.options(override.key_or_group))
        there = choices.get(key) or ABSENT if group else at(key, keys, ABSENT)
        if not override.is_delete() or (there not in (None, ABSENT) and value in (None, there)):
            continue
        found = "nothing to take away" if value is None else show(value)
        if there is ABSENT:
            others = set(choices if group else leaf_paths(keys)) - {key}
            expected, fix = "what is there", did_you_mean(key, others) or "remove it"
        elif there is None:
            found = "null" if value is None else found
            expected, fix = "a value to take away", f"leave it out: {key} is null already"
        else:
            expected = show(there)
            fix = f"write {key}=<{'name' if group else 'value'}> to have another"
        code = "CONFIG-GROUP" if group else "CONFIG-KEY"
        problems.append(given(code, f"~{key}", found, expected, fix))
    return problems


def _misplaced(error: Exception, parsed: Sequence[Override]) -> list[ConfigError]:
    """Find what is set where Hydra has nothing to replace, or is added where something is."""
    named = re.search(r"(?:already at|Could not override) '([^']+)'", str(error))
    problems = []
    for override in parsed:
        key = override.key_or_group
        if named is None or named[1] not in (key, element(override)):
            continue
        line, fix = str(override.input_line), _as_one_choice(override)
        if override.is_add():
            found = "an addition of a key that is there"
            problems.append(given("CONFIG-KEY", line, found, "key=value", fix))
        else:
            found, expected = "a place where nothing is chosen", "a group of train.yaml"
            problems.append(given("CONFIG-GROUP", line, found, expected, fix))
    return problems


def _as_one_choice(override: Override) -> str:
    """Return how to write what was set with ``+`` or at a place that is none."""
    key, value = override.key_or_group, override.get_value_string()
    return f"write model.pattern=[{value}]" if key == "mixer" else f"write {key}={value}"


def _explain_yaml(error: BaseException | None) -> list[ConfigError]:
    while error is not None:
        if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark) is not None:
            place = f"{shorten(Path(mark.name))}:{mark.line + 1}:{mark.column + 1}"
            said, context = str(error.problem), error.context
            if said.startswith("found duplicate key"):
                fix = "expected each key once; remove all but one"
            elif "tag" in said:
                fix = "expected plain values; remove the tag"
            else:
                fix = f"expected YAML; correct the line{f' ({context})' if context else ''}"
            return [ConfigError("CONFIG-YAML", f"{place}: {said}; {fix}")]
        error = error.__cause__ or error.__context__
    return []


def _plain(
    config: DictConfig, *, resolve: bool = False, throw_on_missing: bool = False
) -> dict[str, Any]:
    """Return a composition as plain dicts and lists, without Hydra's own part."""
    found = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=throw_on_missing)
    assert isinstance(found, dict)
    found.pop("hydra", None)
    return {str(key): value for key, value in found.items()}


def _remember_files(loader: Any) -> list[ResultDefault]:
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
) -> tuple[Origins, list[ConfigError]]:
    """Return the place of every key, and what the YAML files hold that is not allowed."""
    origins, problems = Origins(), []
    sources = config.hydra.runtime.config_sources
    folders = [Path(place.path) for place in sources if place.schema == "file"]
    for default in defaults:
        if default.config_path is None or default.config_path.startswith("hydra/"):
            continue
        files = (folder / f"{default.config_path}.yaml" for folder in folders)
        if file := next(filter(Path.is_file, files), None):
            problems += origins.add_file(file, default.package or "")
    for override in parsed:
        origins.add_override(override.key_or_group, override.value())
    return origins, problems


def _resolve(config: DictConfig, written: Composed) -> dict[str, Any]:
    """Return plain values, every reference of them followed."""
    HydraConfig.instance().set_config(config)
    try:
        kept = OmegaConf.masked_copy(config, list(written.raw))
        return _plain(kept, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        problems = []
        for path in leaf_paths(written.raw):
            try:
                OmegaConf.select(config, path, throw_on_missing=True)
            except (OmegaConfBaseException, RecursionError) as reason:
                problems.append(_interpolation(path, str(reason), written))
        raise refusal(problems or [ConfigError("CONFIG-INTERPOLATION", str(error))]) from None


def _interpolation(path: str, reason: str, written: Composed) -> ConfigError:
    item, text = written.item(path), at(path, written.raw)
    found, expected, fix = show(text), "a value", "write one instead of a reference"
    if holder := re.search(r"node `(.*?)` is not a container", reason):
        item, found = written.item(holder[1]), show(at(holder[1], written.raw))
        expected, fix = "a group of keys", "remove this setting"
    elif variable := re.search(r"Environment variable '(.*?)' not found", reason):
        name = variable[1]
        found += f", but {name} is not set"
        fix = f"export {name}=<value>, or give one: ${{oc.env:{name},<value>}}"
    elif missing := re.search(r"Interpolation key '(.*?)' not found", reason):
        key, group = missing[1], missing[1].partition(".")[0]
        if not written.raw.get(group) and (options := written.source.options(group)):
            return no_group(group, written.origins.of(group), options)
        found, expected = f"{found}, but there is no key {key}", "the full path of a key"
        fix = did_you_mean(key, leaf_paths(written.raw)) or "write a value instead"
    elif text == "???":
        found += ", which stands for a value to be given"
        expected, fix = "one", f"set {path}=<value>"
    elif "ecursi" in reason:
        found, expected = f"{found}, which refers back to itself", "a value at the end"
    else:
        found += f", which cannot be resolved: {reason.splitlines()[0]}"
    return problem("CONFIG-INTERPOLATION", item, found, expected, fix)
