#!/usr/bin/env python
"""Sample text from a trained model: generate.py run=runs/<name> prompt='Once upon a time' max_new_tokens=200

run              directory of a run, or one of its checkpoints (runs/<name>/checkpoints/step-00000100)
prompt           text to continue; prompt_file=<path> reads it from a file instead
max_new_tokens   200
temperature      0.8; 0 always takes the most likely token
top_k            50; 0 keeps all
top_p            1.0; the smallest set of tokens with at least this probability
seed             0
samples          1; continuations of the prompt, decoded together; one is streamed, several are printed at the end
device           auto | cpu | cuda
"""

import sys
import time
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from tokenizers import Tokenizer

from pdn.errors import ConfigError, PdnError
from pdn.generate import generate, stream_text
from pdn.load import load_run
from pdn.mixers.base import Strict


class Options(Strict):
    run: str
    prompt: str = ""
    prompt_file: str | None = None
    max_new_tokens: int = Field(200, ge=1)
    temperature: float = Field(0.8, ge=0)
    top_k: int = Field(50, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    samples: int = Field(1, ge=1)
    device: str = Field("auto", pattern="^(auto|cpu|cuda)$")


def parse(arguments: list[str]) -> Options:
    """Options from ``key=value`` words.

    Raises:
        ConfigError: a word without ``=``, an unknown key, or a value of the wrong kind.
    """
    words = [word.partition("=") for word in arguments]
    for key, equals, _ in words:
        if not equals:
            raise ConfigError("OPTION", f"{key!r}: expected key=value; keys: {', '.join(Options.model_fields)}")
    try:
        return Options.model_validate_strings({key: value for key, _, value in words})
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e.get('input')!r}" for e in error.errors())
        raise ConfigError("OPTION", f"{found}. Keys: {', '.join(Options.model_fields)}") from None


def read_prompt(options: Options) -> str:
    if options.prompt_file is None:
        return options.prompt
    try:
        return Path(options.prompt_file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("PROMPT", f"prompt_file={options.prompt_file}: {error}; expected a readable UTF-8 file") from None


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    options = parse(arguments)
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    run = load_run(options.run, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    if run.tokenizer is None:
        raise ConfigError("TOKENIZER", f"{run.directory}: no tokenizer.json; this model was not trained on text")
    tokenizer = Tokenizer.from_file(str(run.tokenizer))
    prompt = read_prompt(options)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [run.eos_id]
    print(f"{run.directory.name}, step {run.step}, {options.max_new_tokens} tokens at temperature {options.temperature}\n")
    began = time.perf_counter()
    tokens = generate(
        run.model,
        torch.tensor([ids] * options.samples, device=device),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p,
        eos_id=run.eos_id,
        generator=torch.Generator(device).manual_seed(options.seed),
    )
    count = 0
    if options.samples == 1:
        print(prompt, end="", flush=True)

        def counted():
            nonlocal count
            for token in tokens:
                count += 1
                yield int(token[0])

        for piece in stream_text(counted(), tokenizer.decode):
            print(piece, end="", flush=True)
        print()
    else:
        rows = torch.stack(list(tokens), 1)
        count = rows.numel()
        for number, row in enumerate(rows.tolist(), start=1):
            print(f"--- {number}\n{prompt}{tokenizer.decode(row)}")
    seconds = time.perf_counter() - began
    print(f"\n{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PdnError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
