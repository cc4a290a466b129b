"""One token of decoding: the fused step, in place and out of place, beside the peer's kernels.

A call is the op on one token of every sequence with a state, under no_grad, norms and raw gates
included. GB/s counts the state read and written once; a state that fits the L2 cache moves faster
than memory. Errors are relative L2 of output and state against the float64 reference.

    python scripts/benchmark.py decode     all models, batch 1 and 64
    python scripts/benchmark.py decode --device cpu --backends reference --batches 1 \\
        --heads 2 --key 16 --steps 2
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from benchmarks._measure import environment, markdown, measure, write_json

from pdn.certification.problems import Problem, relative_error, sample
from pdn.ops.recurrences import RECURRENCES
from pdn.ops.types import RecurrentState

HEADER = [
    "model",
    "batch",
    "backend",
    "GPU µs",
    "wall µs",
    "host µs",
    "launches",
    "GB/s",
    "err o",
    "err state",
    "clock",
]
STEP = {"step": False, "step in place": True}  # our kernel, and whether it overwrites the state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", default=[*RECURRENCES], choices=[*RECURRENCES], metavar="MODEL"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument(
        "--backends", nargs="+", default=[*STEP, "fla"], choices=[*STEP, "fla", "reference"]
    )
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=100, help="timed repetitions")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/benchmark"),
        help="folder of decode.json and decode.md",
    )


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    where = environment(device)
    print(" ".join(f"{k}={v}" for k, v in where.items()), flush=True)
    records = []
    for model in args.models:
        for batch in args.batches:
            size = dict(batch=batch, time=1, heads=args.heads, key=args.key)
            p = sample(
                RECURRENCES[model],
                **size,
                dtype=getattr(torch, args.dtype),
                device=device,
                initial=True,
                final=True,
            )
            with torch.no_grad():
                records += [one(args, p, model, backend, device) for backend in args.backends]
            write_json(args.out / "decode.json", {"environment": where, "records": records})
            print(
                markdown([], [row(r) for r in records[-len(args.backends) :]]).split("\n", 2)[2],
                flush=True,
            )
    table = markdown(HEADER, [row(r) for r in records])
    (args.out / "decode.md").write_text(f"{where}\n\n{table}\n", encoding="utf-8")
    print(f"\n{table}")


def one(args, p: Problem, model: str, backend: str, device: torch.device) -> dict:
    record = {"model": model, "batch": p.tensors["q"].shape[0], "backend": backend}
    try:
        expected = p.to(torch.float64).forward("reference")
        found = call(p, backend, fresh_state(p))()
        record |= {name: relative_error(found[name], expected[name]) for name in ("o", "S")}
        timing = measure(call(p, backend, fresh_state(p)), device, args.steps, together=50)
        moved = 2 * p.tensors["S"].numel() * 4
        record |= asdict(timing) | {"gb_s": moved / timing.gpu_ms / 1e6 if timing.gpu_ms else None}
    except Exception as error:
        record["failed"] = f"{type(error).__name__}: {error}"
    return record


def fresh_state(p: Problem) -> RecurrentState:
    return RecurrentState(
        p.tensors["S"].clone(), p.tensors["A"].clone() if "A" in p.tensors else None
    )


def call(p: Problem, backend: str, state: RecurrentState):
    """Return a function that decodes one token from this state.

    Args:
        p: the call.
        backend: that computes it.
        state: before the token.
    """
    if backend not in STEP:
        tensors = p.tensors | {name: x for name, x in state._asdict().items() if x is not None}
        return lambda: p.forward(backend, tensors)
    from pdn.ops.triton import step

    arguments, options = p.arguments(p.tensors)
    options |= {"state": state, "in_place": STEP[backend]}
    function = step.delta_rule if p.recurrence.online else step.linear_attention

    def run():
        o, new = function(*arguments, **options)
        return {"o": o, "S": new.S}

    return run


def row(r: dict) -> list:
    if "failed" in r:
        return [
            r["model"],
            r["batch"],
            r["backend"],
            *[None] * 7,
            f"failed: {r['failed'][:300]}".replace("|", "/"),
        ]
    times = [
        None if r[k] is None else round(1e3 * r[k], 1) for k in ("gpu_ms", "wall_ms", "host_ms")
    ]
    speed = None if r["gb_s"] is None else round(r["gb_s"])
    return [
        r["model"],
        r["batch"],
        r["backend"],
        *times,
        r["launches"],
        speed,
        f"{r['o']:.1e}",
        f"{r['S']:.1e}",
        r["method"],
    ]
