"""The short convolution and SiLU, forward and backward: the kernel, PyTorch and the peer's kernel.

PyTorch is measured eager and compiled. The parameters are float32, as under autocast. GB/s counts
x, y, dy and dx once and x once more: what must move. Errors are relative L2 of y, dx and dweight
against float64 on the same rounded inputs.

    python scripts/benchmark.py convolution   16x2048 and 1x32768 tokens of 1024 channels,
                                              dense and in documents
    python scripts/benchmark.py convolution --device cpu --backends torch --shapes 2x64 \\
        --channels 16 --steps 2
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from benchmarks._measure import environment, markdown, measure, write_json

from pdn import ops
from pdn.certification.problems import ConvolutionProblem, relative_error, sample_convolution

HEADER = [
    "B×T", "documents", "backend", "GPU µs", "of forward", "wall µs", "host µs", "launches", "GB/s",
    "err y", "err dx",
    "err dweight", "clock",
]  # fmt: skip
BACKENDS = ["triton", "torch", "compiled torch", "fla"]
LENGTHS = [700, 90, 333, 1500, 41, 600]  # of documents, over and over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=["16x2048", "1x32768"], metavar="BxT")
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=50, help="timed repetitions")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/benchmark"),
        help="folder of convolution.json and .md",
    )


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    where = environment(device)
    print(" ".join(f"{k}={v}" for k, v in where.items()), flush=True)
    records = []
    for shape in args.shapes:
        batch, time = map(int, shape.split("x"))
        for bounds in (None, boundaries(batch, time)):
            p = sample_convolution(
                batch, time, args.channels, args.width, dtype=getattr(torch, args.dtype),
                parameters=torch.float32,
                bias=False, cu_seqlens=bounds, device=device,
            )  # fmt: skip
            exact = p.to(torch.float64).run(convolution("torch"))
            for backend in args.backends:
                records.append(
                    {"shape": shape, "documents": len(bounds or [0]) - 1}
                    | one(args, p, exact, backend, device)
                )
                print(markdown([], [row(records[-1])]).split("\n", 2)[2], flush=True)
            write_json(args.out / "convolution.json", {"environment": where, "records": records})
    table = markdown(HEADER, [row(r) for r in records])
    (args.out / "convolution.md").write_text(f"{where}\n\n{table}\n", encoding="utf-8")
    print(f"\n{table}")


def boundaries(batch: int, time: int) -> list[int]:
    """Return documents of LENGTHS, cut where a row of the batch ends."""
    ends = itertools.accumulate(itertools.cycle(LENGTHS))
    inside = itertools.takewhile(lambda end: end < batch * time, ends)
    return sorted({*inside, *range(0, batch * time + 1, time)})


def one(args, p: ConvolutionProblem, exact: dict, backend: str, device: torch.device) -> dict:
    record = {"backend": backend}
    try:
        convolve = convolution(backend)
        found = p.run(convolve)
        record |= {name: relative_error(found[name], x) for name, x in exact.items()}
        timing = measure(lambda: p.run(convolve), device, args.steps)
        forward = measure(
            lambda: convolve(p.x, p.weight, None, cu_seqlens=p.cu_seqlens), device, args.steps
        )
        moved = 5 * p.x.nbytes
        record |= asdict(timing) | {"forward_ms": forward.gpu_ms}
        record |= {"gb_s": moved / timing.gpu_ms / 1e6 if timing.gpu_ms else None}
    except Exception as error:
        record["failed"] = f"{type(error).__name__}: {error}"
    return record


def convolution(backend: str) -> Callable[..., torch.Tensor]:
    """Return ``convolve(x, weight, bias, cu_seqlens=...)`` by one of the backends."""
    if backend == "fla":
        from fla.modules.causal_conv1d import causal_conv1d

        def peer(x, weight, bias, *, cu_seqlens):
            # it takes documents in one row
            rows = x if cu_seqlens is None else x.flatten(0, 1)[None]
            y, _ = causal_conv1d(
                rows, weight, bias, activation="silu", backend="triton", cu_seqlens=cu_seqlens
            )
            return y.view_as(x)

        return peer
    name = "triton" if backend == "triton" else "reference"

    def ours(x, weight, bias, *, cu_seqlens):
        return ops.short_convolution(x, weight, bias, cu_seqlens=cu_seqlens, backend=name)[0]

    return torch.compile(ours, dynamic=False) if backend == "compiled torch" else ours


def row(r: dict) -> list:
    if "failed" in r:
        return [
            r["shape"],
            r["documents"],
            r["backend"],
            *[None] * 9,
            f"failed: {r['failed'][:300]}".replace("|", "/"),
        ]
    times = [
        None if r[k] is None else round(1e3 * r[k], 1)
        for k in ("gpu_ms", "forward_ms", "wall_ms", "host_ms")
    ]
    speed = None if r["gb_s"] is None else round(r["gb_s"])
    errors = [f"{r[name]:.1e}" for name in ("y", "dx", "dweight")]
    return [
        r["shape"],
        r["documents"],
        r["backend"],
        *times,
        r["launches"],
        speed,
        *errors,
        r["method"],
    ]
