"""From a composed dict to a RunConfig, and from pydantic's errors to our messages.

A message has key path, place, found, expected, fix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pdn.cli.messages import did_you_mean, no_group, one_of, problem, refusal, show, unknown_key
from pdn.cli.paths import ABSENT, at, leaf_paths
from pdn.cli.yaml_source import OCTAL, SEXAGESIMAL
from pdn.errors import ConfigError
from pdn.training.config import RunConfig
from pdn.wording import counted

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from pdn.cli.compose import Composed

REFERENCE = re.compile(r"\$\{(?:oc\.select:)?([A-Za-z_][\w.]*)(?:,[^{}]*)?\}")
NAMED = re.compile(r"\b([a-z_]+(?:\.[a-z_]\w*)*)(?= = | [+x] |\b=)|([a-z_]+(?:\.[a-z_]\w*)+)")
PLAIN_NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?")
EXPECTED = {
    "union_tag_not_found": "the name of a kind",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string_too_short": "text that is not empty",
    "string": "text",
    "finite": "a finite number",
    "list": "a list",
    "tuple": "a list",
    "dict": "a group of keys",
    "model": "a group of keys",
}
BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
    "too_short": ("min_length", "at least"),
    "too_long": ("max_length", "at most"),
}
FORMS = {r".+@\d{1,12}": "<run>@<step>"}  # what patterns mean


def parse(composed: Composed, world_size: int | None = None) -> RunConfig:
    """Return the typed configuration; it fits the number of processes, where that is known.

    Raises:
        ConfigError: everything that is wrong with the values, in one message. Exit code 78.
    """
    try:
        config = RunConfig.model_validate(composed.values)
    except ValidationError as error:
        raise refusal(_problems(error, composed)) from None
    try:
        if world_size is not None:
            config.check_world_size(world_size)
    except ValueError as error:
        raise refusal([_cross_field("", str(error), composed)]) from None
    return config


def _problems(error: ValidationError, composed: Composed) -> list[ConfigError]:
    found = [(_path(details, composed.values), details) for details in error.errors()]
    bad = {path for path, _ in found}
    extras = {path for path, details in found if details["type"] == "extra_forbidden"}
    missing = {path for path, details in found if details["type"] == "missing"}
    problems, values = [], {}
    for path, details in found:
        if _reference(path, composed.raw) in bad:
            continue  # the key that it refers to is reported
        if details["type"] == "extra_forbidden":
            problems.append(_extra(path, composed, extras, missing))
        elif details["type"] == "missing":
            problems.append(_missing(path, composed))
        elif details["type"] == "value_error":
            problems.append(_cross_field(path, str(details.get("ctx", {}).get("error")), composed))
        else:
            values.setdefault(path, []).append(details)
    return problems + [
        _value(path, alternatives, composed) for path, alternatives in values.items()
    ]


def _path(details: ErrorDetails, values: Any) -> str:
    """Return pydantic's location without the tags of unions, which are no keys."""
    parts, node = [], values
    *inner, last = details["loc"] or ("",)
    for element in (*inner, last):
        known = (isinstance(node, dict) and element in node) or (
            isinstance(node, list) and isinstance(element, int)
        )
        if known or (element is last and details["type"] in ("missing", "extra_forbidden")):
            parts.append(str(element))
            node = at(str(element), node)
    return ".".join(parts)


def _reference(path: str, raw: dict) -> str | None:
    """Return the key that the value at ``path`` is copied from, if it is.

    By ``${key}``, or by ``${oc.select:key,default}`` where the key need not be.
    """
    value = at(path, raw)
    match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return match.group(1) if match else None


def _extra(path: str, composed: Composed, extras: set[str], missing: set[str]) -> ConfigError:
    parent = path.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    # The YAML files show every key of a class but for those that are null there, such as a list's
    # entries: the valid keys are those beside the unknown one, and those that are missing there.
    beside = {key for key in at(parent, composed.values) if prefix + str(key) not in extras}
    beside |= {other.rpartition(".")[2] for other in missing if other.rpartition(".")[0] == parent}
    beside |= keys_of(parent)
    elsewhere = [
        other
        for other in leaf_paths(composed.raw)
        if not any((other + ".").startswith(key + ".") for key in extras)
    ]
    if any(part.isdecimal() for part in path.split(".")):
        elsewhere = []  # an entry of a list holds keys of its own kind only
    below = list(leaf_paths(at(path, composed.values), path))
    leaf = below[0] if len(below) == 1 else path
    place, source = composed.origins.of(leaf), composed.source
    choices, groups = source.choices_with(leaf), source.groups_with(path.rpartition(".")[2])
    return unknown_key(path, leaf, place, beside, elsewhere, choices, groups)


def keys_of(path: str) -> set[str]:
    """Return the keys that the types know at a path; none where they have several kinds there."""
    kinds: list[Any] = [RunConfig]
    for part in path.split(".") if path else []:
        kinds = [inner for kind in kinds for inner in _inside(kind, part)]
    classes = [kind for kind in kinds if _is_class(kind)]
    return set(classes[0].model_fields) if len(classes) == 1 else set()


def _is_class(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _inside(kind: Any, part: str) -> Iterator[Any]:
    """Yield the types of a key, or of the entry of that number."""
    if _is_class(kind):
        field = kind.model_fields.get(part)
        yield from () if field is None else _alternatives(field.annotation)
    elif get_origin(kind) in (list, tuple, dict):
        yield from _alternatives(get_args(kind)[1 if get_origin(kind) is dict else 0])


def _alternatives(kind: Any) -> Iterator[Any]:
    if get_origin(kind) in (Union, UnionType):
        yield from (inner for one in get_args(kind) for inner in _alternatives(one))
    elif get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    else:
        yield kind


def _owner(path: str) -> tuple[str, int]:
    """Return the key of the list that ``path`` is an entry of, and the entry's number from 1."""
    key, _, last = path.rpartition(".")
    return (key, int(last) + 1) if key and last.isdecimal() else (path, 0)


def _missing(path: str, composed: Composed) -> ConfigError:
    path, number = _owner(path)
    item = composed.item(path)
    if number:
        found, shipped = show(at(path, composed.values)), _shipped(path, composed)
        expected = f"at least {counted(number, 'entry')}"
        expected += f", as in {show(shipped)}" if isinstance(shipped, list) else ""
        return ConfigError("CONFIG-VALUE", f"{item}: found {found}; expected {expected}")
    if options := composed.source.options(path):
        return no_group(path, composed.origins.of(path), options)
    return problem("CONFIG-KEY", item, "no value", "one", f"set {path}=<value>")


def _cross_field(path: str, message: str, composed: Composed) -> ConfigError:
    prefix = f"{path}." if path else ""
    named = [
        key if at(key, composed.values) is not None else prefix + key
        for key in map("".join, NAMED.findall(message))
    ]
    named = [key for key in dict.fromkeys(named) if at(key, composed.values) is not None]
    if not named:
        return ConfigError("CONFIG", f"{composed.item(path)}: {message}")
    places = "; ".join(f"{key}: {composed.origins.of(key)}" for key in named)
    return ConfigError("CONFIG", f"{f'{path}: ' if path else ''}{message} ({places})")


def _value(path: str, alternatives: list[ErrorDetails], composed: Composed) -> ConfigError:
    """Say what is wrong with one value.

    There are several alternatives where the key takes values of several types.
    """
    kind, value = alternatives[0]["type"], alternatives[0]["input"]
    if kind == "union_tag_not_found" and (stray := _stray_entry(path, composed)) is not None:
        return stray
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = alternatives[0].get("ctx", {})["discriminator"].strip("'")
        path, value = f"{path}.{name}", value.get(name) if isinstance(value, dict) else value
    if path == "resume" and isinstance(value, int):  # meant as a step
        pattern = "auto|never|restart|step:<number>"
        kind = "string_pattern_mismatch"
        alternatives = [{**alternatives[0], "type": kind, "ctx": {"pattern": pattern}}]
    expectations = [expectation(details, value) for details in alternatives]
    expected = " or ".join(dict.fromkeys(text for text, _ in expectations))
    unit = alternatives[0].get("loc", ())[-1:] == ("steps",) and not path.endswith("steps")
    if unit and expected == "an integer":  # of an interval, which takes other units
        expected += " of steps, {seconds: s} or {tokens: n}"
    fix = next((fix for _, fix in expectations if fix is not None), None)
    fix = "write resume=never" if path == "resume" and value is False else fix
    place, reference = composed.origins.of(path), _reference(path, composed.raw)
    if reference is not None:
        place = f"{place}: ${{{reference}}}, {composed.origins.of(reference)}"
    owner, _ = _owner(path)
    shipped = _shipped(owner, composed) if fix is None and place == "command line" else ABSENT
    if shipped is not ABSENT:
        fix = f"leave it out for the shipped value {show(shipped)}"
    elif place == "command line":
        fix = fix or f"set {owner}=<value>"
    fix = fix or f"correct it there, or set {owner}=<value>"
    return problem("CONFIG-VALUE", f"{path} ({place})", show(value), expected, fix)


def _stray_entry(path: str, composed: Composed) -> ConfigError | None:
    """Describe an entry that a key of the command line has made, where others are.

    Such as ``model.mixers.gdn.decay.spread=true`` of a model whose mixer is ``pgdn``.
    """
    parent, _, name = path.rpartition(".")
    others = [other for other in at(parent, composed.values, {}) if other != name]
    written = list(leaf_paths(at(path, composed.values), path))
    shipped = at(parent, composed.shipped(), {})
    if not others or name in shipped or not isinstance(at(path, composed.values), dict):
        return None
    end = written[0].removeprefix(f"{path}.") if written else ""
    ends = [f"{parent}.{other}.{tail}" for tail in (end, f"{name}.{end}") for other in others]
    meant = [key for key in ends if at(key, composed.values, ABSENT) is not ABSENT]
    fix = f"did you mean {' or '.join(meant)}?" if meant else "remove it"
    item = composed.item(written[0] if written else path)
    return problem("CONFIG-KEY", item, f"no entry {name}", one_of(others, parent), fix)


def expectation(details: ErrorDetails, value: object) -> tuple[str, str | None]:
    """Say what was expected, and how to correct this value if that is known."""
    kind, context = details["type"], details.get("ctx", {})
    options = re.findall(
        r"'([^']*)'", context.get("expected_tags") or context.get("expected") or ""
    )
    if options:
        return one_of(options), did_you_mean(value, options)
    if kind in BOUNDS:
        key, words = BOUNDS[kind]
        entries = kind.startswith("too_")
        size = counted(context[key], "entry") if entries else f"{context[key]:.12g}"
        return f"{words} {size}", None
    if kind == "string_pattern_mismatch":
        pattern: str = context["pattern"].strip("^$()").replace(r"\d+", "<number>")
        forms = [FORMS.get(form, form) for form in pattern.split("|")]
        numbered = [form for form in forms if form.endswith("<number>")]
        if numbered and str(value).isdecimal():  # 100 for step:100
            return one_of(forms), f"write {numbered[0].replace('<number>', str(value))}"
        return one_of(forms), did_you_mean(value, forms)
    expected = next(
        (text for prefix, text in EXPECTED.items() if kind.startswith(prefix)), details["msg"]
    )
    if expected == "a list" and isinstance(value, str):
        return expected, f"write [{value}]"
    return expected, _plain_number(value) if expected in ("an integer", "a number") else None


def _plain_number(value: object) -> str | None:
    """Say how to write a number that was written as something else."""
    if isinstance(value, str) and (OCTAL.fullmatch(value) or SEXAGESIMAL.fullmatch(value)):
        digits = value.lstrip("+-0_")
        example = f", e.g. {digits}" if digits.isdigit() else ""
        return f"write a decimal number without leading zeros or colons{example}"
    if isinstance(value, str) and PLAIN_NUMBER.fullmatch(value):
        return f"write {value} without quotes"
    if isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return None


def _shipped(path: str, composed: Composed) -> object:
    """Return what the files hold at a path, its reference followed; ``ABSENT`` if nothing."""
    shipped = composed.shipped()
    while (reference := _reference(path, shipped)) is not None:
        path = reference
    return at(path, shipped, ABSENT)
