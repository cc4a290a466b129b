"""The words of a command line as Hydra's overrides, and what is said of those that are none."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from pdn.cli.messages import nearest, problem, refuse_if
from pdn.cli.paths import leaf_paths
from pdn.cli.yaml_source import CODE_KEYS, unsafe_key
from pdn.config import config_root
from pdn.errors import ConfigError

FLAGS = ("help", "multirun", "config-dir", "version", "cfg")
KEY = re.compile(r"[A-Za-z_][\w./]*")


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Return Hydra's reading of every override; of several for one key the last.

    Raises:
        ConfigError: all that are not of the form ``key=value``.
    """
    parser, parsed, problems = OverridesParser.create(), {}, []
    words = list(overrides)
    before = ""
    while words:
        text = words.pop(0)
        try:
            apart = _value_apart(text, words)
            override = None if apart else parser.parse_override(text)
        except (HydraException, ValueError) as error:  # ValueError: too many digits
            more = _cut_off(text, words)
            wrong = _split(text, words[:more]) if more else _unreadable(text, str(error), before)
            problems.append(wrong)
            words = words[more:]
        else:
            if override is None:
                problems.append(_joined([text, *words[:apart]]))
                words = words[apart:]
                continue
            before = text
            # The last one wins, as in Hydra, so that `launch.sh "$@"` can override a script.
            parsed.pop(element(override), None)
            parsed[element(override)] = override
            if not override.key_or_group:
                problems.append(_unreadable(text, "no key"))
    refuse_if(problems)
    return list(parsed.values())


def _cut_off(text: str, words: Sequence[str]) -> int:
    """Return how many of the next words belong to values that begin in ``text``.

    They are the rest of a list or group, or what follows a comma at the end of a word.
    """
    if text.endswith(",") and words and "=" not in words[0]:
        return 1 + _cut_off(words[0], words[1:])
    for count in range(len(words) + 1):
        whole = " ".join([text, *words[:count]])
        if all(whole.count(one) == whole.count(other) for one, other in ("[]", "{}")):
            return count
    return 0


def _value_apart(text: str, words: Sequence[str]) -> int:
    """Return how many of the next words are the value of ``key = value`` or of ``--key value``.

    Or of ``key: value``, or of ``section.key value``.
    """
    key = _key_apart(text)
    if not words or not KEY.fullmatch(key) or nearest(key, FLAGS):
        return 0
    if text == key and words[0].startswith("="):
        return min(len(words), 2 if words[0] == "=" else 1)
    plain = re.fullmatch(r"[^-=][^=]*|-[\d.][^=]*", words[0]) is not None
    apart = text in (f"{key}=", f"{key}:", f"-{key}", f"--{key}")
    return int(plain and (apart or (text == key and "." in key)))


def _key_apart(text: str) -> str:
    return text.lstrip("-").removesuffix("=").removesuffix(":")


def _joined(words: Sequence[str]) -> ConfigError:
    key, value = _key_apart(words[0]), words[-1].removeprefix("=")
    found, fix = " ".join(words), f"write {key}={value}"
    return problem("CONFIG-SYNTAX", "command line", found, "key=value in one word", fix)


def _split(text: str, words: Sequence[str]) -> ConfigError:
    whole = " ".join([text, *words])
    found = f"{text}, the beginning of a value that the shell has cut at its spaces"
    fix = f"write {whole.replace(' ', '')}" if text.endswith(",") else f"quote it: '{whole}'"
    return problem("CONFIG-SYNTAX", "command line", found, "one word", fix)


def _unreadable(text: str, reason: str, before: str = "") -> ConfigError:
    key, equals, value = text.partition("=")
    if text.startswith("-"):
        plain = text.lstrip("-")
        plain = plain if equals else plain.replace("-", "_")
        known = KEY.fullmatch(plain) is not None
        flags = [f"--{flag}" for flag in nearest(plain, FLAGS)]
        fix = f"write {plain}=<value>" if known else "see python train.py --help"
        fix = f"did you mean {' or '.join(flags)}?" if flags else fix
        fix = f"write {plain}" if equals else fix
        reason = "no flag of train.py"
    elif not equals and (parts := re.fullmatch(rf"({KEY.pattern}\.{KEY.pattern}):(.+)", text)):
        fix = f"write {parts[1]}={parts[2]}"
    elif not equals:
        groups = [
            f"{path.parent.name}={text}"
            for path in config_root().glob("*/*.yaml")
            if path.stem == text
        ]
        assignment = f"{text}=<value>" if KEY.fullmatch(text) else f"<key>={text}"
        fix = f"write {' or '.join(sorted(groups)) or assignment}"
        if before and not groups:
            fix += f", or with the word before: '{before} {text}'"
    elif not key:
        fix = f"write <key>={value}"
    elif "[" in key:
        fix = f"write {key.replace('[', '.').replace(']', '')}={value}"
    elif value.strip("=,") not in ("", value):
        fix = f"write {key}={value.strip('=,')}"
    elif value[:1] + value[-1:] == "()":
        fix = f"write '{key}=[{value[1:-1]}]'"
    elif value.endswith(",") or ",," in value:
        fix = f"write {key}={','.join(filter(None, value.split(',')))}"
    elif '"' in value:
        fix = f"quote a value with special characters: {key}=\\'{shlex.quote(value)}\\'"
    else:
        fix = f"quote a value with special characters: '{key}=\"{value}\"'"
    return problem("CONFIG-SYNTAX", "command line", f"{text} ({reason})", "key=value", fix)


def code_keys(parsed: Sequence[Override]) -> list[ConfigError]:
    """Find keys that name code, such as ``_target_``."""
    found = []
    for override in parsed:
        value = None if override.is_sweep_override() else override.value()
        paths = [override.key_or_group, *(leaf_paths(value) if isinstance(value, dict) else ())]
        if any(part in CODE_KEYS for path in paths for part in path.split(".")):
            found.append(unsafe_key(override.key_or_group, "command line"))
    return found


def element(override: Override) -> str:
    """Return the key, or the group and where it goes."""
    return override.get_key_element().lstrip("+~")
