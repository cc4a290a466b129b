"""A run's replica in object storage: what every checkpoint brings there.

The live run is in its local directory. After each checkpoint a thread of rank 0 uploads what is new
and makes a commit of it (``pdn.store.commits``): the checkpoint, the small files, and the lines
that the logs have gained, as numbered segments. A launch whose local directory is empty, such as on
another machine, begins by bringing the newest commit here (``pdn.checkpoint.fetch``).

``replica.json`` in the local directory names the replica and holds the directory's token: a commit
with another token was made elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from pdn.checkpoint import format as files
from pdn.checkpoint.fetch import FILES, LINES, MARKS, restore, step_of
from pdn.checkpoint.retention import retained
from pdn.errors import ConfigError, LockedError, PdnError, StorageError
from pdn.runs.leftovers import holds_progress, move_aside
from pdn.store import commits
from pdn.store.commits import Commit, Entry
from pdn.store.lease import Lease
from pdn.store.local import read_regular, storage_errors, write_durably
from pdn.store.s3 import Bucket

NOTE = "replica.json"
PAUSE_S = 15.0  # between tries while the store fails
LAST_TRIES = 3  # of a launch that has nothing else to do
MAX_SEGMENTS = 64  # of a log; then it goes up whole
log = logging.getLogger(__name__)


class RunReplica:
    """Keeps the replica of one run up to date. For rank 0, which holds the directory's lock.

    Args:
        url: ``s3://bucket/prefix`` of this run alone.
        directory: of the run, locked by this process.
        resume: as in the configuration; ``step:N`` brings that checkpoint, anything else the newest
            one.
        keep_last, keep_every: checkpoints that stay, as in the local directory.

    Attributes:
        held: step of the newest checkpoint in the replica; None if it has none.

    Raises:
        LockedError: another launch uses the replica.
        ConfigError: it holds another run than the local directory, or cannot be used.
        StorageError: the store failed, or nothing that it holds verifies.
    """

    def __init__(
        self, url: str, directory: Path, *, resume: str, keep_last: int, keep_every: int | None
    ):
        self.directory, self._resume = directory, resume
        self._keep = keep_last, keep_every
        self._bucket = Bucket(url)
        self._owner, self._known = _token(directory)
        self._lease = Lease(self._bucket, self._owner)
        try:
            self._launch = f"objects/{self._lease.fence:08d}-{os.urandom(4).hex()}"
            self._uploaded, self._before = 0, set()
            aborted = self._bucket.abort_uploads()
            if aborted:
                log.warning("%s: aborted %d unfinished uploads", self._bucket.url, aborted)
            self._commit = self._take_over()
            self._bring_here()
            self._clear()
        except BaseException:
            self._lease.release()
            raise
        self._changed = threading.Condition()
        self._waiting: _Snapshot | None = None
        self._current: _Snapshot | None = None  # under way; nobody else closes it
        self._failures, self._failure, self._closing = 0, None, False
        self._fatal: LockedError | None = None
        self._landed: list[tuple[int, float]] = []
        self._thread = threading.Thread(target=self._work, name="replica", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int | None:
        return max(map(step_of, self._commit.trees), default=None)

    # ---------------------------------------------------------------- a launch begins

    def _take_over(self) -> Commit:
        """Make a commit under this lease, of what is there: nobody with an older one can go on."""
        while True:
            found = commits.newest(self._bucket) or Commit(0, 0, self._owner)
            self._before = found.objects()
            mine = replace(found, number=found.number + 1, fence=self._lease.fence)
            try:
                commits.publish(self._bucket, mine)
                return mine
            except LockedError:
                # The holder before put one more; what it holds is taken over instead.
                last = commits.newest(self._bucket)
                if last is not None and last.fence >= self._lease.fence:
                    raise

    def _bring_here(self) -> None:
        """Make the local directory that of the newest commit, if another directory made it."""
        commit, run = self._commit, self.directory
        note = {"url": self._bucket.url, "token": self._owner}
        if commit.owner != self._owner and commit.trees:
            if holds_progress(run):
                if not self._known:
                    raise ConfigError(
                        "REPLICA-OTHER",
                        f"{run}: holds a run, and {self._bucket.url} one that was not made here; "
                        "expected one of them to be empty: give this launch another name=, or "
                        "move the local directory away to continue the replica",
                    )
                moved = move_aside(run)
                log.warning(
                    "%s: the run went on elsewhere; what was here is in %s, and it continues from "
                    "%s",
                    run,
                    moved,
                    self._bucket.url,
                )
            with storage_errors(run):
                write_durably(run / NOTE, json.dumps(note).encode())
            restore(self._bucket, commit, run, self._resume)
        with storage_errors(run):
            write_durably(run / NOTE, json.dumps(note).encode())
        if commit.owner != self._owner:
            self._commit = replace(commit, number=commit.number + 1, owner=self._owner)
            commits.publish(self._bucket, self._commit)

    def _clear(self) -> None:
        """Delete the objects that launches before this one left without a commit."""
        kept = self._commit.objects() | self._before
        found = self._bucket.names("objects/")
        old = f"objects/{self._lease.fence:08d}"
        self._bucket.delete([name for name in found if name not in kept and name < old])

    # ---------------------------------------------------------------- while it trains

    def push(self, step: int) -> None:
        """Have the checkpoint of ``step`` replicated, with the run as it now stands.

        Returns at once. One that is still waiting to be uploaded is passed over.

        Raises:
            LockedError: another launch took the replica over.
            StorageError: the local files cannot be read.
        """
        self._lease.require()
        if self._fatal is not None:
            raise self._fatal
        snapshot = _Snapshot.of(self.directory, step)
        with self._changed:
            if self._waiting is not None:
                self._waiting.close()
            self._waiting = snapshot
            self._changed.notify_all()

    def landed(self) -> list[tuple[int, float]]:
        """Return ``(step, seconds)`` of the uploads that were committed since the last call."""
        with self._changed:
            found, self._landed = self._landed, []
        return found

    def finish(self, step: int, timeout_s: float = float("inf")) -> None:
        """Bring the replica to the run's end, and wait for that.

        Args:
            step: of the last checkpoint.
            timeout_s: for all of it.

        Raises:
            StorageError: it stays behind; says why and by how much.
            LockedError: another launch took the replica over.
        """
        self.push(step)
        with self._changed:
            self._failures = 0
            self._changed.wait_for(
                lambda: self._settled or self._failures >= LAST_TRIES,
                None if timeout_s == float("inf") else timeout_s,
            )
            if self._fatal is not None:
                raise self._fatal
            if not self._settled:
                reason = self._failure or f"not uploaded within {timeout_s:g} s"
                raise StorageError(
                    "REPLICA-BEHIND",
                    f"{self._bucket.url}: holds step {self.held}, expected {step}: {reason}. The "
                    f"run in {self.directory} is whole: launch again to bring the replica there",
                )

    def close(self) -> None:
        """Stop uploading, and give the lease back."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._lease.release()

    @property
    def _settled(self) -> bool:
        return self._waiting is None and self._current is None

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                if self._closing or self._waiting is None:
                    return
                snapshot = self._current = self._waiting
                self._waiting = None
            began, error = time.perf_counter(), None
            try:
                self._upload(snapshot)
            except Exception as failure:  # else the thread would die unseen
                error = failure
            with self._changed:
                self._settle(snapshot, error, time.perf_counter() - began)

    def _settle(self, snapshot: _Snapshot, error: Exception | None, seconds: float) -> None:
        """Note how an upload ended; after a failure wait before the next try. Holds the lock."""
        self._current = None
        if error is None:
            self._landed.append((snapshot.step, seconds))
            self._failures, self._failure = 0, None
        else:
            self._failures, self._failure = self._failures + 1, error
        if isinstance(error, LockedError):
            self._fatal = error
        if error is None or self._fatal is not None or self._waiting is not None:
            snapshot.close()
        else:
            self._waiting = snapshot
        self._changed.notify_all()
        if error is not None and self._fatal is None:
            if self._failures == 1:
                log.warning(
                    "%s; the replica stays at step %s until it goes up",
                    error,
                    self.held,
                    exc_info=None if isinstance(error, PdnError | OSError) else error,
                )
            self._changed.wait_for(
                lambda: self._closing or self._waiting is not snapshot, timeout=PAUSE_S
            )

    def _upload(self, snapshot: _Snapshot) -> None:
        landed = commits.read(self._bucket, self._commit.number + 1)
        if landed is not None and landed.fence == self._lease.fence:
            # Ours, put by a try that saw errors only.
            self._before, self._commit = self._before | self._commit.objects(), landed
        base = self._commit
        name = files.step_directory(Path(), snapshot.step).name
        trees = {name: self._tree(snapshot, base.trees.get(name, {}))}
        trees |= {
            other: tree for other, tree in base.trees.items() if step_of(other) < snapshot.step
        }
        kept = retained(map(step_of, trees), *self._keep)
        commit = Commit(
            number=base.number + 1,
            fence=self._lease.fence,
            owner=self._owner,
            files={
                name: self._small(name, data, base.files.get(name))
                for name, data in snapshot.files.items()
            },
            lines={
                name: self._segments(name, data, base.lines.get(name, []))
                for name, data in snapshot.lines.items()
            },
            trees={name: tree for name, tree in trees.items() if step_of(name) in kept},
        )
        self._lease.require()
        commits.publish(self._bucket, commit)
        # A reader may still be at the commit before: its objects go one commit later.
        dropped = self._before - base.objects() - commit.objects()
        self._before, self._commit = base.objects(), commit
        self._bucket.delete(sorted(dropped))

    def _tree(self, snapshot: _Snapshot, there: dict[str, Entry]) -> dict[str, Entry]:
        marker = snapshot.checkpoint["COMMITTED"]
        content = os.pread(marker, 4096, 0)
        if there and there["COMMITTED"]["sha256"] == hashlib.sha256(content).hexdigest():
            return there
        tree = {}
        for name, fd in snapshot.checkpoint.items():
            tree[name] = self._put(name, fd, os.fstat(fd).st_size)
            expected = snapshot.records.get(name)
            if expected is not None and expected["sha256"] != tree[name]["sha256"]:
                raise StorageError(
                    "CKPT-HASH",
                    f"step-{snapshot.step}/{name}: sha256 {tree[name]['sha256'][:12]}… expected "
                    f"{expected['sha256'][:12]}…; it is damaged on the local disk, and not "
                    "replicated",
                )
        return tree

    def _small(self, name: str, data: bytes, there: Entry | None) -> Entry:
        digest = hashlib.sha256(data).hexdigest()
        if there is not None and there["sha256"] == digest:
            return there
        place = self._next(name)
        self._bucket.put(place, data)
        return {"object": place, "bytes": len(data), "sha256": digest}

    def _segments(self, name: str, data: bytes, there: list[Entry]) -> list[Entry]:
        """Return the segments that make up ``data``: what agrees of those there, and a new one."""
        kept, end = [], 0
        for entry in there if len(there) < MAX_SEGMENTS else []:
            piece = data[end : end + entry["bytes"]]
            if hashlib.sha256(piece).hexdigest() != entry["sha256"]:
                break
            kept.append(entry)
            end += entry["bytes"]
        return kept if end == len(data) else [*kept, self._small(name, data[end:], None)]

    def _put(self, name: str, fd: int, size: int) -> Entry:
        place = self._next(name)
        return {"object": place, "bytes": size, "sha256": self._bucket.upload(place, fd, size)}

    def _next(self, name: str) -> str:
        self._uploaded += 1
        return f"{self._launch}/{self._uploaded:06d}-{name}"


@dataclass
class _Snapshot:
    """Holds a run at one moment.

    The files of the checkpoint are open: what is pruned meanwhile can still be read.
    """

    step: int
    checkpoint: dict[str, int]  # name → file descriptor
    records: dict[str, dict]  # of its manifest
    files: dict[str, bytes]
    lines: dict[str, bytes]

    @classmethod
    def of(cls, run: Path, step: int) -> _Snapshot:
        path, opened = files.step_directory(run / "checkpoints", step), {}
        try:
            with storage_errors(path):
                for name in MARKS:
                    opened[name] = os.open(path / name, os.O_RDONLY)
                manifest = files.read_manifest(path)
                for name in manifest.files:
                    opened[name] = os.open(path / name, os.O_RDONLY)
                small = {name: read_regular(run / name) for name in FILES}
                lines = {name: read_regular(run / name) for name in LINES}
        except BaseException:
            for fd in opened.values():
                os.close(fd)
            raise
        return cls(
            step,
            {name: opened[name] for name in (*manifest.files, *MARKS)},
            manifest.files,
            {name: data for name, data in small.items() if data is not None},
            {name: data for name, data in lines.items() if data},
        )

    def close(self) -> None:
        for fd in self.checkpoint.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self.checkpoint = {}


def _token(run: Path) -> tuple[str, bool]:
    """Return the token of a local run directory, and whether it had one before."""
    content = read_regular(run / NOTE)
    try:
        token = json.loads(content or b"")["token"]
        if re.fullmatch(r"[0-9a-f]{32}", token):
            return token, True
    except (ValueError, KeyError, TypeError):
        pass
    return os.urandom(16).hex(), False
