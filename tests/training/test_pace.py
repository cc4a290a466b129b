"""The slow rank and the slow step are named while the run goes on.

Clocks of these tests move when something happens, and not otherwise.
"""

import random

import pytest
import torch
from torch import nn

from pdn.distributed.collectives import max_over_ranks
from pdn.runs import faults
from pdn.training import pace, trainer
from pdn.training.pace import WINDOW, Pace
from tests.ranks import run_ranks
from tests.small_runs import metrics, train_on_ranks

CPU = torch.device("cpu")
STEP = 1.0  # seconds of launching


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Head(nn.Module):
    """Has what ``watch_head`` looks for; its head takes so long."""

    def __init__(self, clock: Clock, seconds: float):
        super().__init__()
        self.norm = nn.Identity()
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        x = self.norm(x)
        self.clock.now += self.seconds
        return x


def told(
    directory, slow: dict[str, float], steps: int, at: int | None = None, scatter: float = 0.0
) -> tuple:
    """Return what the first of two ranks says where the second has slow phases.

    Args:
        directory: for the ranks' meeting.
        slow: seconds by phase that the second rank takes longer.
        steps: to take.
        at: the only step at which it is slow; None: at all.
        scatter: of the logarithm of each head's seconds.
    """

    def work(rank: int) -> tuple:
        clock = Clock()
        own, said = Pace(rank, 2, CPU, clock), []
        model = Head(clock, 0.1)
        own.watch_head(model)
        noise = random.Random(rank)
        for step in range(1, steps + 1):
            longer = slow if at in (None, step) else {}

            def take(phase: str, seconds: float, longer=longer) -> None:
                clock.now += seconds + (longer.get(phase, 0.0) if rank == 1 else 0.0)

            own.enter("data")
            take("data", 0.01)
            said += own.hear(step, max_over_ranks(own.report()))
            own.enter("launch", step)
            model.seconds = 0.1 + (longer.get("computing", 0.0) if rank == 1 else 0.0)
            model.seconds *= noise.lognormvariate(0, scatter)
            model(torch.zeros(1))
            take("launch", STEP)
            own.enter(None)
            own.settled(step, STEP + 0.1 + sum(longer.values()))
            own.enter("between")
            take("between", 0.02)
        return said, own.take()

    return tuple(run_ranks(2, work, directory)[0])


@pytest.mark.parametrize(
    ("phase", "seconds", "lost", "text"),
    [
        (
            "data",
            0.5,
            0.44,
            "holds the others up by 44% of a step: its data takes 0.51 s, 51 times",
        ),
        ("between", 0.5, 0.44, "holds the others up by 44% of a step: its between takes 0.52 s"),
        ("computing", 0.05, 0.5, "computes at least 50% slower than the others in three quarters"),
    ],
)
def test_the_rank_that_holds_the_others_up_is_named_once_with_its_phase(
    phase, seconds, lost, text, tmp_path
):
    said, values = told(tmp_path, {phase: seconds}, 3 * WINDOW + 2)
    assert len(said) == 1, said
    assert said[0].startswith(f"rank 1 {text}")
    assert values["pace/slowest"] == 1
    assert values["pace/lost"] == pytest.approx(lost, abs=0.02)
    assert values["pace/alarm"] == said[0]


def test_ranks_that_take_alike_are_not_named(tmp_path):
    said, values = told(tmp_path, {}, WINDOW + 2)
    assert said == [] and values["pace/lost"] == 0


def test_ranks_whose_heads_are_short_and_scatter_are_not_named_but_a_slower_one_is(tmp_path):
    """Times as on a busy CPU: medians over a window differ by a tenth in half of all windows."""
    for name in ("alike", "slow"):
        (tmp_path / name).mkdir()
    alike, _ = told(tmp_path / "alike", {}, 8 * WINDOW + 2, scatter=0.3)
    assert alike == []
    slow, _ = told(tmp_path / "slow", {"computing": 0.1}, 4 * WINDOW + 2, scatter=0.3)
    assert len(slow) == 1 and slow[0].startswith("rank 1 computes at least")


@pytest.mark.parametrize(
    ("slow", "reason"),
    [({"data": 3.0}, "rank 1, data 3.01 s, usually 0.01 s"),
     ({"between": 3.0}, "rank 1, between 3.02 s, usually 0.02 s"),
     ({"elsewhere": 3.0}, "no host took longer: on the devices, or between them")],
)  # fmt: skip
def test_a_step_that_takes_too_long_is_named_with_what_took_it(slow, reason, tmp_path):
    said, _ = told(tmp_path, slow, 14, at=12)
    assert said == [f"step 12 took 4.1 s, usually 1.1 s: {reason}"]


def slow_steps(slow: set[int], saved: set[int], steps: int) -> list[str]:
    """Return what one rank says of steps that take four times as long, some after a save."""
    clock, said = Clock(), []
    own = Pace(0, 1, CPU, clock)
    for step in range(1, steps + 1):
        said += own.hear(step, own.report())
        own.enter("launch", step)
        clock.now += STEP * (4 if step in slow else 1)
        own.enter(None)
        own.settled(step, STEP * (4 if step in slow else 1))
        if step in saved:
            own.excuse()
    return said


def test_the_step_beside_the_copies_of_a_checkpoint_is_not_called_slow():
    assert slow_steps({21, 41}, saved={20, 40}, steps=60) == []
    assert len(slow_steps({21, 42}, saved={20, 40}, steps=60)) == 1


def test_slow_steps_in_a_row_are_named_once_and_then_counted():
    often = set(range(20, 50, 4)) | {70}
    first, second = slow_steps(often, saved=set(), steps=80)
    assert first.startswith("step 20 took 4 s, usually 1 s: rank 0, launch")
    assert second.startswith("step 70 took 4 s") and second.endswith(
        "; 7 more since the last alarm"
    )


def test_a_run_of_two_ranks_names_the_one_whose_data_come_late(tmp_path, monkeypatch, capfd):
    """Rank 1 is a second late with each batch, told by the exchange that every step has anyway."""
    clock = Clock()

    class Own(Pace):
        def __init__(self, rank, ranks, device):
            super().__init__(rank, ranks, device, clock)

        def enter(self, phase, step=None):
            clock.now += 1.0 if phase == "launch" else 0.0
            super().enter(phase, step)

    strike = faults.strike

    def late(place, step, *what):
        clock.now += 1.0 if place == "data" and torch.distributed.get_rank() == 1 else 0.0
        return strike(place, step, *what)

    monkeypatch.setattr(trainer, "Pace", Own)
    monkeypatch.setattr(pace, "WINDOW", 3)
    monkeypatch.setattr(faults, "strike", late)
    words = "trainer.stop_at=5", "model.num_layers=1"
    train_on_ranks(2, tmp_path, "gdn_tiny", *words, start="fork")
    alarms = [record for record in metrics(tmp_path) if "pace/alarm" in record]
    assert [record["step"] for record in alarms] == [4]
    assert "rank 1 holds the others up by 100% of a step: its data" in alarms[0]["pace/alarm"]
    assert alarms[0]["pace/slowest"] == 1 and alarms[0]["pace/lost"] == 1
    assert "alarm: rank 1 holds" in capfd.readouterr().out
