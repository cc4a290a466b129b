#!/usr/bin/env python
"""Draw runs side by side, from their metrics.jsonl alone.

    python scripts/plot.py runs/a runs/b [out=runs.png]
    python scripts/plot.py runs/sweep      all runs below a directory

out   runs.png; or a name that ends in .html, .svg or .pdf
"""

from pathlib import Path

from pdn.cli.options import Place, parse, run_script
from pdn.config import Strict
from pdn.errors import ConfigError
from pdn.reports.chosen import named, only_runs
from pdn.reports.plots import draw, save
from pdn.runs.records import read_metrics


class Options(Strict):
    out: Place = "runs.png"


def main(arguments: list[str]) -> None:
    runs = [Path(word) for word in arguments if "=" not in word]
    options = parse(Options, [word for word in arguments if "=" in word])
    if not runs:
        raise ConfigError("PLOT", "no run named; expected plot.py runs/a runs/b")
    runs = named(only_runs(runs))
    save(draw({name: read_metrics(run) for name, run in runs.items()}), Path(options.out))
    print(options.out)


if __name__ == "__main__":
    run_script(main, usage=__doc__)
