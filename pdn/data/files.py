"""Durable files and locks: what is published is whole, and only one process makes it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pdn.errors import DataStorageError
from pdn.store.local import sync_directory
from pdn.wording import Tell


def data_storage_error(error: OSError, path: Path | str, doing: str) -> DataStorageError:
    in_the_way = error.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EINVAL)
    remedy = "Move it out of the way" if in_the_way else "Free space or fix access"
    return DataStorageError(
        "DATA-IO", f"{path}: {doing} failed: {error.strerror or error}. {remedy}, then start again"
    )


def folder_name(label: str, digest: str) -> str:
    """Name a folder of the cache by what it is of; a longer name than file systems take is cut."""
    return f"{label.encode()[:200].decode(errors='ignore')}-{digest}"


@contextlib.contextmanager
def making(path: Path) -> Iterator[None]:
    """Report what the operating system refuses while `path` is made."""
    try:
        yield
    except OSError as error:
        raise data_storage_error(error, path, "making the directory") from error


def publish_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` atomically.

    A reader, or a restart after a kill, sees the whole old file or the whole new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise data_storage_error(error, path, "writing") from error


def remove_temporary(directory: Path, name: str = "") -> None:
    """Remove what killed processes left of files of this `name`, or of all in `directory`.

    Only the one process that writes these files may call it.
    """
    for leftover in directory.glob(f".{name}*.tmp"):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Try to take an exclusive `lockf` lock on `path` without waiting; yield whether it was got.

    The kernel frees it when the process ends, however it ends.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise data_storage_error(error, path, "opening the lock file") from error
    try:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError as error:  # such as ENOLCK, of a file system without locks
            raise data_storage_error(error, path, "locking") from error
        with contextlib.suppress(OSError):  # who holds it is for those who wait; a disk may be full
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.uname().nodename}:{os.getpid()}\n".encode())
        yield True
    finally:
        os.close(fd)


@contextlib.contextmanager
def lock(path: Path, tell: Tell) -> Iterator[None]:
    """Take the lock as `try_lock` does, but wait for it.

    `tell` is told who holds it, once and then every 10 s.
    """
    started, told = time.monotonic(), -10.0
    while True:
        with try_lock(path) as got:
            if got:
                yield
                return
        waited = time.monotonic() - started
        if waited - told >= 10:
            told = waited
            with contextlib.suppress(OSError):
                holder = path.read_text(encoding="utf-8").strip() or "another process"
                tell(f"waiting for {holder} to prepare {path.parent} ({waited:.0f} s)")
        time.sleep(0.05)
