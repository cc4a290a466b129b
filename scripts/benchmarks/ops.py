"""Forward and backward of the recurrences, ours beside the rivals, with errors beside times.

One call is the op as a layer uses it: l2norm of q and k, raw gates activated, gradients by
everything. Errors are relative L2 against the float64 chunkwise form on the same rounded inputs, on
one head: the largest over the outputs, over dq dk dv, over the gates' and the preconditioner's
gradients by token, and over those of the head's parameters, which are sums over all tokens that
largely cancel. "first call" is with Triton's caches as they were found.

    python scripts/benchmark.py ops                 all models, 16x2048 and 1x32768, ours and FLA
    python scripts/benchmark.py ops --models gdn kda \\
        --backends triton fla flash_qla fla_tilelang cudnn     and the rivals that are installed
    python scripts/benchmark.py ops --sweep 65536   T = 2048 ... 65536 at that many tokens
    python scripts/benchmark.py ops --warm fla      compile and tune in parallel, for a later run
    python scripts/benchmark.py ops --models pgdn --backends triton --kernels 20
    python scripts/benchmark.py ops --device cpu --backends chunkwise --shapes 1x128 \\
        --heads 2 --key 16 --dtype float32 --steps 2
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks._measure import environment, markdown, measure, write_json
from benchmarks._rivals import RIVALS

from pdn.certification.problems import KINDS, SUMS, Problem, relative_error, sample
from pdn.ops.recurrences import ONLINE, RECURRENCES

SDPA = "sdpa"  # causal softmax attention, the yardstick: no backend, no recurrence
HEADER = [
    "model", "B×T", "backend", "GPU ms", "wall ms", "host ms", "launches", "peak MiB",
    "first call s",
    "err o,S", "err dqkv", "err gates", "err precond", "err sums", "clock",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        default=[*ONLINE, SDPA],
        choices=[*RECURRENCES, SDPA],
        metavar="MODEL",
    )
    parser.add_argument(
        "--shapes", nargs="+", default=["16x2048", "1x32768"], help="batch x tokens"
    )
    parser.add_argument(
        "--sweep",
        type=int,
        metavar="TOKENS",
        help="T = 2048, 4096, ... TOKENS at that many tokens, in place of --shapes",
    )
    parser.add_argument(
        "--backends", nargs="+", default=["triton", "fla"],
        choices=["triton", *RIVALS, "chunkwise", "reference"],
        help="each is timed on the models that it has; fla is its Triton kernels alone",
    )  # fmt: skip
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key", type=int, default=128, help="head size of q, k")
    parser.add_argument("--value", type=int, help="head size of v; that of k by default")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=30, help="timed repetitions")
    parser.add_argument("--no-errors", action="store_true", help="skip the float64 comparison")
    parser.add_argument(
        "--kernels",
        type=int,
        default=0,
        help="also list this many of the largest kernels of each call, launched one after "
        "the other",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/benchmark"),
        help="folder of ops.json, ops.md and ops.png",
    )
    parser.add_argument(
        "--warm",
        choices=["triton", *RIVALS],
        help="only compile and tune this backend, in parallel processes",
    )
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes of --warm"
    )
    # set in the processes of --warm
    parser.add_argument("--tuning-lock", type=Path, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> None:
    if args.sweep:
        times = [2048 << i for i in range(6) if 2048 << i <= args.sweep] or [args.sweep]
        args.shapes = [f"{args.sweep // t}x{t}" for t in times]
    # read when a kernel is first tuned; --warm fills the same cache
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    if args.warm:
        return warm(args)
    device = torch.device(args.device)
    if args.kernels:
        from pdn.ops.triton import compiled

        compiled.starts_early = lambda device: False  # a kernel's time would include its waiting
    if args.tuning_lock:
        tune_one_at_a_time(args.tuning_lock)
    where = environment(device)
    print(" ".join(f"{k}={v}" for k, v in where.items()), flush=True)
    records = []
    for model in args.models:
        for shape in args.shapes:
            for record in run_problem(args, model, shape, device):
                records.append(record)
                write_json(
                    args.out / "ops.json",
                    {"environment": where, "options": vars_of(args), "records": records},
                )
                print(markdown_row(record), flush=True)
    if args.tuning_lock:
        return
    table = markdown(HEADER, [row(r) for r in records])
    summary = f"{table}\n\n{compare(records)}" if len(args.backends) == 2 else table
    (args.out / "ops.md").write_text(f"{where}\n\n{summary}\n", encoding="utf-8")
    print(f"\n{summary}")
    plot(records, args.out / "ops.png")


def vars_of(args: argparse.Namespace) -> dict:
    return {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()}


def run_problem(args, model: str, shape: str, device: torch.device):
    """Return one record for each backend.

    A backend that fails is a record too, so that the others are still measured.

    Args:
        args: of the command line.
        model: name of the recurrence.
        shape: ``BxT``.
        device: to run on.
    """
    batch, tokens = map(int, shape.split("x"))
    size = dict(batch=batch, time=tokens, heads=args.heads, key=args.key, value=args.value)
    base = {"model": model, "shape": shape}
    if model == SDPA:
        call = sdpa_call(args, batch, tokens, device)
        yield base | {"backend": "sdpa", "errors": {}} | asdict(measure(call, device, args.steps))
        return
    p = sample(RECURRENCES[model], **size, dtype=getattr(torch, args.dtype), device=device)
    expected = None
    for backend in args.backends:
        if backend in RIVALS and model not in RIVALS[backend].models:
            continue
        record = base | {"backend": backend, "errors": {}}
        try:
            rival = RIVALS.get(backend)
            with rival.chosen() if rival else contextlib.nullcontext():
                record |= asdict(measure(step(p, rival or backend), device, args.steps))
                if not args.no_errors and not args.tuning_lock:
                    expected = expected or p.to(torch.float64).head(0).run("chunkwise")
                    record["errors"] = errors(p.run(rival or backend), expected)
        except Exception as error:
            record["failed"] = f"{type(error).__name__}: {error}"
        if args.kernels:
            for name, (launches, ms) in list(record.get("kernels", {}).items())[: args.kernels]:
                print(f"    {ms:8.3f} ms  {launches:3d}x  {name[:100]}")
        yield record
        release(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def step(p: Problem, backend):
    """Run forward and backward on fixed leaves. ``backend``: as ``Problem.forward`` takes it."""
    leaves = p.leaves()
    return lambda: p.gradients(p.forward(backend, leaves), leaves)


def sdpa_call(args, batch, tokens, device):
    shape = batch, args.heads, tokens, args.key
    q, k, v, do = (
        torch.randn(shape, device=device, dtype=getattr(torch, args.dtype), requires_grad=i < 3)
        for i in range(4)
    )
    return lambda: torch.autograd.grad(
        F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), do
    )


def errors(results: dict, expected: dict) -> dict[str, float]:
    """Return the relative L2 error of every tensor, on the first head."""
    whole = {
        "o": 2,
        "q": 2,
        "k": 2,
        "v": 2,
        "beta_x": 2,
        "log_decay_x": 2,
        "P_beta_x": 2,
        "P_log_decay_x": 2,
    }
    out = {}
    for name, x in expected.items():
        axis = whole.get(name, whole.get(name[1:], 0))
        out[name] = relative_error(results[name].narrow(axis, 0, 1), x)
    return out


def worst_by_kind(record: dict) -> list[float | None]:
    """Return the worst errors of outputs, dq dk dv, gates, preconditioner, parameters."""
    kinds = [[] for _ in range(5)]
    for name, error in record["errors"].items():
        kinds[4 if name in SUMS else KINDS[name]].append(error)
    return [max(kind) if kind else None for kind in kinds]


def row(r: dict) -> list:
    if "failed" in r:
        return [
            r["model"],
            r["shape"],
            r["backend"],
            *[None] * 11,
            f"failed: {r['failed'][:300]}".replace("|", "/"),
        ]
    peak = None if r["peak_mib"] is None else round(r["peak_mib"])
    times = [
        round(x, 3) if x is not None else None for x in (r["gpu_ms"], r["wall_ms"], r["host_ms"])
    ]
    found = [None if e is None else f"{e:.1e}" for e in worst_by_kind(r)]
    return [
        r["model"],
        r["shape"],
        r["backend"],
        *times,
        r["launches"],
        peak,
        round(r["first_call_s"], 1),
        *found,
        r["method"],
    ]


def markdown_row(r: dict) -> str:
    return markdown(row(r), []).splitlines()[0]


def compare(records: list[dict]) -> str:
    """Return the ratios of the second backend to the first."""
    done = {(r["model"], r["shape"], r["backend"]): r for r in records if "failed" not in r}
    backends = list(dict.fromkeys(r["backend"] for r in records if r["backend"] != "sdpa"))
    rows = []
    for (model, shape, backend), first in done.items():
        second = done.get((model, shape, backends[-1]))
        if backend != backends[0] or second is None or second is first:
            continue
        ratios = [
            second[k] / first[k] if first[k] and second[k] else None
            for k in ("gpu_ms", "wall_ms", "host_ms")
        ]
        memory = first["peak_mib"] / second["peak_mib"] if second["peak_mib"] else None
        rows.append([model, shape, *ratios, memory, first["first_call_s"], second["first_call_s"]])
    names = f"{backends[-1]} / {backends[0]}"
    header = [
        "model",
        "B×T",
        f"GPU: {names}",
        "wall",
        "host",
        "memory (inverse)",
        *(f"first call {b}, s" for b in backends[:: len(backends) - 1 or 1]),
    ]
    return markdown(header, rows) if rows else ""


def plot(records: list[dict], path: Path) -> None:
    """Plot GPU (or wall) time over the length, one panel a model, softmax attention in each."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    done = [r for r in records if "failed" not in r]
    models = list(dict.fromkeys(r["model"] for r in done if r["model"] != SDPA))
    if not models:
        return
    columns = min(3, len(models))
    rows = -(-len(models) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, sharex=True, sharey=True
    )
    for axis in axes.flat[len(models) :]:
        axis.set_visible(False)
    for axis, model in zip(axes.flat, models, strict=False):
        backends = dict.fromkeys(r["backend"] for r in done if r["model"] == model)
        for label, chosen in [*((b, model) for b in backends), ("sdpa", SDPA)]:
            points = sorted(
                (int(r["shape"].split("x")[1]), r["gpu_ms"] or r["wall_ms"])
                for r in done
                if (r["model"], r["backend"]) == (chosen, label)
            )
            if points:
                axis.plot(*zip(*points), "k--" if label == "sdpa" else "o-", label=label)
        axis.set_title(model)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("tokens in a sequence")
    for axis in axes[:, 0]:
        axis.set_ylabel("forward + backward, ms")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"plot: {path}")


def warm(args: argparse.Namespace) -> None:
    """Run one process a (model, shape).

    They share Triton's disk cache, where tuning results are kept too.
    """
    lock = args.out / "tuning.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()

    def one(job):
        model, shape = job
        command = [
            sys.executable, sys.argv[0], "ops", "--models", model, "--shapes", shape, "--backends",
            args.warm, "--steps", "1",
            "--heads", str(args.heads), "--key", str(args.key), "--value",
            str(args.value or args.key), "--dtype", args.dtype,
            "--device", args.device, "--out", str(args.out / "warm" / f"{model}-{shape}"),
            "--tuning-lock", str(lock),
        ]  # fmt: skip
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True)
        last = (result.stdout + result.stderr).strip().splitlines()[-1:]
        seconds = time.perf_counter() - start
        print(f"{model} {shape}: {seconds:.0f} s, exit {result.returncode} {last}", flush=True)

    jobs = [(model, shape) for model in args.models if model != SDPA for shape in args.shapes]
    start = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, jobs))
    print(f"warmed {len(jobs)} of {args.warm} in {time.perf_counter() - start:.0f} s")


def tune_one_at_a_time(lock: Path) -> None:
    """Compile in parallel with other processes, but time candidates alone on the device.

    Otherwise tuning picks at random.
    """
    import fcntl

    import triton
    from triton.runtime.autotuner import Autotuner

    @contextlib.contextmanager
    def alone():
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def bench(call, quantiles):
        call()
        torch.cuda.synchronize()
        with alone():
            return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)

    Autotuner.do_bench = property(lambda self: bench)
