"""Intervals in steps, tokens and seconds."""

import pytest
from pydantic import ValidationError

from pdn.config import Every
from pdn.runs.triggers import Clock, Trigger


def steps_due(every, clock=None, ticks=range(1, 13), tokens_per_step=100) -> list[int]:
    clock = clock or Clock()
    trigger = Trigger(Every.model_validate(every), lambda step: step * tokens_per_step, clock)
    found = []
    for step in ticks:
        clock.now += 1.0
        if trigger.due(step):
            found.append(step)
        assert trigger.due(step) == (step in found)  # asked again, the same answer
    return found


def test_an_interval_in_steps_is_a_multiple_over_all_launches():
    assert steps_due(4) == [4, 8, 12]
    assert steps_due({"steps": 4}, ticks=range(7, 13)) == [8, 12]


def test_an_interval_in_tokens_is_due_at_the_step_that_passes_it():
    assert steps_due({"tokens": 250}) == [3, 5, 8, 10]
    assert steps_due({"tokens": 250.0}, ticks=range(4, 9)) == [5, 8]
    assert steps_due({"tokens": 30}) == list(range(1, 13))


def test_an_interval_in_seconds_counts_from_the_launch_and_from_the_last_time():
    assert steps_due({"seconds": 2.5}) == [3, 6, 9, 12]
    assert steps_due({"seconds": 2.5}, Clock(now=1000.0)) == [3, 6, 9, 12]


def test_no_interval_is_never_due_and_nothing_is_due_before_the_first_step():
    assert not any(Trigger(None, lambda step: 100 * step, Clock()).due(step) for step in range(9))
    assert not Trigger(Every(steps=1), lambda step: 100 * step, Clock()).due(0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "greater than or equal to 1"),
        (2.5, "valid integer"),
        ("5", "valid integer"),
        (True, "valid integer"),
        ({"seconds": 0.0}, "greater than 0"),
        ({"steps": 2, "tokens": 10}, "found steps and tokens; expected one of"),
        ({}, "found no interval; expected one of"),
        ({"minutes": 3}, "Extra inputs"),
    ],
)
def test_what_is_no_interval_is_refused(value, message):
    with pytest.raises(ValidationError, match=message):
        Every.model_validate(value)


@pytest.mark.parametrize("value", [7, {"seconds": 30.0}, {"tokens": 1e9}])
def test_an_interval_is_recorded_as_it_was_written(value):
    assert Every.model_validate(value).model_dump(mode="json") == value
