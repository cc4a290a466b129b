"""Two nodes on one machine: two agents of torchrun with two ranks each, that meet on loopback."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.children import PYTHON_PATH
from tests.presets import small_overrides
from tests.ranks import free_port
from tests.small_runs import losses, metrics

ROOT = Path(__file__).parents[2]
OTHER_CLOCK = """
import datetime, time

seconds, nanoseconds = time.time, time.time_ns
time.time = lambda: seconds() + {offset}
time.time_ns = lambda: nanoseconds() + {offset} * 10**9


class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)


Shifted.__name__ = Shifted.__qualname__ = "datetime"
Shifted.__module__ = "datetime"
datetime.datetime = Shifted
"""  # what Python reads; libfaketime 0.9.10 breaks time.sleep of Python 3.11, or its events
DEADLINE_S = 900.0  # on a machine that does other work as well
WORDS = [
    *(word for word in small_overrides("pgdn_tiny") if "vocab_size" not in word),
    "data=text",
    "data.max_bytes=300000",
    "data.vocab_size=320",
    "data.seq_len=48",
    "trainer.device=cpu",
    "trainer.steps=8",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2",
    "schedule.warmup_steps=3",
    "checkpoint.every=2",
    "checkpoint.asynchronous=false",
    "eval=none",
    "logger=none",
    "name=run",
]


def agent(
    home: Path,
    cache: Path,
    nodes: int,
    port: int,
    words: tuple[str, ...] = (),
    alive: int = 3,
    **environment: str,
) -> subprocess.Popen:
    """Start one node's torchrun; the run lies in ``home``, its data in the node's ``cache``.

    A node counts as lost after ``alive`` heartbeats, of 5 s, that were not seen.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}",
                f"--nproc-per-node={4 // nodes}", "--rdzv-backend=c10d", "--rdzv-id=7",
                f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=3",
                f"--rdzv-conf=keep_alive_max_attempt={alive}"]  # fmt: skip
    command = [*launcher, str(ROOT / "train.py"), *WORDS, *words, f"output_dir={home}"]
    own = {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1", "PDN_CACHE": str(cache)}
    own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or a node that comes back is left waiting
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "output", "ab") as output:
        return subprocess.Popen(
            command, env=kept | own | environment, stdout=output, stderr=subprocess.STDOUT
        )


def wait_for(ready, agents: list[subprocess.Popen], home: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        said = (home / "output").read_text()
        assert all(one.poll() is None for one in agents) and time.monotonic() < deadline, said
        time.sleep(0.1)


def listens(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def has_taken(home: Path, step: int) -> bool:
    ledger = home / "run" / "ledger.jsonl"
    return ledger.exists() and f'"step": {step},' in ledger.read_text()


@pytest.mark.slow
def test_a_node_that_is_lost_and_comes_back_changes_no_loss(tmp_path):
    """The second node has to make its data first, and all its ranks stand still at step 5."""
    home, port, agents = tmp_path / "two", free_port(), []
    try:
        agents.append(agent(home, tmp_path / "cache-0", 2, port))
        # the first one serves the meeting point, which must not be lost
        wait_for(lambda: listens(port), agents, home)
        agents.append(agent(home, tmp_path / "cache-1", 2, port, PDN_FAULT="stop@5:*"))
        wait_for(lambda: has_taken(home, 5), agents, home)
        agents[1].kill()
        assert agents[1].wait() == -signal.SIGKILL
        agents[1] = agent(home, tmp_path / "cache-1", 2, port)
        codes = [one.wait(DEADLINE_S) for one in agents]
        assert codes == [0, 0], (home / "output").read_text()
        agents = [agent(tmp_path / "one", tmp_path / "cache-0", 1, port)]
        assert agents[0].wait(DEADLINE_S) == 0, (tmp_path / "one" / "output").read_text()
    finally:
        for one in agents:
            one.kill()
            one.wait()
    assert "continuing from step 4" in (home / "output").read_text()
    assert losses(metrics(home)) == losses(metrics(tmp_path / "one"))
    ledgers = [(tmp_path / name / "run" / "ledger.jsonl").read_text() for name in ("one", "two")]
    assert ledgers[0] == ledgers[1]
    made = [sorted(p.name for p in (tmp_path / f"cache-{node}").iterdir()) for node in (0, 1)]
    assert made[0] == made[1] != []


HOURS = 1440  # heartbeats of 5 s: torchrun compares them with its own node's clock
HSDP = ("parallel=hsdp", "parallel.replicate=2")


@pytest.mark.slow
@pytest.mark.parametrize("offset", [-3600, 3600])
def test_sharded_nodes_whose_clocks_are_apart_give_the_losses_of_one_node(offset, tmp_path):
    """Shards lie within a node and replicas over both; the second node's clock is wrong."""
    home, port, agents = tmp_path / "two", free_port(), []
    clock = tmp_path / "clock"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text(OTHER_CLOCK.format(offset=offset))
    path = os.pathsep.join((str(clock), str(ROOT)))
    try:
        agents.append(agent(home, tmp_path / "cache-0", 2, port, HSDP, HOURS))
        wait_for(lambda: listens(port), agents, home)
        agents.append(agent(home, tmp_path / "cache-1", 2, port, HSDP, HOURS, PYTHONPATH=path))
        codes = [one.wait(DEADLINE_S) for one in agents]
        assert codes == [0, 0], (home / "output").read_text()
        agents = [agent(tmp_path / "one", tmp_path / "cache-0", 1, port, HSDP)]
        assert agents[0].wait(DEADLINE_S) == 0, (tmp_path / "one" / "output").read_text()
    finally:
        for one in agents:
            one.kill()
            one.wait()
    assert losses(metrics(home)) == losses(metrics(tmp_path / "one"))
    ledgers = [(tmp_path / name / "run" / "ledger.jsonl").read_text() for name in ("one", "two")]
    assert ledgers[0] == ledgers[1]
