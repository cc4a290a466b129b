"""What a hook is: something that happens around the steps of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pdn.config import Every
from pdn.runs.triggers import Trigger
from pdn.training.step import StepResult

if TYPE_CHECKING:
    from pdn.training.trainer import Trainer


class Hook:
    """Does something around the steps of a run.

    Every rank has the same hooks, and they decide alike. Subclasses override what they need.
    """

    def __init__(self, trainer: Trainer):
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
