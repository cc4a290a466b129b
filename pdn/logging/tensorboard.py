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

    TensorBoard drops all that was written from a step on, or nothing. So a run says where it goes
    on (`rewind`); what comes late of an earlier step, such as the cost of a checkpoint or an
    evaluation of one, is added to the curves and takes nothing away.

    Args:
        run_dir: the run's directory.
    """

    def __init__(self, run_dir: Path):
        self._folder = Path(run_dir) / "tensorboard"
        self._writer: SummaryWriter | None = None
        self._purge: int | None = None  # the first step of which nothing counts
        self._failed = False

    def log(self, step: int, values: dict) -> None:
        """Write the numbers among ``values``."""
        if self._failed:
            return
        try:
            writer = self._open()
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

    def rewind(self, step: int) -> None:
        """Drop what was written of steps after ``step``."""
        self.close()
        self._writer, self._purge = None, step + 1

    def _open(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(self._folder, purge_step=self._purge)
        return self._writer

    def _give_up(self, reason: str) -> None:
        self._failed = True
        log.warning("%s; metrics.jsonl goes on", reason)
