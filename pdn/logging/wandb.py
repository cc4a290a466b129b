"""Sends metrics to Weights & Biases without letting it delay, fail or outlive a run.

``metrics.jsonl`` stays the record.

wandb lives in a child process fed through a pipe: its import, threads, exit hooks and crashes are
then not the trainer's, and a server that does not answer can be left behind by killing the child.
"""

import contextlib
import functools
import json
import logging
import netrc
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pdn.logging.heat import image
from pdn.runs.directory import WANDB_RUN_ID
from pdn.runs.launcher import STOP_SIGNALS
from pdn.store.local import storage_errors, write_durably
from pdn.wording import first_line

log = logging.getLogger(__name__)

_QUEUE_RECORDS = 10_000
_INIT_TIMEOUT_S = 30
_FINISH_TIMEOUT_S = 10


class WandbLogger:
    """Sends metrics through a queue and a thread to a child process that runs wandb.

    Every row carries ``step``, which wandb takes for its x axis in place of its own counter of
    rows: that one only ascends, and would drop what is logged after the run went back to an earlier
    step. Of two rows of one step the later one counts, as in ``metrics.jsonl``.

    Without a key (``WANDB_API_KEY`` or an entry in ``~/.netrc``), or when the server does not take
    the run within 30 s, wandb records offline under the run directory (``wandb sync`` uploads that
    later). If wandb is missing or fails, one line says so and training goes on.

    Args:
        run_dir: the run's directory; wandb's files go to ``run_dir/wandb``.
        project: as shown by wandb.
        entity, group: None leaves them to ``WANDB_ENTITY`` and ``WANDB_RUN_GROUP``.
        tags: besides those of ``WANDB_TAGS``.
        commit: of the code, shown by wandb; None: unknown.
        config: the resolved configuration, shown by wandb.

    Construct it on rank 0 only.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str = "pdn",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        commit: str | None = None,
        config: dict | None = None,
    ):
        self._child: subprocess.Popen | None = None
        self._dropped = 0
        run_dir = Path(run_dir).absolute()
        arguments: dict[str, Any] = {
            "project": project,
            "name": run_dir.name,
            "id": _kept_run_id(run_dir),  # a resumed run continues there
        }
        arguments |= {"dir": str(run_dir), "config": config, "entity": entity, "group": group}
        shown = os.environ.get("WANDB_TAGS", "").split(",")
        arguments["tags"] = [tag for tag in dict.fromkeys([*tags, *shown]) if tag]
        arguments["settings"] = {"git_commit": commit, "x_stats_pid": os.getpid()}
        root = str(Path(__file__).parents[2])
        self._child = subprocess.Popen(
            [sys.executable, "-m", "pdn.logging.wandb"],
            stdin=subprocess.PIPE,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))},
        )
        self._records: queue.Queue[dict | None] = queue.Queue(_QUEUE_RECORDS)
        self._records.put(arguments)
        self._feeder = threading.Thread(target=self._feed, name="telemetry", daemon=True)
        self._feeder.start()

    def log(self, step: int, values: dict) -> None:
        """Queue the values of a step; never blocks.

        Records beyond 10,000 unsent ones are dropped and counted.
        """
        self._put({**values, "step": step})

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: list[list]) -> None:
        """Queue a table of text and numbers, likewise."""
        self._put({"step": step, "table": name, "columns": list(columns), "rows": rows})

    def log_map(self, step: int, name: str, rows: list[list[float | None] | None]) -> None:
        """Queue a map of layers and heads, shown as an image, likewise."""
        self._put({"step": step, "map": name, "rows": rows})

    def rewind(self, step: int) -> None:
        """Do nothing: of two rows of one step the later one counts, and none can be withdrawn."""

    def _put(self, record: dict) -> None:
        if self._child is None:
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self, exit_code: int = 0, timeout_s: float = 5.0) -> None:
        """Send what is queued and end the run, for at most ``timeout_s`` seconds.

        What was not sent is in ``metrics.jsonl``.
        """
        if self._child is None:
            return
        deadline = time.monotonic() + timeout_s
        try:
            self._records.put({"exit_code": exit_code}, timeout=timeout_s)
            self._records.put(None, timeout=timeout_s)
            self._child.wait(max(0.1, deadline - time.monotonic()))
        except (queue.Full, subprocess.TimeoutExpired):
            log.warning(
                "wandb did not finish within %g s: left behind; metrics.jsonl is complete",
                timeout_s,
            )
            self._child.kill()
            self._child.wait()
        if self._dropped:
            log.warning(
                "wandb was too slow: %d records were not sent; metrics.jsonl has them",
                self._dropped,
            )
        self._child = None

    def _feed(self) -> None:
        # The child may be gone, which it has said itself: the queue is emptied all the same.
        assert self._child is not None and self._child.stdin is not None
        pipe = self._child.stdin
        while (record := self._records.get()) is not None:
            with contextlib.suppress(OSError, ValueError):
                pipe.write(json.dumps(record, default=str).encode() + b"\n")
                pipe.flush()
        with contextlib.suppress(OSError):
            pipe.close()


def _kept_run_id(run_dir: Path) -> str:
    file = run_dir / WANDB_RUN_ID
    with storage_errors(file):
        if file.exists():
            return file.read_text(encoding="utf-8").strip()
        run_id = secrets.token_hex(4)
        write_durably(file, run_id.encode())
        return run_id


def _serve() -> None:
    """Run the child: read what wandb is told from standard input.

    Its first line has the arguments of ``wandb.init``; records follow, and then the exit code.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # A stop signal reaches the whole process group; this process ends when its pipe does.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    arguments = json.loads(sys.stdin.buffer.readline())
    exit_code = 1  # a trainer that says nothing more was killed
    try:
        run = _start(arguments)
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        rows = _Rows(Path(arguments["dir"]) / "wandb" / "next-row", run.step)
        for line in sys.stdin.buffer:
            record = json.loads(line)
            if "step" in record:
                run.log(_row(record), step=rows.next())
            else:
                exit_code = record["exit_code"]
        rows.close()
        threading.Timer(_FINISH_TIMEOUT_S, os._exit, args=(0,)).start()
        run.finish(exit_code=exit_code)
    except ImportError:
        log.warning(
            "wandb is not installed: metrics go to metrics.jsonl only (pip install wandb, or "
            "logger=none)"
        )
    except Exception as error:
        # Whatever ails wandb, it must not end a training run.
        log.warning(
            "wandb stopped (%s: %s); metrics.jsonl goes on",
            type(error).__name__,
            first_line(error),
        )
    sys.stderr.flush()
    # Not a plain exit: wandb's hooks wait for its service, which may retry a dead server for
    # minutes.
    os._exit(0)


def _row(record: dict) -> dict:
    if "map" in record:
        return {"step": record["step"]} | _image(record["map"], record["rows"])
    if "table" not in record:
        return {key: value for key, value in record.items() if value is not None}
    import wandb

    table = wandb.Table(columns=record["columns"], data=record["rows"])
    return {"step": record["step"], record["table"]: table}


def _image(name: str, rows: list) -> dict:
    """Return a map as wandb shows it; nothing where its images need a package that is not there."""
    import wandb

    try:
        return {name: wandb.Image(image(rows))}
    except ImportError as error:
        _say_once(f"wandb shows no maps ({error}); telemetry.jsonl has them")
        return {}


@functools.cache
def _say_once(line: str) -> None:
    log.warning("%s", line)


class _Rows:
    """Gives numbers of rows that ascend over all launches of a run.

    Offline, wandb begins at 0 again, and its server drops rows of numbers that it has.

    Args:
        file: keeps where the next launch may begin.
        first: where wandb itself would.
    """

    BLOCK = 1000  # rows that are taken at a time, so that a killed launch leaves no number twice

    def __init__(self, file: Path, first: int):
        self._file, self._next = file, first
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            self._next = max(first, int(file.read_text(encoding="utf-8")))
        self._taken = self._next

    def next(self) -> int:
        if self._next == self._taken:
            self._taken += self.BLOCK
            self._file.write_text(str(self._taken), encoding="utf-8")
        self._next += 1
        return self._next - 1

    def close(self) -> None:
        self._file.write_text(str(self._next), encoding="utf-8")


def _start(arguments: dict):
    import wandb

    # wandb refuses what is no mode.
    mode: Any = os.environ.get("WANDB_MODE", "online" if _has_key() else "offline")
    if "WANDB_MODE" not in os.environ and mode == "offline":
        log.info(
            "no wandb key (WANDB_API_KEY or ~/.netrc): recording offline; upload later with wandb "
            "sync"
        )
    # The commit comes from the trainer: wandb would look for a repository where it was started.
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        init_timeout=_INIT_TIMEOUT_S,
        **arguments.pop("settings", {}),
    )
    try:
        return wandb.init(
            mode=mode, resume="allow" if mode == "online" else None, settings=settings, **arguments
        )
    except Exception as error:
        if mode != "online":
            raise
        log.warning(
            "wandb took no run (%s: %s): recording offline",
            type(error).__name__,
            first_line(error),
        )
        wandb.teardown()
        return wandb.init(mode="offline", settings=settings, **arguments)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


if __name__ == "__main__":
    _serve()
