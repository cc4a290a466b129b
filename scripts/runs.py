#!/usr/bin/env python
"""Look at how runs came of each other.

    python scripts/runs.py tree runs/
    python scripts/runs.py check runs/b

tree   draw the runs below a directory, each under the one it is a branch of
check  prove from the ledgers that no token was trained on twice in an epoch
"""

from pathlib import Path

from pdn.cli.options import run_script
from pdn.errors import ConfigError
from pdn.runs.ancestry import check, tree

COMMANDS = {"tree": tree, "check": check}


def main(arguments: list[str]) -> None:
    command, *places = arguments
    if command not in COMMANDS or not places:
        raise ConfigError(
            "RUNS", f"{' '.join(arguments)}: expected tree or check, and directories of runs"
        )
    for place in places:
        print("\n".join(COMMANDS[command](Path(place).expanduser())))


if __name__ == "__main__":
    run_script(main, usage=__doc__)
