"""Versions of config.yaml: what an earlier one recorded, in the words of this one.

A key that came later has a default in its class, which does what runs did before there was that
key; only keys that were renamed or cut differently are translated here.
"""

from pdn.errors import ConfigError

VERSION = 2
KEY = "schema"


def stamped(config: dict) -> dict:
    """``config`` as it is recorded, with the version of its schema."""
    return {KEY: VERSION} | config


def upgraded(recorded: dict, where: object) -> dict:
    """A recorded configuration in today's keys, without its version.

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
    return found


def _axes(parallel: dict) -> dict:
    """Until schema 2 the layout of the ranks had a kind and a number of replicas."""
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
