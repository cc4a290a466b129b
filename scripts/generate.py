#!/usr/bin/env python
"""Sample text from a trained model.

    python scripts/generate.py run=runs/<name> prompt='Once upon a time' max_new_tokens=200

run              directory of a run, one of its checkpoints
                 (runs/<name>/checkpoints/step-00000100), or an exported folder
prompt           null; text to continue; null: none
prompt_file      null; a file that holds it: a .jsonl file many, one JSON string or
                 {"prompt": "..."} a line, any other one
max_new_tokens   200
temperature      0.8; 0 always takes the most likely token
top_k            50; 0 keeps all
top_p            1.0; the smallest set of tokens with at least this probability
seed             0
samples          1; continuations of every prompt. A single one is streamed, several are printed
                 when they are done
batch_size       32; sequences decoded together, of any lengths
device           auto | cpu | cuda
"""

import pdn.cli.process  # noqa: F401 (before torch: see there)

# isort: split
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import Field

from pdn.cli.options import Place, parse, run_script
from pdn.config import Strict
from pdn.data.codec import Codec, open_codec
from pdn.data.records import format_of, json_lines, read_whole
from pdn.data.row import BadRow
from pdn.distributed.world import join_world
from pdn.errors import ConfigError, DataError
from pdn.hub.load import load_run
from pdn.inference.generate import generate, stream_text
from pdn.inference.load import LoadedRun
from pdn.inference.sampling import stream_seed


class Options(Strict):
    run: Place
    prompt: str | None = None
    prompt_file: Place | None = None
    max_new_tokens: int = Field(200, ge=1)
    temperature: float = Field(0.8, ge=0)
    top_k: int = Field(50, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    samples: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)
    device: str = Field("auto", pattern="^(auto|cpu|cuda)$")


def read_prompts(file: str) -> list[str]:
    """Read the prompts in a file.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or a line of a .jsonl file is not
            one.
    """
    try:
        if format_of(Path(file)) == ".parquet":
            raise ConfigError(
                "PROMPT",
                f"prompt_file={file}: found parquet; expected a .txt, which is one prompt, or a "
                ".jsonl of prompts",
            )
        if format_of(Path(file)).startswith(".jsonl"):
            prompts = [_prompt(file, *line) for line in json_lines(Path(file))]
        else:
            prompts = [text for text in [read_whole(Path(file))] if text.strip()]
    except DataError as error:
        raise ConfigError("PROMPT", f"prompt_file={file}: {error.args[0]}") from None
    if not prompts:
        raise ConfigError(
            "PROMPT", f"prompt_file={file}: is empty; expected a prompt, or prompt= for none"
        )
    return prompts


def _prompt(file: str, number: int, value: object) -> str:
    if isinstance(value, BadRow):
        raise value
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ConfigError(
            "PROMPT",
            f"{file}, line {number}: {str(value)[:60]!r}; expected a JSON string or "
            f'{{"prompt": "..."}}',
        )
    return prompt.removeprefix("\ufeff")  # the mark of a file that the prompt once was


def stream(run: LoadedRun, tokenizer: Codec, prompt: list[int], settings: dict) -> int:
    """Print one continuation as it comes; return the number of tokens.

    Args:
        run: with the model.
        tokenizer: of the model.
        prompt: token ids.
        settings: of sampling, as ``generate`` takes them.
    """
    count = 0

    def counted() -> Iterator[int]:
        nonlocal count
        for token in generate(run.model, [prompt], **settings):
            count += 1
            yield int(token[0])

    for piece in stream_text(counted(), tokenizer.decode):
        print(piece, end="", flush=True)
    print()
    return count


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments)
    idle = {"top_k", "top_p", "seed", "samples"} & options.model_fields_set
    if options.temperature == 0 and idle:
        raise ConfigError(
            "SAMPLING",
            f"{', '.join(sorted(idle))}: found with temperature=0, which always takes the most "
            "likely token; expected a temperature above 0, or leave it out",
        )
    device = join_world(options.device, timeout=60).device
    run = load_run(
        options.run, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    if run.tokenizer is None:
        raise ConfigError(
            "TOKENIZER", f"{run.directory}: no tokenizer.json; this model was not trained on text"
        )
    tokenizer = open_codec(run.tokenizer, run.eos_id)
    if options.prompt is not None and options.prompt_file is not None:
        raise ConfigError("PROMPT", "prompt= and prompt_file=: found both; expected one of them")
    prompts = (
        [options.prompt or ""] if options.prompt_file is None else read_prompts(options.prompt_file)
    )
    prompts = [prompt for prompt in prompts for _ in range(options.samples)]
    encoded = [tokenizer.ids(prompt) or [run.eos_id] for prompt in prompts]
    settings = dict(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p, eos_id=run.eos_id,
    )  # fmt: skip
    seeds = [
        stream_seed(options.seed, number // options.samples, number % options.samples)
        for number in range(len(prompts))
    ]
    print(
        f"{run.directory.name}, step {run.step}, {options.max_new_tokens} tokens at temperature "
        f"{options.temperature}\n"
    )
    began, count = time.perf_counter(), 0
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        count = stream(run, tokenizer, encoded[0], settings | {"seeds": seeds})
    for first in range(0, len(prompts) if len(prompts) > 1 else 0, options.batch_size):
        batch = slice(first, first + options.batch_size)
        tokens = generate(run.model, encoded[batch], seeds=seeds[batch], **settings)
        rows = torch.stack(list(tokens), 1).tolist()
        for number, (prompt, row) in enumerate(
            zip(prompts[batch], rows, strict=True), start=first + 1
        ):
            row = row[: row.index(run.eos_id)] if run.eos_id in row else row
            count += len(row)
            print(f"--- {number}\n{prompt}{tokenizer.decode(row)}")
    seconds = time.perf_counter() - began
    print(f"\n{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s")


if __name__ == "__main__":
    run_script(main, usage=__doc__)
