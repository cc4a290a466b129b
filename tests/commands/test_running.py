"""Every command that the project shows, run in a checkout's copy.

A shell gets the text of the page. The programs that it names are `small.py`, which adds words that
make their work small; a hub on loopback takes the place of the real one. In a process of its own
for each, so minutes in all. It is dash that runs what is for any shell, the stricter one: that bash
hands the same words and variables to the same programs is shown in `test_shown.py`.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.catalogue import filled_in, reason_not_to_run, shells
from tests.commands.pages import PROGRAMS, ROOT, Command, all_commands
from tests.data.corpus import documents, tokenizer
from tests.data.local_hub import LocalHub
from tests.evals.hub_data import write_hub_data

pytestmark = pytest.mark.slow

HELP = [Command("--help", f"python {file.relative_to(ROOT)} --help") for file in PROGRAMS]
# The same text of several pages is run once.
RUN = {
    filled_in(c.text): c
    for c in reversed([*all_commands(), *HELP])
    if shells(c) and not reason_not_to_run(c)
}
RUN = list(reversed(RUN.values()))
CASES = [pytest.param(shells(c)[-1], c, id=f"{shells(c)[-1]}-{c}") for c in RUN]
COPIED = ("pdn", "configs", "data", "scripts", "docs", "examples", "tests", ".ci")
LIMIT = 900  # seconds of a command, on a machine that does other work as well
# What CONTRIBUTING tells a reader to copy, to make something of their own.
MINE = {
    "configs/mixer/gdn.yaml": "configs/mixer/mine.yaml",
    "configs/optim/adamw.yaml": "configs/optim/mine.yaml",
    "configs/logger/tensorboard.yaml": "configs/logger/mine.yaml",
    "configs/eval/tasks/needle_1.yaml": "configs/eval/tasks/mine.yaml",
    "data/corpora/slimpajama.yaml": "data/corpora/mine.yaml",
    "configs/data/slimpajama.yaml": "configs/data/mine.yaml",
}
MINE_TINY = """defaults:
  - size@_here_: tiny
  - /mixer@mixers.mine: mine
  - _self_

name: mine_tiny
pattern: [mine]
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[LocalHub]:
    """Serve a corpus and its tokenizer under the names that data/corpora has for them."""
    folder = tmp_path_factory.mktemp("hub")
    served = LocalHub(folder)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents(5200, longest=30))
    for name in ("gmongaras/SlimPajama-627B_Reupload", "cerebras/SlimPajama-627B"):
        served.add("datasets", name, "train/part-0.jsonl", rows.encode())
    served.add("models", "fla-hub/transformer-1.3B-100B", "tokenizer.json", tokenizer_json())
    yield served
    served.close()


def tokenizer_json() -> bytes:
    return tokenizer().content.replace(b"<|endoftext|>", b"</s>")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, hub) -> Path:
    """Copy what git has of the checkout, and add what a reader of the pages has by then."""
    folder = tmp_path_factory.mktemp("checkout")
    skipped = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for file in [p for p in ROOT.iterdir() if p.is_file()]:
        shutil.copy(file, folder / file.name)
    add_mine(folder)
    for task in (folder / "configs/eval/tasks").glob("*.yaml"):  # minutes of a CPU's time else
        task.write_text(re.sub(r"^examples: \d+", "examples: 8", task.read_text(), flags=re.M))
    add_texts(folder)
    add_programs(folder / "bin")
    (folder / "exported").mkdir()
    for line in (
        "python train.py name=tiny logger=wandb",
        "python scripts/export.py run=runs/tiny && mv exported/*/new exported/tiny",
        "python data/prepare.py --path home/web --tokenizer tokenizer.json --out shards/code",
    ):
        launch("bash", line, folder, hub)
    shutil.copytree(folder / "shards/code", folder / "shards/web")
    for name in ("novels", "a", "b", "a-1", "a-2", "b-1", "b-2", "swept/a-1", "swept/b-1"):
        copy_run(folder / "runs", name)
    return folder


def copy_run(runs: Path, name: str) -> None:
    """Copy the run that was trained under another name; a number at its end is its seed."""
    shutil.copytree(runs / "tiny", runs / name, symlinks=True)
    config = runs / name / "config.yaml"
    if name[-1].isdecimal():
        config.write_text(config.read_text().replace("\nseed: 0\n", f"\nseed: {name[-1]}\n"))


def add_mine(folder: Path) -> None:
    for source, target in MINE.items():
        shutil.copy(folder / source, folder / target)
    (folder / "configs/model/mine_tiny.yaml").write_text(MINE_TINY)
    task = folder / "configs/eval/tasks/mine.yaml"
    task.write_text(task.read_text().replace("[512, 1024, 2048, 4096, 8192]", "[600]"))
    data = folder / "configs/data/mine.yaml"
    data.write_text(data.read_text().replace("corpus: slimpajama", "corpus: mine"))


def add_texts(folder: Path) -> None:
    home = folder / "home"
    for place in (home / "novels", home / "web", folder / "novels"):
        place.mkdir(parents=True)
        rows = [json.dumps({"text": text}) + "\n" for text in documents(300, seed=1, longest=80)]
        (place / "part.jsonl").write_text("".join(rows))
    (folder / "corpus").mkdir()
    shutil.copy(folder / "novels/part.jsonl", folder / "corpus/sources.jsonl")
    (home / "wikitext.txt").write_text("\n".join(documents(100, seed=2)))
    for name in ("tokenizer.json", "mistral_32k.json"):
        (folder / name).write_bytes(tokenizer_json())
    write_hub_data(folder / "eval_data")
    for file in (ROOT / "tests/fixtures/eval").glob("*.gz"):
        shutil.copy(file, folder / "eval_data" / file.name)


def add_programs(folder: Path) -> None:
    """Put `small.py` under the names of programs, and Slurm's own as what they print."""
    folder.mkdir()
    small = ROOT / "tests/commands/small.py"
    programs = {
        name: f'exec "$REAL_PYTHON" {small} {name} "$@"'
        for name in ("python", "torchrun", "pytest", "hf", "make", "srun")
    }
    programs |= {"sbatch": "echo Submitted batch job 1", "scontrol": "echo 127.0.0.1"}
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)


def launch(shell: str, text: str, folder: Path, hub: LocalHub) -> None:
    """Run a line by a shell in the copy; an output of what went wrong, if it did."""
    (folder / "tmp").mkdir(exist_ok=True)
    environment = hub.environment(folder / "hf") | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "PYTHONPATH": str(folder),
        "PDN_CACHE": str(folder / "cache"),
        "REAL_PYTHON": sys.executable,
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node0",
        "TRITON_INTERPRET": "0",
    }
    process = subprocess.Popen(
        [shutil.which(shell), "-c", text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    # Of the paper's suite, what has no data here is named at the end; the rest has run. torchrun
    # ends with 1 whatever its ranks end with.
    lacking = "suite=paper" in text and "tasks that cannot be run: 2" in said
    expected = (1 if text.startswith("torchrun") else 74) if lacking else 0
    assert process.returncode == expected, f"{shell}: {text}\n{said[-4000:]}"
    assert "assuming the intent is to" not in said  # torch's warning of every single process


@pytest.mark.parametrize(("shell", "command"), CASES)
def test_a_command_that_is_shown_runs(shell, command, checkout, hub):
    before = set((checkout / "runs").iterdir())
    try:
        launch(shell, filled_in(command.text), checkout, hub)
    finally:
        for made in set((checkout / "runs").iterdir()) - before:  # else the next would continue it
            shutil.rmtree(made) if made.is_dir() else made.unlink()
