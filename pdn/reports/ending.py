"""How a program ends that has started others."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

from pdn.errors import Preempted


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise SystemExit within, as Ctrl-C raises KeyboardInterrupt.

    Their default ends this process at once, and leaves alone what it has started. A SIGHUP that is
    ignored, as under ``nohup``, stays so; another thread than the main one hears of no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit(Preempted.exit_code))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
