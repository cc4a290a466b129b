"""The course of a run: which law holds at which step, from its configuration and its ancestors'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pdn.checkpoint.find import VerifiedCheckpoint
from pdn.data.history import Law, begun, law_at, tokens_of
from pdn.errors import ConfigError
from pdn.training.config import PhaseConfig, RunConfig
from pdn.wording import counted


@dataclass(frozen=True)
class Stage:
    """Holds a part of a run in which one law holds.

    Attributes:
        first: steps before it.
        end: steps up to its last one; None: it lasts to the end.
        micro_batch_size: samples per device and forward pass.
    """

    first: int
    end: int | None
    law: Law
    micro_batch_size: int

    @property
    def tokens_per_step(self) -> int:
        return self.law.global_batch_size * self.law.seq_len


class Course:
    """Tells the law of every step.

    Args:
        config: of the run.
        inherited: the history of the run that it is a branch of, up to the branching.
        start: the step that the branch goes on from; 0 for a run of its own.
    """

    def __init__(self, config: RunConfig, inherited: Sequence[dict] = (), start: int = 0):
        self.inherited, self.start = list(inherited), start
        # of the run, which is the unit unless one is given
        self._segment = config.data.seq_len * windows_carried(config.data)
        self.stages = self._stages(config)

    def _stages(self, config: RunConfig) -> list[Stage]:
        step, tokens = self.start, tokens_of(self.inherited, self.start)
        found: list[Stage] = []
        for phase in [*(config.phases or []), PhaseConfig()]:
            whole = config.in_phase(phase)
            law = self._law(whole, phase)
            per_step = law.global_batch_size * law.seq_len
            end = _end(phase, step, tokens, per_step)
            if end is not None and end <= step:
                continue  # it was over before the branch began
            found.append(Stage(step, end, law, whole.trainer.micro_batch_size))
            if end is None:
                break
            step, tokens = end, tokens + (end - step) * per_step
        return found

    def _law(self, config: RunConfig, phase: PhaseConfig) -> Law:
        """Return the law of a phase; ``config`` is the run's as it is in the phase."""
        data, length = config.data, config.data.seq_len
        before = self.inherited[-1]["law"] if self.inherited else {}
        windows = windows_carried(data)
        unit = getattr(data, "unit_tokens", None) or before.get("unit_tokens") or self._segment
        if unit % (length * windows) and getattr(data, "repeat", "refuse") == "allow":
            unit = length * windows
        return Law(
            seq_len=length,
            global_batch_size=config.trainer.global_batch_size,
            unit_tokens=unit,
            pool_units=getattr(data, "pool_units", None) or before.get("pool_units") or 1,
            weights=phase.weights,
            lr_scale=phase.lr_scale or 1.0,
            carry_windows=windows,
            carry_horizon=getattr(data, "carry_horizon", None) or 1,
        )

    def stage(self, step: int) -> Stage:
        """Return the stage of the step after ``step`` steps."""
        return next(
            (stage for stage in self.stages if stage.end is None or step < stage.end),
            self.stages[-1],
        )

    def tokens(self, steps: int) -> int:
        """Return the tokens of the first ``steps`` steps."""
        found = tokens_of(self.inherited, min(steps, self.start))
        for stage in self.stages:
            end = steps if stage.end is None else min(steps, stage.end)
            found += max(0, end - stage.first) * stage.tokens_per_step
        return found

    def plan(self, step: int, last_step: int, next_sample: int) -> list[tuple[int, int, Law]]:
        """Return first step, first sample and law of the stages from a step on.

        Args:
            step: steps taken.
            last_step: steps of the run.
            next_sample: the first that they did not use.
        """
        ahead = [s for s in self.stages if s.first < last_step and (s.end is None or s.end > step)]
        return [
            (stage.first, next_sample + self.samples(step, stage.first), stage.law)
            for stage in ahead
        ]

    def samples(self, first: int, last: int) -> int:
        """Return the samples of the steps after ``first`` steps, up to ``last`` steps."""
        found = 0
        for stage in self.stages:
            begin = max(first, stage.first)
            end = last if stage.end is None else min(last, stage.end)
            found += max(0, end - begin) * stage.law.global_batch_size
        return found

    def require_data(self, data, start: VerifiedCheckpoint | None, last_step: int) -> None:
        """Refuse phases to come whose data cannot be had, or are read too often.

        Args:
            data: opened, at the place that the launch starts from.
            start: the checkpoint that it starts from, if any.
            last_step: of the launch.
        """
        step, sample = (start.step, start.side["next_sample"]) if start is not None else (0, 0)
        ahead = data.ahead(self.plan(step, last_step, sample))
        ahead.check_epochs(sample + self.samples(step, last_step))

    def lines(self, last_step: int) -> list[str]:
        """Describe the stages up to a step, if there are several, in a line each."""
        shown = [stage for stage in self.stages if stage.first < last_step]
        if len(shown) == 1 and shown[0].law.lr_scale == 1.0:
            return []
        return [
            f"steps {stage.first + 1:,} to {min(stage.end or last_step, last_step):,}: "
            f"{stage.law.global_batch_size} x {stage.law.seq_len:,} tokens, lr x "
            f"{stage.law.lr_scale:g}"
            + (f", {dict(stage.law.weights)}" if stage.law.weights else "")
            for stage in shown
        ]

    def require_begun(self, history: Sequence[dict], step: int, data) -> None:
        """Raise ``ConfigError`` unless this is how the first ``step`` steps of the run went.

        What has not begun may be planned anew.

        Args:
            history: in the checkpoint of that step.
            data: opened, to record laws as the history does.
        """
        begins = {entry["first_step"] for entry in begun(history, step)}
        begins |= {stage.first for stage in self.stages}
        for first in sorted(b for b in begins if self.start <= b < step):
            then, now = law_at(history, first), data.record(self.stage(first).law)
            changed = [key for key in now if then.get(key) != now[key]]
            if changed:
                listed = "; ".join(f"{k} was {then.get(k)!r}, now {now[k]!r}" for k in changed)
                raise ConfigError(
                    "RUN-PHASES",
                    f"phases: from step {first + 1} on {listed}; {counted(step, 'step')} done. "
                    "Expected what has begun as it was: undo the change, or branch before it with "
                    "branch_from=<this run>@<step>",
                )


def windows_carried(data) -> int:
    """Return R of a data configuration: windows of a segment, 1 where no state is carried."""
    return getattr(data, "carry_windows", None) or 1


def _end(phase: PhaseConfig, step: int, tokens: int, per_step: int) -> int | None:
    """Return the step that a phase ends with, which begins after ``step`` steps of ``tokens``."""
    if phase.until is None:
        return None
    if phase.until.steps is not None:
        return phase.until.steps
    assert phase.until.tokens is not None
    return step + max(0, math.ceil((phase.until.tokens - tokens) / per_step))
