"""Where a run's metrics go: its record, and the logger that a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pdn.logging.config import LoggerConfig
from pdn.logging.tensorboard import TensorBoardLogger
from pdn.logging.wandb import WandbLogger
from pdn.runs.directory import RunDirectory


class Logger(Protocol):
    """Takes a run's metrics; but for ``Record``, never blocks, fails or ends it."""

    def log(self, step: int, values: dict) -> None:
        """Take the values of a step; a step may come again, and then the later one counts."""

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: list[list]) -> None:
        """Take a table of text and numbers.

        Args:
            step: that it belongs to.
            name: of the table.
            columns: their titles.
            rows: as long as ``columns``.
        """

    def log_map(self, step: int, name: str, rows: list[list[float | None] | None]) -> None:
        """Take a quantity of every layer and head.

        Args:
            step: that it belongs to.
            name: of the quantity.
            rows: a list of the heads' values for each layer, None for a layer that has it not.
        """

    def rewind(self, step: int) -> None:
        """Take it that the run goes on after ``step``: what is there of later ones is void."""

    def close(self, exit_code: int = 0, timeout_s: float = 5.0) -> None:
        """Send what is left, for at most ``timeout_s`` seconds."""


class Record:
    """Writes the run's own record, ``metrics.jsonl``: what cannot be written there ends the run."""

    def __init__(self, directory: RunDirectory):
        self._directory = directory

    def log(self, step: int, values: dict) -> None:
        """Append one record."""
        self._directory.log({"step": step} | values)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: list[list]) -> None:
        """Leave a table out: its numbers are logged as values."""

    def log_map(self, step: int, name: str, rows: list[list[float | None] | None]) -> None:
        """Leave a map out: ``telemetry.jsonl`` holds it."""

    def rewind(self, step: int) -> None:
        """Leave it to ``RunDirectory.continue_from``, which the ledger needs too."""

    def close(self, exit_code: int = 0, timeout_s: float = 5.0) -> None:
        """Leave the directory open: it outlives its loggers."""


class Loggers:
    """Joins several loggers; the record comes first, so that no other shows what it lacks."""

    def __init__(self, *loggers: Logger):
        self.loggers = loggers

    def log(self, step: int, values: dict) -> None:
        """Have each take the values of a step."""
        for logger in self.loggers:
            logger.log(step, values)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: list[list]) -> None:
        """Have each take a table."""
        for logger in self.loggers:
            logger.log_table(step, name, columns, rows)

    def log_map(self, step: int, name: str, rows: list[list[float | None] | None]) -> None:
        """Have each take a map."""
        for logger in self.loggers:
            logger.log_map(step, name, rows)

    def rewind(self, step: int) -> None:
        """Tell each that the run goes on after ``step``."""
        for logger in self.loggers:
            logger.rewind(step)

    def close(self, exit_code: int = 0, timeout_s: float = 5.0) -> None:
        """Close each."""
        for logger in self.loggers:
            logger.close(exit_code, timeout_s)


class Silent:
    """Takes nothing: ``logger=none``, and every rank but the main one."""

    def log(self, step: int, values: dict) -> None: ...

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: list[list]) -> None: ...

    def log_map(self, step: int, name: str, rows: list[list[float | None] | None]) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self, exit_code: int = 0, timeout_s: float = 5.0) -> None: ...


def open_logger(
    config: LoggerConfig, run_dir: Path, *, run_config: dict | None, commit: str | None
) -> Logger:
    """Open what ``logger=`` names, on the main rank.

    Args:
        run_dir: the run's directory, whose name is the run's.
        run_config: the resolved configuration of the run.
        commit: of the code; None: unknown.
    """
    if config.kind == "wandb":
        return WandbLogger(
            run_dir,
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags,
            commit=commit,
            config=run_config,
        )
    if config.kind == "tensorboard":
        return TensorBoardLogger(run_dir)
    return Silent()
