"""What happens around the steps of a run, in the order of ``HOOKS``."""

from __future__ import annotations

import torch

from pdn.distributed.replicas import check_replicas
from pdn.errors import NumericError
from pdn.logging.gpu import gpu_monitor
from pdn.training.hook import Hook, TrainerView
from pdn.training.profile import Profile
from pdn.training.step import StepResult
from pdn.training.telemetry import Telemetry

MAX_NONFINITE_STEPS = 3  # in a row; the last of them stops the run
MAX_REWINDS = 3  # in one launch, before loss spikes stop the run


class LossSpike(Exception):
    """Ends the present pass over the data: the run goes back to its last checkpoint."""

    def __init__(self, result: StepResult, hook: RewindAtSpikes):
        super().__init__(f"step {result.step}: loss {result.loss}")
        self.result, self.hook = result, hook


class StopAtNonFinite(Hook):
    """Reports skipped updates; the third in a row ends the run."""

    def after_result(self, result: StepResult) -> None:
        in_a_row = self.trainer.nonfinite + 1 if result.skipped else 0
        self.trainer.nonfinite = in_a_row
        if not result.skipped:
            return
        where = f"step {result.step}, samples {result.first_sample} to {result.end_sample - 1}"
        self.trainer.progress.say(
            f"{where}: loss {result.loss}, gradient norm {result.grad_norm}: update skipped on all "
            "ranks"
        )
        if in_a_row == MAX_NONFINITE_STEPS:
            raise NumericError(
                "NONFINITE",
                f"{where}: the {MAX_NONFINITE_STEPS}rd step in a row with loss {result.loss} and "
                f"gradient norm {result.grad_norm}; expected finite values. Lower optim.lr, or "
                "resume before it: resume=step:<number>",
            )


class RewindAtSpikes(Hook):
    """Goes back to the last checkpoint where ``trainer.spike_threshold`` is passed.

    The data that led there are skipped.
    """

    def __init__(self, trainer: TrainerView):
        super().__init__(trainer)
        self.rewinds = 0

    def after_result(self, result: StepResult) -> None:
        if self.trainer.spikes.is_spike(result.loss):
            raise LossSpike(result, self)

    def rewind(self, result: StepResult) -> None:
        """Go back to the last checkpoint, and past the data up to that of the spike. Collective."""
        trainer = self.trainer
        where = (
            f"step {result.step}: loss {result.loss:.4f} is more than "
            f"{trainer.spikes.threshold:g} above the recent median"
        )
        trainer.log_checkpoints(trainer.checkpointer.wait())
        self.rewinds += 1
        found = None
        if self.rewinds <= MAX_REWINDS:
            found = trainer.checkpointer.restore(trainer.model, trainer.optimizer)
        if found is None:
            reason = (
                "there is no checkpoint to rewind to"
                if self.rewinds == 1
                else f"it was rewound {MAX_REWINDS} times already"
            )
            raise NumericError(
                "SPIKE",
                f"{where}, and {reason}; lower optim.lr, or set trainer.spike_threshold=null",
            )
        phases = trainer.data.history
        trainer.adopt(*found)
        trainer.logger.rewind(trainer.step)
        # A phase that begins where the run is again keeps its place: its samples are skipped.
        trainer.data.recall([phase for phase in phases if phase["first_step"] <= trainer.step])
        # No state fits what is in the middle of segments that were skipped in part.
        end = trainer.data.segment_end(result.end_sample)
        first, trainer.next_sample = trainer.next_sample, end
        trainer.progress.say(
            f"{where}: rewound to step {trainer.step}, samples {first} to "
            f"{trainer.next_sample - 1} are skipped"
        )
        # In place of the checkpoint rewound to: a launch killed before the next one must skip them
        # too.
        trainer.save()
        trainer.log_checkpoints(trainer.checkpointer.wait())
        # Says in the ledger what was skipped.
        trainer.directory.continue_from(trainer.step, trainer.next_sample)


class KeepLedger(Hook):
    """Records which samples the step consumed: from then on it is a step of the run."""

    def after_result(self, result: StepResult) -> None:
        self.trainer.commit(result)


class Log(Hook):
    """Logs a step's numbers every ``trainer.log_every`` and at the last step."""

    def __init__(self, trainer: TrainerView):
        super().__init__(trainer)
        self.logs = self.trigger(trainer.config.trainer.log_every)
        self.gpu = gpu_monitor(trainer.world.device) if trainer.world.is_main else None

    def after_result(self, result: StepResult) -> None:
        trainer = self.trainer
        if not self.logs.due(result.step) and result.step != trainer.last_step:
            return
        stage = trainer.course.stage(result.step - 1)
        speed = stage.tokens_per_step / result.seconds
        values = {
            "loss": result.loss,
            **({} if result.z_loss is None else {"z_loss": result.z_loss}),
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "skipped": int(result.skipped),
            "tokens": trainer.course.tokens(result.step),
            "tokens_per_second": speed,
            "mfu": None
            if trainer.peak is None
            else speed
            * trainer.flops_per_token(stage.law.seq_len)
            / (trainer.peak * trainer.world.size),
            "step_seconds": result.seconds,
            "data_seconds": result.data_seconds,
            **trainer.pace.take(),
        }
        if trainer.world.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.gpu is not None:
            values |= self.gpu.read()
        trainer.logger.log(result.step, values)
        trainer.progress.update(result.step, values)


class CheckDivergence(Hook):
    """Compares the parameters of replicas every ``trainer.divergence_check_every``."""

    def __init__(self, trainer: TrainerView):
        super().__init__(trainer)
        self.checks = self.trigger(trainer.config.trainer.divergence_check_every)

    def due(self, step: int, last: bool) -> bool:
        return self.checks.due(step)

    def run(self, step: int) -> None:
        dims = self.trainer.world.dims
        assert dims is not None  # ``fit`` laid the ranks out
        check_replicas(self.trainer.model, step, dims)


class Save(Hook):
    """Saves every ``checkpoint.every``, at the last step, and before tasks.

    Those take minutes and are ended by a signal.
    """

    def __init__(self, trainer: TrainerView):
        super().__init__(trainer)
        self.saves = self.trigger(trainer.config.checkpoint.every)

    def due(self, step: int, last: bool) -> bool:
        due = self.saves.due(step)
        return due or last or self.trainer.evaluations.tasks_due(step, last)

    def run(self, step: int) -> None:
        trainer, checkpointer = self.trainer, self.trainer.checkpointer
        last = step == trainer.last_step
        needed = last or trainer.evaluations.tasks_due(step, last)
        if checkpointer.busy and not needed and trainer.config.checkpoint.when_busy == "skip":
            trainer.progress.say(
                f"step {step}  no checkpoint: the one of step {trainer.saved_step} is still being "
                "written"
            )
            trainer.logger.log(step, {"checkpoint/skipped": 1})
            return
        trainer.save()


class Evaluate(Hook):
    """Runs what ``eval`` asks for; a request to stop is heard before it and during it."""

    def due(self, step: int, last: bool) -> bool:
        return any(self.trainer.evaluations.missing(step, last, ()))

    def run(self, step: int) -> None:
        if step != self.trainer.last_step:
            self.trainer.stop_if_asked()
        self.trainer.evaluate()


HOOKS: tuple[type[Hook], ...] = (
    StopAtNonFinite,
    RewindAtSpikes,
    KeepLedger,
    Log,
    CheckDivergence,
    Telemetry,
    Save,
    Evaluate,
    Profile,
)
