"""Versions of config.yaml: what an earlier one recorded, in the words of this one.

A key that came later has a default in its class, which does what runs did before there was that
key; only keys that were renamed or cut differently are translated here.
"""

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml

from pdn.config import leaves
from pdn.errors import ConfigError, StorageError
from pdn.store.local import read_regular

VERSION = 2
KEY = "schema"
_SHOWN = 5  # of changed keys


def stamped(config: dict) -> dict:
    """Return ``config`` as it is recorded, with the version of its schema."""
    return {KEY: VERSION} | config


def read_config(run: Path) -> dict | None:
    """Return the configuration that ``run`` recorded, in today's keys; None if it recorded none.

    Raises:
        ConfigError: a newer version of pdn wrote it.
        StorageError: it cannot be read, or is damaged.
    """
    file = run / "config.yaml"
    content = read_regular(file)
    if content is None:
        return None
    try:
        found = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StorageError(
            "RUN-CONFIG", f"{file}: not YAML ({reason}); restore it or start under another name"
        ) from None
    if not isinstance(found, dict):
        raise StorageError(
            "RUN-CONFIG",
            f"{file}: holds a {type(found).__name__}, expected keys with values; restore it or "
            "start under another name",
        )
    return upgraded(found, file)


def recorded_config(run: Path, needed: dict[str, type]) -> dict:
    """Return the configuration that ``run`` recorded, for whoever only reads it.

    Args:
        needed: dotted keys, each with the kind of its value.

    Raises:
        ConfigError: there is none, a needed key is missing or of another kind, or a newer version
            of pdn wrote it.
        StorageError: it cannot be read, or is damaged.
    """
    file, found = run / "config.yaml", read_config(run)
    if found is None:
        raise ConfigError(
            "RUN-CONFIG",
            f"{file}: No such file or directory; expected the directory of a run, such as "
            "runs/<name>",
        )
    for key, kind in needed.items():
        value: object = found
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise ConfigError(
                "RUN-CONFIG",
                f"{file}: {key}: found {value!r}, expected a {kind.__name__}; restore the file",
            )
    return found


def upgraded(recorded: dict, where: object) -> dict:
    """Return a recorded configuration in today's keys, without its version.

    Args:
        where: the file, for the message.

    Raises:
        ConfigError: a newer version of pdn wrote it.
    """
    found = dict(recorded)
    version = found.pop(KEY, 1)
    if not isinstance(version, int) or version > VERSION:
        raise ConfigError(
            "RUN-SCHEMA",
            f"{where}: schema {version!r}, expected at most {VERSION}; update pdn to continue "
            "this run",
        )
    parallel = found.get("parallel")
    if isinstance(parallel, dict) and "kind" in parallel:
        found["parallel"] = _axes(dict(parallel))
    trainer = found.get("trainer")
    if isinstance(trainer, dict) and "profile_after" in trainer:  # ``profile`` took its place
        kept = {key: value for key, value in trainer.items() if key != "profile_after"}
        found["trainer"] = kept
    return found


def _axes(parallel: dict) -> dict:
    """Replace the kind and number of replicas that described the ranks until schema 2."""
    kind, replicas = parallel.pop("kind"), parallel.pop("replicas", 1)
    axes = {
        "auto": (1, "auto"),
        "single": (1, 1),
        "ddp": ("all", 1),
        "fsdp": (1, "all"),
        "hsdp": (replicas, "all"),
    }
    replicate, shard = axes.get(kind, (1, "auto"))
    return {"replicate": replicate, "shard": shard, "context": 1} | parallel


def config_changes(
    old: dict, new: dict, may_change: Collection[str] = ()
) -> list[tuple[str, object, object]]:
    """Return the dotted keys at which two configurations differ, as ``(key, old, new)``.

    Args:
        old: an absent value is ``"(absent)"``.
        new: likewise.
        may_change: keys, or prefixes of them, that do not count.
    """
    before, after = (
        {key: list(value) if isinstance(value, tuple) else value for key, value in leaves(config)}
        for config in (old, new)
    )
    changes = []
    for key in sorted(before.keys() | after.keys()):
        exempt = any(key == allowed or key.startswith(allowed + ".") for allowed in may_change)
        was, now = before.get(key, "(absent)"), after.get(key, "(absent)")
        if not exempt and was != now:
            changes.append((key, was, now))
    return changes


def changes_refused(
    where: str, changes: Sequence[tuple[str, object, object]], was: str = ""
) -> ConfigError:
    """Return the error of a run whose defining keys were changed, with the first five of them.

    Args:
        where: the file, or the checkpoint, that has the old values; the message begins with it.
        changes: as ``config_changes`` gives them.
        was: stands before each old value.
    """
    listed = "; ".join(f"{key}: {was}{old!r}, now {new!r}" for key, old, new in changes[:_SHOWN])
    more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return ConfigError(
        "RUN-CONFIG-CHANGED",
        f"{where} {listed}{more}. A run keeps what defines it: undo the change"
        f"{_words_undoing(changes) if not more else ''}, or give the run another name",
    )


def _words_undoing(changes: Sequence[tuple[str, object, object]]) -> str:
    """Return what on the command line gives changed keys their old values, after a space.

    Args:
        changes: as ``config_changes`` gives them.

    Returns:
        such as `` with optim.lr=0.001``; empty if an old value is none that a word can give.
    """
    words = []
    for key, old, _ in changes:
        plain = isinstance(old, str) and re.fullmatch(r"[\w./-]+", old)
        if not plain and not (old is None or isinstance(old, bool | int | float)):
            return ""
        words.append(f"{key}={old if plain else json.dumps(old)}")
    return f" with {' '.join(words)}" if words else ""
