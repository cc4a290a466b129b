"""Notices that a run stands still, names the rank that holds it up, and ends the process.

A rank stopped, swapped out or stuck in I/O leaves the others waiting in a collective, whose own
timeout says nothing about who is missing.
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from pdn.distributed.collectives import is_distributed
from pdn.errors import PdnError
from pdn.wording import first_line

_PULSE_SECONDS = 1.0
_FROZEN_SECONDS = 3.0  # a thread that publishes every second, silent this long, is not being run
_STORE_SECONDS = 6.0  # a store that has not answered by then hangs


class StallError(PdnError):
    """Tells that no step completed within the watchdog's timeout."""

    exit_code = 70


class Watchdog:
    """Ends this process when nothing called ``beat`` or ``alive`` for ``timeout_s`` seconds.

    Each rank's thread publishes its pulse and last step through the process group's store, also
    while its main thread is stuck; a rank without a pulse is frozen, otherwise the one with the
    fewest beats is the slow one.

    Args:
        timeout_s: longest time between two beats, in seconds; counted from the first beat, since
            compilation precedes it.
        on_stall: called with the message before the process ends, e.g. to write ``status.json``.
            Default: nothing.

    The process ends with ``os._exit(70)``: a thread stuck in a collective cannot be unwound.
    """

    def __init__(self, timeout_s: float, on_stall: Callable[[StallError], None] | None = None):
        if timeout_s <= 0:
            raise ValueError(f"timeout_s={timeout_s}: expected a positive number of seconds")
        self.timeout_s = timeout_s
        self._on_stall = on_stall
        self._beats, self._step, self._phase, self._last = 0, -1, "start", 0.0
        self._closed = threading.Event()
        self.rank, self.world_size = (
            (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        )
        self._store = own_store() if is_distributed() else None
        # Two threads, since a store whose server is frozen blocks whoever asks it.
        self._threads = [
            threading.Thread(target=work, name="watchdog", daemon=True)
            for work in (self._pulsate, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def beat(self, step: int, phase: str = "train") -> None:
        """Tell that ``step`` is done and ``phase`` (data, train, evaluate, save, …) begins.

        To be called as often on every rank. Costs about a microsecond.
        """
        self._beats, self._step, self._phase, self._last = (
            self._beats + 1,
            step,
            phase,
            time.monotonic(),
        )

    def alive(self) -> None:
        """Tell that this rank is at work in a phase that takes long.

        Unlike ``beat`` it may be called as often as a rank likes.
        """
        self._last = time.monotonic()

    def close(self) -> None:
        """End the watch: training is over."""
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2 * _PULSE_SECONDS)

    def _pulsate(self) -> None:
        pulse = 0
        while self._store is not None:
            self._publish(self._store, pulse)
            pulse += 1
            if self._closed.wait(_PULSE_SECONDS):
                return

    def _watch(self) -> None:
        while not self._closed.wait(min(_PULSE_SECONDS, self.timeout_s / 4)):
            silent = time.monotonic() - self._last
            if self._last and silent > self.timeout_s:
                self._end(silent)

    def _publish(self, store: Store, pulse: int) -> None:
        # A store that is gone means that the launcher is; then so are we, shortly.
        with contextlib.suppress(RuntimeError):
            store.set(_pulse_of(self.rank), f"{pulse} {self._beats} {self._step} {self._phase}")

    def _end(self, silent: float) -> None:
        suspect = self._find_slow_rank()
        error = StallError(
            "STALL",
            f"rank {self.rank}: no step for {silent:.0f} s after step {self._step} "
            f"({self._phase}), limit {self.timeout_s:g} s; {suspect}. The run resumes from its "
            "last checkpoint when launched again",
        )
        # Straight to the descriptor: the stuck thread may hold the lock of sys.stderr.
        os.write(2, f"{error}\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
        if self._on_stall is not None:
            with contextlib.suppress(Exception):  # no failure may keep the process alive
                self._on_stall(error)
        os._exit(StallError.exit_code)

    def _find_slow_rank(self) -> str:
        store = self._store
        if store is None:
            return "this is the only rank"
        found: list[str] = []
        asking = threading.Thread(
            target=lambda: found.append(self._compare_pulses(store)), daemon=True
        )
        asking.start()
        asking.join(_STORE_SECONDS)
        return (
            found[0]
            if found
            else "slow rank unknown: the ranks' store does not answer, suspect rank 0 or the "
            "launcher"
        )

    def _compare_pulses(self, store: Store) -> str:
        try:
            ranks = range(self.world_size)
            before = pulses(store, ranks)
            time.sleep(_FROZEN_SECONDS)
            after = pulses(store, ranks)
        except RuntimeError as error:
            return (
                f"slow rank unknown: the ranks' store is gone ({first_line(error)}), "
                "suspect rank 0 or the launcher"
            )
        frozen = [
            rank
            for rank in range(self.world_size)
            if rank != self.rank and after.get(rank) == before.get(rank)
        ]
        if frozen:
            return (
                f"slow rank {', '.join(map(str, frozen))}: its process does not run (stopped, or "
                "its machine is gone)"
            )
        beats = {rank: int(value.split()[1]) for rank, value in after.items()}
        slowest, fastest = min(beats, key=beats.__getitem__), max(beats, key=beats.__getitem__)
        if beats[slowest] == beats[fastest]:
            return f"all {self.world_size} ranks are at step {self._step} ({self._phase})"
        return f"slow rank {slowest}: {place_of(after[slowest])}, others {place_of(after[fastest])}"


def pulses(store: Store, ranks: Iterable[int]) -> dict[int, str]:
    """Return what each rank last published: pulse, beats, step and phase; none of the silent."""
    keys = {rank: _pulse_of(rank) for rank in ranks}
    return {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}


def place_of(pulse: str) -> str:
    """Say where a rank was when it published ``pulse``."""
    _, _, step, phase = pulse.split()
    return f"at step {step} ({phase})" if int(step) >= 0 else "before its first step"


def _pulse_of(rank: int) -> str:
    return f"pdn/pulse/{rank}"


def own_store() -> Store:
    """Return the ranks' store over a connection of its own.

    The main thread may hold the other one in a blocking call.
    """
    shared: Any = dist.distributed_c10d._get_default_store()  # torch's stubs lack ``clone``
    return shared.clone()
