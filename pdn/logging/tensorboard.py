"""Metrics as TensorBoard's event files, in ``<run>/tensorboard``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pdn.logging.heat import image

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class TensorBoardLogger:
    """Writes numbers; whatever fails in it is said once and leaves the run alone.

    A step that is not later than the last one, after a rewind or a resume, takes the place of what
    was written from there on.

    Args:
        run_dir: the run's directory.
    """

    def __init__(self, run_dir: Path):
        self._folder = Path(run_dir) / "tensorboard"
        self._writer: SummaryWriter | None = None
        self._step = 0  # of the last values
        self._failed = False

    def log(self, step: int, values: dict) -> None:
        """Write the numbers among ``values``."""
        if self._failed:
            return
        try:
            writer = self._open(step)
            for key, value in values.items():
                if key != "step" and isinstance(value, int | float):
                    writer.add_scalar(key, value, step)
        except ImportError:
            self._give_up(
                "tensorboard is not installed: metrics go to metrics.jsonl only (pip install "
                "tensorboard, or logger=none)"
            )
        except Exception as error:
            self._give_up(f"tensorboard stopped ({type(error).__name__}: {error})")

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: list[list]) -> None:
        """Write a table as Markdown."""
        if self._failed or self._writer is None:
            return
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
        self._writer.add_text(name, text, step)

    def log_map(self, step: int, name: str, rows: list[list[float | None] | None]) -> None:
        """Write a map as an image, rows for layers and columns for heads."""
        if self._failed or self._writer is None:
            return
        try:
            self._writer.add_image(name, image(rows), step, dataformats="HWC")
        except Exception as error:
            self._give_up(f"tensorboard stopped ({type(error).__name__}: {error})")

    def close(self, exit_code: int = 0, timeout_s: float = 5.0) -> None:
        """Write what is left."""
        if self._writer is not None and not self._failed:
            self._writer.close()

    def _open(self, step: int) -> SummaryWriter:
        """Return the writer for ``step``: a new one if the run went back to it."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None or step < self._step:
            if self._writer is not None:
                self._writer.close()
            self._writer = SummaryWriter(self._folder, purge_step=step)
        self._step = step
        return self._writer

    def _give_up(self, reason: str) -> None:
        self._failed = True
        log.warning("%s; metrics.jsonl goes on", reason)
