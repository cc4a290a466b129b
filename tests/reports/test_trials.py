"""Sweeps: what is finished is skipped, what fails is named, and time is kept."""

import json
import os
import signal
import sys
import time

import pytest

from pdn.errors import ConfigError, StorageError
from pdn.reports.trials import Trial, run_trials


def trial(name: str, *words: str) -> Trial:
    return Trial(name, ("model=gdn_tiny", "optim.lr=2e-3", "seed=1", *words))


def sweep(trials, directory, command, **options):
    said: list[str] = []
    options = {"slots": 2, "seconds": None} | options
    return run_trials(
        lambda finished: trials, directory, command=command, say=said.append, **options
    ), said


def launches(directory, name: str) -> int:
    return len((directory / name / "launches").read_text())


def test_finished_trials_are_skipped_and_handed_on_again(tmp_path, command):
    trials = [trial("a"), trial("b"), trial("c")]
    handed: list[str] = []
    for _ in range(2):
        outcome, _ = sweep(
            trials, tmp_path, command, on_finished=lambda t, run: handed.append(t.name)
        )
        assert sorted(outcome.finished) == ["a", "b", "c"]
        assert not outcome.failed and not outcome.unfinished
    assert sorted(handed) == ["a", "a", "b", "b", "c", "c"]
    assert [launches(tmp_path, name) for name in "abc"] == [1, 1, 1]


def test_a_trial_that_fails_is_tried_twice_and_named_with_its_reason(tmp_path, command):
    trials = [
        trial("once", "fail=1"),
        trial("always", "fail=9"),
    ]
    outcome, said = sweep(trials, tmp_path, command)
    assert outcome.finished == ["once"]
    again = [line for line in said if "again" in line]
    assert len(again) == 2 and all(line.endswith("pdn[E-STUB] told to fail") for line in again)
    assert outcome.failed == {
        "always": "exit code 70: pdn[E-STUB] told to fail",
    }
    assert [launches(tmp_path, name) for name in ("once", "always")] == [2, 2]


def test_what_would_fail_again_is_launched_once(tmp_path, command):
    """Wrong configurations, bad data, by torchrun too, and losses that are not finite."""
    trials = [
        trial("wrong", "fail=9", "code=78"),
        trial("data", "fail=9", "code=65"),
        trial("ranks", "fail=9", "code=1", "left=65"),
        trial("diverged", "fail=9", "tag=NONFINITE"),
    ]
    outcome, said = sweep(trials, tmp_path, command)
    assert outcome.failed == {
        "wrong": "exit code 78: pdn[E-STUB] told to fail",
        "data": "exit code 65: pdn[E-STUB] told to fail",
        "ranks": "exit code 65: pdn[E-STUB] told to fail",
        "diverged": "exit code 70: pdn[E-NONFINITE] told to fail",
    }
    assert [launches(tmp_path, t.name) for t in trials] == [1, 1, 1, 1], said


def test_the_reason_is_that_of_the_last_launch(tmp_path):
    (tmp_path / "a.log").write_text("pdn[E-NONFINITE] of an earlier sweep\n")
    command = [sys.executable, "-c", "print('OSError: now'); raise SystemExit(74)"]
    outcome, said = sweep([trial("a")], tmp_path, command)
    assert outcome.failed == {"a": "exit code 74: OSError: now"}
    assert sum("start" in line for line in said) == 2


def test_a_trial_that_another_process_holds_is_waited_for_and_that_is_said_once(tmp_path, command):
    """As one that outlived a sweep that was killed: twice would not do until it ends."""
    outcome, said = sweep([trial("held", "fail=3", "code=73")], tmp_path, command)
    assert outcome.finished == ["held"] and launches(tmp_path, "held") == 4
    assert [line.split()[2] for line in said].count("waits") == 1, said


def test_a_finished_trial_that_does_not_count_has_failed(tmp_path, command):
    """Nor does what waits for its result begin."""

    def verdict(t: Trial, run) -> str | None:
        return "nothing was measured" if t.name == "blind" else None

    outcome, said = sweep([trial("blind"), trial("sound")], tmp_path, command, on_finished=verdict)
    assert outcome.finished == ["sound"] and outcome.failed == {"blind": "nothing was measured"}
    assert any("failed" in line and "nothing was measured" in line for line in said)


def test_the_time_ends_a_sweep_and_the_next_one_goes_on(tmp_path, command):
    trials = [trial("fast"), trial("slow", "sleep=60")]
    began = time.monotonic()
    outcome, said = sweep(trials, tmp_path, command, seconds=8)
    assert time.monotonic() - began < 20
    assert (outcome.finished, outcome.unfinished) == (["fast"], ["slow"])
    assert any("stopped" in line and "slow" in line for line in said)


def test_no_trial_starts_that_would_not_end_in_time(tmp_path, command):
    trials = [trial("a", "sleep=6"), trial("b", "sleep=6"), trial("c", "sleep=6")]
    outcome, _ = sweep(trials, tmp_path, command, slots=1, seconds=12)
    assert outcome.finished == ["a"]
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()
    assert outcome.unfinished == ["b", "c"]


def test_a_trial_may_wait_for_the_results_of_others(tmp_path, command):
    def ready(finished):
        return [trial("first"), *([trial("second")] if "first" in finished else [])]

    outcome = run_trials(
        ready, tmp_path, slots=2, seconds=None, command=command, say=lambda line: None
    )
    assert outcome.finished == ["first", "second"]


def test_a_run_by_other_words_is_no_result_of_a_trial(tmp_path, command):
    sweep([trial("a", "order=x")], tmp_path, command)
    with pytest.raises(ConfigError, match=r"other words, differing in: order=x order=y"):
        sweep([trial("a", "order=y")], tmp_path, command)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_trials_too_and_is_then_as_it_was(tmp_path, number):
    before = signal.getsignal(number)
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    seen: list[set[str]] = []

    def watch(running, failed):
        seen.append(running)
        if len(seen) == 1:
            os.kill(os.getpid(), number)

    said: list[str] = []
    with pytest.raises(SystemExit, match="75"):
        run_trials(
            lambda finished: [Trial(name, ()) for name in "ab"], tmp_path, slots=2, seconds=None,
            say=said.append, command=sleeper, watch=watch,
        )  # fmt: skip
    assert seen[0] == {"a", "b"} and seen[-1] == set()
    assert [line.split()[-2:] for line in said[-2:]] == [["stopped", "a"], ["stopped", "b"]]
    assert signal.getsignal(number) == before


def test_words_that_a_full_disk_has_cut_are_written_again_or_named(tmp_path):
    file = tmp_path / "a.words.json"
    file.touch()
    fails = [sys.executable, "-c", "import sys; sys.exit(78)"]
    trials = [Trial("a", ("seed=1",))]

    def run():
        return run_trials(
            lambda finished: trials, tmp_path, slots=1, seconds=None, command=fails,
            say=lambda line: None,
        )  # fmt: skip

    assert run().failed and json.loads(file.read_text())[0] == "seed=1"
    file.write_text("[")
    with pytest.raises(StorageError, match=r"a\.words\.json: found no words of a trial.* remove"):
        run()
