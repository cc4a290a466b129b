"""The launcher of this process: dying with it, and telling its launch from any other one.

Standard library only, and nothing else of the project: this runs before anything else is imported.
A rank that its launcher has left behind would wait at the launcher's port, and join whoever comes
there next.
"""

import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# What schedulers and terminals send before they end a process, to all of its group. SIGUSR2: Grid
# Engine and LSF; SIGXCPU: a limit on processor time; SIGHUP: the terminal is gone.
STOP_SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAUNCHERS = ("torchrun", "accelerate")  # names of programs
_LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch")
_ORPHANED = 70  # exit code
_SHOWN_ARGUMENTS = 300  # characters


def die_with_launcher() -> bool:
    """Have the kernel SIGKILL this rank of torchrun when its parent dies.

    The rank ends now if the launcher is dead already.

    Without it a SIGKILL of torchrun leaves its workers running, holding devices and the run
    directory's lock. Linux only; elsewhere, and without a launcher, it does nothing: a plain
    ``nohup python train.py`` should outlive its shell.

    Returns:
        Whether that was set.

    Raises:
        OSError: the kernel refused.
    """
    if not sys.platform.startswith("linux") or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The launcher may have died before the call. Its children then belong to init, or to whatever
    # ancestor adopts orphans: only a look at the ancestors tells.
    if not _has_launcher():
        message = f"rank {os.environ.get('RANK')}: its launcher is gone; ending\n"
        os.write(2, message.encode())
        os._exit(_ORPHANED)
    return True


def _has_launcher() -> bool:
    """Return whether an ancestor can be the launcher. True where that cannot be seen.

    That is torchrun, or a parent in Python that starts ranks by itself.
    """
    ancestors = list(_ancestors())
    if not ancestors or any(_is_launcher(words) for _, words in ancestors):
        return True
    parent, words = ancestors[0]
    return parent != 1 and bool(words) and os.path.basename(words[0]).startswith("python")


def _is_launcher(words: list[str]) -> bool:
    for before, word in zip(["", *words], words, strict=False):
        name = os.path.basename(word)
        if name in _LAUNCHERS or word.endswith(
            ("torch/distributed/run.py", "distributed/launch.py")
        ):
            return True
        if before == "-m" and word in _LAUNCHER_MODULES:
            return True
    return False


def _ancestors() -> Iterator[tuple[int, list[str]]]:
    """Yield process id and command line of the parent, its parent, and so on, while seen."""
    pid = os.getppid()
    while pid > 0:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = int(_stat(pid)[1])
        except (OSError, ValueError, IndexError):
            return
        yield pid, words[:-1]
        pid = parent


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat from the third one on: state, parent, …"""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


@dataclass(frozen=True)
class Seat:
    """Describes one rank of a launch as it knows itself, without having asked anybody.

    Attributes:
        launch: digest of the command line, the launcher's run id, ``restarts()``, and the number of
            ranks: the same for all ranks of a launch.
        agent: the launcher's process on this node, ``<pid>@<start time>``; "" where there is none
            or it cannot be told.
        node: the launcher's number of the node.
        place: ``PID … on <host>``.
        arguments: what the program was called with, shortened.
    """

    launch: str
    agent: str
    node: str
    place: str
    arguments: str

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str | bytes) -> "Seat":
        return Seat(**json.loads(text))

    def difference(self, other: "Seat") -> str | None:
        """Return why ``other`` is of another launch; None if it is of the same."""
        if self.launch != other.launch:
            if self.arguments != other.arguments:
                return f"it was called with {other.arguments!r}, this one with {self.arguments!r}"
            return "its launcher gave it another run id, restart count or number of ranks"
        if self.node == other.node and self.agent != other.agent:
            return f"its launcher is process {other.agent or '(gone)'}, that of this one " + (
                self.agent or "(gone)"
            )
        return None


def restarts() -> str:
    """Return the number of this group of ranks among those that meet in the same store.

    A restarted group must not read what the one before it left in the store of the launcher's
    agent. Where the ranks serve the store, each group has its own, and the count says nothing: an
    agent counts its own restarts, so that one that came in place of a lost one has counted less.
    """
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent_serves else "0"


def own_seat(arguments: list[str]) -> Seat:
    """Return the seat of this process.

    Args:
        arguments: what the program was called with.
    """
    names = ("TORCHELASTIC_RUN_ID", "WORLD_SIZE")
    whole = [arguments, restarts(), [os.environ.get(name) for name in names]]
    agent = next((pid for pid, words in _ancestors() if _is_launcher(words)), None)
    return Seat(
        launch=hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:32],
        agent="" if agent is None else f"{agent}@{_stat(agent)[19]}",
        node=os.environ.get("GROUP_RANK", ""),
        place=f"PID {os.getpid()} on {socket.gethostname()}",
        arguments=" ".join(arguments)[:_SHOWN_ARGUMENTS],
    )
