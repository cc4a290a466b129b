"""A run that goes on from a checkpoint of another one: which it is, and what may differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdn.checkpoint.find import VerifiedCheckpoint
from pdn.checkpoint.format import read_side, step_directory
from pdn.checkpoint.manager import Checkpointer
from pdn.data.history import begun
from pdn.data.phases import history_of, part_of
from pdn.distributed.collectives import gather_or_raise
from pdn.errors import ConfigError, StorageError
from pdn.runs.schema import config_changes, read_config
from pdn.training.config import RunConfig
from pdn.training.names import directory_of
from pdn.training.phases import Course

# What makes a source the one that it is, beside what its files hold
_SOURCE = ("kind", "path", "dataset", "dataset_config", "split", "text_field", "max_bytes")
_SOURCE += ("tokenizer", "vocab_size", "eos_token", "validation", "validation_fraction")
_SOURCE += ("validation_split", "validation_documents", "shard_tokens")
_KEPT = ("order_version", "vocab_size", "eos_id", "tokenizer")


@dataclass(frozen=True)
class Parent:
    """Names the checkpoint that a branch goes on from.

    Attributes:
        run: the directory of the parent.
        step: of its checkpoint.
    """

    run: Path
    step: int

    @property
    def checkpoint(self) -> Path:
        return step_directory(self.run / "checkpoints", self.step)


def parent_of(config: RunConfig) -> Parent | None:
    """Return what ``branch_from`` names; None for a run of its own.

    Raises:
        ConfigError: it is the run itself.
    """
    if config.branch_from is None:
        return None
    run, _, step = config.branch_from.rpartition("@")
    parent = Parent(Path(run).expanduser(), int(step))
    if parent.run.resolve() == directory_of(config).resolve():
        raise ConfigError(
            "BRANCH",
            f"branch_from = {config.branch_from} is this run itself; expected another one: give "
            f"the branch its own name=, or go back in this run with resume=step:{parent.step}",
        )
    return parent


def find_parent(config: RunConfig, data, checkpointer: Checkpointer) -> VerifiedCheckpoint | None:
    """Return the verified checkpoint that a new branch starts from; None if it is no branch.

    Args:
        config: of the branch.
        data: of the branch, opened.
        checkpointer: of the branch, for its group of ranks.

    Raises:
        ConfigError: no such checkpoint, or the branch differs in what it may not.
        StorageError: it is damaged.
    """
    parent = parent_of(config)
    if parent is None:
        return None
    found = checkpointer.find_in(parent.run / "checkpoints", parent.step)
    gather_or_raise(lambda: require_branch(found, parent, config, data))
    return found


def require_branch(found: VerifiedCheckpoint, parent: Parent, config: RunConfig, data) -> None:
    """Raise ``ConfigError`` if a run cannot be a branch of a checkpoint."""
    theirs, ours, where = found.side["fingerprint"], data.fingerprint, config.branch_from
    if found.step >= config.trainer.steps:
        raise ConfigError(
            "BRANCH",
            f"branch_from = {where}: begins after step {found.step}, trainer.steps = "
            f"{config.trainer.steps}; expected more: they are counted from the start of the path",
        )
    if theirs.get("seed") != ours.get("seed"):
        raise ConfigError(
            "BRANCH-SEED",
            f"branch_from = {where}: its samples have the order of seed {theirs.get('seed')}, "
            f"found {ours.get('seed')}; expected the same, since in another order the rest of the "
            f"epoch would repeat tokens: data.seed={theirs.get('seed')}",
        )
    for key in _KEPT:
        if theirs.get(key) != ours.get(key):
            raise ConfigError(
                "BRANCH-DATA",
                f"branch_from = {where}: {key} was {theirs.get(key)!r}, found {ours.get(key)!r}; "
                "expected the parent's: prepare the data with its tokenizer.json, or start a new "
                "run with init_from",
            )
    recorded = read_config(parent.run) or {}
    kind = recorded.get("optim", {}).get("kind", config.optim.kind)
    if kind != config.optim.kind:
        raise ConfigError(
            "BRANCH-OPTIM",
            f"branch_from = {where}: the optimiser was {kind}, found {config.optim.kind}; expected "
            "the same, whose state a branch inherits; or start a new run with init_from",
        )
    for name in _same_sources(recorded, config):
        then, now = part_of(theirs, name), part_of(ours, name)
        changed = [f"{name}.{k}" for k in then if k != "share" and now.get(k) != then[k]]
        if changed:
            raise ConfigError(
                "BRANCH-DATA",
                f"branch_from = {where}: {', '.join(changed)} of the same source are not what the "
                "parent was trained on; expected its text: restore it. Where the split into "
                "training and validation follows from the length, keep data.seq_len="
                f"{theirs.get('seq_len')} and give the new one as phases=[{{seq_len: "
                f"{config.data.seq_len}}}]",
            )


def history_in(found: VerifiedCheckpoint, run: Path) -> list[dict]:
    """Return the history of the run that a checkpoint is of, also of one that is older than these.

    Args:
        run: its directory.
    """
    if "history" in found.side:
        return found.side["history"]
    recorded = read_config(run)
    if recorded is None:
        raise ConfigError(
            "RUN-CONFIG-GONE",
            f"{run / 'config.yaml'}: is not there, and {found.path.name} is too old to tell its "
            "batch; restore the file",
        )
    return history_of(found.side["fingerprint"], recorded["trainer"]["global_batch_size"])


def own_history(config: RunConfig, side: dict) -> list[dict]:
    """Return the history in a checkpoint of the run itself.

    Args:
        side: what the trainer kept in it.
    """
    batch = config.trainer.global_batch_size
    return side.get("history") or history_of(side["fingerprint"], batch)


def set_course(
    config: RunConfig, data, found: VerifiedCheckpoint | None, parent: VerifiedCheckpoint | None
) -> Course:
    """Return the course of a run, and have its data know the history so far. Collective.

    Args:
        config: of the run.
        data: opened.
        found: the checkpoint of the run that it continues from, if any.
        parent: else that of another run, if it is a branch.

    Raises:
        ConfigError: phases that have begun are not those of the configuration.
    """
    named, history = parent_of(config), []
    start = named.step if named is not None else 0
    if found is not None:
        history = own_history(config, found.side)
    elif parent is not None:
        assert named is not None  # by whom it was found
        [history, *_] = gather_or_raise(lambda: history_in(parent, named.run))
    course = Course(config, begun(history, start), start)
    data.recall(history)
    if found is not None:
        gather_or_raise(lambda: course.require_begun(history, found.step, data))
    return course


def inherited_fingerprint(config: RunConfig) -> dict[str, object] | None:
    """Return what a new branch shares of its parent's data, for opening them by the same rules.

    None if the run is no branch, or nothing is known yet.
    """
    parent = parent_of(config)
    if parent is None:
        return None
    try:
        recorded = read_config(parent.run) or {}
        theirs = read_side(parent.checkpoint)["side"]["fingerprint"]
    except (OSError, StorageError, ValueError, LookupError, TypeError):
        return None  # the parent is looked at again, and refused, before anything is trained
    return {
        f"{name}.{part}": value
        for name in _same_sources(recorded, config)
        for part, value in part_of(theirs, name).items()
    }


def changes_of(found: VerifiedCheckpoint, config: RunConfig) -> dict[str, list]:
    """Return what a branch changes of what defines its parent: ``{key: [then, now]}``."""
    before = dict(found.side.get("run", {}).get("identity", {}))
    after = config.identity()
    for identity in (before, after):
        identity.pop("branch_from", None)
    inherited = [f"data.{key}" for key in ("unit_tokens", "pool_units")]
    unset = [key for key in inherited if getattr(config.data, key[5:], None) is None]
    changes = config_changes(before, after, unset) if before else []
    return {key: [then, now] for key, then, now in changes}


def _same_sources(recorded: dict, config: RunConfig) -> list[str]:
    """Return the names of the sources that parent and branch both read."""
    theirs = _sources(recorded.get("data", {}))
    ours = _sources(config.data.model_dump(mode="json"))
    return [
        name
        for name in ours.keys() & theirs.keys()
        if all(ours[name].get(key) == theirs[name].get(key) for key in _SOURCE)
    ]


def _sources(data: dict) -> dict[str, dict]:
    return data["sources"] if data.get("kind") == "mixture" else {"data": data}
