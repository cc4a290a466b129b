"""Files on a local disk: durable writes, free space, and errors that name file and remedy."""

import contextlib
import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from pdn.errors import StorageError

log = logging.getLogger(__name__)


def write_durably(file: Path, data: bytes) -> None:
    """Replace ``file`` by ``data``: a crash leaves the old or the new content, never a mixture."""
    draft = file.with_name(f"{file.name}.tmp")
    with os.fdopen(open_to_write(draft, os.O_TRUNC), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, file)
    sync_directory(file.parent)


def open_to_write(file: Path, flags: int) -> int:
    """Return a descriptor of a regular file, made if there is none.

    Args:
        file: to write.
        flags: of ``os.open``, besides those that create it for writing.

    Raises:
        OSError: it cannot be opened, or is not a regular file: a pipe would be waited for.
    """
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | flags, 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a pipe that nobody reads
            raise
        raise _irregular(file) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _irregular(file)
    return fd


def _irregular(file: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(file))


def read_bytes(file: Path) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: it cannot be read, or is not a regular file: a pipe would be waited for.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise _irregular(file)
    return file.read_bytes()


def read_regular(file: Path) -> bytes | None:
    """Return the content of a file; None if there is none.

    Raises:
        StorageError: it cannot be read, or is no regular file: a pipe would be waited for.
    """
    with storage_errors(file):
        try:
            return read_bytes(file)
        except FileNotFoundError:
            return None


def sync_directory(path: Path) -> None:
    """Make names created, renamed or removed in ``path`` survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def require_free_space(path: Path, needed_bytes: int, purpose: str) -> None:
    """Raise ``StorageError`` unless there is enough free space.

    Args:
        path: on the file system.
        needed_bytes: that must be free.
        purpose: what needs them, for the message.
    """
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
    """Turn ``OSError`` into ``StorageError``.

    It tells the file, the errno's name and, on a full disk, the free space.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path) -> StorageError:
    """Return the ``StorageError`` for ``error``, naming the file of the error or else ``path``."""
    where = error.filename or path
    name = errno.errorcode.get(error.errno or 0, "unknown errno")
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = "unknown"
        with contextlib.suppress(OSError):
            free = format_bytes(shutil.disk_usage(path if path.exists() else path.parent).free)
        fix = "free some space" if error.errno != errno.EFBIG else "raise `ulimit -f`"
        return StorageError(
            "DISK-FULL", f"{where}: {reason} ({name}), free {free}; {fix} and launch again"
        )
    allowed = (
        "expected to be allowed: make it accessible for this user, or choose another output_dir"
    )
    remedy = {
        errno.ENOENT: "expected it to stay while the run lasts; launch again",
        errno.EACCES: allowed,
        errno.EPERM: allowed,
        errno.EROFS: "expected a file system that can be written: choose another output_dir",
        errno.EINVAL: "move it away and launch again",
        errno.EMFILE: "expected more open files to be allowed: raise `ulimit -n`",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.EEXIST: "expected no file in the way: remove it, or choose another output_dir",
        errno.ENOTDIR: "expected no file in the way: remove it, or choose another output_dir",
    }.get(error.errno or 0, "check the file system and launch again")
    return StorageError("IO", f"{where}: {reason} ({name}); {remedy}")


def format_bytes(count: int) -> str:
    """Write ``count`` in GB, MB or kB (powers of 1000) to three digits, e.g. ``1.25 GB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def remove_tree(path: Path) -> None:
    """Delete a directory with all in it, or whatever else bears its name; nothing if absent.

    ``shutil.rmtree`` opens what it is given before it looks: at a pipe it would wait for ever.

    Raises:
        OSError: it could not be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
