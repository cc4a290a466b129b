#!/usr/bin/env python
"""Write one interactive HTML file about several runs, which needs nothing else and no network.

    python scripts/report.py runs/a runs/b [out=report.html]
    python scripts/report.py runs/sweep      all runs below a directory

out   report.html
"""

from pathlib import Path

from pdn.cli.options import Place, parse, run_script
from pdn.config import Strict
from pdn.errors import ConfigError
from pdn.reports.chosen import named, only_runs
from pdn.reports.report import write


class Options(Strict):
    out: Place = "report.html"


def main(arguments: list[str]) -> None:
    runs = [Path(word) for word in arguments if "=" not in word]
    options = parse(Options, [word for word in arguments if "=" in word])
    if not runs:
        raise ConfigError("REPORT", "no run named; expected report.py runs/a runs/b")
    write(named(only_runs(runs)), Path(options.out))
    print(options.out)


if __name__ == "__main__":
    run_script(main, usage=__doc__)
