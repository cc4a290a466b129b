"""What every program of this project does before it imports anything else: importing this does it.

Ctrl-C is answered from here on, what is not installed is said, the process is tied to its launcher,
and the threads of torch's libraries are told how to wait. Standard library only, and before torch:
its libraries read the environment once.
"""

import os
import signal
import sys

INTERRUPTED = 130  # exit code, as shells report SIGINT
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _end_at_once(number: int, frame: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _is_a_program() -> bool:
    """Return whether what runs is a program of this project, and not what imports a part of it."""
    file = getattr(sys.modules["__main__"], "__file__", None) or ""
    place = os.path.relpath(os.path.realpath(file), os.path.realpath(_ROOT)).split(os.sep)
    return bool(file) and place[0] in ("train.py", "scripts", "data", "pdn")


def restore_interrupts() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again: the program has come to what handles it.

    What it needs is imported by then.
    """
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _fill_standard_streams() -> None:
    """Put the null device where standard input, output or error is closed, as of some daemons.

    The next file that is opened would have its number, and get what libraries print there; and
    Python has None in the place of the stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (for good)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


_fill_standard_streams()

# Torch's libraries find their files by it, and end the process with a message of their own.
try:
    os.getcwd()
except OSError as error:
    print(
        f"pdn[E-IO] working directory: {error.strerror}; expected one that is there: cd there "
        "again",
        file=sys.stderr,
    )
    sys.exit(74)

# A KeyboardInterrupt in the middle of an import is a traceback at best; some libraries turn it into
# another error, and the import system drops it in places. Nothing needs to be undone yet. Where
# SIGINT is ignored, as in the background of a script, it remains so.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _is_a_program():
    signal.signal(signal.SIGINT, _end_at_once)

# isort: split
import importlib.util  # noqa: E402
import io  # noqa: E402

from pdn.runs.launcher import die_with_launcher  # noqa: E402

NEEDED = ("torch", "hydra", "pydantic", "yaml", "rich", "tokenizers", "numpy")

missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    print(
        f"pdn[E-INSTALL] {', '.join(missing)}: not installed for {sys.executable}; expected the "
        "packages of pyproject.toml: `make install && . .venv/bin/activate`, or pip install -e .",
        file=sys.stderr,
    )
    sys.exit(78)

die_with_launcher()

# Each line goes out at once, into a file or a pipe too, or a run would look dead for minutes. What
# an encoding lacks is shown escaped: a file's name or a dash must not end a run.
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")

# OpenMP's threads spin for a while before they sleep. With the default, an endless count, they
# starve each other on a shared machine. With no spinning every small operation waits for the
# scheduler, which halves the speed of an idle machine. On two cores with a load of 12 a tiny model
# trained with 120 tokens/s at a count of 10,000, 340 at 1,000 and 420 to 780 at none; with the
# default it did not end its first steps within a minute.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
