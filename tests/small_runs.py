"""Small complete runs for tests: composed and parsed as train.py does it.

They train on text that every machine has.
"""

import atexit
import functools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import torch._dynamo
import torch.distributed as dist

from pdn.cli.compose import compose
from pdn.cli.parse import parse
from pdn.data import open as data_open
from pdn.data import open_data
from pdn.errors import PdnError
from pdn.training.config import RunConfig
from pdn.training.fit import fit
from pdn.training.trainer import Trainer
from tests.presets import small_overrides

STEPS = 20
PRELOADED = (torch._dynamo, data_open)  # or each forked rank would import them: a second


@functools.cache
def shared_cache() -> Path:
    """Return the cache of this process's runs, for text that is the same in all of them."""
    made, owner = Path(tempfile.mkdtemp(prefix="pdn-tests-cache-")), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # and no fork of it
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(remove)
    return made


def run_config(directory: Path, preset: str, *overrides: str) -> RunConfig:
    """Configure a run of 20 steps with 8 sequences of 48 tokens each, vocabulary 320.

    Later overrides win.
    """
    words = [
        *small_overrides(preset),
        f"output_dir={directory}",
        "name=run",
        f"trainer.steps={STEPS}",
        "trainer.global_batch_size=8",
        "trainer.micro_batch_size=4",
        "schedule.warmup_steps=10",
        "data.max_bytes=300000",
        "data.vocab_size=320",
        "data.seq_len=48",
        f"data.cache_dir={shared_cache()}",
        "eval=none",
        "logger=none",
        *overrides,
    ]
    chosen = {word.partition("=")[0]: word for word in words}
    del chosen["model.vocab_size"]
    if "data" in chosen:  # of another kind than text
        del chosen["data.max_bytes"], chosen["data.vocab_size"]
    return parse(compose(list(chosen.values())))


def train(
    directory: Path, preset: str, *overrides: str, trainer_cls: type[Trainer] = Trainer
) -> list[dict]:
    """Run in this process; the records of metrics.jsonl."""
    config = run_config(directory, preset, *overrides)
    fit(config, open_data=open_data, trainer_cls=trainer_cls)
    return metrics(directory)


def metrics(directory: Path) -> list[dict]:
    return [
        json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()
    ]


def losses(records: list[dict]) -> list[float]:
    return [record["loss"] for record in records if "loss" in record]


def train_on_ranks(
    ranks: int,
    directory: Path,
    preset: str,
    *overrides: str,
    start: str = "forkserver",
    codes: list[int] | None = None,
) -> list[dict]:
    """Train on several ranks by gloo, or on one that makes its own group.

    The processes are forked from a clean server. A process group must not be made in the test's own
    process: a later fork hangs when it collects what is left of it.

    Args:
        start: ``fork`` forks this process instead, so that what a test has patched holds there too.
        codes: how they end; None: all well.
    """
    config = run_config(directory, preset, *overrides)
    store = directory / f"store-{os.urandom(4).hex()}"
    directory.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(["tests.small_runs"])
    workers = [
        context.Process(target=_rank, args=(rank, ranks, store, config)) for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=240)
        if worker.is_alive():
            worker.kill()
    assert [worker.exitcode for worker in workers] == (codes or [0] * ranks)
    return metrics(directory)


def _rank(rank: int, ranks: int, store: Path, config: RunConfig) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        fit(config, open_data=open_data)
    except PdnError as error:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(error.exit_code)
    if ranks > 1:
        dist.destroy_process_group()
