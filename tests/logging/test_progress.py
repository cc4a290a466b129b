"""The line of progress tells the time that is left, and the log has what a terminal shows."""

import io

import pytest

from pdn.logging import progress
from pdn.logging.progress import ProgressLine
from pdn.runs import output
from pdn.runs.summary import duration

RECORD = {"loss": 1.0, "lr": 1e-3, "tokens_per_second": 1000.0}


@pytest.fixture
def clock(monkeypatch):
    """Let seconds pass as told."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_after_ten_steps_the_time_left_is_right_though_the_first_compiled(clock):
    line = ProgressLine(1000, 0, enabled=True)
    for step in range(1, 11):
        clock[0] += 120.0 if step == 1 else 0.5
        line.update(step, RECORD)
    assert line.remaining(clock[0]) == pytest.approx(990 * 0.5)


def test_pauses_between_steps_count_as_they_come(clock):
    line = ProgressLine(100, 50, enabled=True)
    for step in range(51, 71):
        clock[0] += 1.0 + 5.0 * (step % 5 == 0)  # an evaluation at every fifth step
        line.update(step, RECORD)
    assert line.remaining(clock[0]) == pytest.approx(30 * 2.0, rel=0.1)


def test_a_line_says_elapsed_and_remaining_time(clock, capsys):
    line = ProgressLine(20, 0, enabled=True)
    for step in range(1, 11):
        clock[0] += 9.0
        line.update(step, RECORD)
    assert "elapsed 1 min 21 s  eta 1 min 39 s" in capsys.readouterr().out.splitlines()[-1]


def test_what_a_terminal_shows_is_in_the_log_once(clock, tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patched, output.guarded_output():
        patched.setattr("sys.stdout", output.GuardedStream(terminal, "standard output"))
        output.open_log(tmp_path / "run.log")
        line = ProgressLine(2, 0, enabled=True)
        assert line.console.is_terminal
        line.say("step 0  validation")
        line.update(2, RECORD)
        line.close()
        output.close_log()
    log = (tmp_path / "run.log").read_text()
    assert log.count("step 0  validation") == 1 and log.count("step 2/2") == 1
    assert "\x1b" not in log and "step 0  validation" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3725, "1 h 02 min"),
     (200_000, "2 d 07 h"), (float("inf"), "?"), (float("nan"), "?")],
)  # fmt: skip
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text
