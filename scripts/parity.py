#!/usr/bin/env python
"""Train pairs of arms from the same weights on the same batches, and compare their losses.

    python scripts/parity.py corpus=corpus/sources.jsonl

Prints the losses of every step, and ends with OK where no difference exceeds the tolerance, else
with FAIL and exit code 70.

study      control_14m; docs/evidence/<name>.yaml, whose schedule, first rate and first seed count
pairs      gdn:gdn_same,pgdn:pgdn_same; arms that begin with the same weights, <base>:<other>
steps      50
tolerance  0.005; of the base's loss, at each step
corpus     null; data.path of the runs: a file or directory of text
words      null; further words of train.py for all runs, separated by commas
runs       runs/parity; their directories are <runs>/<arm>, begun anew each time
"""

from pathlib import Path

from pydantic import Field

from pdn.cli.options import Names, Place, parse, run_script
from pdn.config import Strict
from pdn.errors import ConfigError, NumericError
from pdn.reports.evidence import read_study
from pdn.reports.parity import compare_losses, train_arms
from pdn.wording import counted, override

STUDIES = Path(__file__).resolve().parents[1] / "docs" / "evidence"


class Options(Strict):
    study: str = "control_14m"
    pairs: Names = ("gdn:gdn_same", "pgdn:pgdn_same")
    steps: int = Field(50, ge=1)
    tolerance: float = Field(0.005, ge=0)
    corpus: Place | None = None
    words: Names = ()
    runs: Place = "runs/parity"


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments)
    pairs = [tuple(pair.split(":")) for pair in options.pairs]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ConfigError("OPTION", f"pairs={options.pairs}: expected <arm>:<arm>,...")
    extra = [*options.words, *([override("data.path", options.corpus)] if options.corpus else [])]
    study = read_study(STUDIES / f"{options.study}.yaml")
    arms = list(dict.fromkeys(arm for pair in pairs for arm in pair))
    steps = counted(options.steps, "step")
    print(f"{steps} of {', '.join(arms)}: output in {options.runs}/<arm>.log", flush=True)
    runs = train_arms(
        study,
        arms,
        Path(options.runs),
        steps=options.steps,
        extra=extra,
    )
    found = [compare_losses(runs, *pair) for pair in pairs]
    for parity in found:
        print("\n".join([*parity.lines(options.tolerance), ""]))
    apart = [parity.other for parity in found if not parity.holds(options.tolerance)]
    if apart:
        raise NumericError(
            "PARITY",
            f"FAIL: {', '.join(apart)}; expected losses within {options.tolerance:.4%} at every "
            "step: see the table",
        )
    print(f"OK: {counted(len(found), 'pair')} within {options.tolerance:.4%} in {steps}")


if __name__ == "__main__":
    run_script(main, usage=__doc__, bare=True)
