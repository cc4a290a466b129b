"""What telemetry costs beside a training step: one sequence described, gradients and updates.

A variant is as of ``train``: ``pgdn_340m+compile+fsdp``. The step trains on random tokens; the
share is that of an interval of 100 steps.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from benchmarks.train import OPTIMIZER, VOCAB, ours

from pdn.distributed.fsdp import clip_factor, compute_in, gradient_norm, join_world
from pdn.logging.recurrences import measure
from pdn.optim.optimizers import build_optimizer
from pdn.training.telemetry import Updates

INTERVAL = 100  # steps, for the share that is printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("variants", nargs="+", help="e.g. pgdn_340m+compile pgdn_340m+fsdp")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step and rank")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps, and measurements")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])


def main(args: argparse.Namespace) -> None:
    sharded = any({"ddp", "fsdp", "hsdp"} & set(name.split("+")) for name in args.variants)
    world = join_world(args.device, timeout=600, sharded=sharded)
    say = functools.partial(print, flush=True) if world.is_main else lambda *_: None
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    say(f"{world.size} x {device}, {args.batch} x {args.seq_len} tokens a step and rank\n")
    say(f"| variant | step ms | recurrences ms | updates ms | share of {INTERVAL} steps |")
    say("|---|---|---|---|---|")
    for variant in args.variants:
        step, recurrences, updates = timed(variant, args, world)
        share = (recurrences + updates) / (INTERVAL * step)
        say(
            f"| {variant} | {1e3 * step:.1f} | {1e3 * recurrences:.1f} | {1e3 * updates:.1f} "
            f"| {share:.2%} |"
        )
    world.close()


def timed(variant: str, args: argparse.Namespace, world) -> tuple[float, float, float]:
    """Return the medians of a step's, a description's and the updates' seconds."""
    name, *options = variant.split("+")
    model = ours(name, options, world)
    optimizer = build_optimizer(model, OPTIMIZER)
    groups = {group["name"]: group["params"] for group in optimizer.groups}
    tokens = torch.randint(0, VOCAB, (args.batch, args.seq_len + 1), device=world.device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    cuda = world.device.type == "cuda"

    def forward(rows: int) -> torch.Tensor:
        with compute_in(world.device, cuda):
            found = model(inputs[:rows], labels=labels[:rows])
        return found.loss_sum / labels.numel()

    def step(watching: bool) -> float:
        forward(args.batch).backward()
        clip = clip_factor(gradient_norm(model), 1.0)
        spent, updates = 0.0, None
        if watching:
            updates, spent = seconds(lambda: Updates(groups), cuda)
        optimizer.step(clip=clip)
        if updates is not None:
            spent += seconds(lambda: (updates.finish(), updates.read()), cuda)[1]
        optimizer.zero_grad()
        return spent

    def described() -> None:
        measure(model, lambda: forward(1), describing=world.is_main)

    for _ in range(2):
        step(True)
        described()
    steps = [seconds(lambda: step(False), cuda)[1] for _ in range(args.repeats)]
    recurrences = [seconds(described, cuda)[1] for _ in range(args.repeats)]
    updates = [step(True) for _ in range(args.repeats)]
    return statistics.median(steps), statistics.median(recurrences), statistics.median(updates)


def seconds(work: Callable, cuda: bool) -> tuple:
    """Return what ``work`` returns, and how long it took with the device's part."""
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = work()
    if cuda:
        torch.cuda.synchronize()
    return found, time.perf_counter() - began
