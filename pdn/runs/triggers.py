"""After which steps something is due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pdn.config import Every


@dataclass
class Clock:
    """Holds the seconds since the launch, the same on every rank.

    The trainer sets them once a step.
    """

    now: float = 0.0


class Trigger:
    """Says after which steps something is due that happens at an interval; all ranks say the same.

    Args:
        every: the interval; None: never.
        tokens: of the first steps of the run, by how many these are, over all ranks.
        clock: what intervals in seconds are measured by.
    """

    def __init__(self, every: Every | None, tokens: Callable[[int], int], clock: Clock):
        self.every, self.tokens, self.clock = every, tokens, clock
        self._last, self._judged, self._due = clock.now, 0, False

    def due(self, step: int) -> bool:
        """Return whether it is due after ``step`` (1, 2, ...); asked again about a step, the same.

        Intervals in steps and tokens are multiples, counted over all launches; those in seconds
        begin with the launch, and then with the step that was due.
        """
        every = self.every
        if every is None or step == 0:
            return False
        if every.steps is not None:
            return step % every.steps == 0
        if every.tokens is not None:
            return self._passed(step, every.tokens) > self._passed(step - 1, every.tokens)
        assert every.seconds is not None
        if step != self._judged:
            self._judged, self._due = step, self.clock.now - self._last >= every.seconds
            if self._due:
                self._last = self.clock.now
        return self._due

    def _passed(self, step: int, tokens: float) -> int:
        """Return how many multiples of ``tokens`` lie behind ``step``."""
        return int(self.tokens(step) // tokens)
