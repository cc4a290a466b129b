"""Which run came of which, and that no token was trained on twice along the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pdn.errors import ConfigError, PdnError, StorageError
from pdn.runs.records import JsonLines
from pdn.runs.schema import read_config
from pdn.store.local import read_regular, storage_error
from pdn.wording import counted

_SHOWN = 4  # changes of a branch in the tree
_FIX = "restore the ledger, or do not count on this run's data"


def ledger_of(run: Path) -> list[dict]:
    """Return the lines of a run's ledger.

    Raises:
        ConfigError: it has none.
    """
    file = run / "ledger.jsonl"
    if read_regular(file) is None:
        raise ConfigError(
            "LEDGER", f"{file}: is not there; expected the directory of a run that has trained"
        )
    return [record for _, record in JsonLines(file).records()]


def parent_in(run: Path, lines: list[dict]) -> Path | None:
    """Return the directory of the run that one is a branch of, where it is now; None for a root.

    Raises:
        ConfigError: it is not where it was, nor beside the branch.
    """
    if not lines or "parent" not in lines[0]:
        return None
    recorded = Path(_parent(lines[0], run)["run"])
    for place in (recorded, run.parent / recorded.name):
        if (place / "ledger.jsonl").is_file() and place.resolve() != run.resolve():
            return place
    raise ConfigError(
        "PARENT",
        f"{run}: is a branch of {recorded}, which is not there; expected it in its place, or "
        "beside its branch",
    )


def _parent(line: dict, run: Path) -> dict:
    """Return what a ledger's first line says of the parent.

    Raises:
        StorageError: it does not say which run, from which sample, by which changes.
    """
    parent = line["parent"]
    if isinstance(parent, dict) and isinstance(parent.get("run"), str):
        changes = parent.get("changes")
        pairs = changes.values() if isinstance(changes, dict) else [None]
        joint = isinstance(line.get("first"), int) and isinstance(line.get("hash"), str)
        if joint and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            return parent
    raise StorageError(
        "LEDGER",
        f"{run / 'ledger.jsonl'}: its first line is of a branch, but does not tell the parent's "
        f"run, sample, hash and changes; {_FIX}",
    )


def path_to(run: Path) -> list[tuple[Path, list[dict]]]:
    """Return the runs from the root to a run, with the lines of the ledger that count for it.

    Raises:
        ConfigError: a run of the path is not there.
        StorageError: a branch does not go on from what its parent did.
    """
    found: list[tuple[Path, list[dict]]] = []
    end: int | None = None
    joint: dict = {}
    at: Path | None = run
    while at is not None:
        if any(at.resolve() == below.resolve() for below, _ in found):
            raise StorageError(
                "PATH", f"{run}: its ancestry leads back to {at}; expected a root; {_FIX}"
            )
        lines = ledger_of(at)
        if end is not None:
            # what the parent skipped at the joint, it skipped after the branch had begun
            lines = [x for x in lines if x["step"] <= end and _span(x)[1] <= joint["first"]]
            last = next((line for line in reversed(lines) if "hash" in line), {})
            if (last.get("step"), last.get("hash")) != (joint["step"], joint["hash"]):
                raise StorageError(
                    "PATH",
                    f"{at / 'ledger.jsonl'}: at step {joint['step']} the hash of its samples is "
                    f"{last.get('hash')}, expected {joint['hash']}, from which {found[-1][0]} goes "
                    f"on; {_FIX}",
                )
        found.append((at, lines))
        parent = parent_in(at, lines)
        if parent is not None:
            joint, end = lines[0], lines[0]["step"]
        at = parent
    return found[::-1]


def _span(line: dict) -> tuple[int, int]:
    """Return the first sample that a line of a ledger is about, and the one after the last."""
    first: int = line.get("first", line.get("skipped_first", line.get("lost_first", 0)))
    end: int = line.get("end", line.get("skipped_end", line.get("lost_end", 0)))
    return first, end


@dataclass
class _Reached:
    """Holds how far a source was read: tokens of its order, over all epochs, and its cut."""

    tokens: int
    unit: int
    pool: int
    size: int | None  # tokens of the source, where known


@dataclass
class _Walk:
    """Follows the steps of a path and raises at the first that repeats something."""

    reached: dict[str, _Reached] = field(default_factory=dict)
    law: dict = field(default_factory=dict)
    sample: int = 0
    steps: int = 0
    tokens: int = 0
    samples: int = 0
    unplaced: int = 0

    def take(self, line: dict, where: str) -> None:
        first, end = _span(line)
        if first < self.sample:
            raise _repeats(f"{where}: sample {first}, after sample {self.sample - 1}")
        self.sample = end
        if "parent" in line or "hash" not in line:
            return
        self.steps, self.samples = self.steps + 1, self.samples + end - first
        self.law = line.get("law", self.law)
        for name, begin in line.get("begins", {}).items():
            self._begin(name, begin, f"{where}: {name}")
        self.unplaced += "places" not in line
        for name, (start, stop) in line.get("places", {}).items():
            self._read(name, start, stop, where)

    def _content(self, name: str) -> str:
        return self.law.get("sources", {}).get(name, {}).get("content", name)

    def _begin(self, name: str, begin: int, where: str) -> None:
        """Let a source go on at a unit: it must begin a pool that nothing was read of."""
        unit, pool = self.law["unit_tokens"], self.law["pool_units"]
        size = self.law["sources"][name].get("tokens")
        units = None if size is None else (size - 1) // unit
        if units and begin % units % pool:
            raise _repeats(f"{where}: unit {begin} does not begin a pool of {pool}")
        now, then = _Reached(begin * unit, unit, pool, size), self.reached.get(self._content(name))
        self.reached[self._content(name)] = now
        if then is None:
            return
        if (then.unit, then.pool) != (unit, pool):  # cut anew: only from the next epoch on
            if _epochs(then) > _epochs(now):
                raise _repeats(f"{where}: units of {unit} tokens within an epoch of {then.unit}")
        elif then.tokens > now.tokens:
            raise _repeats(f"{where}: goes on at token {now.tokens}, after token {then.tokens}")

    def _read(self, name: str, start: int, stop: int, where: str) -> None:
        stood = self.reached.setdefault(self._content(name), _Reached(0, 1, 1, None))
        if start < stood.tokens:
            raise _repeats(
                f"{where}: {name}: tokens {start} to {stop - 1} of its order, which was read up to "
                f"{stood.tokens} before"
            )
        self.tokens += stop - start
        stood.tokens = stop


def _epochs(reached: _Reached) -> float:
    if reached.size is None:
        return float("inf")
    return -(-reached.tokens // ((reached.size - 1) // reached.unit * reached.unit))


def _repeats(what: str) -> StorageError:
    return StorageError("PATH", f"{what}; expected tokens that were not used before; {_FIX}")


def check(run: Path) -> list[str]:
    """Prove from the ledgers that no token is trained on twice within an epoch along a path.

    Every step takes an interval of the order of each source. Within a phase that order visits every
    window of an epoch once; a phase begins at a pool that no earlier one has opened. So it is
    enough that the intervals follow each other, from the first run to the last step of this one.

    Returns:
        What was found, in lines for people.

    Raises:
        ConfigError: a run of the path is not there.
        StorageError: something repeats, or a branch does not fit its parent. Exit code 74.
    """
    path, walk = path_to(run), _Walk()
    for at, lines in path:
        for line in lines:
            walk.take(line, f"{at / 'ledger.jsonl'}: step {line['step']}")
    if not walk.steps:
        raise ConfigError(
            "LEDGER",
            f"{run / 'ledger.jsonl'}: has no whole line of a step; expected the directory of a run "
            "that has trained",
        )
    steps, runs = counted(walk.steps, "step"), counted(len(path), "run")
    samples, tokens = counted(walk.samples, "sample"), counted(walk.tokens, "token")
    found = [f"{run}: {steps} of {runs}, {samples}, {tokens}: none twice within an epoch"]
    if walk.unplaced:
        found.append(
            f"of {walk.unplaced} steps the ledger has no places in the sources (generated "
            "examples, or steps of an older version): checked by the numbers of their samples only"
        )
    return found


# ---------------------------------------------------------------- the tree


def runs_below(root: Path) -> Iterator[Path]:
    """Yield the directories of runs at and below a directory, in order of name.

    Raises:
        StorageError: a directory cannot be read, which may hold runs.
    """

    def refuse(error: OSError) -> None:
        raise storage_error(error, root)

    for folder, below, files in os.walk(root, onerror=refuse):
        if "config.yaml" in files:
            yield Path(folder)
            below.clear()
        below.sort()


def tree(root: Path) -> list[str]:
    """Draw the runs below a directory, each under the one that it is a branch of.

    Of a run whose records cannot be read, it says why.

    Raises:
        ConfigError: there is no run.
    """
    runs = {run.resolve(): run for run in runs_below(root)}
    if not runs:
        raise ConfigError("RUNS", f"{root}: no run there; expected a directory such as runs/")
    children: dict[Path | None, list[tuple[int, str, Path]]] = {}
    for place, run in runs.items():
        parent, step = origin(run)
        known = parent if parent in runs else None
        children.setdefault(known, []).append((step, run.name, place))
    found: list[str] = []
    drawn: set[Path] = set()

    def draw(place: Path, stem: str, branch: str) -> None:
        if place in drawn:
            found.append(f"{stem}{branch}{runs[place].name}: its ancestry leads back to itself")
            return
        drawn.add(place)
        found.append(stem + branch + _label(runs[place], root))
        below = sorted(children.get(place, []))
        inside = stem + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for number, (_, _, child) in enumerate(below, start=1):
            draw(child, inside, "└─ " if number == len(below) else "├─ ")

    for _, _, place in sorted(children.get(None, [])):
        draw(place, "", "")
    for place in sorted(runs):  # below none: each is a branch of another one of them
        if place not in drawn:
            draw(place, "", "")
    return found


def origin(run: Path) -> tuple[Path | None, int]:
    """Return where the parent of a run is, and the step that the run goes on from."""
    first: dict = {}
    try:
        first = next((record for _, record in JsonLines(run / "ledger.jsonl").records()), {})
        if "parent" not in first:
            return None, 0
        parent = parent_in(run, [first])
    except ConfigError:  # the parent is not where it was
        parent = Path(first["parent"]["run"])
    except StorageError:  # which its label says
        return None, 0
    return parent.resolve() if parent is not None else None, first["step"]


def _label(run: Path, root: Path) -> str:
    try:
        name = str(run.relative_to(root))
    except ValueError:
        name = str(run)
    name = name if name != "." else run.name
    try:
        return f"{name}  {_about(run)}"
    except PdnError as error:
        return f"{name}: {error.args[0]}"


def _about(run: Path) -> str:
    lines = [record for _, record in JsonLines(run / "ledger.jsonl").records()]
    text = f"step {lines[-1]['step'] if lines else 0}"
    if lines and "parent" in lines[0]:
        text += f", from step {lines[0]['step']}{_changes(_parent(lines[0], run))}"
    phases = (read_config(run) or {}).get("phases")
    return text + (f", {counted(len(phases), 'phase')}" if phases else "")


def _changes(parent: dict) -> str:
    changes = [f"{key} {then} → {now}" for key, (then, now) in parent["changes"].items()]
    more = f", and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return f": {', '.join(changes[:_SHOWN])}{more}" if changes else ""
