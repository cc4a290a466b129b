"""Bringing a run here from its replica in object storage, every byte compared."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from pdn.checkpoint import format as files
from pdn.errors import ConfigError, StorageError
from pdn.store import commits
from pdn.store.commits import Commit, Entry
from pdn.store.local import remove_tree, storage_errors, sync_directory
from pdn.store.s3 import Bucket

FILES = ("config.yaml", "tokenizer.json", "status.json", "wandb-run-id")
LINES = ("ledger.jsonl", "metrics.jsonl", "history.jsonl", "run.log")
MARKS = ("manifest.json", "COMMITTED")  # of a checkpoint; brought last, in this order
DAMAGE = ("S3-MISSING", "S3-SIZE", "S3-HASH")  # other bytes than the commit tells
log = logging.getLogger(__name__)


def fetch(url: str, run: Path, step: int | None = None) -> int:
    """Bring a run from its replica into a new directory, without a lease.

    Args:
        url: ``s3://bucket/prefix/<name>``.
        run: absent or empty.
        step: of the checkpoint; None: the newest one that is whole.

    Returns:
        The step of the checkpoint that was brought.

    Raises:
        ConfigError: the directory is not empty, or there is no such replica or checkpoint.
        StorageError: nothing that it holds verifies, or the store failed.
    """
    bucket = Bucket(url)
    with storage_errors(run):
        if run.exists() and any(run.iterdir()):
            raise ConfigError(
                "REPLICA-OTHER", f"{run}: is not empty; expected a new directory: choose another"
            )
    resume = "auto" if step is None else f"step:{step}"
    while True:
        commit = commits.newest(bucket)
        if commit is None or not commit.trees:
            raise ConfigError(
                "REPLICA-ABSENT",
                f"{bucket.url}: found no checkpoint; expected the replica of one run: "
                "replica=<its replica>/<its name>",
            )
        try:
            with storage_errors(run):
                run.mkdir(parents=True, exist_ok=True)
            restore(bucket, commit, run, resume)
            return max(files.committed_steps(run / "checkpoints"))
        except StorageError:
            # A run that is training may have dropped what this commit names: take the next one.
            remove_tree(run)
            latest = commits.newest(bucket)
            if latest is None or latest.number == commit.number:
                raise


def restore(bucket: Bucket, commit: Commit, run: Path, resume: str = "auto") -> None:
    """Bring a commit into an empty run directory, every byte compared with it.

    The newest checkpoint comes, or the one that ``resume=step:N`` names; where that is damaged, the
    one before, with a warning.

    Raises:
        StorageError: nothing of it verifies, its logs do not, or the store failed.
        ConfigError: the checkpoint asked for is not in it.
    """
    trees = {step_of(name): (name, tree) for name, tree in commit.trees.items()}
    for name, tree in trees.values():
        _require_names(bucket, name, tree)
    for name in (*commit.files, *commit.lines):
        if name not in (*FILES, *LINES):
            raise _foreign(bucket, name)
    for step in _wanted(bucket, sorted(trees, reverse=True), resume):
        try:
            _restore_checkpoint(bucket, *trees[step], run)
            break
        except StorageError as error:
            last = step == min(trees) or resume.startswith("step:")
            if last or error.code not in DAMAGE:
                raise
            log.warning("%s; taking the checkpoint before step %d", error, step)
    with storage_errors(run):
        for name, entry in commit.files.items():
            _restore_file(bucket, [entry], run / name)
        for name, segments in commit.lines.items():
            _restore_file(bucket, segments, run / name)
        sync_directory(run)


def _wanted(bucket: Bucket, steps: list[int], resume: str) -> list[int]:
    match = re.fullmatch(r"step:([0-9]{1,12})", resume)
    if match is None:
        return steps
    if int(match[1]) not in steps:
        raise ConfigError(
            "CKPT-ABSENT",
            f"{bucket.url}: no checkpoint of step {match[1]}; expected one of "
            f"{', '.join(map(str, steps)) or 'none'}",
        )
    return [int(match[1])]


def _restore_checkpoint(bucket: Bucket, name: str, tree: dict[str, Entry], run: Path) -> None:
    target = run / "checkpoints" / name
    draft = target.with_name(f"{name}.{os.urandom(4).hex()}.tmp")
    with storage_errors(draft):
        draft.mkdir(parents=True)
        try:
            for file in (*(file for file in tree if file not in MARKS), *MARKS):
                _restore_file(bucket, [tree[file]], draft / file)
            sync_directory(draft)
            os.rename(draft, target)
            sync_directory(target.parent)
        except BaseException:
            remove_tree(draft)
            raise


def _restore_file(bucket: Bucket, segments: list[Entry], file: Path) -> None:
    draft = file.with_name(f"{file.name}.part")
    draft.unlink(missing_ok=True)
    with open(file.with_name(f"{file.name}.tmp"), "wb") as whole:
        for entry in segments:
            bucket.download(entry["object"], draft, entry["bytes"], entry["sha256"])
            if len(segments) == 1:
                break
            whole.write(draft.read_bytes())
            draft.unlink()
        whole.flush()
        os.fsync(whole.fileno())
    if len(segments) == 1:
        os.replace(draft, whole.name)
    os.replace(whole.name, file)


def _require_names(bucket: Bucket, name: str, tree: dict[str, Entry]) -> None:
    if files.STEP_NAME.fullmatch(name) is None or not set(MARKS) <= tree.keys():
        raise _foreign(bucket, name)
    for file in tree:
        if file not in MARKS and files.FILE_NAME.fullmatch(file) is None:
            raise _foreign(bucket, f"{name}/{file}")


def _foreign(bucket: Bucket, name: str) -> StorageError:
    return StorageError(
        "REPLICA-COMMIT",
        f"{bucket.url}: its commit names {name[:80]!r}; expected files of a run only",
    )


def step_of(name: str) -> int:
    match = files.STEP_NAME.fullmatch(name)
    return int(match[1]) if match else -1
