#!/usr/bin/env python
"""Bring a run from its replica in object storage here, every byte compared.

    python scripts/fetch.py replica=s3://bucket/prefix/a to=runs/a

replica  address of one run: the replica= that it was launched with, and its name
to       directory to make; one that is there must be empty
step     null; the checkpoint to bring; null: the newest one that is whole

Nothing is written to the store and no lease is taken: the run may be training meanwhile. What is
brought is for evaluation, generation and export; to continue the run elsewhere, launch it there
with the same replica=.
"""

import pdn.cli.process  # noqa: F401 (before torch: see there)

# isort: split
from pathlib import Path

from pydantic import Field

from pdn.checkpoint.fetch import fetch
from pdn.cli.options import Place, parse, run_script
from pdn.config import Strict


class Options(Strict):
    replica: str
    to: Place
    step: int | None = Field(None, ge=0)


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments)
    to = Path(options.to).expanduser()
    print(f"{to}: checkpoint of step {fetch(options.replica, to, options.step)}")


if __name__ == "__main__":
    run_script(main, usage=__doc__)
