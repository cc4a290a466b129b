"""Log-likelihoods of many short sequences, as evaluations ask for: useful tokens a second.

The requests have the shapes of commonsense tasks: contexts of 15 to 130 tokens with one to four
continuations each, of random tokens. Ours reads them as ``scripts/evaluate.py`` does, its host work
included. ``peer:<model>`` is flash-linear-attention's model of the same size, in batches padded to
their longest, sorted by length, as lm-eval's HFLM reads them.

    python scripts/benchmark.py score pgdn_340m peer:pgdn_340m
    python scripts/benchmark.py score pgdn_tiny --documents 8 --device cpu
"""

import argparse
import functools
import random
import time

import torch
from benchmarks.train import VOCAB, ours, peer

from pdn.distributed.fsdp import join_world
from pdn.distributed.world import World
from pdn.evals.scoring import Scorer

Request = tuple[list[int], list[int]]
# tokens of a context and of a continuation, and continuations: about those of HellaSwag, ARC, PIQA,
# BoolQ and LAMBADA with a vocabulary of 32,000
SHAPES = [(85, 25, 4), (30, 6, 4), (15, 28, 2), (130, 1, 2), (85, 2, 1)]
MAX_LENGTH = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("variants", nargs="+", help="e.g. pgdn_340m peer:pgdn_340m")
    parser.add_argument("--documents", type=int, default=10_000, help="of several requests each")
    parser.add_argument("--batch", type=int, default=64, help="sequences of a pass")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])


def main(args: argparse.Namespace) -> None:
    world = join_world(args.device, timeout=600)
    say = functools.partial(print, flush=True)
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    asked = requests(args.documents)
    tokens = sum(len(context) + len(continuation) for context, continuation in asked)
    say(f"{device}, {len(asked):,} requests, {tokens:,} tokens, {args.batch} sequences a pass\n")
    say("| variant | seconds | useful tokens/s |")
    say("|---|---|---|")
    for variant in args.variants:
        score = scorer_of(variant, world, args.batch)
        score(asked[:: max(1, len(asked) // (8 * args.batch))])  # compiles
        score(asked)
        began = time.perf_counter()
        score(asked)
        seconds = time.perf_counter() - began
        say(f"| {variant} | {seconds:.2f} | {tokens / seconds:,.0f} |")
        del score
    world.close()


def requests(documents: int) -> list[Request]:
    """Draw the requests of that many documents, the same ones every time."""
    rng = random.Random(0)

    def draw(median: int) -> list[int]:
        length = min(MAX_LENGTH // 2, max(1, round(median * rng.lognormvariate(0, 0.4))))
        return [rng.randrange(VOCAB) for _ in range(length)]

    found = []
    for i in range(documents):
        context, continuation, count = SHAPES[i % len(SHAPES)]
        asked = draw(context)
        found += [(asked, draw(continuation)) for _ in range(count)]
    return found


def scorer_of(variant: str, world: World, batch: int):
    """Return the function that scores a list of requests."""
    name, *options = variant.split("+")
    bf16 = world.device.type == "cuda"
    if name.startswith("peer:"):
        model = peer(name.removeprefix("peer:"), world).eval()
        return functools.partial(padded, model, world.device, batch, bf16)
    model = ours(name, options, world).eval()
    return Scorer(model, world, MAX_LENGTH, batch, bf16=bf16).loglikelihoods


@torch.inference_mode()
def padded(
    model: torch.nn.Module, device: torch.device, batch: int, bf16: bool, asked: list[Request]
) -> list[tuple[float, bool]]:
    """Score as lm-eval's HFLM does: sorted, padded on the right, all logits of a batch."""
    order = sorted(range(len(asked)), key=lambda i: -sum(map(len, asked[i])))
    found: list = [None] * len(asked)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        rows = [asked[i][0] + asked[i][1] for i in part]
        width = max(map(len, rows)) - 1
        inputs = torch.tensor([(row[:-1] + [0] * width)[:width] for row in rows]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            log_probs = model(input_ids=inputs).logits.float().log_softmax(-1)
        for i, row, of_row in zip(part, rows, log_probs, strict=True):
            counted = len(asked[i][1])
            of_row = of_row[len(row) - 1 - counted : len(row) - 1]
            wanted = torch.tensor(row[-counted:], device=device)
            greedy = bool((of_row.argmax(-1) == wanted).all())
            found[i] = of_row.gather(1, wanted[:, None]).sum().item(), greedy
    return found
