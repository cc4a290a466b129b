"""Where metrics go besides the run directory."""

from __future__ import annotations

from typing import Literal

from pdn.config import Strict


class LoggerConfig(Strict):
    kind: Literal["none", "wandb"]
    project: str
