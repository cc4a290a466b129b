"""Signals from outside a run: stopping politely, dying with the launcher, and noticing that nothing
moves.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator

from pdn.distributed.collectives import agree

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ECHO_SECONDS = 2.0


class Interrupted(Exception):
    """A stop signal arrived where it need not wait: see ``StopRequest.interruptible``."""


class StopRequest:
    """Remembers that SIGTERM, SIGUSR1 or SIGINT arrived; the trainer acts on it at the next step
    boundary.

    Repeated signals change nothing, except that a SIGINT later than 2 s after the first one ends
    the process at once:
    Ctrl-C under torchrun arrives twice, from the terminal and from the launcher.

    Construct it in the main thread. ``name`` is the signal's name once one arrived, for
    ``status.json``.
    """

    def __init__(self):
        self.name: str | None = None
        self._first = 0.0
        self._interruptible = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._first = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._first > _ECHO_SECONDS:
            raise KeyboardInterrupt
        self._interrupt()

    def _interrupt(self) -> None:
        if self._interruptible and self.name is not None:
            self._interruptible = False
            raise Interrupted(self.name)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a stop signal raises ``Interrupted``, also one that came before: for long waits
        that may be given up.

        It may be raised between any two instructions of the main thread: no collective may be
        inside.
        """
        self._interruptible = True
        try:
            self._interrupt()
            yield
        finally:
            self._interruptible = False

    @property
    def stop_requested(self) -> bool:
        """Whether this rank received a signal. Ranks hear at different times: act only on
        ``agreed()``.
        """
        return self.name is not None

    def agreed(self) -> bool:
        """Whether any rank was told to stop. Collective: call it once a step on every rank."""
        return agree(self.stop_requested)

    def restore(self) -> None:
        """Put the default handlers back, e.g. between two trials in one process."""
        for number in STOP_SIGNALS:
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )


def die_with_launcher() -> bool:
    """Under torchrun, have the kernel SIGKILL this rank when the launcher dies; returns whether
    that was set.

    Without it a SIGKILL of torchrun leaves its workers running, holding devices and the run
    directory's lock. Linux only;
    elsewhere, and without a launcher, it does nothing: a plain ``nohup python train.py`` should
        outlive its shell.
    """
    if not sys.platform.startswith("linux") or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
    return True
