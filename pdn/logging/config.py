"""Where metrics go besides the run directory."""

from __future__ import annotations

from typing import Literal

from pdn.config import Strict


class LoggerConfig(Strict):
    kind: Literal["none", "wandb", "tensorboard"]
    project: str  # of wandb
    entity: str | None  # of wandb: the team or user; null: WANDB_ENTITY, or the key's own
    group: str | None  # of wandb; null: WANDB_RUN_GROUP, which sweeps set to a name of their own
    tags: list[str]  # of wandb, besides those of WANDB_TAGS
