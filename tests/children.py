"""Processes that tests start: their environment, and whether they are still there."""

import os
from pathlib import Path

# This checkout before what the tests themselves were given: the packages may be there and nowhere
# else.
PYTHON_PATH = os.pathsep.join(
    filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
)


def state_of(pid: int) -> str:
    """Return the kernel's letter for what a process does, as in ``ps``; "" if there is none.

    A process may end between two looks at it, and while it is looked at.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """Return whether a process has not ended; one that nobody has waited for yet has."""
    return state_of(pid) not in ("", "X", "Z")


def command_of(pid: int) -> bytes:
    """Return the words of a process's command line, each ended by a null; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
