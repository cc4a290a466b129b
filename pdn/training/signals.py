"""Signals from outside a run that ask it to stop."""

import contextlib
import signal
import time
from collections.abc import Iterator

from pdn.distributed.collectives import any_rank
from pdn.runs.launcher import STOP_SIGNALS

_ECHO_SECONDS = 2.0


class Interrupted(Exception):
    """Tells that a stop signal arrived where it need not wait: ``StopRequest.interruptible``."""


class StopRequest:
    """Remembers that one of ``STOP_SIGNALS`` arrived.

    The trainer acts on it at the next step boundary. A SIGHUP that is ignored, as under ``nohup``,
    stays ignored.

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
        self._numbers = [number for number in STOP_SIGNALS if not _ignored_hangup(number)]
        for number in self._numbers:
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
        """Raise ``Interrupted`` inside at a stop signal, also at one that came before.

        For long waits that may be given up.

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
        """Return whether this rank received a signal.

        Ranks hear at different times: act only on ``agreed()``.
        """
        return self.name is not None

    def agreed(self) -> bool:
        """Return whether any rank was told to stop. Collective: once a step on every rank."""
        return any_rank(self.stop_requested)

    def restore(self) -> None:
        """Put the default handlers back, e.g. between two trials in one process."""
        for number in self._numbers:
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )


def _ignored_hangup(number: signal.Signals) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
