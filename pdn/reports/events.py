"""What did not go on evenly in a run: launches, rewinds, skipped updates, failures, alarms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pdn.runs.ancestry import origin
from pdn.runs.records import read_lines, read_object

MOST = 20  # events of one kind that are told of a run; of a slow disk there may be thousands


def events(path: Path, records: Sequence[dict], names: Mapping[Path, str]) -> list[dict]:
    """Return events with ``step``, ``kind`` and ``text``, in order of steps.

    Of a kind that happened more than ``MOST`` times the first ones, and how many more there are.

    Args:
        path: directory of the run.
        records: of its metrics.
        names: of other runs by their resolved paths, where these are too long.
    """
    found = [*_launches(path, names), *_rewinds(path), *_of_records(records)]
    status = read_object(path / "status.json")
    if status.get("state") == "failed":
        last = max((record["step"] for record in records), default=0)
        words = f"ended: {status.get('reason')}"
        step = status.get("step")
        found.append(_event(step if isinstance(step, int) else last, "failure", words))
    return _told(sorted(found, key=lambda event: event["step"]))


def _event(step: int, kind: str, text: str) -> dict:
    return {"step": step, "kind": kind, "text": text}


def _launches(path: Path, names: Mapping[Path, str]) -> list[dict]:
    found = []
    for number, launch in enumerate(read_lines(path / "history.jsonl"), start=1):
        parent, step = origin(path) if number == 1 else (None, 0)
        what = "started" if number == 1 else "continued"
        if parent is not None:
            what = f"branched from {names.get(parent, parent)}@{step}"
        git = launch.get("git")
        commit = git.get("commit") if isinstance(git, dict) else None
        commit = f", commit {str(commit)[:10]}" if commit else ""
        words = f"{what} on {launch.get('world_size', 1)} × {launch.get('device')}{commit}"
        found.append(_event(launch.get("step", 0), "launch", words))
    return found


def _rewinds(path: Path) -> list[dict]:
    found = []
    for line in read_lines(path / "ledger.jsonl"):
        first, end = line.get("skipped_first"), line.get("skipped_end")
        if isinstance(first, int) and isinstance(end, int):
            words = f"samples {first} to {end - 1} passed over"
            found.append(_event(line.get("step", 0), "rewind", words))
    return found


def _of_records(records: Sequence[dict]) -> list[dict]:
    found = []
    for record in records:
        step = record["step"]
        if record.get("skipped"):
            words = f"update skipped: loss {record.get('loss')}, norm {record.get('grad_norm')}"
            found.append(_event(step, "skip", words))
        for key, value in record.items():
            if key.endswith("/failed"):
                words = f"{value} of {key.removesuffix('/failed')} failed"
                found.append(_event(step, "failure", words))
            elif key.startswith(("alarm", "pace/alarm")):
                found.append(_event(step, "alarm", f"{key}: {value}"))
    return found


def _told(found: Sequence[dict]) -> list[dict]:
    """Leave out what is beyond ``MOST`` of a kind; alarms of different keys are different kinds."""
    kinds = [
        (event["kind"], event["text"].partition(":")[0] if event["kind"] == "alarm" else "")
        for event in found
    ]
    counts, told, shown = Counter(kinds), Counter(), []
    for event, kind in zip(found, kinds, strict=True):
        told[kind] += 1
        if told[kind] <= MOST:
            shown.append(event)
        elif told[kind] == counts[kind]:
            more = f"{counts[kind] - MOST:,} more of these, the last at this step: "
            shown.append(event | {"text": more + event["text"]})
    return shown
