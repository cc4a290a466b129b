"""A file is written past the system's cache where that goes, and holds what it was given anyhow."""

import errno
import hashlib
import os

import numpy as np
import pytest

from pdn.store import direct
from pdn.store.direct import HashedFile

PAGE = direct.ALIGNMENT
SIZES = (1, PAGE, 0, 3 * PAGE - 1, 5 * PAGE + 7)  # of the calls; together no multiple of a page


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(direct, "PIECE_BYTES", 2 * PAGE)


def assert_holds(path, sizes) -> None:
    """Write random bytes, and compare the file and its record with them."""
    data = np.random.default_rng(0).integers(0, 256, sum(sizes), np.uint8)
    with HashedFile(path) as file:
        for end, size in zip(np.cumsum(sizes), sizes, strict=True):
            assert file.position == end - size
            file.write(data[end - size : end])
        record = file.finish()
    assert path.read_bytes() == data.tobytes()
    assert record == {"sha256": hashlib.sha256(data.tobytes()).hexdigest(), "bytes": len(data)}


@pytest.mark.parametrize("sizes", [SIZES, (2 * PAGE, 2 * PAGE), (3,), ()])
def test_a_file_holds_what_was_written_in_whatever_pieces(sizes, tmp_path):
    assert_holds(tmp_path / "file", sizes)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_direct_writes_gets_ordinary_ones(code, tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, flags, mode=0o777):
        fd = opened(path, flags & ~direct._DIRECT, mode)  # made before it is refused
        if flags & direct._DIRECT:
            os.close(fd)
            raise OSError(code, "no direct writes")
        return fd

    monkeypatch.setattr(os, "open", refuse)
    assert_holds(tmp_path / "file", SIZES)


@pytest.mark.skipif(not direct._DIRECT, reason="the system has no direct writes")
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_disk_that_wants_another_alignment_gets_ordinary_writes(code, tmp_path, monkeypatch):
    written, through_cache = os.write, []

    def refuse(fd, data):
        if not through_cache:
            raise OSError(code, "pieces of 64 KiB, please")
        return written(fd, data)

    change = HashedFile._go_through_the_cache
    monkeypatch.setattr(os, "write", refuse)
    monkeypatch.setattr(
        HashedFile, "_go_through_the_cache", lambda own: through_cache.append(change(own))
    )
    assert_holds(tmp_path / "file", SIZES)
    assert len(through_cache) == 1


def test_a_file_that_exists_is_not_written_over_and_a_full_disk_is_told(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(FileExistsError):
        HashedFile(path)
    assert path.read_bytes() == b"before"

    def full(fd, data):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    with HashedFile(tmp_path / "other") as file, pytest.raises(OSError, match="full"):
        file.write(np.zeros(3 * PAGE, np.uint8))
