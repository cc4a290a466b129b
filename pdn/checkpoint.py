"""Checkpoints that survive: written aside, hashed, synced, published by rename, verified before they are believed.

The format is in ``checkpoint_format.py``. Tensors are stored by parameter name and global shape, so that a checkpoint
loads under any world size and under none, DDP, FSDP2 or HSDP alike.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from pdn import checkpoint_format as files
from pdn import checkpoint_state as state
from pdn import faults
from pdn.agreement import agree, is_distributed, together
from pdn.checkpoint_format import committed_steps, step_directory, verify
from pdn.errors import ConfigError, NumericError, PdnError, StorageError
from pdn.run_directory import format_bytes, require_free_space, storage_error, storage_errors, sync_directory

__all__ = ["Checkpointer", "committed_steps", "load_weights", "verify"]

log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", message=r".*assuming the intent is to (save|load) in a single process")

_SPARE_BYTES = 4 << 20  # manifest, index, generator states and file system overhead


class Checkpointer:
    """Saves and restores a model with its optimizer, counters and random states.

    Construct it on every rank at the same time (it makes process groups of its own, since collectives of a writing thread
    must not interleave with training's). Rank 0 removes drafts that a killed run left behind.

    Args:
        directory: the ``checkpoints`` directory of the run; this process's run must hold the run's lock.
        keep_last: how many of the newest checkpoints survive pruning, at least 1.
        keep_every: also keep those whose step is a multiple of this; None keeps no others.
        asynchronous: write from a CPU copy in a thread while training goes on, or before ``save`` returns.

    Attributes:
        last_stall_s: seconds that the ``save`` of the last committed checkpoint held up its caller.
        last_write_s: seconds that its writing took.
    """

    def __init__(self, directory: Path, *, keep_last: int, keep_every: int | None, asynchronous: bool):
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: expected at least 1")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every={keep_every}: expected at least 1, or null to keep none besides the last ones")
        self.directory = Path(directory)
        self.keep_last, self.keep_every, self.asynchronous = keep_last, keep_every, asynchronous
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        self._group = dist.new_group(backend="gloo") if is_distributed() else None
        self._writer_group = dist.new_group(backend="gloo") if is_distributed() else None
        self._buffers: dict[str, Tensor] = {}
        self._pending: _Write | None = None
        self.last_stall_s = self.last_write_s = 0.0
        together(self._prepare_directory, self._group)

    def _prepare_directory(self) -> None:
        if self.rank != 0:
            return
        with storage_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for entry in self.directory.iterdir():
                if files.LEFTOVER_NAME.fullmatch(entry.name):
                    shutil.rmtree(entry)

    # ---------------------------------------------------------------- save

    def save(self, step: int, model: nn.Module, optimizer: state.Optimizers, side: dict) -> list[int]:
        """Save a checkpoint of ``step``. Collective. An unfinished earlier save is finished first.

        Args:
            step: optimizer steps completed.
            model, optimizer: as trained, wrapped or not.
            side: JSON content to keep beside the tensors; floats survive exactly, NaN and infinity are refused.

        Returns:
            Steps that were committed during this call: see ``poll``.

        Raises:
            StorageError: too little free space (checked before anything is written), or writing failed.
            NumericError: a tensor is not finite; nothing is kept.
        """
        started = time.perf_counter()
        committed = self.wait()
        # In order of name, so that equal states make equal files, whatever order an optimizer created its state in.
        tensors = dict(sorted((state.model_tensors(model) | state.optimizer_tensors(model, optimizer)).items()))
        side_json = json.dumps({"side": side, "hyperparameters": state.hyperparameters(optimizer)}, allow_nan=False)
        together(lambda: self._require_space(step, tensors), self._group)
        write = _Write(step, tensors, self._snapshot(tensors), side_json.encode(), state.generator_states())
        self._pending = write
        if self.asynchronous:
            # A daemon, since its peers may be dead: then its collectives never return, and must not hold up the exit.
            threading.Thread(target=self._run, args=(write,), name=f"checkpoint-{step}", daemon=True).start()
            write.stall_s = time.perf_counter() - started
        else:
            self._run(write)
            write.stall_s = time.perf_counter() - started
            committed += self.wait()
        return committed

    def poll(self) -> list[int]:
        """Call at every step boundary, on every rank. Collective only while a save is under way.

        Returns:
            The step whose checkpoint has become durable on all ranks since the last call, as a list of at most one.

        Raises:
            StorageError, NumericError: the save failed on some rank; every rank raises the same, and the draft is removed.
        """
        if self._pending is None or agree(not self._pending.done.is_set(), self._group):
            return []
        write, self._pending = self._pending, None
        if write.error is not None:
            raise write.error
        self.last_stall_s, self.last_write_s = write.stall_s, write.seconds
        return [write.step]

    def wait(self) -> list[int]:
        """Finish the save under way, if there is one; returns and raises as ``poll``. Collective."""
        if self._pending is None:
            return []
        self._pending.done.wait()
        return self.poll()

    def close(self) -> None:
        """Drop the copies kept for asynchronous saves. Not collective: also after a failure, when peers may be gone."""
        self._buffers.clear()

    def _require_space(self, step: int, tensors: dict[str, Tensor]) -> None:
        if self.rank == 0:
            needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + _SPARE_BYTES
            require_free_space(self.directory, needed, f"step-{step}")

    def _snapshot(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of each tensor in CPU memory that training does not touch. The memory is reused by later saves."""
        local = {name: state.local_part(tensor) for name, tensor in tensors.items()}
        if not self.asynchronous:
            return {name: tensor.cpu() for name, tensor in local.items()}
        pin = torch.cuda.is_available()
        for name, tensor in local.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
                self._buffers[name] = buffer
            buffer.copy_(tensor, non_blocking=True)
        if pin:
            torch.cuda.synchronize()
        return {name: self._buffers[name] for name in local}

    def _run(self, write: "_Write") -> None:
        started = time.perf_counter()
        try:
            self._write(write)
        except BaseException as error:  # raised by poll or wait, in the caller's thread
            write.error = error
        write.seconds = time.perf_counter() - started
        # Frees the tensors' owner: a model may be dropped while its checkpoint is still referenced here.
        write.tensors = write.snapshot = {}
        write.done.set()

    def _write(self, write: "_Write") -> None:
        target = step_directory(self.directory, write.step)
        draft = target.with_name(f"{target.name}.tmp")
        try:
            together(lambda: self._open_draft(write, draft), self._writer_group)
            self._write_shards(write, draft)
            faults.strike("save", write.step)
            records = together(lambda: self._finish_rank(write, draft), self._writer_group)
            together(lambda: self._publish(write, draft, target, records), self._writer_group)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(draft, ignore_errors=True)
            raise

    def _open_draft(self, write: "_Write", draft: Path) -> None:
        for name, tensor in write.snapshot.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NumericError(
                    "CKPT-NONFINITE",
                    f"step-{write.step}: {name} on rank {self.rank} is not finite; nothing is saved, the last checkpoint stays",
                )
        if self.rank == 0:
            with storage_errors(draft):
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()

    def _write_shards(self, write: "_Write", draft: Path) -> None:
        try:
            dcp.save(
                write.tensors,
                # No copying ahead: the values are in host memory, and it would open a CUDA context on GPU 0 in this thread.
                storage_writer=files.ShardWriter(draft, per_thread_copy_ahead=0),
                planner=_SnapshotPlanner(write.snapshot),
                process_group=self._writer_group,
                no_dist=not is_distributed(),
            )
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise self._write_failure(write, error) from error

    def _write_failure(self, write: "_Write", error: BaseException) -> StorageError:
        """Torch wraps what happened on the ranks in text; give the errno and, on a full disk, needed and free space."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            inner = getattr(cause, "failures", None)  # CheckpointException: rank → (exception, traceback)
            cause = next(iter(inner.values()))[0] if inner else cause.__cause__ or cause.__context__
        needed = sum(tensor.numel() * tensor.element_size() for tensor in write.snapshot.values())
        detail = f"step-{write.step} on rank {self.rank} needs {format_bytes(needed)}"
        if cause is None:
            # The archive writer of torch.save reports a failed write without its errno.
            text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            with contextlib.suppress(OSError):
                detail += f", free {format_bytes(shutil.disk_usage(self.directory).free)}"
            return StorageError("CKPT-WRITE", f"{self.directory}: {detail}: {text}; free some space and launch again")
        found = storage_error(cause, self.directory)
        return type(found)(found.code, f"{found.args[0]} ({detail})")

    def _finish_rank(self, write: "_Write", draft: Path) -> dict[str, dict]:
        """Write this rank's generator states, and hash what this rank wrote."""
        with storage_errors(draft):
            with open(draft / f"rng-{self.rank}.pt", "wb") as stream:
                torch.save(write.generators, stream)
                stream.flush()
                os.fsync(stream.fileno())
            own = [
                entry
                for entry in draft.iterdir()
                if re.fullmatch(rf"__{self.rank}_[0-9]+\.distcp|rng-{self.rank}\.pt", entry.name)
            ]
            if self.rank == 0:
                files.write_synced(draft / "side.json", write.side_json)
                own += [draft / "side.json", draft / "index.json"]
            return {entry.name: files.file_record(entry) for entry in own}

    def _publish(self, write: "_Write", draft: Path, target: Path, records: list[dict]) -> None:
        if self.rank != 0:
            return
        manifest = files.Manifest(
            step=write.step,
            world_size=self.world_size,
            files={name: record for of_rank in records for name, record in of_rank.items()},
            tensors={name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in write.tensors.items()},
            torch=torch.__version__,
        )
        with storage_errors(draft):
            files.write_commit(draft, manifest)
            if target.exists():
                self._remove(target, write.step)
            os.rename(draft, target)
            sync_directory(self.directory)
            self._prune(write.step)

    def _prune(self, step: int) -> None:
        """Remove what retention does not keep, and everything later than ``step``: it was left by a future that was abandoned."""
        steps = committed_steps(self.directory)
        past = [found for found in steps if found <= step]
        keep = set(past[-self.keep_last :])
        if self.keep_every is not None:
            keep |= {found for found in past if found % self.keep_every == 0}
        for found in steps:
            if found not in keep:
                if found > step:
                    log.warning("removing step-%d: the run was resumed before it and has now saved step-%d", found, step)
                self._remove(step_directory(self.directory, found), step)

    @staticmethod
    def _remove(target: Path, step: int) -> None:
        # Renamed first: a kill in the middle must leave no half of a checkpoint under a valid name.
        doomed = target.with_name(f"{target.name}.old.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(target, doomed)
        faults.strike("prune", step)
        shutil.rmtree(doomed)

    # ------------------------------------------------------------- restore

    def restore(self, model: nn.Module, optimizer: state.Optimizers, which: str = "auto") -> tuple[int, dict] | None:
        """Load the newest checkpoint that verifies, or the one asked for, into ``model`` and ``optimizer`` in place. Collective.

        Args:
            model, optimizer: built and placed as for training; tensors are read straight into each rank's own part.
            which: ``"auto"``, or ``"step:N"`` for exactly that one.

        Returns:
            ``(step, side)``, or None if ``which`` is ``"auto"`` and nothing was ever committed.

        Raises:
            ConfigError: the step asked for is absent or uncommitted, or the checkpoint is of another model.
            StorageError: the step asked for is damaged, or (``"auto"``) every checkpoint is.
        """
        found = self._find(which)
        if found is None:
            return None
        path, manifest = found
        tensors = state.model_tensors(model)
        state.require_same(tensors, manifest, path)
        tensors |= state.allocate_optimizer_state(model, optimizer, manifest, path)
        _read_tensors(tensors, path, manifest, self._group)
        saved = together(lambda: files.read_side(path), self._group)[0]
        state.set_hyperparameters(optimizer, saved["hyperparameters"], path)
        if manifest.world_size == self.world_size:
            together(lambda: state.set_generator_states(path / f"rng-{self.rank}.pt"), self._group)
        elif self.rank == 0:
            log.warning(
                "step-%d was saved by %d ranks, this run has %d: random states start afresh",
                manifest.step,
                manifest.world_size,
                self.world_size,
            )
        return manifest.step, saved["side"]

    def _find(self, which: str) -> tuple[Path, files.Manifest] | None:
        """The checkpoint to resume from, verified by all ranks together; failures on the way are logged by rank 0."""
        [steps, *_] = together(lambda: committed_steps(self.directory) if self.rank == 0 else [], self._group)
        if which == "auto":
            candidates = steps[::-1]
        else:
            candidates = [_pinned_step(which)]
            if candidates[0] not in steps:
                raise _absent(self.directory, candidates[0], steps)
        failures: list[PdnError] = []
        for step in candidates:
            path = step_directory(self.directory, step)
            try:
                manifest = together(lambda path=path: verify(path, rank=self.rank, world_size=self.world_size), self._group)[0]
            except StorageError as error:
                failures.append(error)
                continue
            if self.rank == 0:
                for failure in failures:
                    log.warning("%s; resuming step-%d. To pin: resume=step:%d", failure, step, step)
                later = [found for found in steps if found > step and which != "auto"]
                if later:
                    log.warning("steps %s lie after step-%d and are removed by the next save", later, step)
            return path, manifest
        if failures and which != "auto":
            raise StorageError(failures[0].code, f"{failures[0].args[0]}; resume=auto takes the newest one that verifies")
        if failures:
            raise StorageError(
                failures[0].code,
                f"{failures[0].args[0]}; none of the {len(failures)} checkpoints in {self.directory} verifies. "
                "To start afresh: resume=never in a new run directory",
            )
        return None


@dataclass
class _Write:
    """One save on its way to disk. ``tensors`` tell shapes and placements only; ``snapshot`` holds the values."""

    step: int
    tensors: dict[str, Tensor]
    snapshot: dict[str, Tensor]
    side_json: bytes
    generators: dict[str, Tensor]
    error: BaseException | None = None
    seconds: float = 0.0
    stall_s: float = 0.0

    def __post_init__(self):
        self.done = threading.Event()


class _SnapshotPlanner(DefaultSavePlanner):
    """Plans from the live tensors' shapes and placements, writes the values of the snapshot."""

    def __init__(self, snapshot: dict[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._values = snapshot

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._values[index.fqn]


def _read_tensors(tensors: dict[str, Tensor], path: Path, manifest: files.Manifest, group: dist.ProcessGroup | None) -> None:
    """Fill ``tensors`` in place, each rank its own part; in one process if ``group`` is None."""
    try:
        dcp.load(
            tensors,
            storage_reader=files.ShardReader(path, manifest),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )
    except PdnError:
        raise
    except (Exception, CheckpointException) as error:
        # Verified bytes that torch still refuses: a forged checkpoint, or one of an incompatible torch.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise StorageError("CKPT-READ", f"{path}: {reason}; resume from another step: resume=step:N") from error


def load_weights(path: Path, model: nn.Module) -> tuple[int, dict]:
    """Load a checkpoint's weights into a model in one process, whatever the number of ranks that saved it.

    For evaluation, generation, export and ``init_from``; the optimizer is not read.

    Args:
        path: one checkpoint (``…/step-00000100``), a ``checkpoints`` directory or a run directory (its newest verified one).
        model: not sharded.

    Returns:
        ``(step, side)`` of the checkpoint.

    Raises:
        ConfigError: no such checkpoint, or one of another model.
        StorageError: it is damaged.
    """
    path, manifest = _newest_verified(Path(path))
    tensors = state.model_tensors(model)
    state.require_same(tensors, manifest, path)
    _read_tensors(tensors, path, manifest, None)
    return manifest.step, files.read_side(path)["side"]


def _newest_verified(path: Path) -> tuple[Path, files.Manifest]:
    """The checkpoint at ``path``, or the newest one that verifies of the directory of checkpoints or of the run at ``path``."""
    for directory in (path / "checkpoints", path):
        failures: list[StorageError] = []
        for step in reversed(committed_steps(directory)):
            candidate = step_directory(directory, step)
            try:
                manifest = verify(candidate)
            except StorageError as error:
                failures.append(error)
                continue
            for failure in failures:
                log.warning("%s; using step-%d", failure, step)
            return candidate, manifest
        if failures:
            found = f"none of the {len(failures)} checkpoints in {directory} verifies"
            raise StorageError(failures[0].code, f"{failures[0].args[0]}; {found}")
    return path, verify(path)


# ------------------------------------------------------------------ which checkpoint


def _pinned_step(which: str) -> int:
    match = re.fullmatch(r"step:([0-9]{1,12})", which)
    if match is None:
        raise ConfigError("RESUME", f"resume={which!r}: expected auto, never or step:N, e.g. resume=step:300")
    return int(match[1])


def _absent(directory: Path, step: int, steps: list[int]) -> ConfigError:
    path = step_directory(directory, step)
    nearest = f"; there are {', '.join(map(str, steps[-8:]))}" if steps else "; there is none"
    if path.exists() or path.with_name(f"{path.name}.tmp").exists():
        return ConfigError("CKPT-UNCOMMITTED", f"{path}: has no COMMITTED marker, its save never finished{nearest}")
    return ConfigError("CKPT-ABSENT", f"{path}: no checkpoint of step {step}{nearest}")
