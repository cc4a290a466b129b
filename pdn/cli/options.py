"""``key=value`` words of the scripts, parsed by a pydantic model.

Messages are worded as in the rest of the project.
"""

from __future__ import annotations

import pdn.cli.process  # noqa: F401 (first of all: see there)

# isort: split
import os
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, TypeVar

from pydantic import PlainValidator, ValidationError

from pdn.cli.messages import did_you_mean
from pdn.config import Strict
from pdn.errors import ConfigError
from pdn.training.limits import no_place

Options = TypeVar("Options", bound=Strict)
PLACES = ("run", "out", "text", "data_dir", "prompt_file", "prompts", "folder", "store")
PLACES += ("to", "runs", "records", "corpus", "roots")
SYNONYMS = {"ckpt": "run"}  # what is loaded may be a run or one of its checkpoints


def _split(value: str) -> tuple[str, ...]:
    return tuple(
        part.strip()
        for part in value.removeprefix("[").removesuffix("]").split(",")
        if part.strip()
    )


def _split_lengths(value: str) -> tuple[int, ...]:
    parts = _split(value)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError("expected whole numbers above 0, separated by commas")
    return tuple(map(int, parts))


Names = Annotated[tuple[str, ...], PlainValidator(_split)]  # a,b or [a,b]
Lengths = Annotated[tuple[int, ...], PlainValidator(_split_lengths)]


def parse(kind: type[Options], words: list[str]) -> Options:
    """Parse options of a ``kind`` from ``key=value`` words.

    ``key=null`` leaves an option out whose default is None.

    Raises:
        ConfigError: a word without ``=``, an unknown or repeated key (the nearest is named), a
            value of the wrong kind.
    """
    keys = list(kind.model_fields)
    found: dict[str, str | tuple[str, ...] | None] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key.startswith("-"):
            raise ConfigError(
                "OPTION",
                f"{word!r}: expected key=value{_instead(word, keys)}; keys: {', '.join(keys)}",
            )
        key = SYNONYMS.get(key, key)
        if key not in keys:
            hint = did_you_mean(key, keys) or "see --help."
            raise ConfigError("OPTION", f"{key}: no such key; {hint} Keys: {', '.join(keys)}")
        if key in found:
            raise ConfigError("OPTION", f"{key}: given twice; expected it once")
        found[key] = _local(key, value) if key in PLACES else value
    given = {
        key: value
        for key, value in found.items()
        if value != "null" or kind.model_fields[key].default is not None
    }
    try:
        return kind.model_validate_strings(given)
    except ValidationError as error:
        from pdn.cli.parse import expectation

        parts = []
        for found_wrong in error.errors():
            key = ".".join(map(str, found_wrong["loc"]))
            if found_wrong["type"] == "missing":
                parts.append(f"{key}: found none; expected one: write {key}=<value>")
                continue
            value = found_wrong["input"]
            expected, fix = expectation(found_wrong, value)
            expected = expected.removeprefix("Value error, ").removeprefix("expected ")
            near = f"; {fix}" if fix is not None and fix.startswith("did you mean") else ""
            parts.append(f"{key}: found {value!r}; expected {expected}{near}")
        raise ConfigError("OPTION", f"{'; '.join(parts)}; keys: {', '.join(keys)}") from None


def _instead(word: str, keys: list[str]) -> str:
    """Return what a word without ``=`` was probably meant to be, to end a message."""
    key, equals, value = word.lstrip("-").partition("=")
    if word.startswith("-") and key in keys:
        return f": write {key}={value if equals else '<value>'}"
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


def _local(key: str, value: str) -> str:
    """Expand ``~`` in a path, which shells do not do after ``=``; likewise in each of ``roots``."""
    places = _split(value) if key == "roots" else (value,)
    if value == "null":
        return value
    for place in places:
        problem = no_place(place)
        if problem is not None:
            raise ConfigError("OPTION", f"{key}={place}: {problem}")
    return ",".join(os.path.expanduser(place) for place in places)


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
    from pdn.cli.launch import prepare_output, report
    from pdn.cli.ranks import Ranks

    prepare_output()
    ranks, words = None, sys.argv[1:]
    if usage is not None and {"-h", "--help"} & set(words):
        print(usage)
        return
    try:
        ranks = Ranks()
        if usage is not None and not words and not bare:
            name = os.path.basename(sys.argv[0])
            raise ConfigError("OPTION", f"{name}: no arguments; expected some: --help has them")
        main(words)
    except BaseException as error:
        sys.exit(report(error, ranks))
