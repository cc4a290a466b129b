#!/usr/bin/env python
"""Plot decoding speed and state by length, models side by side.

    python scripts/plot_decoding.py models=pgdn_tiny,transformer_tiny [key=value …]

models      a,b,…: names of configs/model, with fresh weights; what they say does not matter here
lengths     256,1024,4096; tokens already read when the timed ones are decoded
tokens      32; timed tokens at each length
batch_size  1
out         decoding.png, .svg or .html; the numbers are written beside it as JSON
device      auto | cpu | cuda
"""

import pdn.cli.process  # noqa: F401 (before torch: see there)

# isort: split
import json
import time
from pathlib import Path

import torch
from pydantic import Field
from torch.utils._pytree import tree_leaves

from pdn.cli.compose import compose
from pdn.cli.options import Lengths, Names, Place, parse, run_script
from pdn.cli.parse import parse as parse_run
from pdn.config import Strict
from pdn.distributed.fsdp import join_world
from pdn.models.language_model import LanguageModel
from pdn.reports.plots import save, small_multiples

VOCABULARY = 32000


class Options(Strict):
    models: Names = ("pgdn_tiny", "transformer_tiny")
    lengths: Lengths = (256, 1024, 4096)
    tokens: int = Field(32, ge=1)
    batch_size: int = Field(1, ge=1)
    out: Place = Field("decoding.png", pattern=r"\.(png|svg|pdf|html)$")
    device: str = Field("auto", pattern="^(auto|cpu|cuda)$")


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments)
    device = join_world(options.device, timeout=60).device
    curves: dict[str, list[dict]] = {}
    for name in options.models:
        model = build(name, device)
        curves[name] = [at_length(model, length, options) for length in options.lengths]
        for point in curves[name]:
            print(
                f"{name:20} {point['length']:7,} tokens  {point['ms_per_token']:8.2f} ms a token  "
                f"{point['state_mib']:9.3f} MiB"
            )
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} thread(s)"
    )
    panels = [("time a token", "ms", "ms_per_token"), ("state", "MiB a sequence", "state_mib")]
    title = f"decoding, batch {options.batch_size}, {where}"
    out = Path(options.out)
    save(small_multiples(curves, panels, x="length", x_label="tokens before it", title=title), out)
    out.with_suffix(".json").write_text(
        json.dumps({"where": where, "batch_size": options.batch_size, "curves": curves}, indent=1),
        encoding="utf-8",
    )
    print(out)


def build(name: str, device: torch.device) -> LanguageModel:
    config = parse_run(compose([f"model={name}", f"model.vocab_size={VOCABULARY}"]))
    model = LanguageModel(config.model)
    model.to(device)
    model.init_weights(0)
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


@torch.inference_mode()
def at_length(model: LanguageModel, length: int, options: Options) -> dict:
    """Measure a decoding step after ``length`` tokens.

    Returns its median time, and the size of what is carried from step to step.

    Args:
        model: to decode with.
        length: tokens already read.
        options: of the command line.
    """
    device = model.embedding.weight.device
    prompt = torch.randint(
        0, VOCABULARY, (options.batch_size, length), generator=torch.Generator().manual_seed(0)
    ).to(device)
    state = model.init_state(options.batch_size)
    for part in prompt.split(1024, 1):
        state = model.hidden(part, state=state)[1]
    size = sum(
        leaf.numel() * leaf.element_size() for leaf in tree_leaves(state) if leaf is not None
    )
    token, seconds = prompt[:, -1:], []
    for _ in range(options.tokens + 3):
        began = time.perf_counter()
        output = model(token, state=state)
        token, state = output.logits[:, -1:].argmax(-1), output.state
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    ms = 1e3 * sorted(seconds[3:])[len(seconds[3:]) // 2]
    return {"length": length, "ms_per_token": ms, "state_mib": size / options.batch_size / 2**20}


if __name__ == "__main__":
    run_script(main, usage=__doc__)
