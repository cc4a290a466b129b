"""Trees and paths of runs whose records are damaged: every run is told of, and nothing hangs."""

import json
from pathlib import Path

import pytest

from pdn.errors import ConfigError, StorageError
from pdn.runs.ancestry import check, tree

STEP = {"step": 1, "first": 0, "end": 8, "hash": "x"}


def run(place: Path, *lines: dict | str, config: str = "seed: 0\n") -> Path:
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(config)
    text = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (place / "ledger.jsonl").write_text("".join(text))
    return place


def branch(of: Path, **more) -> dict:
    return {"step": 1, "first": 8, "hash": "x", "parent": {"run": str(of), "changes": {}, **more}}


def test_a_run_that_cannot_be_read_is_told_in_the_tree_beside_the_others(tmp_path):
    run(tmp_path / "a", STEP)
    run(tmp_path / "b", branch(tmp_path / "a"), {**STEP, "step": 2, "first": 8, "end": 16})
    run(tmp_path / "c", "[1, 2]\n")
    run(tmp_path / "d", STEP, config=": : [")
    run(tmp_path / "e", branch(tmp_path / "a", run=3))
    (run(tmp_path / "f") / "ledger.jsonl").unlink()
    (tmp_path / "f" / "ledger.jsonl").mkdir()
    a, b, *others = tree(tmp_path)
    assert (a, b) == ("a  step 1", "└─ b  step 2, from step 1")
    reasons = ["not a JSON record", "not YAML", "does not tell", "not a regular file"]
    for line, name, why in zip(others, "cdef", reasons, strict=True):
        assert line.startswith(f"{name}: {tmp_path / name}") and why in line


def test_runs_that_are_branches_of_each_other_end_the_path_and_are_drawn(tmp_path):
    run(tmp_path / "a", branch(tmp_path / "b"))
    run(tmp_path / "b", branch(tmp_path / "a"))
    with pytest.raises(StorageError, match=r"E-PATH\] .*/a: its ancestry leads back to .*/a"):
        check(tmp_path / "a")
    assert tree(tmp_path) == [
        "a  step 1, from step 1",
        "└─ b  step 1, from step 1",
        "   └─ a: its ancestry leads back to itself",
    ]


@pytest.mark.parametrize("lines", [(), ('{"step": 1, "fir',)])
def test_a_ledger_without_a_step_proves_nothing(lines, tmp_path):
    with pytest.raises(ConfigError, match=r"E-LEDGER\] .*: has no whole line of a step; expected"):
        check(run(tmp_path / "a", *lines))


def test_a_branch_whose_first_line_does_not_tell_its_parent_is_refused(tmp_path):
    for parent in ({}, {"run": "a"}, {"run": "a", "changes": {"seed": 1}}, 3):
        place = run(tmp_path / str(len(str(parent))), {**STEP, "parent": parent})
        with pytest.raises(StorageError, match=r"E-LEDGER\] .*does not tell the parent's run"):
            check(place)
