"""A small real run, launched on forked ranks that can be killed.

The oracles compare it with an uninterrupted one. The ranks run ``pdn.training.fit.fit`` as
``train.py`` does, without paying seconds for imports. The launcher is this process: when a rank
dies it behaves like torchrun, SIGTERM and then SIGKILL for the others.

``PDN_FAULTS_DEVICE=cuda PYTORCH_NVML_BASED_CUDA_CHECK=1 pytest tests/faults`` runs them on GPUs
(the second variable keeps CUDA out of this process, which could not fork otherwise).
"""

import json
import logging
import os
import random
import re
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
import torch._inductor

from pdn.checkpoint.format import committed_steps, step_directory, verify
from pdn.cli.compose import compose
from pdn.cli.parse import parse
from pdn.data import open as data_open
from pdn.data import open_data
from pdn.training.config import RunConfig
from pdn.training.fit import fit
from tests.children import is_running, state_of
from tests.ranks import free_port

# preloaded, or each rank would import them, the first for two seconds
PRELOADED = (torch._inductor, data_open)
STEPS, EVERY, BATCH = 24, 4, 4
# from the failure of one rank to SIGTERM and to SIGKILL for its peers; torchrun gives 0 and 30
TERM_S, GRACE_S = 2.0, 15.0
HANGS_S = 600.0  # no launch of these takes so long, on the busiest machine
# cuda: in bf16 with the kernels, on as many GPUs as ranks, by NCCL
DEVICE = os.environ.get("PDN_FAULTS_DEVICE", "cpu")
SIZES = {
    "cpu": "model.d_model=32 model.head_dim=8 model.intermediate_size=32",
    "cuda": "model.d_model=128 model.head_dim=64 model.intermediate_size=128 "
    "parallel.compile=false",
}
BASE = (
    f"model=pgdn_tiny model.num_layers=1 model.num_heads=2 {SIZES[DEVICE]} "
    f"trainer.steps={STEPS} trainer.global_batch_size={BATCH} trainer.micro_batch_size=2 "
    "trainer.deterministic=true "
    f"trainer.device={DEVICE} schedule.warmup_steps=4 checkpoint.every={EVERY} "
    "checkpoint.keep_last=3 "
    "data.vocab_size=300 data.seq_len=32 data.validation_fraction=0.2 eval=none logger=none "
    "name=run"
).split()


def write_corpus(directory: Path) -> Path:
    """Write a few hundred short documents, the same on every machine."""
    rng = random.Random(1)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(400)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    documents = [{"text": " ".join(rng.choices(words, k=rng.randint(20, 60)))} for _ in range(300)]
    (directory / "corpus.jsonl").write_text(
        "".join(json.dumps(document) + "\n" for document in documents)
    )
    return directory


def overrides(directory: Path, base: Path, *more: str) -> list[str]:
    """Return the command line of a run below ``directory``, corpus and cache below ``base``.

    Later settings replace earlier ones.
    """
    words = [
        *BASE,
        f"output_dir={directory}",
        f"data.cache_dir={base / 'cache'}",
        f"data.path={base / 'corpus'}",
        *more,
    ]
    return list({word.partition("=")[0]: word for word in words}.values())


@cache
def _config(words: tuple[str, ...]) -> RunConfig:
    return parse(compose(list(words)))


@dataclass
class Launch:
    """Ranks of one launch.

    ``codes`` fill as they end: an exit code, or minus the signal's number.
    """

    pids: list[int]
    output: Path
    started: float = field(default_factory=time.monotonic)
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> dict[int, int]:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return self.codes

    def kill(self, number: int = signal.SIGKILL, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            if rank not in self.poll():
                os.kill(self.pids[rank], number)

    def wait(self, grace_s: float = GRACE_S) -> list[int]:
        """Exit codes by rank. If one rank fails, its peers are ended as torchrun would."""
        deadline, failed_at, termed = time.monotonic() + HANGS_S, None, False
        while len(self.poll()) < len(self.pids):
            now = time.monotonic()
            if failed_at is None and any(self.codes.values()):
                failed_at = now
            if failed_at is not None and not termed and now > failed_at + TERM_S:
                self.kill(signal.SIGTERM)
                termed = True
            if now > deadline or (failed_at is not None and now > failed_at + TERM_S + grace_s):
                self.kill(signal.SIGKILL)
            time.sleep(0.005)
        assert time.monotonic() < deadline, f"still running after {HANGS_S:g} s:\n{self.text()}"
        return [self.codes[rank] for rank in range(len(self.pids))]

    def text(self) -> str:
        return "".join(
            file.read_text(errors="replace") for file in sorted(self.output.glob("rank-*"))
        )

    def resumed_step(self) -> int:
        """Return the step that the launch says it continued from, or found done."""
        match = re.search(
            r"continuing from step (\d+)|(?<= )(\d+) of \d+ steps are done", self.text()
        )
        return int(match[1] or match[2]) if match else 0

    def wait_until_stopped(self, rank: int = 0) -> None:
        """Wait until SIGSTOP has stopped the rank."""
        while state_of(self.pids[rank]) != "T":
            assert rank not in self.poll(), self.text()
            time.sleep(0.005)


def launch(
    directory: Path, world_size: int, words: list[str], fault: str = "", **environment: str
) -> Launch:
    """Start the run of ``words`` on ``world_size`` forked ranks.

    The output of each goes to a file below ``directory``.
    """
    if DEVICE == "cuda" and world_size > torch.cuda.device_count():
        pytest.skip(f"{world_size} ranks, {torch.cuda.device_count()} GPUs")
    config = _config(tuple(words))
    output = directory / f"output-{time.monotonic_ns()}"
    output.mkdir(parents=True)
    port, pids = free_port(), []
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            code = 1  # whatever happens, the child must not go on as a second test runner
            try:
                os.environ |= environment | {"PDN_FAULT": fault}
                code = _rank(rank, world_size, port, config, output)
            finally:
                os._exit(code)
        pids.append(pid)
    return Launch(pids, output)


def redirect(file: Path) -> None:
    """Send all output of this process into ``file``.

    The parent's objects may be a test runner's own.
    """
    stream = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", 1, closefd=False),
        os.fdopen(2, "w", 1, closefd=False),
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)


def _rank(rank: int, world_size: int, port: int, config: RunConfig, output: Path) -> int:
    redirect(output / f"rank-{rank}")
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        fit(config, open_data=open_data)
        return 0
    except BaseException as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            traceback.print_exc()
        elif rank == 0:
            print(error, file=sys.stderr, flush=True)
        return 70 if code is None else code


# ------------------------------------------------------------------ what a run left behind


@dataclass(frozen=True)
class Record:
    """What a finished run wrote, in a form that compares bit by bit."""

    losses: dict[int, str]
    ledger: tuple[str, ...]
    shards: dict[str, str]


def validations(directory: Path) -> list[tuple[int, str]]:
    """Step and validation loss in hexadecimal, in the order of the records."""
    found = [line for line in read_lines(directory, "metrics.jsonl") if "validation/loss" in line]
    return [(line["step"], float(line["validation/loss"]).hex()) for line in found]


def read_lines(directory: Path, name: str) -> list[dict]:
    file = directory / "run" / name
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def status(directory: Path) -> dict:
    return json.loads((directory / "run" / "status.json").read_text())


def record(directory: Path, length: int = STEPS) -> Record:
    """Read a finished run. Each step must have been logged exactly once, in order."""
    steps = [line for line in read_lines(directory, "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, length + 1))
    manifest = verify(step_directory(directory / "run" / "checkpoints", length))
    return Record(
        losses={line["step"]: float(line["loss"]).hex() for line in steps},
        ledger=tuple((directory / "run" / "ledger.jsonl").read_text().splitlines()),
        shards={
            name: entry["sha256"]
            for name, entry in manifest.files.items()
            if name.endswith(".distcp")
        },
    )


def verified_steps(directory: Path) -> list[int]:
    """Return the committed steps, each of which verifies."""
    checkpoints = directory / "run" / "checkpoints"
    return [verify(step_directory(checkpoints, step)).step for step in committed_steps(checkpoints)]


def computed_step(directory: Path) -> int:
    """Return the last step in the ledger: how far the run had come."""
    file = directory / "run" / "ledger.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def assert_ledger_complete(directory: Path, steps: int = STEPS) -> None:
    """Assert that every sample up to ``steps`` comes exactly once, in order."""
    lines = read_lines(directory, "ledger.jsonl")
    assert [(line["step"], line["first"], line["end"]) for line in lines] == [
        (step, BATCH * (step - 1), BATCH * step) for step in range(1, steps + 1)
    ]


def assert_alive_none(pids: list[int]) -> None:
    for pid in pids:
        assert not is_running(pid), f"process {pid} survives"
