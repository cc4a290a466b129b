"""Trials that others leave behind are stopped, listed with their reason, and never finished."""

import json
import sys

import pytest

from pdn.reports.stopping import Curves, EarlyStopping, verdicts
from pdn.reports.sweep import best_rates, grid_of, rows
from pdn.reports.trials import run_trials

METRIC = "validation/loss"
# A trial as good as its rate is small. A bad one waits to be told to stop, at its first launch.
TRAINER = """
import json, os, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:])
run = os.path.join(words["output_dir"], words["name"])
os.makedirs(run, exist_ok=True)
open(run + "/launches", "a").write("x")
first = len(open(run + "/launches").read()) == 1
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
rate = float(words["optim.lr"])
records = [{"step": s, "loss": rate, "validation/loss": rate + 1 / s} for s in (1, 2, 3, 4)]
bad = rate > 3 and first
with open(run + "/metrics.jsonl", "w") as file:
    for record in records[:2] if bad else records:
        file.write(json.dumps(record) + chr(10))
if bad:
    time.sleep(120)
    sys.exit(1)
open(run + "/status.json", "w").write(json.dumps({"state": "finished", "step": 4}))
"""


def sweep(tmp_path, stop: str | None):
    grid = grid_of(["optim.lr=1,2,3,4"])
    rule = stop and EarlyStopping(stop, 2, tmp_path, METRIC)
    said: list[str] = []
    outcome = run_trials(
        lambda finished: grid.as_trials(), tmp_path, slots=1, seconds=None, say=said.append,
        command=[sys.executable, "-c", TRAINER], stopping=rule, groups=grid.groups,
    )  # fmt: skip
    return outcome, rows(grid, tmp_path, METRIC, failed=outcome.failed), said, grid


def test_a_trial_that_falls_behind_is_stopped_and_goes_on_by_another_rule(tmp_path):
    outcome, table, said, grid = sweep(tmp_path, "median")
    reason = "step 2: 4.5; the median of 3 others is 2.5"
    assert outcome.stopped == {"lr4": reason}
    assert (outcome.finished, outcome.failed, outcome.unfinished) == (["lr1", "lr2", "lr3"], {}, [])
    assert said[-1].endswith(f"lr4  early, {reason}")  # and not that it is launched again
    assert [row["state"] for row in table] == ["finished"] * 3 + ["stopped early"]
    assert table[-1]["reason"] == f"{reason} (median after 2 steps of {METRIC})"
    assert list(best_rates(table, grid, METRIC)[0].results) == [1, 2, 3]

    again, table, _, _ = sweep(tmp_path, "median")
    assert again.stopped == {"lr4": reason} and table[-1]["state"] == "stopped early"
    assert (tmp_path / "lr4" / "launches").read_text() == "x"

    other, table, _, _ = sweep(tmp_path, None)
    assert other.finished == ["lr1", "lr2", "lr3", "lr4"] and not other.stopped
    assert table[-1]["state"] == "finished" and not list(tmp_path.glob("*.stopped.json"))


def curves(**values: list[float]) -> dict[str, dict[int, float]]:
    """Return curves with a value after every tenth step."""
    return {name: {10 * (i + 1): v for i, v in enumerate(own)} for name, own in values.items()}


def test_the_median_is_that_of_what_others_had_at_the_same_step():
    known = curves(a=[5, 1], b=[6, 2], c=[7, 3], d=[6.5], e=[5.5], f=[8, 8], g=[9])
    found = verdicts(known, list("defg"), "median", 10)
    assert found.keys() == {"f", "g"}  # e is better than half at step 10, d is the median
    assert found["g"] == "step 10: 9; the median of 6 others is 6.25"
    assert verdicts(known, ["g"], "median", 20) == {}
    assert verdicts(curves(a=[1], b=[1], g=[9]), ["g"], "median", 10) == {}  # too few others


def test_halving_keeps_the_best_third_of_each_rung():
    known = curves(a=[1, 1, 1], b=[2, 2, 9], c=[3, 3, 8], d=[4], e=[5], f=[6])
    found = verdicts(known, list("abcdef"), "halving", 10)
    # at 10 the best two of six go on; b and c have come to the rung at 30, where one of three does
    assert found.keys() == set("bcdef")
    assert found["d"] == "rung 10: 4; the best 2 of 6 have 2"
    assert found["c"] == "rung 30: 8; the best 1 of 3 have 1"
    assert verdicts(curves(a=[1], f=[6]), ["f"], "halving", 10) == {}


def test_what_is_not_finite_is_stopped_at_once():
    assert verdicts({"a": {10: float("nan")}}, ["a"], "halving", 10) == {"a": "step 10: nan"}
    assert verdicts({"a": {10: float("nan")}}, ["a"], "median", 20) == {}


def test_curves_follow_a_run_that_grows_and_goes_back(tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    file, found = run / "metrics.jsonl", Curves(tmp_path, METRIC)
    assert found.of("a") == {}

    def line(step: int, value: object) -> str:
        return json.dumps({"step": step, METRIC: value}) + "\n"

    file.write_text(line(1, 3.0) + json.dumps({"step": 1, "loss": 9}) + "\n" + line(2, "inf")[:9])
    assert found.of("a") == {1: 3.0}
    file.write_text(line(1, 3.0) + json.dumps({"step": 1, "loss": 9}) + "\n" + line(2, "inf"))
    assert found.of("a") == {1: 3.0, 2: float("inf")}
    file.write_text(line(1, 2.5))
    assert found.of("a") == {1: 2.5}


@pytest.mark.parametrize(
    "words", [["stop=median"], ["stop_after=9"], ["stop=best", "stop_after=9"]]
)
def test_a_rule_needs_its_first_step(words):
    from pdn.cli.options import parse
    from pdn.errors import ConfigError
    from scripts.sweep import Options

    with pytest.raises(ConfigError, match="stop"):
        parse(Options, words)
