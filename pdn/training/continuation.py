"""What a checkpoint says about the run it is of, and whether a launch may continue from it."""

from __future__ import annotations

from pdn.checkpoint.find import VerifiedCheckpoint
from pdn.errors import ConfigError, NumericError
from pdn.runs.directory import RunDirectory
from pdn.runs.schema import VERSION, changes_refused, config_changes
from pdn.training.config import RunConfig
from pdn.training.hook import TrainerView


def side_of(trainer: TrainerView) -> dict:
    """Return what a checkpoint keeps beside the tensors, of a step whose numbers were read."""
    return {
        "next_sample": trainer.next_sample,
        "ledger_hash": trainer.ledger_hash,
        "fingerprint": trainer.data.fingerprint,
        "history": list(trainer.data.history),
        "run": _run_record(trainer.config, trainer.directory, trainer.lengths),
        "nonfinite": trainer.nonfinite,
        "recent_losses": trainer.spikes.state(),
    }


def _run_record(config: RunConfig, directory: RunDirectory, lengths: list[list[int]]) -> dict:
    """Return what a checkpoint keeps about its run: what defines it, its length, and its ledger.

    Args:
        lengths: as ``lengths_of`` gives them.
    """
    return {
        "schema": VERSION,
        "identity": config.identity(),
        "steps": config.trainer.steps,
        "lengths": lengths,
        "ledger": directory.ledger_digest(),
    }


def lengths_of(side: dict, step: int, steps: int) -> list[list[int]]:
    """Return how long the run was to be, and from which step on: ``[[0, 1000], [800, 2000]]``.

    Args:
        side: of the checkpoint that a launch continues from.
        step: of that checkpoint.
        steps: ``trainer.steps`` of the launch.
    """
    saved = side.get("run", {})
    known = saved.get("lengths") or [[0, saved.get("steps", steps)]]
    return known if known[-1][1] == steps else [*known, [step, steps]]


def require_same_run(
    found: VerifiedCheckpoint, config: RunConfig, fingerprint: dict, directory: RunDirectory
) -> None:
    """Raise unless this launch continues the run that a checkpoint is of.

    Args:
        fingerprint: of the data of this launch.

    Raises:
        ConfigError: the data, what defines the run, or the end of a schedule that has begun to
            decay differ. Exit code 78.
        StorageError: the ledger is another one. Exit code 74.
    """
    _require_same_data(found.side["fingerprint"], fingerprint, directory)
    saved = found.side.get("run")
    if saved is not None:
        # of phases those that have begun are compared, with the history
        changes = config_changes(saved["identity"], config.identity(), ("phases",))
        if changes:
            raise changes_refused(f"{found.path}: saved with", changes)
    elif directory.rank == 0 and directory.recorded is None:
        raise ConfigError(
            "RUN-CONFIG-GONE",
            f"{directory.path / 'config.yaml'}: is not there, and {found.path.name} is too old to "
            "tell what defines its run; expected one of them: restore the file",
        )
    _require_steps(found, config, saved, directory)
    digest = None if saved is None else saved["ledger"]
    directory.check_ledger(found.step, digest, found.side["ledger_hash"])


def require_finite_end(step: int, nonfinite: int) -> None:
    """Raise ``NumericError`` if the last steps of a launch had no finite loss or gradient.

    Args:
        nonfinite: how many of them; their updates were skipped, and three would have ended the run.
    """
    if nonfinite:
        raise NumericError(
            "NONFINITE-END",
            f"step {step}: the last {nonfinite} step(s) had a loss or gradient that is not finite; "
            "their updates were skipped, and the weights are those from before. Expected finite "
            "values to the end: resume before them, resume=step:<number>, with other data or a "
            "lower optim.lr under another name",
        )


def _require_same_data(recorded: dict, now: dict, directory: RunDirectory) -> None:
    # A key that the checkpoint does not have is younger than it.
    changed = {key: (old, now.get(key)) for key, old in recorded.items() if now.get(key) != old}
    if changed:
        parts = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
        raise ConfigError(
            "DATA-CHANGED",
            f"{directory.path}: the data is not what this run was trained on: {parts}. "
            "Restore it, or start a run of another name with init_from=",
        )


def _require_steps(
    found: VerifiedCheckpoint, config: RunConfig, saved: dict | None, directory: RunDirectory
) -> None:
    """Let a run become longer or shorter as long as no learning rate that it used changes."""
    recorded = (directory.recorded or {}).get("trainer", {})
    old = saved["steps"] if saved is not None else recorded.get("steps", config.trainer.steps)
    new, decay = config.trainer.steps, config.schedule.decay_steps
    if old == new:
        return
    begins = min(old, new) - decay
    if config.schedule.kind == "wsd" and found.step > begins:
        raise ConfigError(
            "RUN-STEPS",
            f"trainer.steps: {old} so far, now {new}: {found.path.name} is in the decay that "
            f"begins after step {begins}; expected a checkpoint from before it: "
            "resume=step:<number>, or undo the change",
        )
    directory.note_change("trainer.steps", old, new)
