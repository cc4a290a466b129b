"""Two arms that begin alike are compared step by step."""

import json

import pytest

from pdn.errors import ConfigError
from pdn.reports.evidence import Study
from pdn.reports.parity import Parity, compare_losses, train_arms
from tests.reports.test_evidence import STUDY


@pytest.fixture(scope="module")
def runs(command, tmp_path_factory):
    study = Study.model_validate(STUDY)
    return train_arms(
        study, ["gdn", "control"], tmp_path_factory.mktemp("parity"), steps=2, command=command
    )


def test_the_losses_of_two_arms_are_compared_at_each_step(runs):
    parity = compare_losses(runs, "gdn", "control")
    assert parity.losses == {1: (4.0, 4.0), 2: (3.0, 3.0)}
    assert parity.holds(0.0)
    assert parity.lines(0.005)[-1].startswith("OK  control is at most 0.0000% from gdn")


@pytest.mark.parametrize(("loss", "holds"), [(4.019, True), (4.021, False), (float("nan"), False)])
def test_one_step_too_far_apart_fails_by_its_number(loss, holds):
    parity = Parity("a", "b", {1: (5.0, 5.0), 2: (4.0, loss), 3: (3.0, 3.001)})
    assert parity.holds(0.005) is holds
    assert parity.worst()[0] == 2
    last = parity.lines(0.005)[-1]
    assert last.startswith("OK" if holds else "FAIL") and "at step 2; 0.5000% allowed" in last


def test_runs_of_other_samples_or_other_lengths_are_not_compared(runs, tmp_path):
    for name, line in (("metrics.jsonl", None), ("ledger.jsonl", {"step": 2, "hash": "other"})):
        other = tmp_path / name
        other.mkdir()
        for file in ("metrics.jsonl", "ledger.jsonl"):
            lines = (runs["gdn"] / file).read_text().splitlines(keepends=True)
            kept = lines if file != name else [json.dumps(line)] if line else lines[:1]
            (other / file).write_text("".join(kept))
    with pytest.raises(ConfigError, match="gdn took 2 steps, short 1"):
        compare_losses(runs | {"short": tmp_path / "metrics.jsonl"}, "gdn", "short")
    with pytest.raises(ConfigError, match="same samples in the same order"):
        compare_losses(runs | {"other": tmp_path / "ledger.jsonl"}, "gdn", "other")


def test_a_run_that_fails_is_named_with_its_reason_and_an_unknown_arm_refused(command, tmp_path):
    study = Study.model_validate(STUDY)
    with pytest.raises(ConfigError, match=r"gdn: pdn\[E-STUB\] told to fail"):
        train_arms(study, ["gdn"], tmp_path, steps=2, extra=["fail=9"], command=command)
    with pytest.raises(ConfigError, match="mine: found no such arm; expected gdn"):
        train_arms(study, ["mine"], tmp_path, steps=2, command=command)
