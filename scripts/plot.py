#!/usr/bin/env python
"""Draw runs side by side, from their metrics.jsonl alone: plot.py runs/a runs/b [out=runs.png]

out   runs.png; or a name that ends in .html, .svg or .pdf
"""

from pathlib import Path

from pdn.cli.options import parse, run_script
from pdn.config import Strict
from pdn.errors import ConfigError
from pdn.reports.plots import draw, save
from pdn.runs.records import read_metrics


class Options(Strict):
    out: str = "runs.png"


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    runs = [Path(word) for word in arguments if "=" not in word]
    options = parse(Options, [word for word in arguments if "=" in word])
    if not runs:
        raise ConfigError("PLOT", "no run named; expected plot.py runs/a runs/b")
    runs = _only_runs(runs)
    save(draw(_named(runs)), Path(options.out))
    print(options.out)


def _only_runs(paths: list[Path]) -> list[Path]:
    """Those with metrics, of what runs/* may name; a path alone that does not exist is an error of
    reading it.
    """
    runs = [path for path in paths if (path / "metrics.jsonl").is_file() or not path.exists()]
    for path in paths:
        if path not in runs:
            print(f"{path}: not a run, left out")
    if not runs:
        raise ConfigError(
            "PLOT",
            f"{', '.join(map(str, paths))}: no run among them; expected directories with "
            "metrics.jsonl",
        )
    return runs


def _named(runs: list[Path]) -> dict[str, list[dict]]:
    """Records by the shortest end of the path that tells the runs apart."""
    for parts in range(1, 16):
        names = ["/".join(run.resolve().parts[-parts:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return {name: read_metrics(run) for name, run in zip(names, runs, strict=True)}


if __name__ == "__main__":
    run_script(main)
