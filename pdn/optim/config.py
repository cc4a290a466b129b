"""The optimiser and its learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pdn.config import Beta, Fraction, Positive, Strict


class AdamWConfig(Strict):
    kind: Literal["adamw"]
    lr: Positive  # peak
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]  # a list in YAML
    eps: Positive
    weight_decay: float = Field(ge=0)  # of matrices; never of norms, biases, A_log, dt_bias, mu


class ScheduleConfig(Strict):
    """Linear warm-up, then constant, cosine decay, or constant with a linear decay at the end
    (WSD).
    """

    kind: Literal["constant", "cosine", "wsd"]
    warmup_steps: int = Field(ge=0)
    decay_steps: int = Field(ge=0)  # wsd: length of the last phase; cosine and constant: 0
    initial_lr_fraction: Fraction  # of the peak, where the warm-up starts
    final_lr_fraction: Fraction  # of the peak, at trainer.steps

    @model_validator(mode="after")
    def _decay_phase(self):
        if (self.kind == "wsd") != (self.decay_steps > 0):
            expected = "at least 1" if self.kind == "wsd" else "0"
            raise ValueError(
                f"decay_steps = {self.decay_steps}; expected {expected} for kind = {self.kind}"
            )
        return self
