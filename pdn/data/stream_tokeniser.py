"""The process that tokenises a stream, one on a node, which the stream's readers keep running.

They talk by files in the stream's part of the cache: ``SPEC`` says what is to be tokenised,
``READERS`` which shards are wanted now, ``STATUS`` how far it is. Who runs holds ``LOCK``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pdn.data import files
from pdn.data.shards import read_manifest
from pdn.errors import DataError, DataStorageError
from pdn.store.local import open_to_write, read_bytes

PROBE_SECONDS = 5.0  # between two looks whether it still runs, while nothing is waited for
MAX_STARTS = 5  # without progress, before it is given up
STATUS, LOCK, SPEC, READERS, LOG = (
    "status.json",
    "tokeniser.lock",
    "spec.json",
    "readers",
    "tokeniser.log",
)


class TokeniserProcess:
    """Keeps the node's tokeniser of one stream running, whoever has started it.

    Args:
        root: of the stream in the cache; its ``SPEC`` is there before anything is waited for.
    """

    def __init__(self, root: Path):
        self._root, self._shards = root, root / "train"
        self._guard = threading.RLock()
        self._child: subprocess.Popen | None = None
        self._starts, self._probed, self._opened = 0, 0.0, time.time()
        self._at_start: object = None  # its progress when it was started last

    @property
    def pid(self) -> int | None:
        """Return the process that was started here, if one was."""
        return None if self._child is None else self._child.pid

    def look(self) -> None:
        """Do ``ensure`` if the last time was a while ago."""
        if time.monotonic() - self._probed > PROBE_SECONDS:
            self.ensure()

    def ensure(self) -> None:
        """Start it if none holds the lock, and there is something left to do.

        Raises:
            DataError: one that gave up said why, or it ended ``MAX_STARTS`` times without progress.
        """
        with self._guard:
            self._probed = time.monotonic()
            if self._child is not None and self._child.poll() is None:
                return
            with files.try_lock(self._root / LOCK) as free:
                if not free:
                    return
            status = self.status()
            failed = status.get("state") == "failed" and {"time", "code", "message"} <= set(status)
            if failed and (self._starts or status["time"] >= self._opened):
                kind = (
                    DataStorageError
                    if status.get("exit_code") == DataStorageError.exit_code
                    else DataError
                )
                raise kind(status["code"], status["message"])
            if status.get("state") == "done" and all(
                (self._shards / f"{s.name}.bin").exists()
                for s in read_manifest(self._shards).shards
            ):
                return
            self._start()

    def _start(self) -> None:
        if self._starts >= MAX_STARTS and self.progress() == self._at_start:
            tail = (self._root / LOG).read_text(errors="replace", encoding="utf-8")[-500:]
            raise DataStorageError(
                "STREAM-TOKENISER",
                f"{self._root}: the tokeniser ended {self._starts} times without progress; its "
                f"last words: {tail}",
            )
        self._at_start = self.progress()
        self._starts += 1
        root = str(Path(__file__).resolve().parents[2])
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "USE_TORCH": "0",  # or `datasets` imports it, for which a tokeniser has no use
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        }
        with os.fdopen(open_to_write(self._root / LOG, os.O_APPEND), "ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "pdn.data.stream_worker", str(self._root), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                # signals to the training's process group must not reach it; it ends with its parent
                start_new_session=True,
            )

    def progress(self) -> object:
        """Return something that changes while it works."""
        try:
            return self.status().get("documents"), len(os.listdir(self._shards))
        except FileNotFoundError:
            return None

    def status(self) -> dict[str, Any]:
        """Return what it last said of itself; empty if nothing, or not whole."""
        try:
            found = json.loads(read_bytes(self._root / STATUS))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def stop(self) -> None:
        """End the process, if it was started here."""
        with self._guard:
            if self._child is not None:
                self._child.kill()
                self._child.wait()
