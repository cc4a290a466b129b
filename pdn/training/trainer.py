"""The training loop: one launch of one run, from configuration to the last checkpoint."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from pdn import ops
from pdn.checkpoint.manager import Checkpointer, Found
from pdn.checkpoint.recorded import recorded_fingerprint
from pdn.distributed.collectives import agree, together, worst
from pdn.distributed.fsdp import (
    World,
    clip_gradients,
    compute_in,
    join_world,
    last_micro_batch,
    parallelise,
)
from pdn.distributed.replicas import check_replicas
from pdn.distributed.watchdog import StallError, Watchdog
from pdn.errors import ConfigError, NumericError, Preempted, StorageError
from pdn.evals.in_loop import validation_batches
from pdn.evals.schedule import Evaluations
from pdn.logging.loggers import Silent, open_logger
from pdn.logging.progress import ProgressLine, engineering, passing_line, peak_flops
from pdn.models.language_model import LanguageModel
from pdn.optim.optimizers import build_optimizer
from pdn.optim.schedules import lr_fraction
from pdn.runs import faults
from pdn.runs.directory import RunDirectory
from pdn.runs.launcher import die_with_launcher
from pdn.runs.launches import commit_of_code
from pdn.runs.summary import summarise
from pdn.training.config import RunConfig
from pdn.training.continuation import require_finite_end, require_same_run, run_record
from pdn.training.initial import InitialWeights
from pdn.training.memory import require_memory
from pdn.training.plan import describe, with_vocabulary
from pdn.training.signals import Interrupted, StopRequest
from pdn.training.spikes import SpikeDetector

WATCHDOG_LEAD_S = 60.0
STALL_WRITE_S = 15.0  # for a checkpoint under way to end before a stalled process does
MAX_REWINDS = 3  # in one launch, before loss spikes stop the run
MAX_NONFINITE_STEPS = 3  # in a row; the last of them stops the run


def fit(config: RunConfig, *, open_data: Callable) -> None:
    """Train, or continue, the run that ``config`` describes.

    Args:
        open_data: ``pdn.data.open_data``; the trainer knows batches as dicts of tensors and nothing
            else of the data.

    Raises:
        PdnError: whatever the user has to act on, with its exit code, on every rank alike.
    """
    die_with_launcher()
    # The watchdog speaks first: a collective that times out does not know which rank is missing.
    timeout = config.trainer.stall_timeout + WATCHDOG_LEAD_S
    world = join_world(config.trainer.device, timeout, sharded=config.parallel.needs_mesh)
    agreed = world.size == 1
    try:
        try:
            config.check_world_size(world.size)
            world = world.laid_out(config.parallel.dims(world.size))
        except ValueError as error:
            raise ConfigError("CONFIG", str(error)) from None
        if config.trainer.dry_run:
            if world.is_main:
                describe(config, world, open_data)
        else:
            _run(config, world, open_data)
        agreed = True
    except Preempted:
        agreed = True
        raise
    finally:
        # After any other failure the peers may be in a collective that waits for this rank; leaving
        # the group waits for that.
        if agreed:
            world.close()


def _run(config: RunConfig, world: World, open_data: Callable) -> None:
    directory = _everywhere(lambda: RunDirectory(config.directory(), rank=world.world_rank))
    stop = StopRequest()
    trainer, code = None, 0
    try:
        if config.resume == "restart":
            together(directory.restart)
        trainer = Trainer(config, world, directory, open_data, stop)
        trainer.run()
    except BaseException as error:
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 70)
        state = "preempted" if isinstance(error, Preempted) else "failed"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        with contextlib.suppress(
            StorageError
        ):  # the storage may be what failed; its first error is the one to report
            step = trainer.step if trainer else 0
            directory.set_status(
                state, step or (directory.status() or {}).get("step", 0), code, reason
            )
        raise
    finally:
        if trainer is not None:
            trainer.close(code)
        stop.restore()
        # A thread that still writes a checkpoint, after a failure, keeps the lock until the process
        # ends.
        if trainer is None or not trainer.checkpointer.writing:
            directory.close()


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _everywhere(work: Callable):
    """The result of ``work`` on this rank; where it fails on any rank, every rank raises."""
    made = []
    together(lambda: made.append(work()))
    return made[0]


def uses_bf16(config: RunConfig, world: World) -> bool:
    precision = config.trainer.precision
    return precision == "bf16" or (precision == "auto" and world.device.type == "cuda")


class Trainer:
    """State and steps of one launch.

    Attributes:
        step: optimiser steps completed, over all launches.
        next_sample: global index of the first sample that no step has consumed.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        directory: RunDirectory,
        open_data: Callable,
        stop: StopRequest,
    ):
        t = config.trainer
        self.world, self.directory, self.stop = world, directory, stop
        self.bf16 = uses_bf16(config, world)
        torch.manual_seed(config.seed)  # for layers that draw; a checkpoint restores its state
        torch.use_deterministic_algorithms(t.deterministic)
        if world.device.type == "cuda":
            if t.deterministic:
                os.environ.setdefault(
                    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
                )  # or every product raises
            torch.set_float32_matmul_precision("high" if self.bf16 else "highest")
        ops.set_default_backend(config.ops.backend)
        together(lambda: require_memory(config, world))
        self.data = _everywhere(lambda: self._open(config, open_data))
        self._require_same_data()
        self.config = config = with_vocabulary(config, self.data)
        together(lambda: require_memory(config, world))
        self.evaluations = Evaluations(
            config.eval, config.model, world, self.data, seq_len=config.data.seq_len, bf16=self.bf16,
            validation=validation_batches(
                functools.partial(open_data, recorded=self.data.fingerprint), config.data,
                config.data_seed, world,
            ),
            resuming=together(directory.has_progress)[0],
        )  # fmt: skip
        together(
            lambda: directory.record_config(
                config.model_dump(mode="json"),
                may_change=config.may_change(),
                completed=config.completed,
                write=False,
            )
        )
        c = config.checkpoint
        self.checkpointer = Checkpointer(
            directory.checkpoints,
            keep_last=c.keep_last,
            keep_every=c.keep_every,
            asynchronous=c.asynchronous,
        )
        self.step, self.next_sample, self.ledger_hash, self.nonfinite = (
            0,
            0,
            self.data.empty_ledger,
            0,
        )
        self.saved_step = 0  # of nothing there is nothing to save
        self.spikes, self.rewinds = SpikeDetector(t.spike_threshold), 0
        self.logger = Silent()
        self.last_step = min(t.steps, t.stop_at or t.steps)
        self.flops_per_token = config.model.flops_per_token(config.data.seq_len)
        self.peak = peak_flops(world.device)

    def _open(self, config: RunConfig, open_data: Callable):
        try:
            with passing_line(enabled=self.world.is_main) as progress, self.stop.interruptible():
                return open_data(
                    config.data,
                    global_batch_size=config.trainer.global_batch_size,
                    seed=config.data_seed,
                    rank=self.world.batch_rank,
                    world_size=self.world.batch_ranks,
                    progress=progress,
                    recorded=self._recorded(config),
                )
        except Interrupted as signal:
            raise Preempted(
                "PREEMPTED",
                f"{signal}: stopped while the data were opened, no step is lost; launch again to "
                "continue",
            ) from None

    def _recorded(self, config: RunConfig) -> dict[str, object] | None:
        """What the run that is continued was trained on, or None for a new one."""
        if config.resume in ("never", "restart"):
            return None
        return recorded_fingerprint(self.directory.checkpoints)

    def _require_same_data(self) -> None:
        """Nodes with another corpus or tokenizer under the same path would train on batches that do
        not belong together.
        """
        first, *others = together(lambda: self.data.fingerprint | self.data.validation_fingerprint)
        for rank, other in enumerate(others, start=1):
            for key in first.keys() | other.keys():
                if first.get(key) != other.get(key):
                    raise ConfigError(
                        "DATA-RANKS",
                        f"{key}: rank 0 found {first.get(key)!r}, rank {rank} {other.get(key)!r}; "
                        "expected the same data on every node",
                    )

    # ------------------------------------------------------------ the launch

    def run(self) -> None:
        found = self._find()
        # Only now: a launch that was refused leaves the run as it was.
        together(self.directory.write_config)
        together(lambda: self.directory.keep_tokenizer(self.data.tokenizer_path))
        say = print if self.world.is_main else lambda *_: None
        if (
            found is not None
            and found.step >= self.last_step
            and not self._has_to_evaluate(found.step)
        ):
            require_finite_end(found.step, found.side.get("nonfinite", 0))
            self._settle_status(found.step)
            say(
                f"{self.directory.path}: {found.step} of {max(found.step, self.last_step)} steps "
                "are done; nothing left to train"
            )
            return
        # Whatever can be refused is, before a large model takes its time and memory.
        together(
            lambda: self.data.check_epochs(self.last_step * self.config.trainer.global_batch_size)
        )
        self._build(found)
        self._announce(say)
        if self.world.is_main:
            self.logger = open_logger(
                self.config.logger,
                self.directory.path,
                run_config=self.config.model_dump(mode="json"),
                commit=commit_of_code(),
            )
        self.directory.set_status("running", self.step)
        self.progress = ProgressLine(self.last_step, self.step, enabled=self.world.is_main)
        self.watchdog = Watchdog(self.config.trainer.stall_timeout, on_stall=self._record_stall)
        try:
            self._loop()
        finally:
            self.watchdog.close()
            self.progress.close()
        self.checkpointer.wait()
        require_finite_end(self.step, self.nonfinite)
        self._settle_status(self.step)
        say(
            f"done: {self.step} steps, checkpoint {self.directory.checkpoints}/step-{self.step:08d}"
        )
        for line in summarise(self.directory.path) if self.world.is_main else ():
            say(line)

    def _has_to_evaluate(self, step: int) -> bool:
        """Whether a launch that was cut off after the last step has left its evaluation to this
        one.
        """
        missing, *_ = together(
            lambda: self.evaluations.missing(step, True, self.directory.logged(step))
        )
        return step == self.last_step and any(missing)

    def _settle_status(self, step: int) -> None:
        """Say that this launch has nothing left to do, unless the status says so already."""
        finished = step >= self.config.trainer.steps
        state = "finished" if finished else "stopped"
        if (self.directory.status() or {}).get("state") != state:
            self.directory.set_status(state, step, 0, None if finished else "trainer.stop_at")

    def _record_stall(self, error: StallError) -> None:
        self.directory.set_status("failed", self.step, error.exit_code, str(error))
        self.checkpointer.close(STALL_WRITE_S)

    def _find(self) -> Found | None:
        """The checkpoint to continue from, of the data that the run was trained on."""
        config = self.config
        if config.resume == "never":
            if together(self.directory.has_progress)[0]:
                raise ConfigError(
                    "RESUME",
                    f"resume = never: {self.directory.path} already holds a run; expected another "
                    "name= or resume=auto",
                )
            return None
        which = "auto" if config.resume == "restart" else config.resume
        found = self.checkpointer.find(which)
        if found is None:
            together(self.directory.require_nothing_lost)
            return None
        fingerprint = self.data.fingerprint
        together(lambda: require_same_run(found, config, fingerprint, self.directory))
        return found

    def _build(self, found: Found | None) -> None:
        """The model and its optimizer, as ``found`` has them, or else ``init_from``, or else
        initialised.
        """
        config = self.config
        with torch.device("meta"):
            model = LanguageModel(config.model)
        weights = None
        if found is not None:
            found.require_fit(model)
        elif config.init_from is not None:
            weights = _everywhere(
                lambda: InitialWeights(
                    config.init_from,
                    self.data.tokenizer_path,
                    any_tokenizer=config.init_tokenizer == "any",
                )
            )
            weights.require_fit(model)
        state_bytes = build_optimizer(model, config.optim).state_bytes()
        self.checkpointer.preflight(model, state_bytes)
        self.model = parallelise(model, config.parallel, self.world, seed=config.seed)
        self.optimizer = build_optimizer(self.model, config.optim)
        if found is not None:
            self.checkpointer.load(found, self.model, self.optimizer)
            self._adopt(found.step, found.side)
            return
        if weights is not None:
            weights.load(self.model)
        self.directory.continue_from(0, 0)

    def _adopt(self, step: int, side: dict) -> None:
        """Continue from the counters of a checkpoint whose tensors were just restored."""
        self.step = self.saved_step = step
        self.next_sample, self.ledger_hash = side["next_sample"], side["ledger_hash"]
        self.spikes.load(side["recent_losses"])
        self.nonfinite = side.get("nonfinite", 0)
        self.directory.continue_from(step, self.next_sample)

    def _announce(self, say: Callable) -> None:
        config, t = self.config, self.config.trainer
        tokens = t.global_batch_size * config.data.seq_len
        say(
            f"run      {self.directory.path}"
            + (f", continuing from step {self.step}" if self.step else "")
        )
        say(f"model    {config.model.name}, {config.model.num_params():,} parameters")
        say(
            "data     "
            + self.data.describe(t.steps * t.global_batch_size)
            .removeprefix("data: ")
            .replace("\n", "\n         ")
        )
        precision = "bf16" if self.bf16 else "fp32"
        device = torch.cuda.get_device_name() if self.world.device.type == "cuda" else "CPU"
        unknown = self.world.device.type == "cuda" and self.peak is None
        note = "; its peak rate is not known here: no mfu" if unknown else ""
        say(f"device   {self.world.size} x {device}, {precision}{note}")
        say(
            f"plan     {t.steps:,} steps of {tokens:,} tokens, {engineering(t.steps * tokens)} in "
            "all"
        )

    def _loop(self) -> None:
        # What a killed launch had still to evaluate is evaluated now, and what it had evaluated is
        # not again.
        logged = together(lambda: self.directory.logged(self.step))[0]
        self._evaluate(logged)
        while not self._train_to_the_end():
            pass

    def _train_to_the_end(self) -> bool:
        """Step until the last one; False if a loss spike rewound the run, which then goes on from
        an earlier step.
        """
        t = self.config.trainer
        # Not a multiple of the step: samples that a rewind skipped are never used.
        stop_sample = self.next_sample + (self.last_step - self.step) * t.global_batch_size
        steps = self.data.steps(
            self.next_sample, micro_batch_size=t.micro_batch_size, stop_sample=stop_sample
        )
        began = time.perf_counter()
        while (found := self._next_batch(steps)) is not None:
            batch, next_sample = found
            waited = time.perf_counter() - began
            self.watchdog.beat(self.step, "train")
            record = self._train_step(batch)
            if self.spikes.is_spike(record["loss"]):
                steps.close()
                self._rewind(record["loss"], next_sample)
                return False
            first, self.next_sample = self.next_sample, next_sample
            self.step += 1
            self._commit(batch, first)
            seconds = time.perf_counter() - began
            self._log(record, seconds, waited)
            faults.strike("step", self.step, self.model)
            self._boundary()
            self.watchdog.beat(self.step, "data")
            began = time.perf_counter()
        return True

    def _rewind(self, loss: float, end_sample: int) -> None:
        """Go back to the last checkpoint and past the data from there up to ``end_sample``, where
        the loss spiked.
        """
        where = f"step {self.step + 1}: loss {loss:.4f} is more than {self.spikes.threshold:g} above the recent median"
        self.checkpointer.wait()
        self.rewinds += 1
        found = (
            self.checkpointer.restore(self.model, self.optimizer)
            if self.rewinds <= MAX_REWINDS
            else None
        )
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
        self._adopt(*found)
        first, self.next_sample = self.next_sample, end_sample
        self.progress.say(
            f"{where}: rewound to step {self.step}, samples {first} to {end_sample - 1} are skipped"
        )
        # in place of the checkpoint rewound to: a launch killed before the next one must skip them
        # too
        self._save()
        self._log_checkpoints(self.checkpointer.wait())
        self.directory.continue_from(
            self.step, self.next_sample
        )  # says in the ledger what was skipped

    def _next_batch(self, steps: Iterator) -> tuple[dict[str, Tensor], int] | None:
        """The next batch, or None at the end. A failure, or a signal that arrives meanwhile, is
        acted upon by all ranks: those that have their batch would wait for the others for ever."""
        found, failure, level = None, None, 0
        try:
            with self.stop.interruptible():
                faults.strike("data", self.step + 1, self.model)
                found = next(steps, None)
            self.watchdog.beat(self.step, "agree")
        except Interrupted:
            level = 1
        except Exception as error:
            failure, level = error, 2
        level = worst(level)
        if level == 2:
            together(lambda: _raise(failure))
        if level == 1:
            self._stop()
        return found

    def _commit(self, batch: dict[str, Tensor], first: int) -> None:
        digests = self.world.gather(batch["sample_digests"].flatten())
        self.ledger_hash = self.data.roll_ledger(self.ledger_hash, digests)
        self.directory.commit(self.step, first, self.next_sample, self.ledger_hash)

    def _boundary(self) -> None:
        """What happens between two steps: publish, save, evaluate; a request to stop is heard
        before and after evaluating.
        """
        config = self.config
        self._log_checkpoints(self.checkpointer.poll())
        last = self.step == self.last_step
        check_every = config.trainer.divergence_check_every
        if check_every is not None and self.step % check_every == 0:
            check_replicas(self.model, self.step, self.world.dims)
        # Before tasks too: they take minutes, and a signal ends them.
        if (
            last
            or self.step % config.checkpoint.every == 0
            or self.evaluations.tasks_due(self.step, last)
        ):
            self._save()
        if not last:
            self._stop_if_asked()
        self._evaluate()
        if not last:
            self._stop_if_asked()

    def _evaluate(self, logged: Collection[str] = ()) -> None:
        """What is due after this step, but for what ``logged`` has keys of."""
        beat = functools.partial(self.watchdog.beat, self.step, "evaluate")
        pace = dict(beat=beat, alive=self.watchdog.alive, check=self._check_stop)
        try:
            for keys, lines, tables in self.evaluations.due(
                self.model, self.step, self.step == self.last_step, logged, **pace
            ):
                record = {"step": self.step} | keys
                self.directory.log(record)
                self.logger.log(self.step, record)
                for table in tables:
                    self.logger.log_table(self.step, *table)
                for line in lines:
                    self.progress.say(f"step {self.step}  {line}")
        except Preempted:  # the next launch evaluates
            self._stop()

    def _check_stop(self) -> None:
        """Raise ``Preempted`` if this rank was asked to stop, where that reaches the others."""
        if self.stop.stop_requested:
            raise Preempted("PREEMPTED", self.stop.name)

    def _stop_if_asked(self) -> None:
        if agree(self.stop.stop_requested):
            self._stop()

    def _stop(self) -> None:
        if self.saved_step != self.step:
            self._save()
        self.checkpointer.wait()
        raise Preempted(
            "PREEMPTED",
            f"{self.stop.name or 'a signal'}: saved step {self.step}; launch again to continue",
        )

    # ------------------------------------------------------------ one step

    def _train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Forward, backward and update over all micro-batches; returns loss, gradient norm and
        learning rate.
        """
        t = self.config.trainer
        fraction = lr_fraction(self.config.schedule, self.step, t.steps)
        self.optimizer.set_lr_fraction(fraction)
        inputs = {
            key: batch[key].to(self.world.device, non_blocking=True)
            for key in ("tokens", "labels", "cu_seqlens")
            if key in batch
        }
        counted = self.world.sum((inputs["labels"] >= 0).sum())
        loss = torch.zeros((), device=self.world.device)
        micro_batches = len(inputs["tokens"])
        for i in range(micro_batches):
            last_micro_batch(
                self.model,
                i == micro_batches - 1,
                keep_gathered=not self.config.parallel.reshard_after_forward,
            )
            micro = {key: value[i] for key, value in inputs.items()}
            with compute_in(self.world.device, self.bf16):
                output = self.model(
                    micro["tokens"], labels=micro["labels"], cu_seqlens=micro.get("cu_seqlens")
                )
            share = output.loss_sum / counted
            share.backward()
            loss += share.detach()
        faults.strike("backward", self.step + 1, self.model)
        norm = clip_gradients(self.model, t.grad_clip)
        loss, norm = self.world.sum(loss).item(), norm.item()
        finite = not agree(not (math.isfinite(loss) and math.isfinite(norm)))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        lr = self.config.optim.lr * fraction
        self._count_nonfinite(finite, loss, norm)
        return {"loss": loss, "grad_norm": norm, "lr": lr, "skipped": int(not finite)}

    def _count_nonfinite(self, finite: bool, loss: float, norm: float) -> None:
        self.nonfinite = 0 if finite else self.nonfinite + 1
        if not finite:
            first = self.next_sample
            where = f"step {self.step + 1}, samples {first} to {first + self.config.trainer.global_batch_size - 1}"
            self.progress.say(
                f"{where}: loss {loss}, gradient norm {norm}: update skipped on all ranks"
            )
            if self.nonfinite == MAX_NONFINITE_STEPS:
                raise NumericError(
                    "NONFINITE",
                    f"{where}: the {MAX_NONFINITE_STEPS}rd step in a row with loss {loss} and "
                    f"gradient norm {norm}; "
                    "expected finite values. Lower optim.lr, or resume before it: "
                    "resume=step:<number>",
                )

    # ------------------------------------------------------------ records

    def _log(self, record: dict[str, float], seconds: float, waited: float) -> None:
        if self.step % self.config.trainer.log_every and self.step != self.last_step:
            return
        tokens = self.config.trainer.global_batch_size * self.config.data.seq_len
        speed = tokens / seconds
        mfu = (
            None
            if self.peak is None
            else speed * self.flops_per_token / (self.peak * self.world.size)
        )
        record |= {
            "step": self.step,
            "tokens": self.step * tokens,
            "tokens_per_second": speed,
            "mfu": mfu,
        }
        record |= {"step_seconds": seconds, "data_seconds": waited}
        if self.world.device.type == "cuda":
            record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.directory.log(record)
        self.logger.log(self.step, record)
        self.progress.update(self.step, record)

    def _save(self) -> None:
        self.watchdog.beat(self.step, "save")
        self.directory.sync()
        side = {
            "next_sample": self.next_sample,
            "ledger_hash": self.ledger_hash,
            "fingerprint": self.data.fingerprint,
            "run": run_record(self.config, self.directory),
            "nonfinite": self.nonfinite,
        }
        side["recent_losses"] = self.spikes.state()
        committed = self.checkpointer.save(self.step, self.model, self.optimizer, side)
        self.saved_step = self.step
        self._log_checkpoints(committed)

    def _log_checkpoints(self, committed: list[int]) -> None:
        for step in committed:
            costs = {
                "stall_seconds": self.checkpointer.last_stall_s,
                "write_seconds": self.checkpointer.last_write_s,
            }
            record = {"step": self.step, "checkpoint/step": step} | {
                f"checkpoint/{key}": cost for key, cost in costs.items()
            }
            self.directory.log(record)
            self.logger.log(self.step, record)

    def close(self, exit_code: int) -> None:
        """Let what runs beside the training end; ``exit_code``: of the launch."""
        self.logger.close(exit_code)
        self.checkpointer.close(self.config.trainer.stall_timeout)
        self.data.close()
