#!/usr/bin/env python
"""Print what the model saw: ``inspect_data.py (RUN | data=NAME [overrides]) --step S [--sample I]``.

RUN is a run's directory (its config.yaml says which data, seed and batch); without one, the data config is composed as
`train.py` would. Step S is the S-th optimiser step, counted from 1: samples [(S-1)·G, S·G).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import yaml
from pydantic import TypeAdapter
from tokenizers import Tokenizer

from data import open_data
from data.config import DataConfig
from data.errors import DataError


def run_config(run: Path) -> dict:
    path = run / "config.yaml" if run.is_dir() else run
    if not path.is_file():
        raise DataError("INSPECT-RUN", f"{path}: no such file; expected a run's directory or its config.yaml")
    return yaml.safe_load(path.read_text())


def composed_config(overrides: list[str]) -> dict:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(Path(__file__).resolve().parent.parent / "configs"), version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=overrides), resolve=True, throw_on_missing=True)


def show(sample: int, row: dict[str, np.ndarray], data, tokenizer: Tokenizer, ids: bool) -> None:
    source, place, epoch = data.origin(sample)
    tokens, labels = row["tokens"], row["labels"]
    documents = int((tokens == data.eos_id).sum()) + 1
    print(
        f"--- sample {sample}: {source} sample {place}, epoch {'?' if epoch is None else epoch}, {len(tokens)} tokens,"
        f" parts of {documents} documents, {int((labels != -100).sum())} labels, digest {int(row['digest']) & (1 << 64) - 1:016x}"
    )
    print(tokens.tolist() if ids else tokenizer.decode(tokens.tolist(), skip_special_tokens=False))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", help="a run's directory, or Hydra overrides such as data=text seed=1")
    parser.add_argument("--step", type=int, required=True, help="optimiser step, from 1")
    parser.add_argument("--sample", type=int, help="number of one sample within the step; default: all")
    parser.add_argument("--ids", action="store_true", help="print token ids instead of text")
    options = parser.parse_args(argv)
    try:
        raw = composed_config(options.run) if "=" in options.run[0] else run_config(Path(options.run[0]))
        batch = raw["trainer"]["global_batch_size"]
        if options.step < 1 or (options.sample is not None and not 0 <= options.sample < batch):
            parser.error(f"--step counts from 1, --sample from 0 to {batch - 1}")
        config = TypeAdapter(DataConfig).validate_python(raw["data"])
        data = open_data(config, global_batch_size=batch, seed=raw["seed"], progress=lambda line: print(line, file=sys.stderr))
    except DataError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    tokenizer = Tokenizer.from_file(str(data.tokenizer_path))
    first = (options.step - 1) * batch
    step, _ = next(data.steps(first, micro_batch_size=batch, stop_sample=first + batch))
    for i in range(batch) if options.sample is None else [options.sample]:
        row = {k: step[k][0, i].numpy() for k in ("tokens", "labels")} | {"digest": step["sample_digests"][0, i].numpy()}
        show(first + i, row, data, tokenizer, options.ids)
    data.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
