#!/usr/bin/env python
"""Tell what a run would take: parameters, FLOPs, memory of a rank, hours on 1 to 1024 GPUs.

    python scripts/estimate.py experiment=pgdn_340m model.vocab_size=32000 gpu=H100 ranks=8
    python scripts/estimate.py model=transformer_1b model.vocab_size=32000 trainer.steps=20000

Nothing is opened or built: no data, no device. Groups and keys of train.py go to the run.

gpu    H200 | H100: the one whose measured speeds count
ranks  1; GPUs that the memory of one is told for
"""

import pdn.cli.process  # noqa: F401 (before torch: see there)

# isort: split
from typing import Literal

from pydantic import Field

from pdn.cli.compose import compose
from pdn.cli.options import parse, run_script
from pdn.cli.parse import parse as parse_run
from pdn.config import Strict
from pdn.errors import ConfigError
from pdn.training.estimate import sized


class Options(Strict):
    gpu: Literal["H200", "H100"] = "H200"
    ranks: int = Field(1, ge=1)


def main(arguments: list[str]) -> None:
    own = [word for word in arguments if word.partition("=")[0] in Options.model_fields]
    options = parse(Options, own)
    config = parse_run(compose([word for word in arguments if word not in own]))
    if config.model.vocab_size is None:
        raise ConfigError(
            "VOCAB",
            "model.vocab_size is null, and the data are not opened here; expected a number: "
            "model.vocab_size=32000, or trainer.dry_run=true of train.py, which opens them",
        )
    try:
        config.check_world_size(options.ranks)
    except ValueError as error:
        raise ConfigError("CONFIG", str(error)) from None
    print("\n".join(sized(config, options.ranks, options.gpu)))


if __name__ == "__main__":
    run_script(main, usage=__doc__)
