"""Sends metrics to Weights & Biases without letting it delay, fail or outlive a run; ``metrics.jsonl`` stays the record."""

import logging
import math
import netrc
import os
import queue
import secrets
import threading
import time
from pathlib import Path
from urllib.parse import urlparse

from pdn.run_directory import storage_errors, write_durably

log = logging.getLogger(__name__)

_QUEUE_RECORDS = 10_000
_INIT_TIMEOUT_S = 30
_DONE = object()


class Telemetry:
    """Records go into a queue; a daemon thread imports wandb, connects and sends them.

    Without a key (``WANDB_API_KEY`` or an entry in ``~/.netrc``), or when the server does not take the run within 30 s,
    wandb records offline under the run directory (``wandb sync`` uploads that later). If wandb is missing or fails, one
    line says so and training goes on.

    Args:
        run_dir: the run's directory; wandb's files go to ``run_dir/wandb``.
        kind: ``"wandb"`` or ``"none"``.
        project, name: as shown by wandb.
        run_id: wandb's id of the run; None keeps one in ``run_dir/wandb-run-id``, so that a resumed run continues there.
        config: the resolved configuration, shown by wandb.

    Construct it on rank 0 only.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        kind: str,
        project: str = "pdn",
        name: str | None = None,
        run_id: str | None = None,
        config: dict | None = None,
    ):
        if kind not in ("wandb", "none"):
            raise ValueError(f"kind={kind!r}: expected wandb or none")
        self._thread: threading.Thread | None = None
        self._alive = kind == "wandb"
        self._abandoned = False
        self._dropped = 0
        if kind == "none":
            return
        self._records: queue.Queue = queue.Queue(_QUEUE_RECORDS)
        run_id = run_id or _kept_run_id(Path(run_dir))
        self._init = {"project": project, "name": name or Path(run_dir).name, "id": run_id, "dir": str(run_dir), "config": config}
        self._thread = threading.Thread(target=self._serve, name="telemetry", daemon=True)
        self._thread.start()

    def log(self, record: dict) -> None:
        """Queue one record with its ``"step"``; never blocks. Records beyond 10,000 unsent ones are dropped and counted."""
        if not self._alive:
            return
        try:
            self._records.put_nowait(dict(record))
        except queue.Full:
            self._dropped += 1

    def close(self, exit_code: int = 0, timeout_s: float = 5.0) -> None:
        """Send what is queued and end the run, for at most ``timeout_s`` seconds; what was not sent is in ``metrics.jsonl``."""
        if self._thread is None:
            return
        deadline = time.monotonic() + timeout_s
        try:
            self._records.put((_DONE, exit_code), timeout=timeout_s)
        except queue.Full:
            self._dropped += 1
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._abandoned = True
            log.warning("wandb did not finish within %g s: left behind; metrics.jsonl is complete", timeout_s)
        if self._dropped:
            log.warning("wandb was too slow: %d records were not sent; metrics.jsonl has them", self._dropped)
        self._thread = None
        self._alive = False

    def _serve(self) -> None:
        try:
            run = self._start()
            while True:
                record = self._records.get()
                if isinstance(record, tuple):
                    run.finish(exit_code=record[1])
                    return
                run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])
        except ImportError:
            log.warning("wandb is not installed: metrics go to metrics.jsonl only (pip install wandb, or logger=none)")
        except Exception as error:
            # Whatever ails it, wandb must not end a training run. Once abandoned, its exit hooks fail it by design.
            if not self._abandoned:
                log.warning("wandb stopped (%s: %s); metrics.jsonl goes on", type(error).__name__, _first_line(error))
        finally:
            self._alive = False

    def _start(self):
        import wandb

        online = _has_key() and os.environ.get("WANDB_MODE", "online") == "online"
        if not online and "WANDB_MODE" not in os.environ:
            log.info("no wandb key (WANDB_API_KEY or ~/.netrc): recording offline; upload later with wandb sync")
        # Nothing of the machine, the repository or the console belongs to the metrics; console capture also patches stdout.
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            init_timeout=_INIT_TIMEOUT_S,
        )
        mode = "online" if online else os.environ.get("WANDB_MODE", "offline")
        try:
            return wandb.init(mode=mode, resume="allow", settings=settings, **self._init)
        except Exception as error:
            if not online or self._abandoned:
                raise
            log.warning("wandb took no run (%s: %s): recording offline", type(error).__name__, _first_line(error))
            wandb.teardown()
            return wandb.init(mode="offline", settings=settings, **self._init)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _kept_run_id(run_dir: Path) -> str:
    file = run_dir / "wandb-run-id"
    with storage_errors(file):
        if file.exists():
            return file.read_text().strip()
        run_id = secrets.token_hex(4)
        write_durably(file, run_id.encode())
        return run_id
