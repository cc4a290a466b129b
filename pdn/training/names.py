"""Names of runs and their directories.

A default name is one that people can read; earlier versions gave others, which are found again.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import yaml

from pdn.data.config import DataConfig
from pdn.errors import ConfigError
from pdn.runs.schema import upgraded
from pdn.training.config import RunConfig

_DIGITS = 6  # of the hash in a name: two of a hundred trials share one with 3 in 10,000
_LABEL = 24  # characters of the data's part
_HEXADECIMAL = "[0-9a-f]{8}"


def directory_of(config: RunConfig) -> Path:
    """Return a run's directory: one of a former default name if the run is there."""
    root = Path(config.output_dir).expanduser()
    if config.name is None and (former := former_directory(config, root)) is not None:
        return former
    return root / name_of(config)


def name_of(config: RunConfig) -> str:
    """Return the name of a run's directory under ``output_dir``.

    The default is ``<model>-<data>-lr<peak>-s<seed>-<hash>``, such as
    ``gdn-340m-slimpajama-lr4e-4-s1-70b9c1``.
    """
    if config.name is not None:
        return config.name
    identity = json.dumps(config.identity(), sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    parts = [
        config.model.name,
        _label(config.data),
        f"lr{_scientific(config.optim.lr)}",
        f"s{config.seed}",
    ]
    return "-".join([*map(_word, parts), digest[:_DIGITS]])


def _word(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.").lower() or "x"


def _label(data: DataConfig) -> str:
    """Return what the data are called: their corpus, file, directory or hub name, or their kind."""
    places = (getattr(data, key, None) for key in ("corpus", "dataset", "path"))
    place = next(filter(None, places), None)
    if place is None:
        return data.kind
    name = Path(str(place).rstrip("/")).name
    return _word(name.partition(".")[0] or name)[:_LABEL].strip("-") or data.kind


def _scientific(number: float) -> str:
    """Write 0.0004 as ``4e-4`` and 0.00035 as ``3.5e-4``."""
    mantissa, _, exponent = f"{number:.3e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def former_name(config: RunConfig) -> str:
    """Return the default name until schema 2, which hashed the number of steps in every case."""
    identity = config.identity()
    identity["trainer"] = {"steps": config.trainer.steps} | identity["trainer"]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{config.model.name}-{config.data.kind}-{digest[:8]}"


def former_directory(config: RunConfig, root: Path) -> Path | None:
    """Return where a run of a former default name is, if it is the one that ``config`` describes.

    Raises:
        ConfigError: there are several, which differ in the number of steps only.
    """
    exact = root / former_name(config)
    if (exact / "config.yaml").is_file():
        return exact
    if config.schedule.ends_by_steps or not root.is_dir():
        return None
    # Its name hashed a number of steps that is not known here.
    pattern = re.compile(f"{re.escape(f'{config.model.name}-{config.data.kind}')}-{_HEXADECIMAL}")
    found = [
        entry
        for entry in sorted(root.iterdir())
        if pattern.fullmatch(entry.name) and _is_run_of(config, entry / "config.yaml")
    ]
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found)
        raise ConfigError(
            "RUN-NAME",
            f"{root}: found {names}, all of this configuration but for trainer.steps; expected "
            "one: say which with name=",
        )
    return found[0] if found else None


def _is_run_of(config: RunConfig, file: Path) -> bool:
    """Return whether the record at ``file`` has the identity of ``config``."""
    try:
        recorded = upgraded(yaml.safe_load(file.read_bytes()), file)
        mine = config.model_dump(mode="json")
        # Only what defines a run: other parts may be of any version.
        values = mine | {key: recorded[key] for key in config.identity()}
        values["trainer"] = mine["trainer"] | {
            key: recorded["trainer"][key] for key in config.identity()["trainer"]
        }
        if config.model.vocab_size is None:  # it was settled by the data before it was recorded
            values["model"] = values["model"] | {"vocab_size": None}
        return type(config).model_validate(values).identity() == config.identity()
    except (OSError, yaml.YAMLError, ConfigError, ValueError, KeyError, TypeError, AttributeError):
        return False
