"""What reliability costs: the stall of a save, memory over many saves, memory of a resume."""

import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pdn.checkpoint.format import committed_steps
from pdn.checkpoint.manager import Checkpointer
from tests.faults.conftest import amount
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

INTERVAL = 500  # steps, the default of checkpoint.every


def build(width: int, depth: int):
    torch.manual_seed(0)
    layers = [
        layer for _ in range(depth) for layer in (torch.nn.Linear(width, width), torch.nn.GELU())
    ]
    model = torch.nn.Sequential(*layers)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def step(model, optimizer, rows: int) -> float:
    began = time.perf_counter()
    model(torch.randn(rows, model[0].in_features)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


@amount(None, 6)
def test_an_asynchronous_save_stalls_training_by_less_than_one_percent(tmp_path, table, trials):
    with table(
        "25",
        "stall of an asynchronous save, 19 M parameters, 226 MB of state",
        f"≤ 1 % of {INTERVAL} steps",
    ) as row:
        model, optimizer = build(1536, 8)
        saver = Checkpointer(tmp_path, keep_last=1, keep_every=None, asynchronous=True)
        for _ in range(3):
            step(model, optimizer, 512)
        saver.save(1, model, optimizer, {})  # allocates the buffers
        saver.wait()
        plain = statistics.median(step(model, optimizer, 512) for _ in range(8))
        stalls, slowed = [], []
        for trial in range(trials):
            saver.save(2 + trial, model, optimizer, {})
            while not saver.poll():
                slowed.append(step(model, optimizer, 512) - plain)
            stalls.append(saver.last_stall_s)
            row.trials += 1
        sync = Checkpointer(tmp_path / "sync", keep_last=1, keep_every=None, asynchronous=False)
        sync.save(1, model, optimizer, {})
        stall, while_writing = statistics.median(stalls), max(0.0, sum(slowed) / trials)
        share = 100 * (stall + while_writing) / (INTERVAL * plain)
        row.note = (
            f"stall {1e3 * stall:.0f} ms (synchronous: {1e3 * sync.last_stall_s:.0f} ms); steps of "
            f"{1e3 * plain:.0f} ms are "
            f"{1e3 * while_writing:.0f} ms slower in all during the {saver.last_write_s:.1f} s of "
            f"writing; together {share:.2f} %"
        )
        assert share <= 1


def resident(field: str = "VmRSS") -> int:
    """Return bytes of this process: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


@amount(None, 200)
def test_two_hundred_saves_do_not_grow_the_process(tmp_path, table, trials):
    with table("26", "memory over asynchronous saves of 6 MB on two ranks", "no growth") as row:

        def work(rank: int):
            model, optimizer = build(256, 8)
            step(model, optimizer, 4)
            saver = Checkpointer(tmp_path, keep_last=2, keep_every=None, asynchronous=True)
            sizes = []
            for number in range(1, 51 + trials):
                saver.save(number, model, optimizer, {})
                step(model, optimizer, 4)
                if number in (50, 50 + trials):
                    saver.wait()
                    gc.collect()
                    sizes.append(resident())
            return sizes

        growth = [after - before for before, after in run_ranks(2, work, tmp_path, timeout_s=300)]
        assert committed_steps(tmp_path) == [49 + trials, 50 + trials]
        row.trials = trials
        row.note = f"{max(growth) / 1e6:.1f} MB after 50 saves for warming up"
        assert max(growth) < 6e6


@amount(None, 5)
def test_resuming_needs_no_more_memory_than_training(tmp_path, table, trials):
    with table(
        "27", "peak memory of a resumed process, 400 MB of state", "≤ 1.1 × that of training"
    ) as row:
        ratios = []
        for _ in range(trials):
            peaks = [
                int(in_fresh_process(f"print(train_or_resume(Path({str(tmp_path)!r}), {save}))"))
                for save in (True, False)
            ]
            ratios.append(peaks[1] / peaks[0])
            row.trials += 1
        row.note = (
            f"median {statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        assert statistics.median(ratios) <= 1.1


def train_or_resume(directory: Path, save: bool) -> int:
    before = resident()
    model, optimizer = build(2048, 8)
    saver = Checkpointer(directory, keep_last=1, keep_every=None, asynchronous=False)
    if not save:
        saver.restore(model, optimizer)
    for _ in range(2):
        step(model, optimizer, 8)
    peak = resident("VmHWM") - before
    if save:
        saver.save(2, model, optimizer, {})
    return peak


def in_fresh_process(code: str) -> str:
    """Return what ``code`` prints; a fork would reuse memory that its parent has freed."""
    lines = "from pathlib import Path\nfrom tests.faults.test_cost import train_or_resume\n" + code
    root = Path(__file__).parent.parent.parent
    return subprocess.run(
        [sys.executable, "-c", lines],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
