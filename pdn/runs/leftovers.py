"""What a run directory tells about checkpoints that are gone, and how it is cleared.

A run that was killed before its first save has nothing to continue from and starts over. A run that
has saved, and whose checkpoints are gone, must not: starting over would wipe its records.
"""

import json
import os
from pathlib import Path

from pdn.runs.records import read_object
from pdn.store.local import read_regular, storage_errors, sync_directory

ASIDE = "before-restart-{}"
_SAVED_STATES = ("finished", "stopped", "preempted")
_STAYS = ("run.lock", "replica.json")


def holds_progress(run: Path) -> bool:
    """Return whether a run has a step in its ledger, or a checkpoint, committed or not."""
    ledger = run / "ledger.jsonl"
    with storage_errors(run):
        return any((run / "checkpoints").glob("step-*")) or (
            ledger.exists() and ledger.stat().st_size > 0
        )


def committed_before(run: Path) -> str | None:
    """Return, in words, what shows that ``run`` once committed a checkpoint; None if nothing does.

    Args:
        run: the directory of a run in which no committed checkpoint was found.

    Raises:
        StorageError: a record exists and cannot be read.
    """
    with storage_errors(run):
        status = read_object(run / "status.json")
        step, state = status.get("step"), status.get("state")
        if isinstance(step, int) and step > 0 and state in _SAVED_STATES:
            return f"status.json says {state} at step {step}"
        if isinstance(status.get("checkpoint"), int):
            return f"status.json names a checkpoint of step {status['checkpoint']}"
        steps = _saved_steps(run / "metrics.jsonl")
        if steps:
            return f"metrics.jsonl names a checkpoint of step {steps[-1]}"
        unmarked = sorted(
            entry.name for entry in (run / "checkpoints").glob("step-*") if entry.suffix != ".tmp"
        )
        if unmarked and not (run / "checkpoints" / unmarked[-1]).exists():
            return f"checkpoints/{unmarked[-1]} is a link to a place that is not there"
        if unmarked:
            return f"checkpoints/{unmarked[-1]} is there without its COMMITTED marker"
    return None


def _saved_steps(file: Path) -> list[int]:
    """Return the steps of all checkpoints that metrics.jsonl tells of, but for damaged lines."""
    steps = []
    for line in (read_regular(file) or b"").splitlines():
        if b'"checkpoint/step"' in line:
            try:
                steps.append(int(json.loads(line)["checkpoint/step"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    return steps


def move_aside(run: Path) -> Path | None:
    """Move everything that earlier launches left in ``run`` into a directory of its own below it.

    Nothing is deleted. A launch that is killed in between leaves the rest to the next one.

    Returns:
        Where it went; None if there was nothing.

    Raises:
        StorageError: the directory cannot be changed.
    """
    prefix = ASIDE.format("")
    with storage_errors(run):
        old = [
            entry
            for entry in sorted(run.iterdir())
            if entry.name not in _STAYS and not entry.name.startswith(prefix)
        ]
        old = [entry for entry in old if not _is_empty_directory(entry)]
        if not old:
            return None
        number = 1
        while (run / ASIDE.format(number)).exists():
            number += 1
        target = run / ASIDE.format(number)
        target.mkdir()
        for entry in old:
            os.rename(entry, target / entry.name)
        (run / "checkpoints").mkdir(exist_ok=True)
        sync_directory(target)
        sync_directory(run)
    return target


def _is_empty_directory(entry: Path) -> bool:
    return entry.is_dir() and not entry.is_symlink() and not any(entry.iterdir())
