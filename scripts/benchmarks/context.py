"""Sequences in pieces on the ranks of torchrun: how far loss and gradients are from whole ones.

Every rank has the whole sequences besides, in float32 and in bfloat16 autocast, and computes them
by itself. The first sequence is of several documents with ``--documents``. Errors are relative L2
against the whole sequences in float32: of the loss, and the largest of a gradient, by its
parameter. Those of pieces should be those of whole sequences in the same precision.

    torchrun --nproc-per-node 2 scripts/benchmark.py context pgdn_tiny gdn_tiny --tokens 4096
    torchrun --nproc-per-node 2 scripts/benchmark.py context pgdn_tiny --tokens 64 --device cpu
"""

import argparse
import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from benchmarks.train import model_config

from pdn.distributed.context import ContextRanks, context_ranks
from pdn.distributed.dims import ParallelDims
from pdn.distributed.fsdp import compute_in, join_world
from pdn.models.language_model import LanguageModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", help="e.g. pgdn_tiny hybrid_tiny")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--documents", action="store_true", help="isolate documents")
    parser.add_argument("--compile", action="store_true", help="compile every block")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])


def main(args: argparse.Namespace) -> None:
    world = join_world(args.device, timeout=600, sharded=True)
    say = functools.partial(print, flush=True) if world.is_main else lambda *_: None
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    split = context_ranks(ParallelDims(1, 1, world.size), world.device)
    torch.set_float32_matmul_precision("highest")
    say(f"{world.size} x {device}, {args.batch} x {args.tokens} tokens\n")
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
                f"| {name} | {'bfloat16' if bf16 else 'float32'} | {whole['loss']:.1e} "
                f"| {pieces['loss']:.1e} | {whole[worst[0]]:.1e} | {pieces[worst[1]]:.1e} "
                f"| {worst[1]} |"
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
