"""Whole training steps on random tokens: tokens/s, MFU and memory, and those of the peer's models.

A variant is ``<model>`` (eager), ``<model>+compile`` (every block compiled), ``<model>+fla`` (our
model on the peer's ops) or ``peer:<model>`` (flash-linear-attention's own model of the same size,
with its fused norms and losses). ``+fsdp``, ``+ddp`` and ``+<key>=<value>`` of the group
``parallel`` shard ours, over the ranks of torchrun or on one; with ``+context=2`` two ranks share
each sequence. ``+pieces=<n>`` takes sequences in pieces of n tokens, as ``trainer.piece_tokens``.

Steps follow each other without waiting for the device, as in a run; "alone" is a step before which
the host has waited, so that the GPU waits for its first launches. Sequences of 128 tokens keep the
GPU waiting: then a step takes as long as the host needs to launch it.
"""

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks._tuning import compile_together

from pdn import ops
from pdn.cli.compose import compose
from pdn.cli.parse import parse
from pdn.distributed.config import ParallelConfig
from pdn.distributed.fsdp import (
    World,
    clip_factor,
    clip_gradients,
    compute_in,
    gradient_norm,
    join_world,
    parallelise,
)
from pdn.logging.profile import Profiler
from pdn.logging.progress import peak_flops
from pdn.logging.trace import UPDATE, lines
from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel
from pdn.optim.config import AdamWConfig
from pdn.optim.optimizers import build_optimizer
from pdn.training.pieces import accumulate_in_pieces
from pdn.wording import first_line

VOCAB = 32000
PROFILED_STEPS = 3
OPTIMIZER = AdamWConfig(kind="adamw", lr=4e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "variants", nargs="+", help="e.g. pgdn_340m pgdn_340m+compile pgdn_340m+fla peer:pgdn_340m"
    )
    parser.add_argument("--batch", type=int, default=16, help="sequences per step and rank")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIRECTORY",
        help="also print the time of each part of a step; trace and table go to DIRECTORY/VARIANT",
    )
    parser.add_argument("--json", type=Path, help="write the rows here too")


def model_config(name: str) -> ModelConfig:
    return parse(compose([f"model={name}", f"model.vocab_size={VOCAB}"])).model


def parallel_config(options: list[str]) -> ParallelConfig:
    """Return the group ``parallel`` that a variant's options ask for."""
    kinds = [f"parallel={option}" for option in options if option in ("ddp", "fsdp", "hsdp")]
    keys = [f"parallel.{option}" for option in options if "=" in option and "pieces=" not in option]
    words = [*kinds, f"parallel.compile={str('compile' in options).lower()}", *keys]
    return parse(compose(words)).parallel


def ours(name: str, options: list[str], world: World) -> torch.nn.Module:
    ops.set_default_backend("fla" if "fla" in options else "auto")
    with torch.device("meta"):
        model = LanguageModel(model_config(name))
    return parallelise(model, parallel_config(options), world, seed=0)


def peer(name: str, world: World) -> torch.nn.Module:
    """Return flash-linear-attention's model with the sizes of ours.

    It is in float32 for autocast, as its trainer runs it.
    """
    import fla.models as zoo

    compile_together()
    config = model_config(name)
    kinds = {
        "deltanet": ("DeltaNetConfig", "DeltaNetForCausalLM", {}),
        "gdn": (
            "GatedDeltaNetConfig",
            "GatedDeltaNetForCausalLM",
            {"expand_v": 1, "use_gate": False},
        ),
        "kda": ("KDAConfig", "KDAForCausalLM", {"expand_v": 1}),
        "pgdn": (
            "PrecondGatedDeltaNetConfig",
            "PrecondGatedDeltaNetForCausalLM",
            {"expand_v": 1, "use_gate": False},
        ),
        "pkda": ("PrecondKDAConfig", "PrecondKDAForCausalLM", {"expand_v": 1}),
        "transformer": ("TransformerConfig", "TransformerForCausalLM", {}),
    }
    config_class, model_class, extra = kinds[name.rsplit("_", 1)[0]]
    sizes = dict(
        hidden_size=config.d_model, num_hidden_layers=config.num_layers, num_heads=config.num_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size, vocab_size=VOCAB, tie_word_embeddings=True,
    )  # fmt: skip
    return getattr(zoo, model_class)(getattr(zoo, config_class)(**sizes, **extra)).to(world.device)


def measure(
    variant: str,
    args: argparse.Namespace,
    world: World,
    then: Callable[[Callable[[], None]], object] | None = None,
) -> dict:
    """Measure one row of the table.

    Args:
        variant: what to measure, see the module.
        args: of the command line; ``documents`` beside it: of so many tokens, isolated.
        world: the ranks.
        then: called with a step when all is measured; what it returns is ``found`` of the row.
    """
    is_peer = variant.startswith("peer:")
    if is_peer and world.size > 1:
        raise ValueError("the peer's model is not sharded here; expected one rank")
    name, *options = variant.removeprefix("peer:").split("+")
    cuda = world.device.type == "cuda"
    if is_peer:
        model = peer(name, world)
        step = _step_of_peer(model, args, world)
    else:
        world = world.laid_out(parallel_config(options).dims(world.size))
        model = ours(name, options, world)
        step = _step_of_ours(model, args, world, options)
    times = _timed(step, args, cuda)
    if args.profile is not None:
        _profile(step, model, args, variant, world)
    speed = world.batch_ranks * args.batch * args.seq_len / times["seconds"]
    peak = peak_flops(world.device)
    return {
        "variant": variant,
        "tokens_per_second": round(speed),
        "mfu": peak
        and speed * model_config(name).flops_per_token(args.seq_len) / (peak * world.size),
        "step_ms": 1e3 * times["seconds"],
        "alone_ms": 1e3 * times["alone"],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "first_step_s": times["first"],
        "found": then and then(step),
    }


def _random_tokens(args: argparse.Namespace, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels of this rank, [B, T] each."""
    tokens = torch.randint(0, VOCAB, (args.batch, args.seq_len + 1), device=world.device)
    inputs, labels = (
        world.context.piece_of(part).contiguous() for part in (tokens[:, :-1], tokens[:, 1:])
    )
    return inputs, labels


def _step_of_peer(
    model: torch.nn.Module, args: argparse.Namespace, world: World
) -> Callable[[], None]:
    """Return what takes a step of flash-linear-attention's model, on random tokens."""
    cuda = world.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=cuda
    )
    inputs, _ = _random_tokens(args, world)

    def step() -> None:
        with compute_in(world.device, cuda):
            loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        with torch.profiler.record_function(UPDATE):
            clip_gradients(model, 1.0)
            optimizer.step()
        optimizer.zero_grad()

    return step


def _step_of_ours(
    model: torch.nn.Module, args: argparse.Namespace, world: World, options: list[str]
) -> Callable[[], None]:
    """Return what takes a step of our model, on random tokens."""
    cuda = world.device.type == "cuda"
    optimizer = build_optimizer(model, OPTIMIZER)
    inputs, labels = _random_tokens(args, world)
    bounds, size = None, getattr(args, "documents", None)
    if size:
        rows = range(0, args.batch * args.seq_len, args.seq_len)
        starts = [start for row in rows for start in range(row, row + args.seq_len, size)]
        bounds = torch.tensor([*starts, args.batch * args.seq_len], device=world.device).int()
    pieces = next((int(x.removeprefix("pieces=")) for x in options if "pieces=" in x), None)
    counted = torch.tensor(labels.numel(), device=world.device)

    def accumulate() -> None:
        if pieces:
            accumulate_in_pieces(
                model, {"tokens": inputs, "labels": labels}, counted, world, size=pieces,
                last=True, bf16=cuda, keep_gathered=False, z_loss=0.0,
            )  # fmt: skip
            return
        with world.context.split(inputs, bounds) as own:
            with compute_in(world.device, cuda):
                loss = model(inputs, labels=labels, cu_seqlens=own).loss_sum
                loss = loss / (labels.numel() * world.size)
            loss.backward()

    def step() -> None:
        accumulate()
        with torch.profiler.record_function(UPDATE):
            optimizer.step(clip=clip_factor(gradient_norm(model), 1.0))
        optimizer.zero_grad()

    return step


def _timed(step: Callable[[], None], args: argparse.Namespace, cuda: bool) -> dict[str, float]:
    """Return the seconds of the first step, of one ``alone``, and of those that follow each other.

    The peak of the device's memory is that of all steps after the warm-up.
    """

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    began = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - began
    for _ in range(args.warmup):
        step()
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    alone = []
    for _ in range(args.steps):
        began = time.perf_counter()
        step()
        wait()
        alone.append(time.perf_counter() - began)
    # What compiling left to Python's collector, half a second of walking, would come in few steps.
    gc.collect()
    gc.disable()
    step()  # the device is busy when the clock starts
    clock = _clock(cuda)
    for _ in range(args.steps):
        step()
    seconds = clock() / args.steps
    gc.enable()
    return {"first": first, "alone": statistics.median(alone), "seconds": seconds}


def _clock(cuda: bool) -> Callable[[], float]:
    """Start a clock where the device is in its work; what it returns gives the seconds since.

    That call waits for the device, this one does not.
    """
    if not cuda:
        began = time.perf_counter()
        return lambda: time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()

    def seconds() -> float:
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    return seconds


def _profile(
    step: Callable[[], None],
    model: torch.nn.Module,
    args: argparse.Namespace,
    variant: str,
    world: World,
) -> None:
    """Print where the time of three steps goes, as ``trainer.profile`` does in a run."""
    if not world.is_main:  # takes the same steps
        for _ in range(1 + PROFILED_STEPS):
            step()
        return
    folder = args.profile / variant.replace(":", "-")
    profiler = Profiler(world.device)
    profiler.warm_up()
    step()
    profiler.begin(folder)
    for _ in range(PROFILED_STEPS):
        step()
    tokens = {args.batch * args.seq_len}
    table = profiler.end(folder, model, steps=PROFILED_STEPS, tokens=tokens)
    print("\n".join([f"{variant}: {folder}", *lines(table)]), flush=True)


def main(args: argparse.Namespace) -> None:
    sharded = any(
        option in variant.split("+")
        for variant in args.variants
        for option in ("ddp", "fsdp", "hsdp")
    )
    world = join_world(args.device, timeout=600, sharded=sharded)
    say = functools.partial(print, flush=True) if world.is_main else lambda *_: None
    torch.set_float32_matmul_precision("high")
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    shape = f"{args.batch} x {args.seq_len} tokens a step and rank"
    say(f"{world.size} x {device}, torch {torch.__version__}, {shape}, bf16 on a GPU\n")
    say(
        "| variant | tokens/s | MFU | step ms | alone ms | peak GiB | first step s "
        "|\n|---|---|---|---|---|---|---|"
    )
    rows = []
    for variant in args.variants:
        try:
            row = measure(variant, args, world)
        except Exception as error:
            say(f"| {variant} | failed: {type(error).__name__}: {first_line(error)[:120]} |")
            continue
        finally:
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
        rows.append(row)
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        say(
            f"| {variant} | {row['tokens_per_second']:,} | {mfu} | {row['step_ms']:.1f} | "
            f"{row['alone_ms']:.1f} | {memory} | {row['first_step_s']:.1f} |"
        )
    world.close()
    if args.json and world.is_main:
        args.json.write_text(
            json.dumps({"device": device, "rows": rows}, indent=1), encoding="utf-8"
        )
