"""The training loop: one launch of one run, from configuration to the last checkpoint."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from pdn.checkpoint.find import VerifiedCheckpoint
from pdn.checkpoint.manager import Checkpointer
from pdn.checkpoint.replica import RunReplica
from pdn.config import Every
from pdn.distributed.collectives import gather_or_raise, max_over_ranks, raise_on_all_ranks
from pdn.distributed.copies import HostCopy, Moment
from pdn.distributed.fsdp import clip_factor, gradient_norm
from pdn.distributed.watchdog import StallError, Watchdog
from pdn.distributed.world import World
from pdn.errors import Preempted
from pdn.evals.in_loop import validation_batches
from pdn.evals.schedule import Evaluations, Pulse
from pdn.logging.loggers import Loggers, Record, Silent, open_logger
from pdn.logging.progress import ProgressLine, peak_flops
from pdn.optim.schedules import lr_fraction
from pdn.runs import faults
from pdn.runs.directory import RunDirectory
from pdn.runs.launches import commit_of_code
from pdn.runs.sequences import keep_sequences
from pdn.runs.summary import summarise
from pdn.runs.triggers import Clock, Trigger
from pdn.training.branches import changes_of, find_parent, own_history, parent_of, set_course
from pdn.training.carry import CarriedState, carried_for
from pdn.training.config import RunConfig
from pdn.training.continuation import lengths_of, require_finite_end, side_of
from pdn.training.hooks import HOOKS, Hook, LossSpike
from pdn.training.memory import require_memory
from pdn.training.pace import Pace
from pdn.training.phases import Course
from pdn.training.plan import with_vocabulary
from pdn.training.setup import (
    announce,
    build,
    find_checkpoint,
    open_run_data,
    prepare_torch,
    uses_bf16,
)
from pdn.training.signals import Interrupted, StopRequest
from pdn.training.spikes import SpikeDetector
from pdn.training.step import (
    StepOutput,
    StepResult,
    accumulate_gradients,
    agree_on_finite,
)
from pdn.wording import counted

STALL_WRITE_S = 15.0  # for a checkpoint under way to end before a stalled process does
STOP, FAIL = 1, 2  # what a rank reports when it fetches a batch; the highest counts


class Trainer:
    """Holds the state of one launch and takes its steps.

    The numbers of a step are read when the next ``lag`` steps are under way, so that a GPU never
    waits for the host; nothing is saved, evaluated or ended before all of them are read.

    Attributes:
        step: optimiser steps taken, over all launches; the numbers of the last may be unread.
        settled_step: steps whose numbers were read and found good; those are in the ledger.
        next_sample: global index of the first sample that no step has consumed.
        lag: steps that may be under way when the next is taken: 1 on a GPU, 0 on a CPU.
        hooks: what happens around the steps, in order.
        model, optimizer, progress, watchdog: from ``run`` on, which first refuses what it can.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        directory: RunDirectory,
        open_data: Callable,
        stop: StopRequest,
    ):
        self.world, self.directory, self.stop = world, directory, stop
        self.bf16 = uses_bf16(config, world)
        prepare_torch(config, world)
        # Before the data are prepared, which may take hours, and with their vocabulary once more.
        gather_or_raise(lambda: [require_memory(phase, world) for phase in config.every_phase()])
        self.data = open_run_data(config, world, directory, open_data, stop)
        self.config = config = with_vocabulary(config, self.data)
        gather_or_raise(lambda: [require_memory(phase, world) for phase in config.every_phase()])
        t, c = config.trainer, config.checkpoint
        self.course = Course(config)
        self.clock, self._launched = Clock(), time.monotonic()
        self.evaluations = Evaluations(
            config.eval, config.model, world, self.data,
            seq_len=config.data.seq_len, bf16=self.bf16, seed=config.seed,
            validation=validation_batches(
                functools.partial(open_data, recorded=self.data.fingerprint), config.data,
                config.data_seed, world.each_alone(),
            ),
            trigger=self.trigger,
            keep=functools.partial(keep_sequences, directory.path),
            resuming=gather_or_raise(directory.has_progress)[0],
        )  # fmt: skip
        gather_or_raise(
            lambda: directory.take_config(
                config.model_dump(mode="json"),
                may_change=config.may_change(),
                completed=config.completed,
            )
        )
        self.checkpointer = Checkpointer(
            directory.checkpoints,
            keep_last=c.keep_last,
            keep_every=c.keep_every,
            asynchronous=c.asynchronous,
        )
        self.step = self.settled_step = self.saved_step = 0  # step 0 needs no checkpoint
        self.next_sample, self.ledger_hash = 0, self.data.empty_ledger
        self.spikes = SpikeDetector(t.spike_threshold)
        self.nonfinite = 0  # skipped updates since the last good one
        self.lengths = [[0, t.steps]]  # of the run, from which step on
        self.logger = Loggers(Record(directory))
        self.replica: RunReplica | None = None  # of the main rank, if the run has one
        self.last_step = min(t.steps, t.stop_at or t.steps)
        self.flops_per_token = functools.cache(config.model.flops_per_token)  # of a seq_len
        self.peak = peak_flops(world.device)
        self.lag = 1 if world.device.type == "cuda" else 0
        self.carried: CarriedState | None = None  # from step to step, if the run carries states
        self.pace = Pace(world.world_rank, world.size, world.device)
        self._pending: deque[StepResult] = deque()
        self.hooks: list[Hook] = [hook(self) for hook in HOOKS]

    def trigger(self, every: Every | None) -> Trigger:
        """Return the trigger of an interval, in steps, tokens or seconds of this launch."""
        return Trigger(every, lambda step: self.course.tokens(step), self.clock)

    # ------------------------------------------------------------ the launch

    def run(self) -> None:
        """Train until the last step of the launch; collective, as everything here."""
        found = find_checkpoint(self.config, self.data, self.directory, self.checkpointer)
        parent = None
        if found is None:
            parent = find_parent(self.config, self.data, self.checkpointer)
        self.course = set_course(self.config, self.data, found, parent)
        # Only now: a launch that was refused leaves the run as it was.
        gather_or_raise(self.directory.write_config)
        gather_or_raise(lambda: self.directory.keep_tokenizer(self.data.tokenizer_path))
        say = print if self.world.is_main else lambda *_: None
        if found is not None and not self._is_anything_left(found.step):
            require_finite_end(found.step, found.side.get("nonfinite", 0))
            self._settle_status(found.step)
            say(
                f"{self.directory.path}: {found.step} of {max(found.step, self.last_step)} steps "
                "are done; nothing left to train"
            )
            return
        # Whatever can be refused is, before a large model takes its time and memory.
        start = found or parent
        gather_or_raise(lambda: self.course.require_data(self.data, start, self.last_step))
        self.model, self.optimizer = build(
            self.config, self.world, start, self.data, self.checkpointer
        )
        if found is not None:
            self.adopt(found.step, found.side)
        elif parent is not None:
            self._branch(parent)
        else:
            self.directory.continue_from(0, 0)
        self.pace.watch_head(self.model)
        self.carried = carried_for(self, start)
        place = self.step, self.next_sample
        announce(self.config, self.world, self.data, self.course, self.directory.path, place, say)
        self._train()
        self.checkpointer.wait()
        require_finite_end(self.step, self.nonfinite)
        self._settle_status(self.step)
        say(
            f"done: {counted(self.step, 'step')}, checkpoint "
            f"{self.directory.checkpoints}/step-{self.step:08d}"
        )
        for line in summarise(self.directory.path) if self.world.is_main else ():
            say(line)

    def _branch(self, parent: VerifiedCheckpoint) -> None:
        """Go on from a checkpoint of another run whose tensors were just restored."""
        named, side = parent_of(self.config), parent.side
        assert named is not None
        self._take_over(parent.step, side)
        self.saved_step = 0  # by this run
        about = {"run": str(named.run.resolve()), "changes": changes_of(parent, self.config)}
        self.directory.begin_branch(parent.step, self.next_sample, self.ledger_hash, about)

    def _train(self) -> None:
        shown = Silent()
        if self.world.is_main:
            shown = open_logger(
                self.config.logger,
                self.directory.path,
                run_config=self.config.model_dump(mode="json"),
                commit=commit_of_code(),
            )
        self.logger = Loggers(Record(self.directory), shown)
        self.logger.rewind(self.step)  # a killed launch may have logged later ones
        self.directory.set_status("running", self.step)
        self.progress = ProgressLine(self.last_step, self.step, enabled=self.world.is_main)
        self.watchdog = Watchdog(self.config.trainer.stall_timeout, on_stall=self._record_stall)
        try:
            if self.step and self.saved_step != self.step:
                self.save()  # a branch does not depend on its parent's checkpoint from here on
            # What a killed launch had still to evaluate is evaluated now, and what it had
            # evaluated is not again.
            self.evaluate(gather_or_raise(lambda: self.directory.logged(self.step))[0])
            while not self._train_to_the_end():
                pass
        finally:
            self.watchdog.close()
            self.progress.close()

    def _is_anything_left(self, step: int) -> bool:
        """Return whether there are steps left, or evaluations before which a launch was cut off."""
        missing, *_ = gather_or_raise(
            lambda: self.evaluations.missing(step, True, self.directory.logged(step))
        )
        return step < self.last_step or (step == self.last_step and any(missing))

    def _settle_status(self, step: int) -> None:
        """Say that this launch has nothing left to do, unless the status says so already."""
        finished = step >= self.config.trainer.steps
        state = "finished" if finished else "stopped"
        if (self.directory.status() or {}).get("state") != state:
            self.directory.set_status(state, step, 0, None if finished else "trainer.stop_at")

    def _record_stall(self, error: StallError) -> None:
        self.directory.set_status("failed", self.settled_step, error.exit_code, str(error))
        self.checkpointer.close(STALL_WRITE_S)

    def adopt(self, step: int, side: dict) -> None:
        """Continue from the counters of a checkpoint whose tensors were just restored."""
        self._take_over(step, side)
        self.data.recall(own_history(self.config, side))
        self.directory.continue_from(step, self.next_sample)

    def _take_over(self, step: int, side: dict) -> None:
        self.step = self.settled_step = self.saved_step = step
        self.next_sample, self.ledger_hash = side["next_sample"], side["ledger_hash"]
        self.spikes.load(side["recent_losses"])
        self.nonfinite = side.get("nonfinite", 0)
        self.lengths = lengths_of(side, step, self.config.trainer.steps)

    # ------------------------------------------------------------ the loop

    def _train_to_the_end(self) -> bool:
        """Step until the last one; return False if a loss spike rewound the run.

        It then goes on from an earlier step.
        """
        try:
            while self.step < self.last_step and self._train_stage():
                pass
        except LossSpike as spike:
            self._pending.clear()
            spike.hook.rewind(spike.result)
            return False
        return True

    def _train_stage(self) -> bool:
        """Step to the end of the stage that the next step is in; False if the data ended first."""
        stage = self.course.stage(self.step)
        end = self.last_step if stage.end is None else min(stage.end, self.last_step)
        gather_or_raise(lambda: self.data.enter(stage.first, self.next_sample, stage.law))
        # Not a multiple of the step: samples that a rewind skipped are never used.
        stop_sample = self.next_sample + (end - self.step) * stage.law.global_batch_size
        steps = self.data.steps(
            self.next_sample, micro_batch_size=stage.micro_batch_size, stop_sample=stop_sample
        )
        self._settled = Moment(self.world.device)
        try:
            while (found := self._next_batch(steps)) is not None:
                self._take_step(*found)
                self._settle(self.lag)
                faults.strike("step", self.step, self.model)
                self._boundary()
                self.watchdog.beat(self.step, "data")
        except LossSpike:
            steps.close()
            raise
        self._settle()
        return self.step == end

    def _next_batch(self, steps: Iterator) -> tuple[dict[str, Tensor], int, float] | None:
        """Return the next batch, the sample after it, and the seconds it took; None at the end.

        A failure, or a signal that arrived, is acted upon by all ranks: those that have their batch
        would wait for the others for ever. In the same exchange they agree on the time, and hear
        of each other's pace.
        """
        began = time.perf_counter()
        self.pace.enter("data")
        found, failure, level = None, None, 0
        try:
            with self.stop.interruptible():
                faults.strike("data", self.step + 1, self.model, self.checkpointer.before_change)
                found = next(steps, None)
            self.watchdog.beat(self.step, "agree")
        except Interrupted:
            level = STOP
        except Exception as error:
            failure, level = error, FAIL
        level, self.clock.now, *paces = max_over_ranks(
            [level, time.monotonic() - self._launched, *self.pace.report()]
        )
        for text in self.pace.hear(self.step + 1, paces):
            self.progress.say(f"step {self.step}  alarm: {text}")
        if level == FAIL:
            raise_on_all_ranks(failure)
        if level == STOP:
            self._stop()
        return None if found is None else (*found, time.perf_counter() - began)

    def _take_step(self, batch: dict[str, Tensor], next_sample: int, waited: float) -> None:
        """Take one step and queue its result, without waiting for its numbers."""
        self.watchdog.beat(self.step, "train")
        self.pace.enter("launch", self.step + 1)
        fraction = lr_fraction(self.config.schedule, self.step, self.config.trainer.steps)
        fraction *= self.course.stage(self.step).law.lr_scale
        self.optimizer.set_lr_fraction(fraction)
        output = self.train_step(batch)
        device = output.loss.device
        numbers = torch.stack([value.to(device) for value in output if value is not None])
        first, self.next_sample = self.next_sample, next_sample
        self.step += 1
        self._pending.append(
            StepResult(
                step=self.step,
                first_sample=first,
                end_sample=next_sample,
                sample_digests=batch["sample_digests"].flatten(),
                lr=self.config.optim.lr * fraction,
                data_seconds=waited,
                output=HostCopy(numbers),
            )
        )
        self.pace.enter(None)

    def _settle(self, unread: int = 0) -> None:
        """Read the numbers of all steps but the last ``unread``, and have the hooks act on them.

        Raises:
            LossSpike: the run has to go back.
        """
        while len(self._pending) > unread:
            result = self._pending.popleft()
            result.read()
            arrived = result.output.arrived
            result.seconds, self._settled = arrived.seconds_since(self._settled), arrived
            self.pace.settled(result.step, result.seconds)
            for hook in self.hooks:
                hook.after_result(result)

    def commit(self, result: StepResult) -> None:
        """Write into the ledger that a step consumed its samples."""
        digests = self.data.in_order(self.world.gather(result.sample_digests))
        self.ledger_hash = self.data.roll_ledger(self.ledger_hash, digests)
        samples = result.first_sample, result.end_sample
        notes = self.data.notes(result.step, *samples) if self.world.is_main else None
        self.directory.commit(result.step, *samples, self.ledger_hash, notes)
        self.settled_step = result.step

    def _boundary(self) -> None:
        """Do what happens between two steps: publish a checkpoint, and what the hooks want."""
        self.pace.enter("between")
        self.log_checkpoints(self.checkpointer.poll())
        last = self.step == self.last_step
        due = [hook for hook in self.hooks if hook.due(self.step, last)]
        if due or last:
            self._settle()
            for hook in due:
                hook.run(self.step)
            self._settled = Moment(self.world.device)

    # ------------------------------------------------------------ between two steps

    def evaluate(self, logged: Collection[str] = ()) -> None:
        """Evaluate what is due after this step, but for what ``logged`` has keys of."""
        beat = functools.partial(self.watchdog.beat, self.step, "evaluate")
        pulse = Pulse(beat=beat, alive=self.watchdog.alive, check=self._check_stop)
        try:
            for report in self.evaluations.due(
                self.model, self.step, self.step == self.last_step, logged,
                average=self.optimizer.average, pulse=pulse,
            ):  # fmt: skip
                self.logger.log(self.step, report.keys)
                for table in report.tables:
                    self.logger.log_table(self.step, *table)
                for line in report.lines:
                    self.progress.say(f"step {self.step}  {line}")
        except Preempted:  # the next launch evaluates
            self._stop()

    def _check_stop(self) -> None:
        """Raise ``Preempted`` if this rank was asked to stop, where that reaches the others."""
        if self.stop.name is not None:
            raise Preempted("PREEMPTED", self.stop.name)

    def stop_if_asked(self) -> None:
        """Save and end the launch if any rank was asked to stop. Collective."""
        if self.stop.agreed():
            self._stop()

    def _stop(self) -> None:
        self._settle()
        if self.saved_step != self.step:
            self.save()
        self.checkpointer.wait()
        raise Preempted(
            "PREEMPTED",
            f"{self.stop.name or 'a signal'}: saved step {self.step}; launch again to continue",
        )

    def save(self) -> None:
        """Save a checkpoint of this step, all of whose numbers have been read."""
        self.watchdog.beat(self.step, "save")
        gather_or_raise(self.data.check_unchanged)
        self.directory.sync()
        states = self.carried and self.carried.tensors(self.data.window(self.next_sample))
        side = side_of(self)
        committed = self.checkpointer.save(self.step, self.model, self.optimizer, side, states)
        self.saved_step = self.step
        self.pace.excuse()
        self.log_checkpoints(committed)

    def log_checkpoints(self, committed: list[int]) -> None:
        """Log what the checkpoints cost that have become durable."""
        for step in committed:
            stall, write = self.checkpointer.last_stall_s, self.checkpointer.last_write_s
            values = {"checkpoint/stall_seconds": stall, "checkpoint/write_seconds": write}
            self.logger.log(step, {"checkpoint/step": step} | values)
        if committed and self.config.replica is not None:
            gather_or_raise(lambda: self._replicate(committed[-1]))

    def _replicate(self, step: int) -> None:
        """Have the checkpoint of a step copied to the replica, and log what has arrived there."""
        if self.replica is not None:
            self.replica.push(step)
            for arrived, seconds in self.replica.landed():
                self.logger.log(step, {"replica/step": arrived, "replica/seconds": seconds})

    def close(self, exit_code: int) -> None:
        """Let what runs beside the training end; ``exit_code``: of the launch."""
        self.logger.close(exit_code)
        self.checkpointer.close(self.config.trainer.stall_timeout)
        self.data.close()

    # ------------------------------------------------------------ one step

    def train_step(self, batch: dict[str, Tensor]) -> StepOutput:
        """Run all micro-batches forward and backward, and update at the learning rates set.

        The host does not wait for the device: where loss or gradients are not finite on any rank,
        the optimiser changes nothing. Collective.

        Args:
            batch: ``tokens`` and ``labels`` [micro-batches, B, T] int64, and ``cu_seqlens`` where
                documents are isolated, in host memory.
        """
        inputs = {
            key: batch[key].to(self.world.device, non_blocking=True)
            for key in ("tokens", "labels", "cu_seqlens")
            if key in batch
        }
        for key in ("tokens", "labels"):
            inputs[key] = self.world.context.piece_of(inputs[key])
        t = self.config.trainer
        if self.carried is not None:
            window = self.data.window(self.next_sample)
            shares = self.carried.accumulate_gradients(inputs, window)
        else:
            shares = accumulate_gradients(
                self.model, inputs, self.world, bf16=self.bf16, z_loss=t.z_loss,
                keep_gathered=not self.config.parallel.reshard_after_forward,
                piece_tokens=t.piece_tokens,
            )  # fmt: skip
        faults.strike("backward", self.step + 1, self.model)
        norm = gradient_norm(self.model)
        losses, found_inf = agree_on_finite(shares, norm.to(shares.device), self.world)
        clip = clip_factor(norm, t.grad_clip)
        for hook in self.hooks:
            hook.before_update(self.step + 1, inputs)
        self.optimizer.step(found_inf.to(norm.device), clip)
        for hook in self.hooks:
            hook.after_update(self.step + 1)
        self.optimizer.zero_grad()
        return StepOutput(losses[0], norm, found_inf, losses[1] if t.z_loss else None)
