"""What each launch of a run was: its command, code, versions and machine."""

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

_PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "datasets", "safetensors")
_GIT_SECONDS = 5.0


def describe_launch(step: int) -> dict:
    """Return the record of this launch, which continues from ``step``, as JSON values."""
    return {
        "step": step,
        "time": time.time(),
        "command": shlex.join(sys.orig_argv),
        "directory": os.getcwd(),
        "git": _git(Path(__file__).parents[2]),
        "versions": _versions(),
        "device": _device(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "pdn": sys.modules["pdn"].__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(root: Path) -> dict | None:
    """Return the commit of the code, and whether tracked files differ from it, if any.

    A copy without its repository, such as a container's, is told it by ``PDN_COMMIT``.
    """
    if not (root / ".git").exists():
        told = os.environ.get("PDN_COMMIT")
        return {"commit": told, "changed": None} if told else None
    commit = _ask_git(root, "rev-parse", "HEAD")
    changed = _ask_git(root, "status", "--porcelain", "--untracked-files=no")
    if commit is None:
        return None
    return {"commit": commit, "changed": None if changed is None else bool(changed)}


def commit_of_code() -> str | None:
    """Return the commit of this code, if it lies in a repository."""
    found = _git(Path(__file__).parents[2])
    return None if found is None else found["commit"]


def _ask_git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()
