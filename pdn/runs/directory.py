"""One run, one directory, one writer: its lock, configuration, status, metrics and ledger.

Layout: ``config.yaml``, ``tokenizer.json``, ``status.json``, ``metrics.jsonl``, ``ledger.jsonl``,
``telemetry.jsonl``, ``validation.json``, ``history.jsonl`` (a line for every launch), ``run.log``,
``run.lock``, ``checkpoints/``.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from pdn.errors import LockedError, StorageError
from pdn.runs import output
from pdn.runs.launches import describe_launch
from pdn.runs.ledger import check_ledger
from pdn.runs.leftovers import committed_before, holds_progress, move_aside
from pdn.runs.records import JsonLines
from pdn.runs.schema import changes_refused, config_changes, read_config, stamped
from pdn.store.local import (
    open_to_write,
    read_regular,
    require_free_space,
    storage_errors,
    write_durably,
)

WANDB_RUN_ID = "wandb-run-id"
RELAUNCHES = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")  # above 0: not the first start
STATES = ("running", "stopped", "finished", "preempted", "failed")  # stopped: at trainer.stop_at
TOKENIZER = "tokenizer.json"
TELEMETRY = "telemetry.jsonl"
STATUS_SECONDS = 2.0  # between two looks of status.json at the step
MIN_FREE_BYTES = 16 << 20  # below this not even the logs of a short run fit
log = logging.getLogger(__name__)


class RunDirectory:
    """Keeps the directory of a run.

    Rank 0 creates, locks and writes it; on other ranks every writing method does nothing.

    Args:
        path: the directory; created with its parents by rank 0.
        rank: global rank of this process.

    Attributes:
        checkpoint: step of the newest checkpoint, as ``status.json`` tells it; None without one.

    Raises:
        LockedError: another process holds the directory; names its PID and host. Exit code 73.
        StorageError: the directory cannot be created or written, or its file system is full. Exit
            code 74.
    """

    def __init__(self, path: Path, *, rank: int):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.rank = rank
        self._lock_fd: int | None = None
        self._made = False  # by this launch
        self._launched, self._told, self.checkpoint = time.time(), 0.0, None
        self._output = contextlib.ExitStack()
        self._config: dict | None = None
        self._changes: dict[str, tuple] = {}
        self.recorded: dict | None = None
        if rank != 0:
            return
        with storage_errors(self.path):
            self._create()
            self._lock()
            self._require_writable()
        self._metrics = JsonLines(self.path / "metrics.jsonl")
        self._telemetry = JsonLines(self.path / TELEMETRY)
        self._ledger = JsonLines(self.path / "ledger.jsonl")
        self._history = JsonLines(self.path / "history.jsonl")
        self.checkpoint = (self.status() or {}).get("checkpoint")
        self._output.enter_context(output.guarded_output())

    def _create(self) -> None:
        self._made = not self.path.exists()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # a file system that makes none, such as /proc
            raise StorageError(
                "IO",
                f"{error.filename}: no directory can be made here (ENOENT); expected a file system "
                "for files: choose another output_dir",
            ) from error

    def _lock(self) -> None:
        # lockf and not flock: a flock is inherited by forked loader workers and outlives its owner
        # with them.
        self._lock_fd = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            holder = (
                os.pread(self._lock_fd, 400, 0).decode(errors="replace").strip()
                or "a process not yet named"
            )
            os.close(self._lock_fd)
            self._lock_fd = None
            raise LockedError(
                "RUN-LOCKED",
                f"{self.path}: already in use by {holder}; stop that run first, or give this one "
                "another name",
            ) from None
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"PID {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _require_writable(self) -> None:
        """Prove, before anything costly is built, that the directory can be written and has space.

        Raises:
            OSError: it cannot be written.
            StorageError: too little space is free.
        """
        probe = self.path / f".probe-{os.getpid()}"
        write_durably(probe, b"probe")
        probe.unlink()
        if not os.access(self.checkpoints, os.W_OK | os.X_OK):
            reason = os.strerror(errno.EACCES)
            raise PermissionError(errno.EACCES, reason, str(self.checkpoints))
        require_free_space(self.path, MIN_FREE_BYTES, "the run")

    def has_progress(self) -> bool:
        """Return whether there is something to lose. Any rank may ask.

        That is a step in the ledger, a checkpoint, committed or not, or the trace of one that is
        gone.
        """
        return holds_progress(self.path) or committed_before(self.path) is not None

    def require_nothing_lost(self) -> None:
        """Raise if this run, in which no checkpoint was found, once had one.

        Starting over would wipe its records.

        Raises:
            StorageError: what shows it, and the ways out. Exit code 74.
        """
        if self.rank != 0:
            return
        trace = committed_before(self.path)
        if trace is not None:
            raise StorageError(
                "CKPT-GONE",
                f"{self.checkpoints}: found no committed checkpoint, but {trace}; expected the "
                "checkpoints that this run has saved. Nothing was changed. Restore them; or give "
                "this launch another name=; or start over with resume=restart, which moves what "
                "is here aside and deletes nothing",
            )

    def restart(self) -> None:
        """Move what earlier launches left aside, so that the run starts over (``resume=restart``).

        A launcher that starts the same command again after a failure or a requeue continues
        instead: otherwise such a run would never come further than its first interruption.
        """
        if self.rank != 0 or any(_positive(os.environ.get(name)) for name in RELAUNCHES):
            return
        moved, self.checkpoint = move_aside(self.path), None
        if moved is not None:
            print(
                f"restart  what was in {self.path} is in {moved}; to continue the new run leave "
                "resume=restart out",
                flush=True,
            )

    def take_config(
        self,
        config: dict,
        *,
        may_change: Collection[str] = (),
        completed: Callable[[dict], dict] = dict,
    ) -> None:
        """Compare the configuration of this launch with the recorded one.

        It is kept for ``write_config``, which waits until the checkpoint was found to agree too. A
        later launch may change what defines the run only as long as there is no progress.

        Args:
            config: resolved, plain containers only.
            may_change: dotted keys, or prefixes of them, that do not define the run, e.g.
                ``"trainer.stop_at"``, ``"logger"``.
            completed: adds to what an earlier version recorded the keys that came later.

        Raises:
            ConfigError: keys that define the run differ; old and new values are named. Exit code
                78.
            StorageError: the file cannot be read, or is not YAML.
        """
        if self.rank != 0:
            return
        self._config = config
        file = self.path / "config.yaml"
        with storage_errors(file):
            if os.path.lexists(file):
                self._settle_changes(file, config, may_change, completed)

    def write_config(self) -> None:
        """Write ``config.yaml`` as ``take_config`` was given it."""
        if self.rank != 0 or self._config is None:
            return
        text = yaml.safe_dump(stamped(self._config), sort_keys=False, allow_unicode=True)
        with storage_errors(self.path / "config.yaml"):
            write_durably(self.path / "config.yaml", text.encode())

    def note_change(self, key: str, old: object, new: object) -> None:
        """Have this launch's line in ``history.jsonl`` say that a key changed.

        Args:
            key: dotted.
            old: the value so far.
            new: the value from now on.
        """
        self._changes[key] = (old, new)

    def ledger_digest(self) -> str | None:
        """Return the SHA-256 of the ledger so far, for a checkpoint; None on other ranks."""
        return self._ledger.digest() if self.rank == 0 else None

    def check_ledger(self, step: int, digest: str | None, rolling_hash: str) -> None:
        """Compare the ledger with what a checkpoint says of it; see ``pdn.runs.ledger``.

        Args:
            step: of the checkpoint.
            digest: of the ledger when it was saved; None in old checkpoints.
            rolling_hash: of the samples up to there.

        Raises:
            StorageError: they differ.
        """
        if self.rank == 0 and not check_ledger(self._ledger.file, step, digest, rolling_hash):
            log.warning(
                "%s: is gone; the run goes on, and its ledger begins after step %d",
                self._ledger.file,
                step,
            )

    def keep_tokenizer(self, source: Path | None) -> None:
        """Copy the tokenizer into the run.

        It can then be evaluated and sampled from wherever its data went.
        """
        if self.rank == 0 and source is not None:
            with storage_errors(self.path / TOKENIZER):
                write_durably(self.path / TOKENIZER, Path(source).read_bytes())

    def _settle_changes(
        self,
        file: Path,
        config: dict,
        may_change: Collection[str],
        completed: Callable[[dict], dict],
    ) -> None:
        recorded = read_config(self.path)
        if recorded is None:  # the file's name was there
            raise StorageError(
                "RUN-CONFIG",
                f"{file}: is a link to nothing; restore it or start under another name",
            )
        recorded = completed(recorded)
        self.recorded = recorded
        changes = config_changes(recorded, config, may_change)
        if changes and not self.has_progress():
            # What the other configuration has left: its evaluation of the initial weights, its
            # tokenizer, its run at wandb.
            for name in ("metrics.jsonl", TELEMETRY, TOKENIZER, WANDB_RUN_ID):
                (self.path / name).unlink(missing_ok=True)
        elif changes:
            raise changes_refused(f"{file}:", changes, was="recorded ")

    def set_status(
        self, state: str, step: int, exit_code: int | None = None, reason: str | None = None
    ) -> None:
        """Replace ``status.json`` atomically.

        Args:
            state: one of ``STATES``.
            step: optimizer steps completed.
            exit_code: what the process will exit with; launchers lose it, so it is kept here. None
                while running.
            reason: one line, e.g. ``"SIGTERM"`` or the error message.
        """
        if state not in STATES:
            raise ValueError(f"state {state!r}: expected one of {', '.join(STATES)}")
        if self.rank != 0:
            return
        if state in ("finished", "stopped", "preempted") and step > 0:
            self.checkpoint = step  # saved before any of these is said
        if state == "running":
            self._begin(step)
        elif state == "failed":
            output.open_log(self.path / "run.log")
        output.note(f"{state} at step {step}" + (f": {reason}" if reason else ""))
        content = self._status(state, step, exit_code, reason)
        with storage_errors(self.path / "status.json"):
            write_durably(self.path / "status.json", content)

    def _begin(self, step: int) -> None:
        """Open the log, and record what this launch is."""
        output.open_log(self.path / "run.log")
        changes = {"changes": self._changes} if self._changes else {}
        self._history.append(describe_launch(step) | changes)

    def _status(
        self, state: str, step: int, exit_code: int | None = None, reason: str | None = None
    ) -> bytes:
        status = {"state": state, "step": step, "exit_code": exit_code, "reason": reason}
        status |= {"checkpoint": self.checkpoint, "output": output.lost()}
        status |= {"pid": os.getpid(), "host": socket.gethostname()}
        status |= {"launched": self._launched, "time": time.time()}
        return (json.dumps(status, indent=1) + "\n").encode()

    def _tell_step(self, record: dict) -> None:
        """Keep status.json at the step; not synced, since it is replaced every few seconds."""
        self.checkpoint = record.get("checkpoint/step", self.checkpoint)
        if "loss" not in record or time.monotonic() - self._told < STATUS_SECONDS:
            return
        self._told = time.monotonic()
        draft = self.path / "status.json.tmp"
        with storage_errors(self.path / "status.json"):
            with os.fdopen(open_to_write(draft, os.O_TRUNC), "wb") as stream:
                stream.write(self._status("running", record["step"]))
            os.replace(draft, self.path / "status.json")

    def status(self) -> dict | None:
        """Return the content of ``status.json``, or None before the first launch. Any rank may ask.

        It is empty if the file is damaged.
        """
        content = read_regular(self.path / "status.json")
        try:
            found = None if content is None else json.loads(content)
        except (ValueError, RecursionError):
            return {}
        return found if found is None or isinstance(found, dict) else {}

    def log(self, record: dict) -> None:
        """Append one record to ``metrics.jsonl``, flushed to the operating system.

        ``record["step"]`` is required.
        """
        if self.rank == 0:
            self._metrics.append(record)
            self._tell_step(record)

    def log_telemetry(self, record: dict) -> None:
        """Append one record to ``telemetry.jsonl``, likewise."""
        if self.rank == 0:
            self._telemetry.append(record)

    def telemetry(self) -> list[dict]:
        """Return the records of ``telemetry.jsonl``; none on other ranks."""
        return [record for _, record in self._telemetry.records()] if self.rank == 0 else []

    def commit(
        self,
        step: int,
        first_sample: int,
        end_sample: int,
        rolling_hash: str,
        notes: dict | None = None,
    ) -> None:
        """Append to ``ledger.jsonl`` which samples an optimizer step consumed.

        Args:
            step: 1-based number of the completed step.
            first_sample, end_sample: global positions in the sample order.
            rolling_hash: digest over all sample ids so far, so that two ledgers compare by their
                last line.
            notes: more about the step: its phase, and what it took of each source.
        """
        if self.rank == 0:
            line = {"step": step, "first": first_sample, "end": end_sample, "hash": rolling_hash}
            self._ledger.append(line | (notes or {}))

    def begin_branch(self, step: int, next_sample: int, rolling_hash: str, parent: dict) -> None:
        """Make both logs those of a branch that stands where its parent stood.

        Args:
            step: of the parent's checkpoint.
            next_sample: the first that the parent had not used.
            rolling_hash: of the parent's ledger, from which this one goes on.
            parent: what the ledger's first line says of it.
        """
        if self.rank != 0:
            return
        self._metrics.truncate(step)
        self._telemetry.truncate(step)
        self._ledger.truncate(-1)
        place = {"step": step, "first": next_sample, "end": next_sample, "hash": rolling_hash}
        self._ledger.append(place | {"parent": parent})

    def continue_from(self, step: int, next_sample: int) -> None:
        """Make the logs those of a run that stands after ``step``.

        Call it on every start, and after rewinding.

        Drops what they say about later steps, and a line torn by a crash. Samples that lie between
        the ledger's last one and ``next_sample`` were passed over: a line says so,
        ``{"step": …, "skipped_first": …, "skipped_end": …}``. So does one for samples whose lines
        are gone: ``"lost_first"``, ``"lost_end"``.
        """
        if self.rank != 0:
            return
        self.checkpoint = step or self.checkpoint
        self._metrics.truncate(step)
        self._telemetry.truncate(step)
        last = self._ledger.truncate(step) or {"step": 0, "end": 0}
        end: Any = last.get("end", last.get("skipped_end", last.get("lost_end")))
        if last["step"] < step:
            log.warning(
                "%s: ends at step %d of %d; lines were lost, perhaps with power",
                self._ledger.file,
                last["step"],
                step,
            )
            self._ledger.append({"step": step, "lost_first": end, "lost_end": next_sample})
        elif end < next_sample:
            self._ledger.append({"step": step, "skipped_first": end, "skipped_end": next_sample})

    def logged(self, step: int) -> set[str]:
        """Return the keys that ``metrics.jsonl`` has for ``step``."""
        if self.rank != 0:
            return set()
        return {
            key for _, record in self._metrics.records() if record["step"] == step for key in record
        }

    def sync(self) -> None:
        """Make both logs durable, so that no checkpoint is ahead of them after a power failure."""
        if self.rank == 0:
            self._metrics.sync()
            self._ledger.sync()

    def remove_unbegun(self) -> None:
        """Remove the directory if this launch made it, and refused before it recorded a run.

        What was wrong has been said, and is another run once it is corrected. Under torchrun the
        directory stays: it loses the exit code, which launchers find in ``status.json``.
        """
        if not self._made or self._lock_fd is None or "TORCHELASTIC_RUN_ID" in os.environ:
            return
        own = {"checkpoints", "run.log", "run.lock", "status.json", "replica.json"}
        if {path.name for path in self.path.iterdir()} <= own and not any(
            self.checkpoints.iterdir()
        ):
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Release the lock and close the logs.

        The operating system does the same when the process dies.
        """
        if self._lock_fd is None:
            return
        for lines in (self._metrics, self._telemetry, self._ledger, self._history):
            lines.close()
        self._output.close()
        output.close_log()
        os.close(self._lock_fd)
        self._lock_fd = None


def _positive(count: str | None) -> bool:
    return count is not None and count.isdecimal() and int(count) > 0
