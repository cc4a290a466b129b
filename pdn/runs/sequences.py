"""``validation.json`` of a run: the losses of single sequences, of its last validation."""

from __future__ import annotations

import json
from pathlib import Path

from pdn.runs.records import read_object
from pdn.store.local import storage_errors, write_durably

FILE = "validation.json"


def keep_sequences(run: Path, record: dict) -> None:
    """Write ``{"step": …, "sets": {name: {"id": […], "loss": […], "tokens": […]}}}``.

    Earlier ones are replaced. A set whose sequences are too many is null.
    """
    file = run / FILE
    with storage_errors(file):
        write_durably(file, json.dumps(record).encode())


def read_sequences(run: Path, step: int, name: str) -> dict[str, tuple[float, int]] | None:
    """Return the losses of a set's sequences, summed in nats, and their tokens, by their names.

    Args:
        run: its directory.
        step: after which they were measured.
        name: of the set: ``validation``, or ``validation/<name>``.

    Returns:
        None if the run kept none of that set and step.
    """
    record = read_object(run / FILE)
    sets = record.get("sets")
    found = sets.get(name) if record.get("step") == step and isinstance(sets, dict) else None
    if not isinstance(found, dict):
        return None
    rows = zip(found["id"], found["loss"], found["tokens"], strict=True)
    return {str(key): (float(loss), int(tokens)) for key, loss, tokens in rows}
