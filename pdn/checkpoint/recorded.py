"""What a run's checkpoints say about its data, before any of them is loaded."""

from __future__ import annotations

from pathlib import Path

from pdn.checkpoint.format import committed_steps, read_side, step_directory
from pdn.errors import PdnError


def recorded_fingerprint(checkpoints: Path) -> dict[str, object] | None:
    """Return the data's fingerprint in the newest checkpoint that can be read; None without one.

    Whether it can be trusted is found out when it is loaded.
    """
    found = _recorded(checkpoints, "fingerprint")
    return found if isinstance(found, dict) else None


def recorded_history(checkpoints: Path) -> list[dict]:
    """Return the history in the newest checkpoint that can be read; empty without one."""
    found = _recorded(checkpoints, "history")
    return found if isinstance(found, list) else []


def _recorded(checkpoints: Path, key: str) -> object:
    for step in sorted(committed_steps(checkpoints), reverse=True):
        try:
            found = read_side(step_directory(checkpoints, step))["side"][key]
        except (PdnError, OSError, ValueError, LookupError, TypeError):
            continue
        if found is not None:
            return found
    return None
