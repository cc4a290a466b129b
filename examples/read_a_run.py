"""What is in a run: `python examples/read_a_run.py runs/<name>`."""

import sys
from pathlib import Path

from tokenizers import Tokenizer

import pdn


def main(path: str | Path) -> str:
    """Print sizes, some of the optimiser's state and a continuation; returns the latter."""
    checkpoint = pdn.read_checkpoint(path)  # every byte verified, no tensor read yet
    name = next(name for name in checkpoint if name.endswith("mixer.q_proj.weight"))
    moments = checkpoint.moments(name)
    print(f"{checkpoint.path}, step {checkpoint.step}: {len(checkpoint)} tensors")
    print(f"{name} {checkpoint.shape(name)}: std {checkpoint[name].std():.4f}")
    for key, x in moments.items():
        print(f"  {key}: {tuple(x.shape)}, mean {x.float().mean():.3g}")

    run = pdn.load_run(path)
    tokenizer = Tokenizer.from_file(str(run.tokenizer))
    prompt = tokenizer.encode("import ", add_special_tokens=False).ids
    settings = dict(max_new_tokens=30, temperature=0.8, top_k=50, seeds=[0], eos_id=run.eos_id)
    text = tokenizer.decode(
        [int(token[0]) for token in pdn.generate(run.model, [prompt], **settings)]
    )
    print(f"import {text}")
    return text


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("read_a_run.py: expected one run; give its directory: runs/<name>")
    main(sys.argv[1])
