"""One run, one directory, one writer: its lock, configuration, status, metrics and ledger.

Layout: ``config.yaml``, ``tokenizer.json``, ``status.json``, ``metrics.jsonl``, ``ledger.jsonl``, ``run.lock``,
``checkpoints/``.
"""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import yaml

from pdn.errors import ConfigError, LockedError, StorageError

WANDB_RUN_ID = "wandb-run-id"
STATES = ("running", "stopped", "finished", "preempted", "failed")  # stopped: at trainer.stop_at
TOKENIZER = "tokenizer.json"
log = logging.getLogger(__name__)

MIN_FREE_BYTES = 16 << 20  # below this not even the logs of a short run fit


class RunDirectory:
    """The directory of a run. Rank 0 creates, locks and writes it; on other ranks every writing method does nothing.

    Args:
        path: the directory; created with its parents by rank 0.
        rank: global rank of this process.

    Raises:
        LockedError: another process holds the directory; names its PID and host. Exit code 73.
        StorageError: the directory cannot be created or written, or its file system is full. Exit code 74.
    """

    def __init__(self, path: Path, *, rank: int):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.rank = rank
        self._lock_fd: int | None = None
        if rank != 0:
            return
        with storage_errors(self.path):
            self._create()
            self._lock()
            self.preflight(MIN_FREE_BYTES)
        self._metrics = JsonLines(self.path / "metrics.jsonl")
        self._ledger = JsonLines(self.path / "ledger.jsonl")

    def _create(self) -> None:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # of a file system that makes no directories, such as /proc
            raise StorageError(
                "IO",
                f"{error.filename}: no directory can be made here (ENOENT); expected a file system for files: "
                "choose another output_dir",
            ) from error

    def _lock(self) -> None:
        # lockf and not flock: a flock is inherited by forked loader workers and outlives its owner with them.
        self._lock_fd = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            holder = os.pread(self._lock_fd, 400, 0).decode(errors="replace").strip() or "a process not yet named"
            os.close(self._lock_fd)
            self._lock_fd = None
            raise LockedError(
                "RUN-LOCKED", f"{self.path}: already in use by {holder}; stop that run first, or give this one another name"
            ) from None
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"PID {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def preflight(self, needed_bytes: int) -> None:
        """Prove that the directory can be written and has ``needed_bytes`` free, before anything costly is built.

        Raises:
            StorageError: not writable (with the errno), or too little space (with needed and free).
        """
        if self.rank != 0:
            return
        with storage_errors(self.path):
            probe = self.path / f".probe-{os.getpid()}"
            write_durably(probe, b"probe")
            probe.unlink()
        require_free_space(self.path, needed_bytes, "the run")

    def has_progress(self) -> bool:
        """Whether there is something to lose: a step in the ledger, or a checkpoint, committed or not. Any rank may ask."""
        ledger = self.path / "ledger.jsonl"
        with storage_errors(self.path):
            return any(self.checkpoints.glob("step-*")) or (ledger.exists() and ledger.stat().st_size > 0)

    def record_config(self, config: dict, *, may_change: Collection[str] = ()) -> None:
        """Write ``config.yaml``; a later launch may change what defines the run only as long as there is no progress.

        Args:
            config: resolved, plain containers only.
            may_change: dotted keys, or prefixes of them, that do not define the run, e.g. ``"trainer.stop_at"``, ``"logger"``.

        Raises:
            ConfigError: keys that define the run differ; old and new values are named. Exit code 78.
            StorageError: the file cannot be read or written, or is not YAML.
        """
        if self.rank != 0:
            return
        file = self.path / "config.yaml"
        with storage_errors(file):
            if file.exists():
                self._settle_changes(file, config, may_change)
            write_durably(file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())

    def keep_tokenizer(self, source: Path | None) -> None:
        """Copy the tokenizer into the run, so that it can be evaluated and sampled from wherever its data went."""
        if self.rank == 0 and source is not None:
            with storage_errors(self.path / TOKENIZER):
                write_durably(self.path / TOKENIZER, Path(source).read_bytes())

    def _settle_changes(self, file: Path, config: dict, may_change: Collection[str]) -> None:
        try:
            recorded = yaml.safe_load(file.read_bytes())
        except yaml.YAMLError as error:
            raise StorageError("RUN-CONFIG", f"{file}: not YAML ({error}); restore it or start under another name") from None
        changes = config_changes(recorded if isinstance(recorded, dict) else {}, config, may_change)
        if changes and not self.has_progress():
            # What the other configuration has left: its evaluation of the initial weights, its tokenizer, its run at wandb.
            for name in ("metrics.jsonl", TOKENIZER, WANDB_RUN_ID):
                (self.path / name).unlink(missing_ok=True)
        elif changes:
            listed = "; ".join(f"{key}: recorded {old!r}, now {new!r}" for key, old, new in changes[:5])
            more = f"; and {len(changes) - 5} more" if len(changes) > 5 else ""
            raise ConfigError(
                "RUN-CONFIG-CHANGED",
                f"{file}: {listed}{more}. A run keeps what defines it: undo the change, or give the run another name",
            )

    def set_status(self, state: str, step: int, exit_code: int | None = None, reason: str | None = None) -> None:
        """Replace ``status.json`` atomically.

        Args:
            state: one of ``STATES``.
            step: optimizer steps completed.
            exit_code: what the process will exit with; launchers lose it, so it is kept here. None while running.
            reason: one line, e.g. ``"SIGTERM"`` or the error message.
        """
        if state not in STATES:
            raise ValueError(f"state {state!r}: expected one of {', '.join(STATES)}")
        if self.rank != 0:
            return
        status = {"state": state, "step": step, "exit_code": exit_code, "reason": reason}
        status |= {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
        with storage_errors(self.path / "status.json"):
            write_durably(self.path / "status.json", (json.dumps(status, indent=1) + "\n").encode())

    def status(self) -> dict | None:
        """The content of ``status.json``, or None before the first launch; empty if it is damaged. Any rank may ask."""
        file = self.path / "status.json"
        with storage_errors(file):
            content = file.read_bytes() if file.exists() else None
        try:
            found = None if content is None else json.loads(content)
        except ValueError:
            return {}
        return found if found is None or isinstance(found, dict) else {}

    def log(self, record: dict) -> None:
        """Append one record to ``metrics.jsonl``, flushed to the operating system. ``record["step"]`` is required."""
        if self.rank == 0:
            self._metrics.append(record)

    def commit(self, step: int, first_sample: int, end_sample: int, rolling_hash: str) -> None:
        """Append to ``ledger.jsonl`` that optimizer step ``step`` consumed the samples ``[first_sample, end_sample)``.

        Args:
            step: 1-based number of the completed step.
            first_sample, end_sample: global positions in the sample order.
            rolling_hash: digest over all sample ids so far, so that two ledgers compare by their last line.
        """
        if self.rank == 0:
            self._ledger.append({"step": step, "first": first_sample, "end": end_sample, "hash": rolling_hash})

    def continue_from(self, step: int, next_sample: int) -> None:
        """Make both logs those of a run that stands after ``step``; call it on every start, and after rewinding.

        Drops what they say about later steps, and a line torn by a crash. Samples that lie between the ledger's last one and
        ``next_sample`` were passed over: a line says so, ``{"step": …, "skipped_first": …, "skipped_end": …}``.
        """
        if self.rank != 0:
            return
        self._metrics.truncate(step)
        last = self._ledger.truncate(step) or {"step": 0, "end": 0}
        end = last.get("end", last.get("skipped_end"))
        if last["step"] < step:
            log.warning("%s: ends at step %d of %d; lines were lost, perhaps with power", self._ledger.file, last["step"], step)
        elif end < next_sample:
            self._ledger.append({"step": step, "skipped_first": end, "skipped_end": next_sample})

    def logged(self, step: int) -> set[str]:
        """The keys that ``metrics.jsonl`` has for ``step``."""
        if self.rank != 0:
            return set()
        return {key for _, record in self._metrics.records() if record["step"] == step for key in record}

    def sync(self) -> None:
        """Make both logs durable, so that no checkpoint is ahead of them after a power failure."""
        if self.rank == 0:
            self._metrics.sync()
            self._ledger.sync()

    def close(self) -> None:
        """Release the lock and close the logs. The operating system does the same when the process dies."""
        if self._lock_fd is None:
            return
        self._metrics.close()
        self._ledger.close()
        os.close(self._lock_fd)
        self._lock_fd = None


class JsonLines:
    """An append-only file of JSON records in order of ``step``. Opens lazily; written by one process.

    Raises:
        StorageError: writing failed (free space or errno named), the file was removed, or a line is damaged.
    """

    def __init__(self, file: Path):
        self.file = file
        self._fd: int | None = None

    def append(self, record: dict) -> None:
        if not isinstance(record.get("step"), int):
            raise ValueError(f"record {record}: expected an integer 'step'")
        line = json.dumps({key: _json_value(value) for key, value in record.items()}, allow_nan=False) + "\n"
        with storage_errors(self.file):
            if self._fd is None:
                self._fd = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            # An unlinked file accepts writes for ever; nobody would find them.
            if os.fstat(self._fd).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "removed while the run was writing to it", str(self.file))
            data = line.encode()
            written = os.write(self._fd, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, "short write", str(self.file))

    def records(self) -> Iterator[tuple[int, dict]]:
        """Each whole line, after the number of bytes up to its end; stops before a torn one."""
        with storage_errors(self.file):
            content = self.file.read_bytes() if self.file.exists() else b""
        end = 0
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                int(record["step"])
            except (ValueError, KeyError, TypeError):
                raise StorageError(
                    "LOG-DAMAGED", f"{self.file}:{number}: not a JSON record with a step; delete from this line on"
                ) from None
            end += len(line)
            yield end, record

    def truncate(self, step: int) -> dict | None:
        """Drop the first record of a later step and all after it, and a torn line; the last record that stays."""
        keep, last = 0, None
        for end, record in self.records():
            if record["step"] > step:
                break
            keep, last = end, record
        with storage_errors(self.file):
            if self.file.exists() and self.file.stat().st_size != keep:
                os.truncate(self.file, keep)
        return last

    def sync(self) -> None:
        if self._fd is not None:
            with storage_errors(self.file):
                os.fsync(self._fd)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _json_value(value: object) -> object:
    """JSON has no NaN and infinity: they become ``"nan"``, ``"inf"``, ``"-inf"``, which ``float()`` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def config_changes(old: dict, new: dict, may_change: Collection[str] = ()) -> list[tuple[str, object, object]]:
    """Dotted keys at which two configurations differ, as ``(key, old, new)``; absent values are ``"(absent)"``."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changes = []
    for key in sorted(before.keys() | after.keys()):
        exempt = any(key == allowed or key.startswith(allowed + ".") for allowed in may_change)
        was, now = before.get(key, "(absent)"), after.get(key, "(absent)")
        if not exempt and was != now:
            changes.append((key, was, now))
    return changes


def _leaves(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, list(node) if isinstance(node, tuple) else node


def write_durably(file: Path, data: bytes) -> None:
    """Replace ``file`` by ``data`` so that after a crash either the old or the new content is there, never a mixture."""
    draft = file.with_name(f"{file.name}.tmp")
    with open(draft, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, file)
    sync_directory(file.parent)


def sync_directory(path: Path) -> None:
    """Make names created, renamed or removed in ``path`` survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def require_free_space(path: Path, needed_bytes: int, purpose: str) -> None:
    """Raise ``StorageError`` naming needed and free space unless ``needed_bytes`` are free at ``path``."""
    with storage_errors(path):
        free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise StorageError(
            "DISK-FULL",
            f"{path}: {purpose} needs {format_bytes(needed_bytes)}, free {format_bytes(free)}; "
            "free some space, or keep fewer checkpoints",
        )


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn ``OSError`` into ``StorageError`` with the file, the errno's name and, on a full disk, the free space."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path) -> StorageError:
    """The ``StorageError`` for ``error``, naming the file of the error or else ``path``."""
    where = error.filename or path
    name = errno.errorcode.get(error.errno or 0, "unknown errno")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = "unknown"
        with contextlib.suppress(OSError):
            free = format_bytes(shutil.disk_usage(path if path.exists() else path.parent).free)
        return StorageError("DISK-FULL", f"{where}: {error.strerror} ({name}), free {free}; free some space and launch again")
    remedy = {
        errno.ENOENT: "expected it to stay while the run lasts; launch again",
        errno.EACCES: "expected to be allowed: make it accessible for this user, or choose another output_dir",
        errno.EPERM: "expected to be allowed: make it accessible for this user, or choose another output_dir",
        errno.EROFS: "expected a file system that can be written: choose another output_dir",
        errno.EEXIST: "expected no file in the way: remove it, or choose another output_dir",
        errno.ENOTDIR: "expected no file in the way: remove it, or choose another output_dir",
    }.get(error.errno or 0, "check the file system and launch again")
    return StorageError("IO", f"{where}: {error.strerror} ({name}); {remedy}")


def format_bytes(count: int) -> str:
    """``count`` in GB, MB or kB (powers of 1000) to three digits, e.g. ``1.25 GB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
