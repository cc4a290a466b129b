#!/usr/bin/env python
"""Write a trained model as a Hugging Face folder.

    python scripts/export.py run=runs/<name> [out=exported/<name>] [dtype=bfloat16]

run     directory of a run, or one of its checkpoints (runs/<name>/checkpoints/step-00000100)
out     exported/<name of the run>; must not exist yet
dtype   float32 | bfloat16; decays, norms and the preconditioner's parameters stay float32
weights last | ema, the moving average of a run with optim.ema
"""

import pdn.cli.process  # noqa: F401 (before torch: see there)

# isort: split
from pathlib import Path
from typing import Literal

from pydantic import Field

from pdn.cli.options import Place, parse, run_script
from pdn.config import Strict
from pdn.hub import export
from pdn.hub.load import load_run
from pdn.reports.plots import save_curves


class Options(Strict):
    run: Place
    out: Place | None = None
    dtype: str = Field("float32", pattern="^(float32|bfloat16)$")
    weights: Literal["last", "ema"] = "last"


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments)
    run = load_run(options.run, weights=options.weights)
    out = Path(options.out or f"exported/{run.directory.name}")
    target, why_own = export(run, out, dtype=options.dtype, curves=save_curves)
    print(f"{out}: step {run.step}, {run.model.config.num_params():,} parameters, {options.dtype}")
    print(
        f"loads as {target.architecture} of {target.library}"
        + (f": no released class has {why_own}" if why_own else "")
    )


if __name__ == "__main__":
    run_script(main, usage=__doc__)
