"""Checkpoints that survive: written aside, hashed, synced, renamed, verified before use.

The format is in ``pdn.checkpoint.format``. Tensors are stored by parameter name and global shape,
so that a checkpoint loads under any world size and under none, DDP, FSDP2 or HSDP alike.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from pdn.checkpoint import format as files
from pdn.checkpoint import retention, shards, state
from pdn.checkpoint.find import VerifiedCheckpoint, find
from pdn.checkpoint.format import step_directory
from pdn.checkpoint.memory import HostMemory
from pdn.checkpoint.snapshot import Snapshot
from pdn.distributed.collectives import any_rank, gather_or_raise, is_distributed
from pdn.distributed.fsdp import local_part
from pdn.distributed.peers import is_broken_exchange
from pdn.errors import NumericError, StorageError
from pdn.optim.container import OptimizerContainer
from pdn.runs import faults
from pdn.store.local import (
    format_bytes,
    remove_tree,
    require_free_space,
    storage_error,
    storage_errors,
    sync_directory,
)

log = logging.getLogger(__name__)

_SPARE_BYTES = 4 << 20  # manifest, index, generator states and file system overhead


def _new_group() -> dist.ProcessGroup | None:
    """Make a gloo group of all ranks; None without a process group. Collective."""
    if not is_distributed():
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group


class Checkpointer:
    """Saves and restores a model with its optimizer, counters and random states.

    Construct it on every rank at the same time (it makes process groups of its own, since
    collectives of a writing thread must not interleave with training's). Rank 0 removes drafts that
    a killed run left behind.

    Args:
        directory: the ``checkpoints`` of the run, whose lock this process's run must hold.
        keep_last: how many of the newest checkpoints survive pruning, at least 1.
        keep_every: also keep those whose step is a multiple of this; None keeps no others.
        asynchronous: copy and write in a thread while training goes on, or before ``save`` returns.

    Attributes:
        last_stall_s: seconds that the ``save`` of the last committed checkpoint held up its caller,
            and the update after it.
        last_write_s: seconds that its writing took.
    """

    def __init__(
        self, directory: Path, *, keep_last: int, keep_every: int | None, asynchronous: bool
    ):
        self.directory, self.asynchronous = Path(directory), asynchronous
        self._retention = retention.Retention(self.directory, keep_last, keep_every)
        self.rank, self.world_size = (
            (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        )
        self._group, self._writer_group = _new_group(), _new_group()
        self._threads = shards.default_threads()
        self._memory = HostMemory()
        self._pending: _Write | None = None
        self.last_stall_s = self.last_write_s = 0.0
        # In the names of drafts: a rank of an earlier launch that outlived its rank 0 must not
        # write into ours.
        [self._launch, *_] = gather_or_raise(self._prepare_directory, self._group)

    def _prepare_directory(self) -> str | None:
        """Clear away what a killed launch left behind; return a name for this one."""
        if self.rank != 0:
            return None
        with storage_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for entry in list(self.directory.iterdir()):
                if match := files.LEFTOVER_NAME.fullmatch(entry.name):
                    target = self.directory / match[1]
                    # Killed between the two renames of a replacement, or just before the one of a
                    # new checkpoint.
                    if (
                        match[2] != ".old"
                        and files.lacks_only_its_name(entry)
                        and not os.path.lexists(target)
                    ):
                        os.rename(entry, target)
                    elif entry.is_symlink():
                        log.warning("%s: a link, left as it is; no draft is a link", entry)
                    else:
                        remove_tree(entry)
        return os.urandom(4).hex()

    def preflight(self, model: nn.Module, optimizer_bytes: int) -> None:
        """Raise ``StorageError`` if no checkpoint would fit on the disk. Collective.

        Args:
            model: whose tensors count.
            optimizer_bytes: of the optimizer's state, which need not exist yet.
        """
        needed = _bytes(state.model_tensors(model).values()) + optimizer_bytes + _SPARE_BYTES
        gather_or_raise(lambda: self._require_space(needed, "a checkpoint"), self._group)

    def reserve(self, model: nn.Module, optimizer_sizes: list[int]) -> None:
        """Make the memory that asynchronous saves copy into, so that the first one need not.

        Args:
            model: as trained.
            optimizer_sizes: bytes of each tensor that the optimiser keeps on this rank, also of
                those that its first step will create.
        """
        if self.asynchronous:
            local = [local_part(tensor) for tensor in state.model_tensors(model).values()]
            sizes = [tensor.numel() * tensor.element_size() for tensor in local]
            self._memory.reserve(sizes + optimizer_sizes)

    def before_change(self) -> None:
        """Return when weights, optimiser state and what was saved with them may be changed.

        A save may still be copying them. An ``OptimizerContainer`` calls this by itself from its
        first save on; whatever else changes them calls it before. Not collective.
        """
        if self._pending is not None and self._pending.copy is not None:
            self._pending.copy.release()

    # ---------------------------------------------------------------- save

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: state.Optimizers,
        side: dict,
        more: dict[str, Tensor] | None = None,
    ) -> list[int]:
        """Save a checkpoint of ``step``. Collective. An unfinished earlier save is finished first.

        Args:
            step: optimizer steps completed.
            model, optimizer: as trained, wrapped or not. They are copied before this returns, or,
                of an ``OptimizerContainer`` and asynchronously, before its next step.
            side: JSON content to keep beside the tensors; floats survive exactly, NaN and infinity
                are refused.
            more: further tensors, sharded or not, by names that begin with ``carried.``; ``read``
                restores them.

        Returns:
            Steps that were committed during this call: see ``poll``.

        Raises:
            StorageError: too little free space (checked before anything is written), or writing
                failed; of this save, if it is not asynchronous, or of the one before.
            NumericError: a tensor is not finite, likewise; nothing is kept.
        """
        started = time.perf_counter()
        committed = self.wait()
        # In order of name, so that equal states make equal files, whatever order an optimizer
        # created its state in.
        tensors = state.model_tensors(model) | state.optimizer_tensors(model, optimizer)
        tensors = dict(sorted((tensors | (more or {})).items()))
        side_json = json.dumps(
            {"side": side, "hyperparameters": state.named_hyperparameters(model, optimizer)},
            allow_nan=False,
        )
        local = {name: local_part(tensor.detach()) for name, tensor in tensors.items()}
        write = _Write(step, tensors, side_json.encode(), state.generator_states())
        if self.asynchronous:
            write.copy = Snapshot(local, self._memory, self._threads)
            self._pending = write
            # A daemon, since its peers may be dead: then its collectives never return, and must not
            # hold up the exit.
            threading.Thread(
                target=self._run, args=(write,), name=f"checkpoint-{step}", daemon=True
            ).start()
            write.stall_s = time.perf_counter() - started
            if isinstance(optimizer, OptimizerContainer):
                optimizer.call_before_change(self.before_change)
            else:
                self.before_change()
        else:
            self._pending = write
            write.values = {name: tensor.cpu() for name, tensor in local.items()}
            self._run(write)
            write.stall_s = time.perf_counter() - started
            committed += self.wait()
        return committed

    def poll(self) -> list[int]:
        """Call at every step boundary, on every rank. Collective only while a save is under way.

        Returns:
            The step whose checkpoint has become durable on all ranks since the last call, as a list
            of at most one.

        Raises:
            StorageError, NumericError: the save failed on some rank; every rank raises the same,
                and the draft is removed.
        """
        if self._pending is None or any_rank(not self._pending.done.is_set(), self._group):
            return []
        write, self._pending = self._pending, None
        if write.error is not None:
            raise write.error
        waited = write.copy.waited_s if write.copy is not None else 0.0
        self.last_stall_s, self.last_write_s = write.stall_s + waited, write.seconds
        return [write.step]

    def wait(self) -> list[int]:
        """Finish the save under way, if any; returns and raises as ``poll``. Collective."""
        if self._pending is None:
            return []
        self._pending.done.wait()
        return self.poll()

    @property
    def busy(self) -> bool:
        """Return whether a save has not been published by ``poll`` yet; the same on every rank."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """Return whether a thread of this process may still change the directory."""
        return self._pending is not None and not self._pending.done.is_set()

    def close(self, timeout_s: float) -> None:
        """Let a save that is under way end, and drop the copies kept for asynchronous saves.

        Not collective: also after a failure, when peers may be gone, without whom the save cannot
        end; hence the bound of ``timeout_s`` seconds.
        """
        write = self._pending
        if write is not None and not write.done.wait(timeout_s):
            text = "step-%d: not written within %g s, given up; the checkpoint before it stays"
            log.warning(text, write.step, timeout_s)
        elif write is not None and write.error is not None:
            gone = is_broken_exchange(write.error)
            reason = "another rank is gone" if gone else write.error
            log.warning("step-%d: not saved: %s", write.step, reason)
        self._memory.clear()

    def _require_space(self, needed: int, purpose: str) -> None:
        if self.rank == 0:
            require_free_space(self.directory, needed, purpose)

    def _run(self, write: "_Write") -> None:
        started = time.perf_counter()
        try:
            self._write(write)
        except BaseException as error:  # raised by poll or wait, in the caller's thread
            write.error = error
        write.seconds = time.perf_counter() - started
        # Frees the tensors' owner: a model may be dropped while its checkpoint is still referenced
        # here.
        write.tensors = write.values = {}
        write.done.set()

    def _write(self, write: "_Write") -> None:
        target = step_directory(self.directory, write.step)
        draft = target.with_name(f"{target.name}.{self._launch}.tmp")
        try:
            gather_or_raise(lambda: self._open_draft(write, draft), self._writer_group)
            written = self._write_shards(write, draft)
            faults.strike("save", write.step)
            records = gather_or_raise(
                lambda: written | self._finish_rank(write, draft), self._writer_group
            )
            gather_or_raise(
                lambda: self._publish(write, draft, target, records), self._writer_group
            )
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(draft, ignore_errors=True)
            raise

    def _open_draft(self, write: "_Write", draft: Path) -> None:
        if write.copy is not None:
            write.copy.complete()
            write.values = write.copy.values
        # Not in ``save``, which would then wait for its peers.
        needed = _bytes(write.tensors.values()) + _SPARE_BYTES
        self._require_space(needed, f"step-{write.step}")
        name = shards.nonfinite(write.values, self._threads)
        if name is not None:
            raise NumericError(
                "CKPT-NONFINITE",
                f"step-{write.step}: {name} on rank {self.rank} is not finite; nothing is "
                "saved, the last checkpoint stays",
            )
        if self.rank == 0:
            with storage_errors(draft):
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()

    def _write_shards(self, write: "_Write", draft: Path) -> dict[str, dict]:
        """Write this rank's share of the tensors; return size and SHA-256 of each file."""
        writer = shards.ShardWriter(draft, self._threads)
        try:
            dcp.save(  # pyright: ignore[reportPrivateImportUsage]  (documented under this name)
                write.tensors,
                storage_writer=writer,
                planner=shards.SnapshotPlanner(write.values),
                process_group=self._writer_group,
                no_dist=not is_distributed(),
            )
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            if is_broken_exchange(error):  # no fault of the disk
                raise
            raise self._write_failure(write, error) from error
        return writer.records

    def _write_failure(self, write: "_Write", error: BaseException) -> StorageError:
        """Find the errno in what torch wraps in text; on a full disk add needed and free space."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            # CheckpointException: rank → (exception, traceback)
            inner = getattr(cause, "failures", None)
            cause = next(iter(inner.values()))[0] if inner else cause.__cause__ or cause.__context__
        needed = format_bytes(_bytes(write.values.values()))
        detail = f"step-{write.step} on rank {self.rank} needs {needed}"
        if cause is None:
            # The archive writer of torch.save reports a failed write without its errno.
            text = (
                str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            )
            with contextlib.suppress(OSError):
                detail += f", free {format_bytes(shutil.disk_usage(self.directory).free)}"
            return StorageError(
                "CKPT-WRITE",
                f"{self.directory}: {detail}: {text}; free some space and launch again",
            )
        found = storage_error(cause, self.directory)
        return type(found)(found.code, f"{found.args[0]} ({detail})")

    def _finish_rank(self, write: "_Write", draft: Path) -> dict[str, dict]:
        """Write this rank's generator states; return size and SHA-256 of the small files."""
        with storage_errors(draft):
            states = io.BytesIO()
            torch.save(write.generators, states)
            small = {f"rng-{self.rank}.pt": states.getvalue()}
            if self.rank == 0:
                small["side.json"] = write.side_json
            for name, data in small.items():
                files.write_synced(draft / name, data)
            names = [*small, "index.json"] if self.rank == 0 else [*small]
            return {name: files.file_record(draft / name) for name in names}

    def _publish(self, write: "_Write", draft: Path, target: Path, records: list[dict]) -> None:
        if self.rank != 0:
            return
        manifest = files.Manifest(
            step=write.step,
            world_size=self.world_size,
            files={name: record for of_rank in records for name, record in of_rank.items()},
            tensors={
                name: [str(t.dtype).removeprefix("torch."), list(t.shape)]
                for name, t in write.tensors.items()
            },
            torch=torch.__version__,
        )
        with storage_errors(draft):
            files.write_commit(draft, manifest)
            replaced = retention.retire(target) if os.path.lexists(target) else None
            if replaced is not None:
                faults.strike("replace", write.step)
            os.rename(draft, target)
            sync_directory(self.directory)
            if replaced is not None:
                retention.discard(replaced, target)
            self._retention.prune(write.step)

    # ------------------------------------------------------------- restore

    def find(self, which: str = "auto") -> VerifiedCheckpoint | None:
        """Return the newest checkpoint that verifies, or the one asked for. Collective.

        See ``pdn.checkpoint.find.find``.
        """
        return find(self.directory, which, self._group, self.rank, self.world_size)

    def find_in(self, directory: Path, step: int) -> VerifiedCheckpoint:
        """Return a verified checkpoint of another run, which is not touched. Collective.

        Args:
            directory: that run's checkpoints.
            step: of the one that is wanted.

        Raises:
            ConfigError: it is absent or uncommitted.
            StorageError: it is damaged.
        """
        which = f"step:{step}"
        found = find(directory, which, self._group, self.rank, self.world_size, continues=False)
        assert found is not None  # a step that is named is there, or was refused
        return found

    def load(
        self, found: VerifiedCheckpoint, model: nn.Module, optimizer: state.Optimizers
    ) -> None:
        """Load a checkpoint into ``model`` and ``optimizer`` in place. Collective.

        Each rank loads its own part.

        Args:
            found: as ``find`` returned it.
            model: sharded or not.
            optimizer: of that model.

        Raises:
            ConfigError: it is of another model, or has no optimizer state.
        """
        path, manifest = found.path, found.manifest
        found.require_fit(model)
        self.before_change()
        tensors = state.model_tensors(model) | state.allocate_optimizer_state(
            model, optimizer, manifest, path
        )
        shards.read_tensors(tensors, path, manifest, self._group)
        if manifest.world_size == self.world_size:
            gather_or_raise(
                lambda: state.set_generator_states(path / f"rng-{self.rank}.pt"), self._group
            )
        elif self.rank == 0:
            log.warning(
                "step-%d was saved by %d ranks, this run has %d: random states start afresh",
                manifest.step,
                manifest.world_size,
                self.world_size,
            )

    def read(self, found: VerifiedCheckpoint, tensors: dict[str, Tensor]) -> None:
        """Fill tensors that were saved as ``more``, each rank its own part. Collective."""
        self.before_change()
        shards.read_tensors(tensors, found.path, found.manifest, self._group)

    def restore(
        self, model: nn.Module, optimizer: state.Optimizers, which: str = "auto"
    ) -> tuple[int, dict] | None:
        """Do ``find`` and ``load``. Collective.

        Args:
            model: sharded or not.
            optimizer: of that model.
            which: as for ``find``.

        Returns:
            The checkpoint's ``(step, side)``, or None if nothing was ever committed.
        """
        found = self.find(which)
        if found is None:
            return None
        self.load(found, model, optimizer)
        return found.step, found.side


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class _Write:
    """Holds one save on its way to disk.

    ``tensors`` tell shapes and placements only; ``values`` are this rank's parts.
    """

    step: int
    tensors: dict[str, Tensor]
    side_json: bytes
    generators: dict[str, Tensor]
    values: dict[str, Tensor] = field(default_factory=dict)
    copy: Snapshot | None = None  # of an asynchronous save: where the values come from
    error: BaseException | None = None
    seconds: float = 0.0
    stall_s: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)
