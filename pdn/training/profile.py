"""The steps of a run that are profiled."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pdn.logging.profile import MEMORY, Profiler
from pdn.logging.trace import lines
from pdn.training.hook import Hook, TrainerView
from pdn.training.step import StepResult


class Profile(Hook):
    """Profiles the steps of ``trainer.profile`` on the main rank, into ``profile-<first>-<last>``.

    The step before them warms the profiler up, and its allocations are the memory's snapshot; so
    the device is waited for after the step before that, after that step and after the last.
    """

    def __init__(self, trainer: TrainerView):
        super().__init__(trainer)
        asked = trainer.config.trainer.profile
        self.steps = None if asked is None else asked.steps
        self._profiler: Profiler | None = None
        self._data_seconds = 0.0

    def before_update(self, step: int, inputs: dict[str, Tensor]) -> None:
        if self._profiler is not None:
            self._profiler.before_update()

    def after_update(self, step: int) -> None:
        if self._profiler is not None:
            self._profiler.after_update()

    def after_result(self, result: StepResult) -> None:
        self._data_seconds += result.data_seconds

    def due(self, step: int, last: bool) -> bool:
        if self.steps is None:
            return False
        first, end = self.steps
        return step in (first - 2, first - 1, end)

    def run(self, step: int) -> None:
        assert self.steps is not None
        trainer, (first, last) = self.trainer, self.steps
        if not trainer.world.is_main:
            return
        folder = trainer.directory.path / f"profile-{first}-{last}"
        if step == first - 2:
            if self._profiler is not None:  # a rewind led here again
                self._profiler.cancel()
            self._profiler = Profiler(trainer.world.device)
            self._profiler.warm_up()
        elif self._profiler is None:
            if step == last:
                trainer.progress.say(
                    f"step {step}  no profile: this launch went on from a step beyond {first - 2}"
                )
        elif step == first - 1:
            self._data_seconds = 0.0
            self._profiler.begin(folder)
        else:
            self._finish(folder, self._profiler)
            self._profiler = None

    def _finish(self, folder: Path, profiler: Profiler) -> None:
        assert self.steps is not None
        trainer, (first, last) = self.trainer, self.steps
        count = last - first + 1
        stages = [trainer.course.stage(step - 1) for step in range(first, last + 1)]
        tokens = {
            stage.micro_batch_size * stage.law.seq_len // trainer.config.parallel.context
            for stage in stages
        }
        table = profiler.end(folder, trainer.model, steps=count, tokens=tokens)
        trainer.progress.say(f"steps {first} to {last}  profile, of rank 0: {folder}")
        for line in lines(table, 1e3 * self._data_seconds / count):
            trainer.progress.say(line)
        trainer.progress.say(
            f"  memory of step {first - 1}: {folder / MEMORY}, for pytorch.org/memory_viz"
            if table.on_gpu
            else "  no snapshot of the memory: there is one on a GPU only"
        )
