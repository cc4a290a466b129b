#!/usr/bin/env python
"""Become a program that a page names, with words added that make its work small.

``small.py PROGRAM WORDS…``: the tests put this under the names of ``python``, ``torchrun`` and so
on before PATH. So a shell gets the text of the page, and what follows are the only changes. It
needs the standard library alone.
"""

import os
import re
import sys
import tempfile

SIZES = [
    "model.num_layers=2", "model.d_model=32", "model.num_heads=1", "model.head_dim=32",
    "model.intermediate_size=64", "trainer.steps=2", "trainer.global_batch_size=4",
    "trainer.micro_batch_size=2", "schedule.warmup_steps=1", "eval.max_samples=8",
]  # fmt: skip
FEW = 50  # steps
STREAM = [
    "data.seq_len=32", "data.processes=1", "data.shard_tokens=2000", "data.block_shards=2",
    "data.validation_documents=8",
]  # fmt: skip
DATA = {
    "text": ["data.seq_len=32", "data.max_bytes=300000", "data.vocab_size=320"],
    "shards": ["data.seq_len=32"],
    "slimpajama": STREAM,
    "stream_local": STREAM,
    "mine": STREAM,
    "mqar": ["data.seq_len=64", "data.num_pairs=4"],
}
# Of others the preset's: slimpajama.
EXPERIMENTS = {"mqar": "mqar", "evidence/code_14m": "text", "evidence/width": "text"}
LAUNCHED = {
    "hydra/launcher=torchrun": ["hydra.launcher.nproc_per_node=2"],
    "hydra/launcher=slurm": ["hydra.launcher.nodes=1"],
}
SCRIPTS = {
    "scripts/generate.py": ["max_new_tokens=8"],
    "scripts/compare.py": ["seeds=2", "rates=1e-3,2e-3", *SIZES[:-1], *DATA["text"]],
    "scripts/sweep.py": ["slots=1", *SIZES, *DATA["text"]],
    "scripts/collect_sources.py": ["roots=pdn", "max_characters=200000"],
    "scripts/make_needles.py": ["texts=50"],
    "scripts/plot_decoding.py": ["lengths=8,16", "tokens=2"],
}
# Of a study only what is done within so many seconds; its records do not go into the documents.
STUDY = ["seconds=20", "slots=2", "words=" + ",".join(SIZES), "records=records.jsonl"]
ON_A_CPU = ["--device", "cpu", "--dtype", "float32", "--steps", "1"]
BENCHMARKS = {
    "checkpoint": ["--gigabytes", "0.001", "--ranks", "1", "--repeats", "1"],
    "context": ["--device", "cpu", "--tokens", "64", "--batch", "1"],
    "convolution": [*ON_A_CPU, "--backends", "torch", "--shapes", "2x16", "--channels", "16"],
    "data": ["--tokens", "200000", "--path", "novels", "--tokenizer", "tokenizer.json"],
    "decode": [
        *ON_A_CPU, "--backends", "reference", "--batches", "1", "--heads", "1", "--key", "16",
    ],
    "decode_models": [*ON_A_CPU, "--models", "pgdn_tiny", "--batches", "1"],
    "ops": [
        *ON_A_CPU, "--backends", "chunkwise", "--models", "pgdn", "--shapes", "1x32",
        "--heads", "1", "--key", "16",
    ],
    "registers": ["--models", "pgdn", "--capabilities", "90", "--kernels", "finish_kernel"],
    "repeat": ["--device", "cpu", "--batch", "1", "--seq-len", "32", "--repeats", "2"],
    "score": ["--device", "cpu", "--documents", "4"],
    "telemetry": ["--device", "cpu", "--batch", "1", "--seq-len", "32", "--repeats", "1"],
    "train": [
        "--device", "cpu", "--batch", "1", "--seq-len", "32", "--steps", "1", "--warmup", "1",
    ],
}  # fmt: skip


def shrink(program: str, words: list[str]) -> list[str]:
    """Return the command that takes the place of a program and its words."""
    python = [os.environ.get("REAL_PYTHON", sys.executable)]
    if program == "make":
        return ["/usr/bin/make", "-n", *words]
    if program == "pytest" or words[:2] == ["-m", "pytest"]:
        chosen = words if program == "pytest" else words[2:]
        return [*python, "-m", "pytest", "--collect-only", "-q", *chosen]
    if program == "srun":
        return words
    if program == "torchrun":
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        ranks = "1" if any(word.startswith("experiment=") for word in words) else "2"
        if "parallel=hsdp" in words and "parallel.context=2" in words:
            ranks = "4"  # replicas of shards of pairs
        few = with_flags(words[:at], {"--nnodes": "1", "--nproc-per-node": ranks})
        few = ["127.0.0.1:0" if word == "node0:29500" else word for word in few]
        return [*python, "-m", "torch.distributed.run", *few, words[at], *own(words[at:])]
    if program == "hf":
        return [*python, "-m", "huggingface_hub.cli.hf", *words]
    return [*python, words[0], *own(words)] if words else python


def own(words: list[str]) -> list[str]:
    """Return the words of a program of ours, after its name, with small sizes."""
    script, given = words[0], words[1:]
    if script == "train.py":
        return training(given)
    if script == "scripts/benchmark.py" and given:
        return [*small_variants(given), *BENCHMARKS.get(given[0], [])]
    if script == "data/prepare.py":
        sizes = ["--processes", "1", "--shard-tokens", "5000", "--validation-fraction", "0.1"]
        return [*given, *sizes]
    if script == "data/show.py":
        return [*given, "--step", "1"] if "--step" in given else given
    if script == "scripts/export.py":  # into a folder that is not there yet
        return with_keys(given, [f"out={tempfile.mkdtemp(dir='exported')}/new"])
    if script == "scripts/evaluate.py":
        probes = any(word.startswith("tasks=") and "piqa" not in word for word in given)
        sizes = ["lengths=600"] if probes else ["limit=2", "data_dir=eval_data"]
        return with_keys(given, ["max_length=600", *sizes])
    if script == "scripts/compare.py" and any(word.startswith("base=runs/") for word in given):
        return given
    if script == "scripts/evidence.py" and any(word.startswith("run=") for word in given):
        return with_keys(given, STUDY)
    if script == "scripts/coordinates.py":
        deep = any(word.startswith("depths=") for word in given)
        axis = "depths=2,4" if deep else "widths=32,64"
        return with_keys(given, [axis, "seeds=1", "steps=2"])
    if script == "scripts/sweep.py":
        given = two_trials(given)
    return with_keys(given, SCRIPTS.get(script, []))


def two_trials(given: list[str]) -> list[str]:
    """Return the words of a sweep with two values of the first key that has several."""
    found, room = [], 2
    for word in given:
        key, _, values = word.partition("=")
        parts = [] if "[" in values or "{" in values else values.split(",")
        if parts[1:]:
            word, room = f"{key}={','.join(parts[:room])}", 1
        found.append(word)
    return found


def training(given: list[str]) -> list[str]:
    """Return the words of train.py; those that train nothing as they are.

    A command of few steps keeps its own numbers, which belong together, and gets a small model.
    """
    if {"--help", "-sc", "--cfg"} & set(given):
        return given
    if "-m" in given:
        given = two_trials(given)
    values = dict(word.split("=", 1) for word in given if "=" in word)
    large = any(size in values.get("model", "") for size in ("_340m", "_1b"))
    default = "slimpajama" if large or "experiment" in values else "text"
    data = values.get("data", EXPERIMENTS.get(values.get("experiment", ""), default))
    more = [*SIZES, *DATA[data]]
    if int(values.get("trainer.steps", FEW + 1)) <= FEW:
        more = [w for w in more if w.startswith("model.") or w.partition("=")[0] not in values]
    more += [w for launcher, keys in LAUNCHED.items() if launcher in given for w in keys]
    if not {"logger"} & set(values):
        more.append("logger=none")
    if values.get("name") == "novels":  # which other pages read is there already
        more.append("name=novels-again")
    if values.get("resume", "").startswith("step:"):
        more.append("resume=step:2")
    return with_keys(given, more)


def small_variants(words: list[str]) -> list[str]:
    tiny = [word.replace("_340m", "_tiny").replace("+compile", "") for word in words]
    return [re.sub(r"\+pieces=\d+", "+pieces=16", word) for word in tiny]


def with_keys(given: list[str], more: list[str]) -> list[str]:
    """Return words with ``key=value`` ones added, in place of those that have their keys."""
    keys = {word.partition("=")[0] for word in more}
    return [word for word in given if word.partition("=")[0] not in keys] + more


def with_flags(given: list[str], values: dict[str, str]) -> list[str]:
    """Return words with other values behind the flags that are there."""
    found = list(given)
    for flag, value in values.items():
        if flag in found:
            found[found.index(flag) + 1] = value
    return found


if __name__ == "__main__":
    command = shrink(sys.argv[1], sys.argv[2:])
    print("+", *command, file=sys.stderr, flush=True)
    os.execv(command[0], command) if "/" in command[0] else os.execvp(command[0], command)
