r"""Sequences in pieces on the ranks of torchrun: how far loss and gradients are from whole ones, or
how much slower a step is.

Every rank has the whole sequences besides, in float32 and in bfloat16 autocast, and computes them
by itself. The first sequence is of several documents with ``--documents``. Errors are relative L2
against the whole sequences in float32: of the loss, and the largest of a gradient, by its
parameter. Those of pieces should be those of whole sequences in the same precision.

    torchrun --nproc-per-node 2 scripts/benchmark.py context pgdn_tiny gdn_tiny --tokens 4096
    torchrun --nproc-per-node 2 scripts/benchmark.py context pgdn_tiny --tokens 64 --device cpu

With ``--speed`` whole training steps in bfloat16 are timed, blocks compiled: on each rank by itself
with a share of the tokens, and in pieces over all ranks, sharded as ``--layout`` says. The second
table has the milliseconds of a step that begin with each kind of work on pieces, until the next
one: waiting for other ranks is in *exchange*, the rest of the model and of the step in *other*.

    torchrun --nproc-per-node 2 scripts/benchmark.py context pgdn_340m --speed 8 --tokens 65536 \
        --batch 1
"""

import argparse
import functools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
import torch.distributed as dist
from benchmarks.train import measure, model_config

from pdn.distributed.context import ContextRanks, context_ranks
from pdn.distributed.dims import ParallelDims
from pdn.distributed.fsdp import World, compute_in, join_world
from pdn.models.language_model import LanguageModel
from pdn.ops import exchange

PHASES = ("local summary", "exchange", "combine", "scan", "other")
CLOCKED_STEPS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", help="e.g. pgdn_tiny hybrid_tiny")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--documents", action="store_true", help="isolate documents")
    parser.add_argument("--document-tokens", type=int, default=5000, help="of those of --speed")
    parser.add_argument("--compile", action="store_true", help="compile every block")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--speed", type=int, metavar="STEPS", help="time so many steps instead")
    parser.add_argument("--layout", nargs="+", default=["ddp"], help="e.g. ddp fsdp")


def main(args: argparse.Namespace) -> None:
    world = join_world(args.device, timeout=600, sharded=True)
    say = functools.partial(print, flush=True) if world.is_main else lambda *_: None
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    say(f"{world.size} x {device}, {args.batch} x {args.tokens} tokens\n")
    if args.speed:
        compare_speed(args, world, say)
        return world.close()
    split = context_ranks(ParallelDims(1, 1, world.size), world.device)
    torch.set_float32_matmul_precision("highest")
    say("| model | precision | loss: whole | pieces | gradient: whole | pieces | of |")
    say("|---|---|---|---|---|---|---|")
    for name in args.models:
        compute = computation(name, args, world.device)
        exact = compute(ContextRanks(), False)
        for bf16 in (False, True):
            whole = errors(compute(ContextRanks(), bf16), exact)
            parts = compute(split, bf16)
            for part in parts.values():
                dist.all_reduce(part)
            pieces = errors(parts, exact)
            worst = [max(found, key=lambda key: found[key]) for found in (whole, pieces)]
            say(
                f"| {name} | {'bfloat16' if bf16 else 'float32'} | {whole['loss']:.1e} | "
                f"{pieces['loss']:.1e} | {whole[worst[0]]:.1e} | {pieces[worst[1]]:.1e} | "
                f"{worst[1]} |"
            )
    world.close()


def computation(
    name: str, args: argparse.Namespace, device: torch.device
) -> Callable[[ContextRanks, bool], dict[str, torch.Tensor]]:
    """Return what computes the loss and the gradients of this rank's pieces, or of the whole."""
    with torch.device(device):
        model = LanguageModel(model_config(name))
    model.init_weights(0)
    if args.compile:
        for block in model.blocks:
            block.compile()
    generator = torch.Generator().manual_seed(0)
    size = args.batch, args.tokens + 1
    drawn = torch.randint(0, model.config.vocab_size, size, generator=generator).to(device)
    documents = None
    if args.documents:
        # at, before and after the middle, where two ranks share the sequence
        middle, end = args.tokens // 2, args.batch * args.tokens
        starts = [0, 1, middle - 1, middle, middle + 2]
        later = range(args.tokens, end, args.tokens)
        documents = torch.tensor([*starts, *later, end, end], dtype=torch.int32, device=device)

    def compute(ranks: ContextRanks, bf16: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        tokens, labels = (ranks.piece_of(x).contiguous() for x in (drawn[:, :-1], drawn[:, 1:]))
        with ranks.split(tokens, documents) as own:
            with compute_in(device, bf16):
                loss = model(tokens, labels=labels, cu_seqlens=own).loss_sum
            loss.backward()
        found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach().clone()} | found

    return compute


def errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        key: float((found[key] - x).norm() / x.norm().clamp(min=1e-30)) for key, x in exact.items()
    }


def compare_speed(args: argparse.Namespace, world: World, say: Callable[[str], None]) -> None:
    """Print the speed of whole sequences on one rank and of pieces on all, and their parts."""
    torch.set_float32_matmul_precision("high")
    cuda = world.device.type == "cuda"
    documents = args.document_tokens if args.documents else None
    shared = dict(steps=args.speed, warmup=4, profile=None, documents=documents)
    whole = dict(batch=args.batch, seq_len=args.tokens // world.size)
    pieces = dict(batch=args.batch, seq_len=args.tokens)
    say(
        "| model | layout | tokens/s | of so many alone | step ms | alone ms | peak GiB | first s |"
    )
    say("|---|---|---|---|---|---|---|---|")
    parts = []
    for name in args.models:
        alone, compiled = 0.0, "+compile" if cuda else ""
        for layout in ("one rank", *args.layout):
            one = layout == "one rank"
            options = "" if one else f"+{layout}+context={world.size}"
            row = measure(
                f"{name}{compiled}{options}",
                argparse.Namespace(**shared, **(whole if one else pieces)),
                replace(world, size=1) if one else world,
                functools.partial(clocked, device=world.device),
            )
            speed = row["tokens_per_second"]
            alone = speed if one else alone
            peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
            share = speed / alone / (1 if one else world.size)
            say(
                f"| {name} | {layout} | {speed:,} | {share:.1%} | {row['step_ms']:.1f} | "
                f"{row['alone_ms']:.1f} | {peak} | {row['first_step_s']:.1f} |"
            )
            parts.append((name, layout, row["found"]))
            if cuda:
                torch.cuda.empty_cache()
    say(f"\n| model | layout | {' | '.join(PHASES)} | calls of each |\n{'|---' * 8}|")
    for name, layout, (ms, calls) in parts:
        times = " | ".join(f"{ms[phase]:.1f}" for phase in PHASES)
        say(f"| {name} | {layout} | {times} | {', '.join(str(calls[x]) for x in PHASES)} |")


def clocked(step: Callable[[], None], device: torch.device) -> tuple[dict, dict]:
    """Return the milliseconds of a step by what had begun last, and how often each began."""
    cuda = device.type == "cuda"
    marks = []

    def mark(name: str) -> None:
        if cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        marks.append((name, now))

    with exchange.clocked(mark):
        mark("other")
        for _ in range(CLOCKED_STEPS):
            step()
        mark("other")
    if cuda:
        torch.cuda.synchronize()
    ms, calls = Counter(), Counter()
    for (name, begin), (_, end) in pairwise(marks):
        taken = begin.elapsed_time(end) if cuda else 1e3 * (end - begin)
        ms[name] += taken / CLOCKED_STEPS
        calls[name] += 1
    return ms, {name: count // CLOCKED_STEPS for name, count in calls.items()} | {
        name: 0 for name in PHASES if name not in calls
    }
