"""One launch of a run: join the other ranks, train, and say how it ended."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable

from pdn.checkpoint.format import committed_steps
from pdn.checkpoint.replica import RunReplica
from pdn.distributed.collectives import gather_or_raise, run_or_raise
from pdn.distributed.peers import explain, is_broken_exchange, tell_peers
from pdn.distributed.world import World, join_world
from pdn.errors import ConfigError, DataError, PdnError, Preempted, StorageError
from pdn.runs.directory import RunDirectory
from pdn.runs.launcher import die_with_launcher
from pdn.runs.output import note
from pdn.training.config import RunConfig
from pdn.training.devices import check_devices
from pdn.training.names import directory_of, name_of
from pdn.training.plan import describe
from pdn.training.signals import StopRequest
from pdn.training.trainer import Trainer
from pdn.wording import first_line

WATCHDOG_LEAD_S = 60.0
PREEMPTION_S = 20.0  # for the replica; schedulers kill 30 s after their signal
log = logging.getLogger(__name__)


def fit(config: RunConfig, *, open_data: Callable, trainer_cls: type[Trainer] = Trainer) -> None:
    """Train, or continue, the run that ``config`` describes.

    Args:
        config: of the run.
        open_data: ``pdn.data.open_data``; the trainer knows batches as dicts of tensors and nothing
            else of the data.
        trainer_cls: what trains, ``Trainer`` or a subclass with another ``train_step`` or other
            ``hooks``.

    Raises:
        PdnError: whatever the user has to act on, with its exit code, on every rank alike.
    """
    die_with_launcher()
    if not config.trainer.dry_run:  # a dry run may describe another machine's run
        check_devices(config.trainer.device, config.ops.backend, config.model.implementation)
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
            _run(config, world, open_data, trainer_cls)
        agreed = True
    except Preempted:
        agreed = True
        raise
    finally:
        # After any other failure the peers may be in a collective that waits for this rank; leaving
        # the group waits for that.
        if agreed:
            world.close()


def _run(config: RunConfig, world: World, open_data: Callable, trainer_cls: type[Trainer]) -> None:
    directory = run_or_raise(lambda: RunDirectory(directory_of(config), rank=world.world_rank))
    stop = StopRequest()
    trainer, replica, code = None, None, 0
    try:
        # Before anything looks into the directory: an empty one is filled from there.
        replica = run_or_raise(lambda: _open_replica(config, directory))
        if config.resume == "restart":
            gather_or_raise(directory.restart)
        trainer = trainer_cls(config, world, directory, open_data, stop)
        trainer.replica = replica
        trainer.run()
        gather_or_raise(lambda: _finish(replica, directory, config.trainer.stall_timeout))
    except BaseException as caught:
        error = _explained(caught)
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 70)
        state = "preempted" if isinstance(error, Preempted) else "failed"
        reason = first_line(error)
        # The storage may be what failed; its first error is the one to report.
        with contextlib.suppress(StorageError):
            # A launch that did not come to train tells the step that the next one begins after.
            with contextlib.suppress(StorageError):
                saved = committed_steps(directory.checkpoints)
                directory.checkpoint = max(saved, default=directory.checkpoint)
            step = (trainer.settled_step if trainer else 0) or directory.checkpoint or 0
            directory.set_status(state, step, code, reason)
        if state == "preempted":
            try:
                _finish(replica, directory, PREEMPTION_S)
            except PdnError as behind:
                log.warning("%s", behind)
        if error is not caught:
            raise error from caught
        raise
    finally:
        if trainer is None and code in (DataError.exit_code, ConfigError.exit_code):
            directory.remove_unbegun()
        if trainer is not None:
            trainer.close(code)
        stop.restore()
        if replica is not None:
            replica.close()
        # A thread that still writes a checkpoint, after a failure, keeps the lock until the process
        # ends.
        if trainer is None or not trainer.checkpointer.writing:
            directory.close()


def _explained(error: BaseException) -> BaseException:
    """Return the error to report: of an exchange that broke, one that names the rank that is gone.

    Torch's traceback then goes into the log. Any other error is told to the peers, whose exchanges
    with this rank will break.
    """
    if is_broken_exchange(error):
        for line in "".join(traceback.format_exception(error)).splitlines():
            note(line)
        found = explain(error)
        note(str(found))
        return found
    if not isinstance(error, PdnError):  # those all ranks have alike
        lines = str(error).splitlines() or [""]
        tell_peers(f"{type(error).__name__}: {lines[0][:300]}")
    return error


def _open_replica(config: RunConfig, directory: RunDirectory) -> RunReplica | None:
    """Return the replica of the run on its main rank, with the local directory filled from it."""
    if config.replica is None or directory.rank != 0:
        return None
    return RunReplica(
        f"{config.replica.rstrip('/')}/{name_of(config)}",
        directory.path,
        resume=config.resume,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    )


def _finish(replica: RunReplica | None, directory: RunDirectory, timeout_s: float) -> None:
    """Bring the replica, where this rank has one, to the newest checkpoint of the directory."""
    steps = committed_steps(directory.checkpoints) if replica is not None else []
    if replica is not None and steps:
        replica.finish(steps[-1], timeout_s)
