"""The optimiser, its parameter groups and its learning-rate schedule.

A field with a default is younger than the first recorded runs, and its default does what they did.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pdn.config import Beta, Fraction, Positive, Strict

# decay of a moving average of the weights, which is evaluated beside them; null: none
Ema = Annotated[float, Field(gt=0, lt=1)]


class GroupConfig(Strict):
    """Holds what one group of parameters may set apart."""

    lr_scale: Positive = 1.0  # of the group's peak learning rate, times optim.lr
    weight_decay: float | None = Field(ge=0, default=None)  # null: what optim.decay gives it


class GroupsConfig(Strict):
    """Holds the parameter groups; ``pdn.optim.groups`` has the rule that fills them."""

    embeddings: GroupConfig = GroupConfig()  # the embedding, and a head of its own
    matrices: GroupConfig = GroupConfig()  # weights of the linear maps inside blocks
    filters: GroupConfig = GroupConfig()  # other weights that decay, such as convolutions
    vectors: GroupConfig = GroupConfig()  # norms, biases, A_log, dt_bias, mu, ...


class AdamWConfig(Strict):
    kind: Literal["adamw"]
    lr: Positive  # peak
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]  # a list in YAML
    eps: Positive
    weight_decay: float = Field(ge=0)
    decay: Literal["matrices", "all"] = "matrices"  # what decays: all groups but vectors, or all
    groups: GroupsConfig = GroupsConfig()
    ema: Ema | None = None


class MuonConfig(Strict):
    """Asks for Muon for the group ``matrices``, AdamW for the others."""

    kind: Literal["muon"]
    lr: Positive  # peak, of both
    momentum: Beta
    nesterov: bool
    ns_steps: int = Field(ge=1, lt=100)  # Newton-Schulz iterations
    ns_dtype: Literal["bfloat16", "float32"]
    adjust_lr: Literal["match_rms_adamw", "original"]  # lr times 0.2 sqrt(max(m, n)) of an [m, n],
    # which makes the updates as large as AdamW's, or times sqrt(max(1, m / n))
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]  # of AdamW; a list in YAML
    eps: Positive  # of AdamW
    weight_decay: float = Field(ge=0)
    decay: Literal["matrices", "all"]  # what decays: all groups but vectors, or all
    groups: GroupsConfig
    ema: Ema | None = None


OptimConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


class ScheduleConfig(Strict):
    """Describes how the learning rate goes after its linear warm-up.

    It stays constant, decays as a cosine, or is constant with a linear decay at the end (WSD).
    """

    kind: Literal["constant", "cosine", "wsd"]
    warmup_steps: int = Field(ge=0)
    decay_steps: int = Field(ge=0)  # wsd: length of the last phase; cosine and constant: 0
    initial_lr_fraction: Fraction  # of the peak, where the warm-up starts
    final_lr_fraction: Fraction  # of the peak, at trainer.steps

    @property
    def ends_by_steps(self) -> bool:
        """Return whether the learning rate of every step depends on how many there will be."""
        return self.kind == "cosine"

    @model_validator(mode="after")
    def _decay_phase(self):
        if (self.kind == "wsd") != (self.decay_steps > 0):
            expected = "at least 1" if self.kind == "wsd" else "0"
            raise ValueError(
                f"decay_steps = {self.decay_steps}; expected {expected} for kind = {self.kind}"
            )
        return self
