"""The runs that a command's words name, and what to call them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pdn.errors import ConfigError
from pdn.runs.ancestry import runs_below

LONG = 40  # characters of a name
PART = re.compile(r"(?<=[-_/])(?<!\de[-_])")  # begins there; 1e-3 is one
TOLD = 3  # paths that are left out; of more their number


def only_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the runs among what ``runs/*`` may name, and those below directories of runs.

    What is left out is told in one line. A path that does not exist stays, for whoever reads it to
    refuse.

    Raises:
        ConfigError: none is left.
    """
    runs: list[Path] = []
    left: list[Path] = []
    for path in paths:
        within = [path] if _has_metrics(path) or not path.exists() else _below(path)
        runs += within
        left += [] if within else [path]
    if not runs:
        raise ConfigError(
            "RUNS",
            f"{', '.join(map(str, paths))}: no run among them; expected directories with "
            "metrics.jsonl, or with such directories in them",
        )
    if left:
        more = f" and {len(left) - TOLD:,} more" if len(left) > TOLD else ""
        shown = ", ".join(map(str, left[:TOLD]))
        print(f"left out, no metrics.jsonl: {shown}{more}")
    return runs


def _has_metrics(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file()


def _below(path: Path) -> list[Path]:
    return [run for run in runs_below(path) if _has_metrics(run)] if path.is_dir() else []


def named(runs: Sequence[Path]) -> dict[str, Path]:
    """Return runs by the shortest end of the path that tells them apart.

    Of long names what all have in common at both ends is left out, for an ellipsis.
    """
    runs = list(dict.fromkeys(run.resolve() for run in runs))
    found: dict[str, Path] = {}
    for parts in range(1, 16):
        found = {"/".join(run.parts[-parts:]): run for run in runs}
        if len(found) == len(runs):
            break
    return dict(zip(_shortened(list(found)), found.values(), strict=True))


def _shortened(names: Sequence[str]) -> list[str]:
    if len(names) < 2 or max(map(len, names)) <= LONG:
        return list(names)
    parts = [PART.split(name) for name in names]
    least = min(map(len, parts)) - 1  # of each a part is left
    first = _common(parts, least)
    last = _common([own[::-1] for own in parts], least - first)
    found = []
    for own in parts:
        middle = "".join(own[first : len(own) - last])
        found.append(("…" if first else "") + (f"{middle.rstrip('-_/')}…" if last else middle))
    return found


def _common(parts: Sequence[Sequence[str]], most: int) -> int:
    """Count the leading parts that all have in common, at most ``most``."""
    count = 0
    while count < most and len({own[count] for own in parts}) == 1:
        count += 1
    return count
