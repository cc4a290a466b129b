"""The table of a sweep on a terminal."""

import io
import sys

import pytest
from rich.console import Console

from pdn.reports.live import ROOM, LiveTable


def row(trial: str, state: str, loss: float | None = None, reason: str | None = None) -> dict:
    step = None if loss is None else 1200
    return {
        "trial": trial, "state": state, "step": step, "loss": loss, "validation/loss": loss,
        "reason": reason,
    }  # fmt: skip


ROWS = [
    row("gdn-lr1", "finished", 3.5),
    row("gdn-lr2", "finished", 3.25),
    row("gdn-lr4", "running", 4.0),
    row("gdn-lr8", "failed", 9.0, "pdn[E-NONFINITE] [not] a style"),
    row("gdn-lr9", "waiting"),
]


def drawn(rows, *, terminal: bool, height: int = 40, width: int = 120) -> str:
    file = io.StringIO()
    size = {"width": width, "height": height}
    console = Console(file=file, force_terminal=terminal, color_system=None, **size)
    with LiveTable("validation/loss", console) as live:
        live.say("start [gdn-lr4]")
        live.show(rows)
    return file.getvalue()


def test_a_terminal_shows_what_runs_first_and_then_what_failed_with_its_reason():
    said = drawn(ROWS, terminal=True)
    places = [said.index(f"gdn-lr{n} ") for n in (4, 8, 2, 1, 9)]
    assert places == sorted(places) and said.index("start [gdn-lr4]") < said.index("state")
    assert "1,200  4.0000" in said and "pdn[E-NONFINITE] [not] a style" in said
    assert "1 running, 1 failed, 2 finished, 1 waiting" in said


def test_a_table_leaves_the_terminal_room_and_counts_what_it_does_not_show():
    many = [row(f"gdn-lr{n}", "waiting") for n in range(100)]
    said = drawn(many, terminal=True, height=ROOM + 5).rpartition("trial ")[2]
    assert said.count("gdn-lr") == 5 and "100 waiting; 95 not shown" in said


def test_what_is_no_terminal_gets_the_lines_alone():
    assert drawn(ROWS, terminal=False) == "start [gdn-lr4]\n"


@pytest.mark.parametrize(
    ("width", "numbers", "name"),
    [(120, True, "gdn_tiny-d_model384-lr1e_3-seed2"), (66, True, None), (40, False, None)],
)
def test_names_and_reasons_make_room_for_state_and_result(width, numbers, name):
    names = [f"gdn_tiny-d_model384-lr{rate}-seed2" for rate in ("1e_3", "2e_3", "4e_3")]
    reasons = [None, "exit code 78: pdn[E-CONFIG] a reason of many words", None]
    states = ["finished", "failed", "waiting"]
    said = drawn(
        [row(*of, 3.5, why) for *of, why in zip(names, states, reasons, strict=True)],
        terminal=True,
        width=width,
    )
    lines = said.rpartition("trial ")[2].splitlines()
    assert all(state in said for state in states) and said.count("3.5000") >= 3
    assert ("1,200" in said) == numbers and ("exit code 78" in said) == (name is not None)
    assert all(line.startswith("gdn") and len(line) <= width for line in lines[1:4])
    assert all(f"{rate}-seed2" in said or not numbers for rate in ("1e_3", "2e_3", "4e_3"))
    assert name is None or name in said


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_a_reader_that_has_gone_is_told_to_who_runs_the_table(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError), LiveTable("validation/loss") as live:
        live.say("start gdn-lr4")
