"""Reading zstd: frame after frame, within bounded memory, and a truncated one is an error."""

from __future__ import annotations

import io

LONGEST_WINDOW = 1 << 28
"""Bytes that a zstd frame may ask a reader to keep."""


def open_zstd(raw: io.BufferedIOBase) -> io.BufferedReader:
    """Return a reader of what the frames in `raw` hold; closing it closes `raw`."""
    return io.BufferedReader(_ZstdFrames(raw), 1 << 20)


class _ZstdFrames(io.RawIOBase):
    """Decompresses zstd frames.

    It raises EOFError in a truncated one, which `zstandard`'s own reader takes for the end.
    """

    def __init__(self, raw: io.BufferedIOBase):
        import zstandard

        self._raw = raw
        self._new = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj
        self._frame, self._rest, self._out = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        # Read at least four bytes where there are as many, to see a byte order mark whole.
        while len(self._out) < min(4, len(target)) and self._fill():
            pass
        part = self._out[: len(target)]
        target[: len(part)] = part
        self._out = self._out[len(part) :]
        return len(part)

    def _fill(self) -> bool:
        # Read little at a time: 4 bytes can stand for 128 KiB, and all of it is returned at once.
        compressed = self._rest or self._raw.read(1 << 10)
        self._rest = b""
        if not compressed:
            if self._frame is not None:
                raise EOFError("the file ends within a compressed frame")
            return False
        self._frame = self._frame or self._new()
        found = self._frame.decompress(compressed)
        self._out = memoryview(bytes(self._out) + found) if len(self._out) else memoryview(found)
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()
