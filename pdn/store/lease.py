"""The lock of a place in object storage: one writer at a time, with a number for each.

``lease.json`` names its holder and a *fencing number*, one higher for every holder. It is changed
by conditional puts only, so that of two launches one gets it. A holder renews it; one that was
killed does not, and after ``SECONDS`` without a change the next launch takes it. No clock is
compared with another machine's: the waiting launch watches the object itself.

A lease keeps polite launches apart. What keeps a holder that slept through its end from writing is
the chain of commits (``pdn.store.commits``), each of which names its fencing number.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace

from pdn.errors import LockedError, PdnError, StorageError
from pdn.store.s3 import Bucket

NAME = "lease.json"
SECONDS = 30.0  # without a renewal until another launch may take it
RENEWALS = 3  # in that time
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Holds the content of ``lease.json``.

    Attributes:
        owner: token of the local run directory.
        fence: fencing number, from 1.
        held: False once it was given back.
        beat: renewals so far.
        process: of the holder, for the message.
    """

    owner: str
    fence: int
    held: bool
    beat: int
    process: str

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class Lease:
    """Holds the lease of a bucket's prefix, and renews it in a thread, until it is released.

    Args:
        bucket: the place.
        owner: token of the local run directory, whose own lock this process holds: a lease that
            names it is of a process that is gone, and is taken at once.

    Raises:
        LockedError: another launch renews it. Exit code 73.
        StorageError: the store failed.
    """

    def __init__(self, bucket: Bucket, owner: str):
        self._bucket = bucket
        self._holder, self._etag = _take(bucket, owner)
        self._ended = threading.Event()
        self._lost: LockedError | None = None
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def fence(self) -> int:
        return self._holder.fence

    def require(self) -> None:
        """Raise ``LockedError`` if another launch has taken it."""
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Give it back, so that the next launch need not wait. What fails is left to time."""
        self._ended.set()
        self._thread.join(SECONDS)
        if self._lost is None and not self._thread.is_alive():
            try:
                self._put(replace(self._holder, held=False))
            except PdnError as error:
                log.warning("%s; the lease ends by itself in %g s", error, SECONDS)

    def _renew(self) -> None:
        while not self._ended.wait(SECONDS / RENEWALS):
            try:
                self._put(replace(self._holder, beat=self._holder.beat + 1))
            except PdnError as error:
                # Not lost yet: a commit tells whether somebody else took it.
                log.warning("%s; the lease is renewed again soon", error)
            if self._lost is not None:
                return

    def _put(self, holder: Holder) -> None:
        data = holder.encode()
        etag = self._bucket.put(NAME, data, replacing=self._etag)
        if etag is None:
            found, current = _read(self._bucket)
            if found != holder:  # and not our own put, whose answer was lost
                self._lost = _locked(self._bucket, found)
                return
            etag = current
        assert etag is not None
        self._holder, self._etag = holder, etag


def _take(bucket: Bucket, owner: str) -> tuple[Holder, str]:
    process = f"PID {os.getpid()} on {socket.gethostname()}"
    seen, since = None, 0.0
    while True:
        found, etag = _read(bucket)
        if etag != seen:
            if seen is not None and found is not None and found.held:
                raise _locked(bucket, found)  # its holder is alive, or another launch was faster
            seen, since = etag, time.monotonic()
        free = found is None or not found.held or found.owner == owner
        if free or time.monotonic() - since >= SECONDS:
            mine = Holder(owner, (found.fence if found else 0) + 1, True, 0, process)
            new = bucket.put(NAME, mine.encode(), absent=etag is None, replacing=etag)
            if new is None and _read(bucket)[0] == mine:  # the answer was lost
                new = _read(bucket)[1]
            if new is not None:
                return mine, new
        else:
            time.sleep(min(1.0, SECONDS / 20))


def _read(bucket: Bucket) -> tuple[Holder | None, str | None]:
    """Return the holder with an ETag that is not newer than it; None if there never was one."""
    head = bucket.head(NAME)
    data = bucket.get(NAME) if head else None
    if head is None or data is None:
        return None, None
    try:
        return Holder(**json.loads(data)), head[1]
    except (ValueError, TypeError):
        raise StorageError(
            "S3-LEASE",
            f"{bucket.url}/{NAME}: found {data[:40]!r}, expected a lease; if no launch uses this "
            "replica, delete the object",
        ) from None


def _locked(bucket: Bucket, found: Holder | None) -> LockedError:
    who = found.process if found else "nobody"
    return LockedError(
        "REPLICA-LOCKED",
        f"{bucket.url}: in use by {who}; expected one launch at a time: stop that one first, or "
        "give this one another name",
    )
