"""Learning rates as a pure function of the step."""

import math

from pdn.optim.config import ScheduleConfig


def lr_fraction(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step as a fraction of the peak.

    Args:
        schedule: how it goes.
        step: optimiser step, 0-based.
        steps: how many there are.
    """
    warmup, final = schedule.warmup_steps, schedule.final_lr_fraction
    if step < warmup:
        return (
            schedule.initial_lr_fraction + (1 - schedule.initial_lr_fraction) * (step + 1) / warmup
        )
    if schedule.kind == "cosine":
        progress = (step - warmup + 1) / (steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "wsd" and step >= steps - schedule.decay_steps:
        progress = (step - (steps - schedule.decay_steps) + 1) / schedule.decay_steps
        return 1 - (1 - final) * progress
    return 1.0
