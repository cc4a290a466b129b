"""Speed of saving a checkpoint, beside a plain parallel write of the same bytes.

Both in turn, in the same directory: the values of a rank's tensors written by as many threads into
as many files and synced to disk, and an asynchronous save until it is committed. On two and more
ranks the model is sharded over them (FSDP2, gloo). After each save the rank multiplies matrices for
``--pass-seconds``, in place of the next forward and backward pass, beside which the tensors are
copied. Stalls are the time in the save and the wait of the update after that pass. Rates are
medians over the repetitions, stalls their maximum; the machine's load is printed beside them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmarks._measure import markdown
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pdn.checkpoint import shards, state
from pdn.checkpoint.format import step_directory
from pdn.checkpoint.manager import Checkpointer
from pdn.distributed.fsdp import local_part
from pdn.optim.adamw import LocalAdamW
from pdn.optim.container import OptimizerContainer

WIDTH = 2048
LAYER_BYTES = 3 * 4 * WIDTH * WIDTH  # a matrix with two moments, float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="weights and moments together (default: 2)"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of writes (default: 5)")
    parser.add_argument(
        "--pass-seconds",
        type=float,
        default=1.0,
        help="from a save to its update (default: 1)",
    )
    parser.add_argument(
        "--directory", type=Path, default=Path("runs"), help="on the disk to measure"
    )


def main(args: argparse.Namespace) -> None:
    args.directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory(dir=args.directory) as home:
            mp.spawn(_rank, (ranks, Path(home), args), nprocs=ranks)
            rows.append(torch.load(Path(home) / "row", weights_only=True))
    print(markdown(list(rows[0]), [list(row.values()) for row in rows]))
    print(f"\n{os.cpu_count()} cores, load over the last minute {os.getloadavg()[0]:.1f}")


def _rank(rank: int, ranks: int, home: Path, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    if ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{home}/rendezvous", rank=rank, world_size=ranks
        )
    model, optimizer = _build(ranks, max(1, round(args.gigabytes * 1e9 / LAYER_BYTES)))
    saver = Checkpointer(home / "checkpoints", keep_last=1, keep_every=None, asynchronous=True)
    moments = list(state.optimizer_tensors(model, optimizer).values())
    tensors = [*state.model_tensors(model).values(), *moments]
    own = [local_part(tensor) for tensor in tensors]
    saver.reserve(model, [local_part(t).numel() * t.element_size() for t in moments])
    whole = sum(t.numel() * t.element_size() for t in tensors)
    plain, ours, stalls, passes = [], [], [], []
    count = _products_in(args.pass_seconds)
    alone = statistics.median(_multiply(count) for _ in range(3))

    def save(step: int) -> None:
        began = time.perf_counter()
        saver.save(step, model, optimizer, {})
        passes.append(_multiply(count))
        saver.before_change()
        saver.wait()
        if ranks > 1:
            dist.barrier()
        ours.append(time.perf_counter() - began)

    for repeat in range(args.repeats):
        writes = [
            lambda: plain.append(_write_plainly(own, home / f"plain-{rank}", ranks)),
            lambda step=repeat + 1: save(step),
        ]
        for write in writes if repeat % 2 else reversed(writes):
            _settle(ranks)
            write()
        stalls.append(saver.last_stall_s)
        _settle(ranks)
        if rank == 0:
            shutil.rmtree(step_directory(saver.directory, repeat + 1))
    if rank == 0:
        rates = [whole / 1e9 / statistics.median(times) for times in (plain, ours)]
        row = {
            "ranks": ranks,
            "GB": f"{whole / 1e9:.2f}",
            "threads a rank": shards.default_threads(),
            "plain write, GB/s": f"{rates[0]:.2f} ({whole / 1e9 / max(plain):.2f} to "
            f"{whole / 1e9 / min(plain):.2f})",
            "save, GB/s": f"{rates[1]:.2f} ({whole / 1e9 / max(ours):.2f} to "
            f"{whole / 1e9 / min(ours):.2f})",
            "save / plain": f"{rates[1] / rates[0]:.0%}",
            "first stall, s": f"{stalls[0]:.2f}",
            "longest later stall, s": f"{max(stalls[1:], default=0.0):.2f}",
            "pass, s": f"{alone:.2f}",
            "beside a save, s": f"{statistics.median(passes):.2f}",
        }
        torch.save(row, home / "row")
    if ranks > 1:
        dist.destroy_process_group()


def _build(ranks: int, layers: int) -> tuple[nn.Module, OptimizerContainer]:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    adamw = LocalAdamW(model.parameters())
    for parameter in model.parameters():  # as after a step, without its gradients
        adamw.state[parameter] = {
            "step": torch.ones(()),
            "exp_avg": torch.randn_like(parameter),
            "exp_avg_sq": torch.rand_like(parameter),
        }
    return model, OptimizerContainer(model, [adamw])


def _settle(ranks: int) -> None:
    """Begin alike: with nothing left to write back, and all ranks at once."""
    os.sync()
    if ranks > 1:
        dist.barrier()


def _write_plainly(tensors: list[Tensor], directory: Path, ranks: int) -> float:
    """Write and sync a rank's bytes; return the seconds until every rank has."""
    directory.mkdir()
    threads = shards.default_threads()
    data = [shards.as_bytes(tensor).data for tensor in tensors]

    def write(number: int) -> None:
        with open(directory / str(number), "xb", buffering=0) as stream:
            for part in data[number::threads]:
                while part:
                    part = part[stream.write(part) :]
            os.fsync(stream.fileno())

    if ranks > 1:
        dist.barrier()
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(threads)))
    if ranks > 1:
        dist.barrier()
    seconds = time.perf_counter() - began
    shutil.rmtree(directory)
    return seconds


def _products_in(seconds: float) -> int:
    """Return how many products of two matrices take about so long."""
    return round(50 * seconds / _multiply(50))


def _multiply(count: int) -> float:
    """Multiply matrices so often; return the seconds it took."""
    matrix = torch.randn(512, 512)
    began = time.perf_counter()
    for _ in range(count):
        matrix @ matrix
    return time.perf_counter() - began
