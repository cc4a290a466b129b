"""``key=value`` words of the scripts, parsed by a pydantic model.

Messages are worded as in the rest of the project.
"""

from __future__ import annotations

from pdn.cli.process import restore_interrupts  # first of all: see there

# isort: split
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import AfterValidator, PlainValidator, ValidationError

from pdn.cli.messages import did_you_mean
from pdn.config import Strict
from pdn.errors import ConfigError
from pdn.training.limits import no_place

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Options = TypeVar("Options", bound=Strict)
# What CUDA takes for one; of a word that it does not know it shows none, and no later ones.
DEVICE = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")
SYNONYMS = {"ckpt": "run"}  # what is loaded may be a run or one of its checkpoints


def _split(value: str) -> tuple[str, ...]:
    parts = value.removeprefix("[").removesuffix("]").split(",")
    return tuple(part.strip() for part in parts if part.strip())


def _split_lengths(value: str) -> tuple[int, ...]:
    parts = _split(value)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError("expected whole numbers above 0, separated by commas")
    return tuple(map(int, parts))


def _split_devices(value: str) -> tuple[str, ...]:
    parts = _split(value)
    if len(set(parts)) < len(parts) or not all(DEVICE.fullmatch(part) for part in parts):
        raise ValueError("expected numbers of GPUs, or names such as GPU-… and MIG-…, each once")
    return parts


def _split_rates(value: str) -> tuple[float, ...]:
    parts = _split(value)
    try:
        rates = tuple(map(float, parts))
    except ValueError:
        rates = ()
    if not rates or len(set(rates)) < len(rates) or not all(0 < r < math.inf for r in rates):
        raise ValueError("expected numbers above 0, each once, separated by commas")
    return rates


class _Refused(ValueError):
    """Tells that a value, or one part of a list, cannot be."""

    def __init__(self, value: str, problem: str):
        super().__init__(problem)
        self.value = value


def _local(value: str) -> str:
    problem = no_place(value)
    if problem is not None:
        raise _Refused(value, problem)
    return os.path.expanduser(value)  # which shells do not do after ``=``


Place = Annotated[str, AfterValidator(_local)]
Places = Annotated[tuple[str, ...], PlainValidator(lambda v: tuple(map(_local, _split(v))))]
Names = Annotated[tuple[str, ...], PlainValidator(_split)]  # a,b or [a,b]
Devices = Annotated[tuple[str, ...], PlainValidator(_split_devices)]  # of CUDA
Rates = Annotated[tuple[float, ...], PlainValidator(_split_rates)]
Lengths = Annotated[tuple[int, ...], PlainValidator(_split_lengths)]


def parse(kind: type[Options], words: list[str]) -> Options:
    """Parse options of a ``kind`` from ``key=value`` words.

    ``key=null`` leaves an option out whose default is None.

    Raises:
        ConfigError: a word without ``=``, an unknown or repeated key (the nearest is named), a
            value of the wrong kind.
    """
    keys = list(kind.model_fields)
    found: dict[str, str] = {}
    for word, after in itertools.zip_longest(words, words[1:], fillvalue=""):
        key, equals, value = word.partition("=")
        key = SYNONYMS.get(key, key)
        if not equals or key.startswith("-"):
            instead, names = _instead(word, after, keys), ", ".join(keys)
            raise ConfigError("OPTION", f"{word!r}: expected key=value{instead}; keys: {names}")
        if key not in keys:
            hint = did_you_mean(key, keys) or "see --help."
            raise ConfigError("OPTION", f"{key}: no such key; {hint} Keys: {', '.join(keys)}")
        if key in found:
            raise ConfigError("OPTION", f"{key}: given twice; expected it once")
        found[key] = value
    given = {
        key: value
        for key, value in found.items()
        if value != "null" or kind.model_fields[key].default is not None
    }
    try:
        return kind.model_validate_strings(given)
    except ValidationError as error:
        problems = "; ".join(map(_wrong, error.errors()))
        raise ConfigError("OPTION", f"{problems}; keys: {', '.join(keys)}") from None


def _wrong(details: ErrorDetails) -> str:
    """Say what is wrong with one option."""
    from pdn.cli.parse import expectation

    key, value = ".".join(map(str, details["loc"])), details["input"]
    if details["type"] == "missing":
        return f"{key}: found none; expected one: write {key}=<value>"
    if details["type"] == "value_error":
        error = details.get("ctx", {}).get("error")
        return f"{key}={getattr(error, 'value', value)}: {error}"
    expected, fix = expectation(details, value)
    near = f"; {fix}" if fix is not None and fix.startswith("did you mean") else ""
    return f"{key}: found {value!r}; expected {expected}{near}"


def _instead(word: str, after: str, keys: list[str]) -> str:
    """Return what a word without ``=`` was probably meant to be, to end a message.

    Args:
        word: that is not understood.
        after: the next one, or nothing: the value of ``--key value`` and of ``key = value``.
        keys: that there are.
    """
    key, equals, value = word.lstrip("-").partition("=")
    key, after = key.replace("-", "_"), after.removeprefix("=")
    if key in keys and (word.startswith("-") or not equals):
        if not equals:
            value = "<value>" if not after or after.startswith("-") or "=" in after else after
        return f": write {key}={value}"
    if "run" in keys and not word.startswith("-") and os.path.exists(os.path.expanduser(word)):
        return f": write run={word}"
    return ""


def refuse_unused(options: Strict, keys: Iterable[str], why: str) -> None:
    """Refuse what was given and would do nothing.

    Args:
        options: that were parsed.
        keys: of options that have no effect.
        why: they have none.

    Raises:
        ConfigError: one of them was given.
    """
    given = [key for key in keys if key in options.model_fields_set]
    if given:
        found = ", ".join(f"{key}={getattr(options, key)}" for key in given)
        raise ConfigError("OPTION", f"{found}: without effect, as {why}; leave it out")


def run_script(
    main: Callable[[list[str]], None], *, usage: str | None = None, bare: bool = False
) -> None:
    """Run ``main`` with the command line's words.

    It ends with the messages, once among all ranks, and the exit codes of train.py.

    Args:
        main: takes the words.
        usage: what ``--help`` prints; None: main does it.
        bare: it does something without any words; else they are asked for.
    """
    from pdn.cli.launch import report
    from pdn.cli.ranks import Ranks

    ranks, words = None, sys.argv[1:]
    try:
        restore_interrupts()
        if usage is not None and {"-h", "--help"} & set(words):
            print(usage, flush=True)
            return
        ranks = Ranks()
        if usage is not None and not words and not bare:
            name = os.path.basename(sys.argv[0])
            raise ConfigError("OPTION", f"{name}: no arguments; expected some: --help has them")
        main(words)
    except BaseException as error:
        sys.exit(report(error, ranks))
