"""Which checkpoints of a run stay, and how the others go."""

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from pdn.checkpoint.format import committed_steps, step_directory
from pdn.runs import faults
from pdn.store.local import remove_tree

log = logging.getLogger(__name__)


def retained(steps: Iterable[int], keep_last: int, keep_every: int | None) -> set[int]:
    """Return which of the steps stay: the last ones, and every multiple of ``keep_every``."""
    steps = sorted(steps)
    kept = set(steps[-keep_last:])
    if keep_every is not None:
        kept |= {step for step in steps if step % keep_every == 0}
    return kept


class Retention:
    """Removes from a directory of checkpoints what is kept no longer.

    A checkpoint that is a link was moved elsewhere by its owner: it is not counted, and never
    deleted.

    Args:
        directory: the ``checkpoints`` directory of the run.
        keep_last: how many of the newest survive, at least 1.
        keep_every: also keep those whose step is a multiple of this; None keeps no others.
    """

    def __init__(self, directory: Path, keep_last: int, keep_every: int | None):
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: expected at least 1")
        if keep_every is not None and keep_every < 1:
            raise ValueError(
                f"keep_every={keep_every}: expected at least 1, or null to keep none besides the "
                "last ones"
            )
        self._directory, self._keep = directory, (keep_last, keep_every)
        self._told: set[int] = set()  # linked checkpoints that were mentioned

    def prune(self, step: int) -> None:
        """Remove what is not kept, and everything later than ``step``, the newest of the run.

        What is later was left by a future that was abandoned.
        """
        steps = committed_steps(self._directory)
        linked = {found for found in steps if step_directory(self._directory, found).is_symlink()}
        past = [found for found in steps if found <= step and found not in linked]
        keep = {found for found in linked if found <= step}
        for found in sorted(keep - self._told):
            log.warning(
                "step-%d: is a link to %s: it stays, whatever checkpoint.keep_last says",
                found,
                step_directory(self._directory, found).resolve(),
            )
        self._told |= keep
        keep |= retained(past, *self._keep)
        for found in steps:
            if found not in keep:
                if found > step:
                    log.warning(
                        "removing step-%d: the run was resumed before it and has now saved step-%d",
                        found,
                        step,
                    )
                target = step_directory(self._directory, found)
                retired = retire(target)
                faults.strike("prune", step)
                discard(retired, target)


def retire(target: Path) -> Path:
    """Take its name from a checkpoint that is to be removed, and return the name that it has now.

    A kill must leave no half of one under a valid name.
    """
    retired = target.with_name(f"{target.name}.old.tmp")
    with contextlib.suppress(OSError):
        remove_tree(retired)  # of a link the link only
    os.rename(target, retired)
    return retired


def discard(retired: Path, target: Path) -> None:
    """Delete a checkpoint that was retired; a link only gets a name that counts no more.

    Args:
        retired: as ``retire`` returned it.
        target: the name that it had.
    """
    if not retired.is_symlink():
        remove_tree(retired)
        return
    kept, number = target.with_name(f"{target.name}.superseded"), 1
    while os.path.lexists(kept):
        number += 1
        kept = target.with_name(f"{target.name}.superseded-{number}")
    os.rename(retired, kept)
    log.warning(
        "%s: was a link to %s, which stays; the link is now %s",
        target.name,
        kept.resolve(),
        kept.name,
    )
