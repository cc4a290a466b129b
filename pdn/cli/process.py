"""What every program of this project does before it imports anything else: importing this does it.

What is not installed is said, the process is tied to its launcher, and the threads of torch's
libraries are told how to wait. Standard library only, and before torch: its libraries read the
environment once.
"""

import importlib.util
import io
import os
import sys

from pdn.runs.launcher import die_with_launcher

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
