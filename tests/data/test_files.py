"""Locks and records of a cache on a disk that is full, or on a file system that has no locks."""

import contextlib
import errno
import fcntl
import os

import pytest

from pdn.data.files import try_lock
from pdn.errors import DataStorageError
from tests.data.test_stream import corpus, least, open_stream  # noqa: F401 (fixtures)


def refusing(number: int):
    """Return a call that the operating system refuses, which is told of a descriptor: no name."""

    def call(*arguments):
        raise OSError(number, os.strerror(number))

    return call


def test_a_full_disk_does_not_keep_a_lock_from_being_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", refusing(errno.ENOSPC))
    with try_lock(tmp_path / "lock") as got:
        assert got


def test_a_file_system_without_locks_is_told_by_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", refusing(errno.ENOLCK))
    with pytest.raises(DataStorageError, match="lock: locking failed: No locks available"):  # noqa: SIM117
        with try_lock(tmp_path / "lock"):
            pass


def test_a_reader_of_a_stream_that_cannot_be_recorded_is_told_by_its_file(
    corpus,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(os, "pwrite", refusing(errno.ENOSPC))
    with pytest.raises(DataStorageError, match=r"readers.*json: writing failed: No space"):  # noqa: SIM117
        with contextlib.closing(open_stream(corpus, tmp_path / "cache")) as data:
            next(iter(data.batches(0)))
