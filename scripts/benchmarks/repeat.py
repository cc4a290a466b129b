"""The same forward and backward pass again and again, compared bit by bit with the first.

A kernel that is wrong once in a million programs passes every test of small problems, and moves a
loss by a hundredth in a run. A variant is as of ``train``: ``pgdn_340m+compile``. Where something
differs, the first block whose output does is named with its sequences, and the parameters whose
gradients do.

    python scripts/benchmark.py repeat pgdn_340m+compile --repeats 200
"""

import argparse
import functools

import torch
from benchmarks.train import VOCAB, ours
from torch import Tensor

from pdn.distributed.fsdp import compute_in, join_world
from pdn.models.language_model import LanguageModel
from pdn.models.layers import linear_cross_entropy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("variants", nargs="+", help="e.g. pgdn_340m+compile gdn_340m")
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--repeats", type=int, default=100, help="passes after the first")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])


def main(args: argparse.Namespace) -> None:
    world = join_world(args.device, timeout=600)
    say = functools.partial(print, flush=True)
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    say(f"{device}, {args.batch} x {args.seq_len} tokens, {args.repeats} passes after the first")
    for variant in args.variants:
        name, *options = variant.split("+")
        model = ours(name, options, world)
        tokens = torch.randint(0, VOCAB, (args.batch, args.seq_len + 1), device=world.device)
        first = None
        differing = 0
        for i in range(1 + args.repeats):
            found = one_pass(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            first = first or found
            said = difference(first, found)
            if said:
                differing += 1
                say(f"{variant}: pass {i}: {said}")
        say(f"{variant}: {differing} of {args.repeats} passes differ from the first")
        del model, first, found
    world.close()


def one_pass(
    model: LanguageModel, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return checksums of every sequence after the embedding and each block, and the gradients.

    The checksums, [1 + blocks, B] int64, are of the bits, so that their order does not count.
    """
    model.zero_grad()
    with compute_in(tokens.device, tokens.is_cuda):
        x = model.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        sums = [checksum(x)]
        for block in model.blocks:
            x, _ = block(x)
            sums.append(checksum(x))
        loss, _, _ = linear_cross_entropy(model.norm(x), model.head_weight, labels)
    loss.backward()
    gradients = {
        name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None
    }
    return torch.stack(sums), gradients


def checksum(x: Tensor) -> Tensor:
    """Sum the bits of each sequence of x [B, T, D] as integers: [B]."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(width).flatten(1).sum(1, dtype=torch.int64)


def difference(
    first: tuple[Tensor, dict[str, Tensor]], found: tuple[Tensor, dict[str, Tensor]]
) -> str:
    """Say what differs between two passes; nothing if they are equal to the last bit."""
    said = []
    at, sequences = (first[0] != found[0]).nonzero(as_tuple=True)
    if len(at):
        place = int(at[0])
        where = "the embedding" if place == 0 else f"block {place - 1}"
        own = sorted({int(s) for a, s in zip(at, sequences, strict=True) if int(a) == place})
        said.append(f"forward, first in {where}, sequences {own}")
    names = list(first[1])
    unequal = torch.stack([(first[1][name] != found[1][name]).any() for name in names]).tolist()
    wrong = [name for name, differs in zip(names, unequal, strict=True) if differs]
    if wrong:
        said.append(f"gradients of {len(wrong)} parameters, from the end {wrong[-1]}")
    return "; ".join(said)
