#!/usr/bin/env python
"""Average the weights of a run's last checkpoints, into a run that is evaluated and exported.

    python scripts/average.py run=runs/<name> last=5 [out=runs/<name>-average-5]

run    directory of a run that kept enough checkpoints (checkpoint.keep_last, checkpoint.keep_every)
last   how many of them
out    directory of the average; must not exist yet
"""

import pdn.cli.process  # noqa: F401 (before torch: see there)

# isort: split
from pathlib import Path

from pydantic import Field

from pdn.cli.options import Place, parse, run_script
from pdn.config import Strict
from pdn.inference.average import average


class Options(Strict):
    run: Place
    last: int = Field(ge=2)
    out: Place | None = None


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments)
    run = Path(options.run)
    out = Path(options.out or run.with_name(f"{run.name}-average-{options.last}"))
    steps = average(run, options.last, out)
    print(f"{out}: the mean of steps {', '.join(map(str, steps))}")


if __name__ == "__main__":
    run_script(main, usage=__doc__)
