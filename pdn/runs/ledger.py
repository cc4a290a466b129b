"""Whether the ledger of a run is the one that a checkpoint was saved with."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pdn.errors import StorageError
from pdn.runs.records import JsonLines
from pdn.store.local import read_regular

_WAYS_OUT = (
    "expected it as it was when the checkpoint was saved. Restore it; or move it away, and the run "
    "goes on with a ledger that says what it does not hold; or start over with resume=restart"
)


def check_ledger(file: Path, step: int, digest: str | None, rolling_hash: str) -> bool:
    """Compare a ledger with a checkpoint of ``step``.

    Args:
        digest: SHA-256 of the ledger's bytes up to that step, as ``JsonLines.digest`` gave it; None
            in checkpoints that are older than it, whose rolling hash and order of lines count.
        rolling_hash: of all samples up to that step.

    Returns:
        Whether there is a ledger; a run may go on without one, but never by itself with another.

    Raises:
        StorageError: it differs; the first line that shows it is named where that is known.
    """
    if step == 0:
        return True
    if not os.path.lexists(file):
        return False
    records = [record for _, record in JsonLines(file).records() if record["step"] <= step]
    if len(records) == 1 and records[0].get("lost_end") is not None:
        return True  # begun anew at this very checkpoint
    where = f"{file}: up to step {step}"
    if digest is not None:
        if digest not in _prefixes(file, step):
            raise StorageError(
                "LEDGER-CHANGED", f"{where} it is not what the checkpoint tells; {_WAYS_OUT}"
            )
        return True
    problem = _disorder(records, step)
    if problem is None:
        last = next((record for record in reversed(records) if "hash" in record), {})
        if last.get("hash") != rolling_hash:
            problem = f"the samples' hash is {last.get('hash')}, the checkpoint has {rolling_hash}"
    if problem is not None:
        raise StorageError("LEDGER-CHANGED", f"{where} {problem}; {_WAYS_OUT}")
    return True


def _prefixes(file: Path, step: int) -> set[str]:
    """Return the SHA-256 after every line up to ``step``.

    Lines about skipped samples may follow the one of the step itself.
    """
    running, found = hashlib.sha256(), {hashlib.sha256().hexdigest()}
    for line in (read_regular(file) or b"").splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        running.update(line)
        found.add(running.copy().hexdigest())
    return found if step == 0 else found - {hashlib.sha256().hexdigest()}


def _disorder(records: list[dict], step: int) -> str | None:
    """Return what is wrong with the order of the lines; None if nothing is."""
    expected, end = 1, 0
    for record in records:
        first = record.get("first", record.get("skipped_first", record.get("lost_first")))
        last = record.get("end", record.get("skipped_end", record.get("lost_end")))
        if not isinstance(first, int) or not isinstance(last, int) or first != end or last < first:
            return f"step {record['step']} has samples {first} to {last}, after sample {end}"
        if "hash" in record:
            if record["step"] != expected:
                return f"step {record['step']} follows step {expected - 1}"
            expected += 1
        elif "lost_end" in record:
            expected = record["step"] + 1
        end = last
    return None if expected == step + 1 else f"it ends at step {expected - 1}"
