"""Retry a source that fails or hangs, from where it was, with growing pauses."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pdn.data.documents import Batch, Source
from pdn.data.failures import chain, is_passing
from pdn.errors import DataError, DataStorageError

LONGEST_PAUSE = 60.0


class Retrying:
    """Opens `source` again after a failure or a stall, at the last batch that it gave.

    Nothing is lost or repeated.

    Args:
        source: what is read.
        retry_seconds: give up after so long without a batch.
        stall_seconds: count silence of so long as a failure.
        tell: called with a line about each failure.
        first_pause: seconds before the first retry; it doubles up to a minute.
    """

    def __init__(
        self,
        source: Source,
        *,
        retry_seconds: float,
        stall_seconds: float,
        tell: Callable[[str], None],
        first_pause: float = 1.0,
    ):
        self._source, self._retry, self._stall, self._tell, self._pause = (
            source,
            retry_seconds,
            stall_seconds,
            tell,
            first_pause,
        )

    def identity(self) -> dict[str, Any]:
        return self._source.identity()

    def batches(self, cursor: dict[str, Any] | None) -> Iterator[Batch]:
        last: Batch | None = None
        since, pause = time.monotonic(), self._pause
        while True:
            try:
                fresh = self._watched(last.cursor if last else cursor)
                if last is not None:
                    # the same cursor gives the same batches, so this one is `last` again
                    next(fresh, None)
                for batch in fresh:
                    yield batch
                    last, since, pause = batch, time.monotonic(), self._pause
                return
            except Exception as error:
                if not is_passing(error):
                    raise self._bad_data(error) from error
                failure = error
            silent = time.monotonic() - since
            if silent + pause > self._retry:
                raise DataStorageError(
                    "SOURCE-FAILED",
                    f"{self._source.identity().get('name')}: no data for {silent:.0f} s "
                    f"({type(failure).__name__}: {failure}); check the network or disk, then start "
                    "again: it continues after the last whole shard",
                ) from failure
            self._tell(
                f"source failed ({type(failure).__name__}: {failure}); trying again in {pause:.0f} "
                "s"
            )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _bad_data(self, error: Exception) -> DataError:
        """Return the error for what a second try would find again."""
        if isinstance(error, DataError):
            return error
        name = self._source.identity().get("name")
        where = [getattr(e, "filename", None) for e in chain(error)]
        file = next((f"{f}: " for f in where if f), "")
        return DataError(
            "SOURCE-BAD",
            f"{name}: {file}cannot be read ({type(error).__name__}: {error}); expected text of "
            "this format; mend it at its source, or leave it out",
        )

    def _watched(self, cursor: dict[str, Any] | None) -> Iterator[Batch]:
        """Yield the source's batches.

        A thread reads them, so that one that hangs can be left behind.
        """
        items: queue.Queue = queue.Queue(maxsize=4)
        left = threading.Event()

        def put(item) -> bool:
            while not left.is_set():
                try:
                    items.put(item, timeout=0.5)
                    return True
                except queue.Full:
                    continue
            return False

        def read() -> None:
            try:
                for batch in self._source.batches(cursor):
                    if not put(batch):
                        return
                put(None)
            except Exception as error:
                put(error)

        threading.Thread(target=read, name="source", daemon=True).start()
        try:
            while True:
                try:
                    item = items.get(timeout=self._stall)
                except queue.Empty:
                    raise TimeoutError(f"nothing for {self._stall:g} s") from None
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            left.set()
