"""Which failures of a source a second try can mend: those of networks and of busy servers."""

from __future__ import annotations

import errno
import http.client
import os

from pdn.errors import DataError, DataStorageError

WAYS_OUT = (
    "or train on what needs no hub: data=shards (made with data/prepare.py), data=stream_local "
    "data.path=<directory>, or data=text for a smoke run"
)
SILENCE = 10.0  # seconds that the hub may take to answer a first question
LASTING = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
"""What the next try finds again."""
BUSY = {408, 425, 429}
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
CLIENTS = {"aiohttp", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
CLIENTS |= {"anyio", "fsspec", "botocore"}
"""Packages whose own exceptions are about the network."""


def chain(error: BaseException) -> list[BaseException]:
    """Return an exception and what it came from, the outermost first."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an exception is about; None if it is about none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    status = status if status is not None else getattr(error, "status", None)
    return status if isinstance(status, int) and status >= 400 else None


def switched_off(error: BaseException) -> str | None:
    """Return the variable that keeps the hub's client from asking, if that is what failed."""
    if not any("OfflineModeIsEnabled" in f"{type(e).__name__} {e}" for e in chain(error)):
        return None
    return next((name for name in OFFLINE if os.environ.get(name)), OFFLINE[0])


def unanswered(error: BaseException) -> str:
    """Return how a hub that did not give what was asked failed, to go after its name.

    One that answers that it is busy can be reached.
    """
    status = next((found for e in chain(error) if (found := status_of(e)) is not None), None)
    if switch := switched_off(error):
        return f"is not asked, as {switch} is set"
    if status is None:
        root = chain(error)[-1]
        said = (str(root).strip().splitlines() or [""])[0][:160]
        return f"cannot be reached ({type(root).__name__}{f': {said}' if said else ''})"
    words = http.client.responses.get(status, "refused")
    return f"answers HTTP {status} ({words}): it is busy, try again later"


def is_passing(error: BaseException) -> bool:
    """Return whether the operation that raised `error` may succeed if it is tried again later.

    The outermost exception that says anything about it decides. One that says nothing, such as a
    decoder's complaint about the bytes it got, does not pass.
    """
    for found in chain(error):
        if isinstance(found, DataStorageError):
            return True
        if isinstance(found, DataError):
            return False
        if (status := status_of(found)) is not None:
            return status >= 500 or status in BUSY
        if isinstance(found, UnicodeError | LookupError | MemoryError):
            return False
        if isinstance(found, OSError) and found.errno in LASTING:
            return False
        if isinstance(found, FileNotFoundError | PermissionError):
            return False
        # Damaged parquet is an OSError without a number; so is what the hub's client raises.
        if type(found) is OSError and found.errno is None and _is_decoder(found):
            return False
        if isinstance(found, OSError | TimeoutError | http.client.HTTPException):
            return True
        if type(found).__module__.split(".")[0] in CLIENTS:
            return True
    return False


def _is_decoder(error: OSError) -> bool:
    """Return whether pyarrow's reader raised it, and not the file under it."""
    trace, last = error.__traceback__, None
    while trace is not None:
        last, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    return last is not None and "pyarrow" in last
