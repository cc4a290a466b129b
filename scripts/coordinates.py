#!/usr/bin/env python
"""Check muP: train models of several widths for a few steps, and compare the size of their numbers.

    python scripts/coordinates.py model=pgdn [key=value …]

model       name of configs/model without its size, such as pgdn
depths      null; such as 2,4,8,16: num_layers in the place of widths, at d_model=base_width; the
            rules are those of model.base_depth, the first of them
widths      128,256,512,1024; d_model, multiples of head_dim
base_width  128; as model.base_width
rules       true; false: without muP, for comparison
head_dim    32; the same at every width
lr          2e-3; at the base width
seeds       3; of initialisation and data
steps       10
out         coordinates.png, .svg or .html
"""

import pdn.cli.process  # noqa: F401 (before torch: see there)

# isort: split
from pathlib import Path

from pydantic import Field

from pdn.cli.compose import compose
from pdn.cli.options import Lengths, Place, parse, run_script
from pdn.cli.parse import parse as parse_run
from pdn.config import Positive, Strict
from pdn.errors import ConfigError
from pdn.models.language_model import LanguageModel
from pdn.optim.config import OptimConfig
from pdn.reports.plots import log_log, save
from pdn.training.coordinates import first_and_last, slopes
from pdn.wording import counted

VOCABULARY = 256


class Options(Strict):
    model: str
    depths: Lengths | None = None
    widths: Lengths = (128, 256, 512, 1024)
    base_width: int = Field(128, ge=1)
    rules: bool = True
    head_dim: int = Field(32, ge=1)
    lr: Positive = 2e-3
    seeds: int = Field(3, ge=1)
    steps: int = Field(10, ge=1)
    out: Place = Field("coordinates.png", pattern=r"\.(png|svg|pdf|html)$")


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments)
    depths = options.depths
    key, axis = ("widths", options.widths) if depths is None else ("depths", depths)
    if len(set(axis)) < 2:
        raise ConfigError(key.upper(), f"{key}={','.join(map(str, axis))}: expected two or more")
    for width in options.widths if depths is None else (options.base_width,):
        if width % options.head_dim:
            raise ConfigError(
                "WIDTHS", f"width {width}: expected a multiple of head_dim={options.head_dim}"
            )
    found, sizes = slopes(
        lambda size, seed: build(options, size, seed),
        widths=axis,
        seeds=options.seeds,
        steps=options.steps,
        named=dict if depths is None else first_and_last,
    )
    print(f"{'':22}slope  " + "".join(f"{size:>10}" for size in axis))
    for name, slope in found.items():
        print(f"{name:20} {slope:+7.3f}  " + "".join(f"{size:10.4g}" for size in sizes[name]))
    base = options.base_width if depths is None else f"depth {depths[0]}"
    rules = f"muP of base {base}" if options.rules else "without muP"
    title = f"{options.model}, {rules}, {counted(options.steps, 'step')}"
    out = Path(options.out)
    name = "d_model" if depths is None else "num_layers"
    save(log_log(list(axis), sizes, name, "root mean square", title), out)
    print(out)


def build(options: Options, size: int, seed: int) -> tuple[LanguageModel, OptimConfig]:
    """Return a fresh model of two layers or of a depth, and its optimiser's configuration."""
    depths = options.depths
    width, layers = (size, 2) if depths is None else (options.base_width, size)
    shape = {
        "vocab_size": VOCABULARY,
        "num_layers": layers,
        "d_model": width,
        "head_dim": options.head_dim,
        "num_heads": width // options.head_dim,
        "intermediate_size": 3 * width,
        "base_width": options.base_width if options.rules else "null",
        "base_depth": depths[0] if depths is not None and options.rules else "null",
    }
    words = [f"model={options.model}_tiny", f"optim.lr={options.lr}"]
    words += ["optim.groups.embeddings.lr_scale=1.0"]  # one rate for all parts
    words += [f"model.{key}={value}" for key, value in shape.items()]
    config = parse_run(compose(words))
    model = LanguageModel(config.model)
    model.init_weights(seed)
    return model, config.optim


if __name__ == "__main__":
    run_script(main, usage=__doc__)
