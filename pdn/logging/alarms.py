"""What of a recurrence has gone wrong before the loss shows it, by layer and head."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from pdn.logging.recurrences import Maps

REMEMBERED = 8  # measurements of a head that it is compared with
# A decay has collapsed where the tokens that keep longest keep less than this, and once kept
# COLLAPSE times as long. Heads that forget at once from the start are part of the initialisation.
SHORT_HALF_LIFE = 1.0  # tokens, of the 90 % quantile
COLLAPSE = 4.0
SATURATED_SHARE = 0.5  # of the preconditioner's channels and tokens, near its bounds
BLOW_UP = 10.0  # a state's norm over the median of the head's last ones
STABLE_WRITE = 2.0  # beyond it a write turns the state over and enlarges it
ROUNDING = 0.02  # what bfloat16 adds to a write of 2, the limit of gains in (0, 2)


@dataclass(frozen=True)
class Alarm:
    """Points at one head that needs a look.

    Attributes:
        kind: decay, preconditioner, state or write.
        layer, head: where, from 0.
        text: what was found and what it was, in words.
    """

    kind: str
    layer: int
    head: int
    text: str

    def __str__(self) -> str:
        return f"layer {self.layer}, head {self.head}: {self.text}"


class Alarms:
    """Compares each head with what it was; an alarm is raised once, until the head is well again.

    Call it with every measurement in order.
    """

    def __init__(self):
        self._norms: dict[tuple[int, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=REMEMBERED)
        )
        self._longest: dict[tuple[int, int], float] = {}
        self._standing: set[tuple[str, int, int]] = set()

    def check(self, maps: Maps) -> list[Alarm]:
        """Return the alarms of a measurement that the one before did not raise."""
        found = [*self._decays(maps), *_saturated(maps), *self._states(maps), *_writes(maps)]
        standing = {(alarm.kind, alarm.layer, alarm.head) for alarm in found}
        new = [a for a in found if (a.kind, a.layer, a.head) not in self._standing]
        self._standing = standing
        return new

    def _decays(self, maps: Maps) -> Iterator[Alarm]:
        for layer, head, life in _heads(maps, "half_life_p90"):
            longest = self._longest.get((layer, head), life)
            self._longest[layer, head] = max(longest, life)
            if life < SHORT_HALF_LIFE and life * COLLAPSE < longest:
                text = f"the decay collapsed: half-life {life:.3g} tokens (it was {longest:.3g})"
                yield Alarm("decay", layer, head, text)

    def _states(self, maps: Maps) -> Iterator[Alarm]:
        for layer, head, norm in _heads(maps, "S_norm"):
            before = self._norms[layer, head]
            usual = statistics.median(before) if before else math.inf
            if not math.isfinite(norm):
                yield Alarm("state", layer, head, "the norm of the state S is not finite")
                continue
            if norm > BLOW_UP * usual:
                # Not remembered: a blow-up does not become the usual.
                text = f"the state S blew up: norm {norm:.3g} (its median was {usual:.3g})"
                yield Alarm("state", layer, head, text)
            else:
                before.append(norm)


def _saturated(maps: Maps) -> Iterator[Alarm]:
    for layer, head, share in _heads(maps, "saturated"):
        if not share < SATURATED_SHARE:
            text = f"B saturates: {share:.0%} of it is at its bounds"
            yield Alarm("preconditioner", layer, head, text)


def _writes(maps: Maps) -> Iterator[Alarm]:
    for layer, head, write in _heads(maps, "write_max"):
        if not write <= STABLE_WRITE + ROUNDING:
            text = f"a write erases {write:.3g} times the old value; stable up to {STABLE_WRITE:g}"
            yield Alarm("write", layer, head, text)


def _heads(maps: Maps, quantity: str) -> Iterator[tuple[int, int, float]]:
    for layer, row in enumerate(maps.get(quantity, ())):
        for head, value in enumerate(row or ()):
            # what is not finite was recorded as None
            yield layer, head, math.nan if value is None else value
