"""Where runs come from, and whether they saw the same samples, as a report says it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pdn.runs.ancestry import origin
from pdn.runs.records import read_lines
from pdn.runs.schema import recorded_config


def ancestry(run: Path, config: dict, names: Mapping[Path, str]) -> list[str]:
    """Return where a run's weights come from, and where those come from, and so on.

    It ends where a directory is not at hand.

    Args:
        run: its directory.
        config: what it recorded.
        names: of runs that have a shorter one than their directory, by its resolved path.
    """
    found: list[str] = []
    seen = {run.resolve()}
    while True:
        parent, step = origin(run)
        if parent is not None:
            found.append(f"{names.get(parent, parent)}@{step}")
            home = parent if (parent / "config.yaml").is_file() else None
        elif isinstance(source := config.get("init_from"), str):
            place = Path(source).expanduser().resolve()
            found.append(names.get(place, source))
            places = [place, *place.parents[:2]]  # of a run, or of one of its checkpoints
            home = next((p for p in places if (p / "config.yaml").is_file()), None)
        else:
            return [*found, "initialisation"]
        if home is None or home in seen:
            return found
        seen.add(home)
        run, config = home, recorded_config(home, {})


def _hashes(run: Path) -> dict[int, str]:
    """Return the rolling hash over all samples by step, those of the parents of a branch included.

    Where a parent is not at hand, its steps are missing.
    """
    found: dict[int, str] = {}
    seen: set[Path] = set()
    end: int | None = None
    while run.resolve() not in seen:
        seen.add(run.resolve())
        for line in read_lines(run / "ledger.jsonl"):
            if {"step", "hash"} <= line.keys() and (end is None or line["step"] <= end):
                found.setdefault(line["step"], line["hash"])
        parent, step = origin(run)
        if parent is None:
            break
        run, end = parent, step if end is None else min(end, step)
    return found


def same_order(runs: dict[str, Path]) -> list[str]:
    """Say whether the runs saw the same samples in the same order, by their ledgers' hashes.

    A branch has seen what its parents had before it.
    """
    by_run = {name: _hashes(path) for name, path in runs.items()}
    groups: list[list[str]] = []  # of runs that agree with the first one of them
    for name, steps in by_run.items():
        for group in groups:
            both, alike = _common(by_run[group[0]], steps)
            if both and alike == both:
                group.append(name)
                break
        else:
            groups.append([name])
    said = []
    for group in groups:
        common = [len(_common(by_run[group[0]], by_run[name])[0]) for name in group[1:]]
        if common:
            steps = (
                "the one common step" if min(common) == 1 else f"all {min(common):,} common steps"
            )
            said.append(f"{_listed(group)}: the same samples in {steps}")
    first = groups[0][0]
    for group in groups[1:]:
        both, alike = _common(by_run[first], by_run[group[0]])
        end = f"up to step {alike[-1]:,}" if alike else "at no step"
        shared = f"the same samples {end} of {both[-1]:,}" if both else "no step in common"
        said.append(f"{_listed(group)} against {first}: {shared}")
    return said


def _common(a: dict[int, str], b: dict[int, str]) -> tuple[list[int], list[int]]:
    """Return the steps that two ledgers have in common, and those of them with one hash."""
    both = sorted(a.keys() & b.keys())
    return both, [step for step in both if a[step] == b[step]]


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
