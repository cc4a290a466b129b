"""Which checkpoint a launch starts from: the newest that verifies, or the one that it names."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import nn

from pdn.checkpoint import format as files
from pdn.checkpoint import state
from pdn.checkpoint.format import committed_steps, step_directory, verify
from pdn.distributed.collectives import gather_or_raise
from pdn.errors import ConfigError, StorageError
from pdn.wording import counted

log = logging.getLogger(__name__)

_LISTINGS = 4  # of the checkpoints of a run that trains meanwhile


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """Describes a checkpoint whose bytes agree with its manifest; no tensor of it is loaded yet.

    Attributes:
        side: what the trainer kept beside the tensors.
        hyperparameters: of each parameter, by name; in old checkpoints a list of those of each
            optimizer and group. A record, see ``state.named_hyperparameters``.
    """

    path: Path
    manifest: files.Manifest
    side: dict
    hyperparameters: dict | list

    @property
    def step(self) -> int:
        return self.manifest.step

    def require_fit(self, model: nn.Module, *, resuming: bool = True) -> None:
        """Raise ``ConfigError`` if it is not of ``model`` or cannot be resumed.

        The model may be on the meta device.
        """
        state.require_same(state.model_tensors(model), self.manifest, self.path)
        if resuming and self.step > 0 and not self.manifest.has_optimizer:
            raise ConfigError(
                "CKPT-OPTIM",
                f"{self.path}: has no optimizer state, expected some at step {self.step}; to start "
                "from weights: init_from",
            )


def find(
    directory: Path,
    which: str,
    group: dist.ProcessGroup | None,
    rank: int,
    world_size: int,
    *,
    continues: bool = True,
) -> VerifiedCheckpoint | None:
    """Return the checkpoint to resume from, verified by all ranks together. Collective.

    Failures on the way are logged by rank 0.

    Args:
        which: ``"auto"``, or ``"step:N"`` for exactly that one.
        group: for the collectives; None without a process group.
        rank, world_size: of this process.
        continues: the run itself goes on, whose later checkpoints its next save removes.

    Returns:
        None if ``which`` is ``"auto"`` and nothing was ever committed.

    Raises:
        ConfigError: the step asked for is absent or uncommitted.
        StorageError: it is damaged, or (``"auto"``) every checkpoint is.
    """
    [steps, *_] = gather_or_raise(lambda: committed_steps(directory) if rank == 0 else [], group)
    if which == "auto":
        candidates = steps[::-1]
    else:
        candidates = [_pinned_step(which)]
        if candidates[0] not in steps:
            raise _absent(directory, candidates[0], steps, "resume=step:" if continues else "@")
    failures: list[StorageError] = []
    for step in candidates:
        path = step_directory(directory, step)
        try:
            [(manifest, saved), *_] = gather_or_raise(
                lambda path=path: _read(path, rank, world_size), group
            )
        except StorageError as error:
            failures.append(error)
            continue
        if rank == 0:
            later = [found for found in steps if found > step and which != "auto" and continues]
            _warn(step, failures, later)
        return VerifiedCheckpoint(path, manifest, saved["side"], saved["hyperparameters"])
    if failures:
        raise _damaged(directory, which, failures, continues)
    return None


def _warn(step: int, failures: list[StorageError], later: list[int]) -> None:
    for failure in failures:
        log.warning("%s; resuming step-%d. To pin: resume=step:%d", failure, step, step)
    if later:
        log.warning("steps %s lie after step-%d and are removed by the next save", later, step)


def _damaged(
    directory: Path, which: str, failures: list[StorageError], continues: bool
) -> StorageError:
    """Return the error of a search that no checkpoint has passed."""
    if which == "auto":
        fix = (
            f"none of {counted(len(failures), 'checkpoint')} in {directory} verifies. Restore one "
            "of them; or give this launch another name=; or start over with resume=restart, which "
            "moves what is here aside"
        )
    else:
        fix = "resume=auto takes the newest one that verifies" if continues else "name another"
    return StorageError(failures[0].code, f"{failures[0].args[0]}; {fix}")


def _read(path: Path, rank: int, world_size: int) -> tuple[files.Manifest, dict]:
    return verify(path, rank=rank, world_size=world_size), files.read_side(path)


def newest_verified(path: Path) -> VerifiedCheckpoint:
    """Return the checkpoint at ``path``, or the newest one there that verifies.

    ``path`` may also be a directory of checkpoints, or a run.

    Raises:
        ConfigError: there is no checkpoint.
        StorageError: it is damaged, or all of them are.
    """
    for directory in (path / "checkpoints", path) * _LISTINGS:
        failures: list[StorageError] = []
        steps = committed_steps(directory)
        for step in reversed(steps):
            candidate = step_directory(directory, step)
            try:
                manifest, saved = _read(candidate, 0, 1)
            except StorageError as error:
                failures.append(error)
                continue
            for failure in failures:
                log.warning("%s; using step-%d", failure, step)
            return VerifiedCheckpoint(candidate, manifest, saved["side"], saved["hyperparameters"])
        if failures and steps != committed_steps(directory):
            continue  # the run goes on: it saved another one, and pruned these
        if failures:
            found = f"none of {counted(len(failures), 'checkpoint')} in {directory} verifies"
            raise StorageError(failures[0].code, f"{failures[0].args[0]}; {found}")
    manifest, saved = _read(path, 0, 1)
    return VerifiedCheckpoint(path, manifest, saved["side"], saved["hyperparameters"])


def _pinned_step(which: str) -> int:
    match = re.fullmatch(r"step:([0-9]{1,12})", which)
    if match is None:
        raise ConfigError(
            "RESUME",
            f"resume={which!r}: expected auto, never, restart or step:N, e.g. resume=step:300",
        )
    return int(match[1])


def _absent(directory: Path, step: int, steps: list[int], asked: str) -> ConfigError:
    """Return what is wrong with a checkpoint that was asked for.

    Args:
        directory: of the run's checkpoints.
        step: that was asked for.
        steps: that there are.
        asked: what stands before the step where it is written: ``resume=step:``, or ``@`` where a
            branch names another run.
    """
    path = step_directory(directory, step)
    last = steps[-8:]
    if last:
        known = f"expected one of {', '.join(map(str, last))}: {asked}{last[-1]}"
    elif asked == "@":
        known = f"{directory.parent} has none; expected a run with checkpoints: check its path"
    else:
        known = "there is none: resume=auto"
    if path.exists() or any(directory.glob(f"{path.name}.*tmp")):
        return ConfigError(
            "CKPT-UNCOMMITTED", f"{path}: has no COMMITTED marker, its save never finished; {known}"
        )
    alike = (
        sorted(entry.name for entry in directory.glob(f"{path.name}*"))
        if directory.is_dir()
        else []
    )
    if alike:
        return ConfigError(
            "CKPT-ABSENT",
            f"{path}: found {alike[0]}, expected that name exactly; rename it to resume from it",
        )
    return ConfigError("CKPT-ABSENT", f"{path}: no checkpoint of step {step}; {known}")
