"""When checkpoints are written and which are kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pdn.config import Every, Steps, Strict


class CheckpointConfig(Strict):
    every: Every
    keep_last: int = Field(ge=1)
    keep_every: Steps | None  # steps; null: only the last ones stay
    asynchronous: bool
    # a periodic save while the last one is being written: wait for that, or leave this one out
    when_busy: Literal["wait", "skip"] = "wait"
