"""Several gloo ranks without torchrun: forked children that meet through a file.

Two of them take about 0.1 s.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # preloaded, or each forked rank would import it: a second
import torch.distributed as dist


def free_port() -> int:
    """Return a port that nobody listens on.

    It lies below the range of outgoing connections: those may take any other one, even of this
    test.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_ranks(
    world_size: int,
    work: Callable[[int], object],
    directory: Path,
    *,
    timeout_s: float = 60.0,
    enough: int | None = None,
) -> list:
    """Run ``work(rank)`` in ``world_size`` processes.

    Returns their results, JSON values, in rank order. A child that raises prints its traceback and
    fails the call; a child that was killed yields None.

    Args:
        directory: an existing directory for the rendezvous and the results.
        timeout_s: when to kill ranks that still run, and fail.
        enough: the same once so many ranks have ended.
    """
    tag = f"{os.getpid()}-{time.monotonic_ns()}"
    children = []
    for rank in range(world_size):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os._exit(_child(rank, world_size, work, directory, tag))
        children.append(pid)
    codes = _wait(children, timeout_s, enough or world_size)
    assert not any(code == 1 for code in codes), f"exit codes of the ranks: {codes}"
    files = [directory / f"result-{tag}-{rank}.json" for rank in range(world_size)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def _child(
    rank: int, world_size: int, work: Callable[[int], object], directory: Path, tag: str
) -> int:
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/rendezvous-{tag}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        result = work(rank)
        (directory / f"result-{tag}-{rank}.json").write_text(json.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _wait(children: list[int], timeout_s: float, enough: int) -> list[int]:
    deadline, codes = time.monotonic() + timeout_s, {}
    while len(codes) < len(children):
        for pid in children:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline or enough <= len(codes) < len(children):
            for pid in set(children) - codes.keys():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise AssertionError(f"ranks still running, {len(codes)} of {len(children)} ended")
        time.sleep(0.01)
    return [codes[pid] for pid in children]
