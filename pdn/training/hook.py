"""What a hook is: something that happens around the steps of a run."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from pdn.checkpoint.manager import Checkpointer
from pdn.config import Every
from pdn.distributed.watchdog import Watchdog
from pdn.distributed.world import World
from pdn.evals.schedule import Evaluations
from pdn.logging.loggers import Loggers
from pdn.logging.progress import ProgressLine
from pdn.optim.container import OptimizerContainer
from pdn.runs.directory import RunDirectory
from pdn.runs.triggers import Trigger
from pdn.training.config import RunConfig
from pdn.training.pace import Pace
from pdn.training.phases import Course
from pdn.training.spikes import SpikeDetector
from pdn.training.step import StepResult


class TrainerView(Protocol):
    """Shows what a hook may use of the trainer; ``Trainer`` describes the numbers."""

    config: RunConfig
    world: World
    directory: RunDirectory
    data: Any
    course: Course
    model: nn.Module
    optimizer: OptimizerContainer
    bf16: bool
    checkpointer: Checkpointer
    evaluations: Evaluations
    spikes: SpikeDetector
    logger: Loggers
    progress: ProgressLine
    watchdog: Watchdog
    pace: Pace
    peak: float | None
    step: int
    saved_step: int
    last_step: int
    next_sample: int
    ledger_hash: str
    lengths: list[list[int]]
    nonfinite: int

    def trigger(self, every: Every | None) -> Trigger: ...
    def flops_per_token(self, seq_len: int, /) -> int: ...
    def commit(self, result: StepResult) -> None: ...
    def adopt(self, step: int, side: dict) -> None: ...
    def evaluate(self) -> None: ...
    def stop_if_asked(self) -> None: ...
    def save(self) -> None: ...
    def log_checkpoints(self, committed: list[int]) -> None: ...


class Hook:
    """Does something around the steps of a run.

    Every rank has the same hooks, and they decide alike. Subclasses override what they need.
    """

    def __init__(self, trainer: TrainerView):
        self.trainer = trainer

    def trigger(self, every: Every | None) -> Trigger:
        """Return the trigger of an interval, measured in this run's steps, tokens and seconds."""
        return self.trainer.trigger(every)

    def before_update(self, step: int, inputs: dict[str, Tensor]) -> None:
        """Look at the gradients of ``step``, before they are clipped and used.

        Nothing may wait for the device here, nor change anything. A ``train_step`` of one's own
        that does not go by ``Trainer.train_step`` leaves these two out.

        Args:
            step: that ends with this update.
            inputs: the batch on the device, [micro-batches, B, T].
        """

    def after_update(self, step: int) -> None:
        """Look at the parameters after the update of ``step``, likewise."""

    def after_result(self, result: StepResult) -> None:
        """Act on the numbers of a step. On a GPU the next step is already under way."""

    def due(self, step: int, last: bool) -> bool:
        """Return whether ``run`` is to be called after ``step``. Called once a step.

        If any hook says so, the numbers of all steps are read first.
        """
        return False

    def run(self, step: int) -> None:
        """Act between two steps, when nothing is under way but perhaps a save. Collective.

        What changes weights here calls ``self.trainer.checkpointer.before_change()`` first.
        """
