"""What a run's checkpoints say about its data, before any of them is loaded."""

from __future__ import annotations

from pathlib import Path

from pdn.checkpoint.format import committed_steps, read_side, step_directory
from pdn.errors import PdnError


def recorded_fingerprint(checkpoints: Path) -> dict[str, object] | None:
    """Return the data's fingerprint in the newest checkpoint that can be read; None without one.

    Whether it can be trusted is found out when it is loaded.
    """
    for step in sorted(committed_steps(checkpoints), reverse=True):
        try:
            found = read_side(step_directory(checkpoints, step))["side"]["fingerprint"]
        except (PdnError, OSError, ValueError, LookupError, TypeError):
            continue
        if isinstance(found, dict):
            return found
    return None
