"""Where each key of a composed configuration was written, and what a YAML file may not contain."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from pdn.cli.messages import problem
from pdn.errors import ConfigError

OCTAL = re.compile(r"[-+]?0[0-9_]+")
SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the fast one, where PyYAML has it
CODE_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


class Origins:
    """Remembers the place that set each key: ``configs/train.yaml:27`` or ``command line``.

    The last to set one wins.
    """

    def __init__(self):
        self._places: dict[str, str] = {}

    def add_file(self, file: Path, package: str) -> list[ConfigError]:
        """Record the keys of one YAML file, which Hydra merges at ``package``.

        Returns what is wrong with the file.
        """
        shown = shorten(file)
        text = file.read_text(encoding="utf-8")
        problems = list(_forbidden_events(text, shown))
        root = yaml.compose(text, Loader=LOADER)
        if root is None or problems:
            return problems
        if not isinstance(root, yaml.MappingNode):
            text = f"{shown}:1: found a {root.id}; expected keys with values"
            return [ConfigError("CONFIG-YAML", text)]
        if package.startswith("experiment"):
            expected = "the first line to be '# @package _global_'"
            fix = "write it, so that its keys are those of the run"
            problems.append(problem("CONFIG-YAML", f"{shown}:1", "no package", expected, fix))
        if package:
            self._places[package] = shown
        root.value = [(key, value) for key, value in root.value if key.value != "defaults"]
        for path, node, value in _walk(root, package):
            place = f"{shown}:{node.start_mark.line + 1}"
            self._places[path] = place
            problems.extend(_suspicious(path, value, place))
        return problems

    def add_override(self, path: str, value: object) -> None:
        self._places[path] = "command line"
        for parent in itertools.accumulate(path.split(".")[:-1], "{}.{}".format):
            if not any(key.startswith(f"{parent}.") for key in self._places if key != path):
                self._places[parent] = "command line"  # it was a value, or was not there
        if isinstance(value, list):  # the entries that a file gave are gone
            self._places = {k: v for k, v in self._places.items() if not k.startswith(f"{path}.")}
        if isinstance(value, dict):
            for key, item in value.items():
                self.add_override(f"{path}.{key}", item)

    def of(self, path: str) -> str:
        """Return the place that set ``path``, or else the nearest group of keys that holds it."""
        while path:
            if path in self._places:
                return self._places[path]
            path = path.rpartition(".")[0]
        return "configs"


def shorten(file: Path) -> str:
    """Return ``file`` relative to the working directory where it lies below it."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def _walk(node: yaml.Node, path: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Yield every key below ``node``: its dotted path, its own node and that of its value."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{path}.{key.value}" if path else str(key.value)
            yield inner, key, value
            yield from _walk(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield f"{path}.{i}", value, value
            yield from _walk(value, f"{path}.{i}")


def _forbidden_events(text: str, shown: str) -> Iterator[ConfigError]:
    for event in yaml.parse(text, Loader=LOADER):
        place = f"{shown}:{event.start_mark.line + 1}"
        if getattr(event, "tag", None) is not None:
            tag = f"the YAML tag {event.tag}"
            yield problem("CONFIG-UNSAFE", place, tag, "plain values", "remove the tag")
        if isinstance(event, yaml.AliasEvent):
            alias, fix = f"the YAML alias *{event.anchor}", "write ${its.key} instead"
            yield problem("CONFIG-UNSAFE", place, alias, "plain values", fix)


def _suspicious(path: str, node: yaml.Node, place: str) -> Iterator[ConfigError]:
    name = path.rpartition(".")[2]
    if name in CODE_KEYS:
        yield unsafe_key(path, place)
    if not isinstance(node, yaml.ScalarNode) or node.style in ("'", '"'):
        return
    for pattern, reading in ((OCTAL, "an octal number"), (SEXAGESIMAL, "a number in base 60")):
        if pattern.fullmatch(node.value):
            decimal = re.sub(r"^([-+]?)[0_]+(?=[0-9])", r"\1", node.value)
            number = f"; as a number write {decimal}" if pattern is OCTAL else ""
            found = f"{node.value}, which YAML 1.1 reads as {reading}"
            fix = f"as text write '{node.value}'{number}"
            yield problem("CONFIG-YAML", f"{path} ({place})", found, "no second reading", fix)


def unsafe_key(path: str, place: str) -> ConfigError:
    found, item = "a key that names code", f"{path} ({place})"
    fix = "choose implementations by kind, e.g. optim.kind=adamw, and remove this key"
    return problem("CONFIG-UNSAFE", item, found, "values only", fix)
