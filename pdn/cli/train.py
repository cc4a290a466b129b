"""The program behind ``train.py``: compose, parse, fit. ``python -m pdn.cli.train`` runs it too."""

import pdn.cli.process  # noqa: F401 (first of all: it ties this process to its launcher)

# isort: split
import os
import sys

from pdn.cli.launch import main


def train(config) -> None:
    """Train the run that ``config``, a RunConfig, describes."""
    # Imported here, so that a mistake on the command line or Ctrl-C is answered before torch loads.
    from pdn.data import open_data
    from pdn.training.fit import fit

    fit(config, open_data=open_data)


def run() -> None:
    """Run the command line of this process and exit with the code of its outcome."""
    code = main(sys.argv[1:], train)
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        # A normal exit would destroy the process group, and so wait for peers that wait for
        # this rank.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
