"""Tokens a second of whole models that decode, captured as a CUDA graph, with random weights.

A step reads one token of every sequence and samples the next. Tokens a second are over --steps
steps by the clock, the host's looks at the tokens included. first_s is what a fresh process pays:
making the decoder (certificates, compilation, capture) and its first token. With --check, greedy
tokens of the captured step in float32 are compared with those of the model's own forward pass.

    python scripts/benchmark.py decode_models     three 340M models, batch 1, 64, 512
    python scripts/benchmark.py decode_models --first-token --models pgdn_340m
    python scripts/benchmark.py decode_models --device cpu --models pgdn_tiny --batches 1 2 \\
        --steps 8 --dtype float32
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path

import torch
from benchmarks._measure import environment, markdown, synchronize, write_json
from benchmarks._tuning import compile_together

import pdn
from pdn.inference.decode import Decoder
from pdn.inference.sampling import Sampling
from pdn.models.language_model import LanguageModel

VOCABULARY = 32000
HEADER = [
    "model",
    "batch",
    "temperature",
    "tokens/s",
    "ms/step",
    "GPU ms/step",
    "launches",
    "first s",
    "MiB",
]
COLUMNS = [
    "model",
    "batch",
    "temperature",
    "tokens_s",
    "ms",
    "gpu_ms",
    "launches",
    "first_s",
    "peak_mib",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = ["pgdn_340m", "transformer_340m", "hybrid_340m"]
    parser.add_argument("--models", nargs="*", default=models, metavar="MODEL")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 512])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0])
    parser.add_argument("--top-k", type=int, default=None, help="where the temperature is not 0")
    parser.add_argument("--steps", type=int, default=256, help="timed steps")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--check", action="store_true", help="compare tokens in float32")
    parser.add_argument("--first-token", action="store_true", help="only that, of the first model")
    parser.add_argument("--peer", action="store_true", help="also FLA's GatedDeltaNet by generate")
    parser.add_argument("--kernels", action="store_true", help="time by kernel of one step")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"), help="folder")


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    if args.first_token:
        return first_token(args, device)
    where = environment(device)
    print(" ".join(f"{k}={v}" for k, v in where.items()), flush=True)
    records = []
    for name in args.models:
        model = build(name, device, getattr(torch, args.dtype))
        for batch, temperature in itertools.product(args.batches, args.temperatures):
            how = Sampling(temperature, args.top_k if temperature else None)
            record = {"model": name, "batch": batch, "temperature": temperature}
            record |= speed(args, model, batch, how, device)
            records.append(record)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()})
            write_json(args.out / "decode_models.json", {"environment": where, "records": records})
        if args.check:
            print(f"{name}: {check(model.float(), device)}", flush=True)
        del model
    if args.peer:
        records += peer(args, device)
        write_json(args.out / "decode_models.json", {"environment": where, "records": records})
    table = markdown(HEADER, [[r.get(column) for column in COLUMNS] for r in records])
    (args.out / "decode_models.md").write_text(f"{where}\n\n{table}\n", encoding="utf-8")
    print(f"\n{table}")


def build(name: str, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    return pdn.build_model(name, vocab_size=VOCABULARY, device=device, dtype=dtype).eval()


def prompts(batch: int, length: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (batch, length), generator=random).tolist()


def speed(args, model: LanguageModel, batch: int, how: Sampling, device: torch.device) -> dict:
    """Time one batch size.

    Args:
        args: of the command line.
        model: to decode with.
        batch: sequences.
        how: to sample.
        device: of the model.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    start = time.perf_counter()
    length = args.prompt + args.steps + 64
    decoder = Decoder(model, batch, how=how, max_new_tokens=args.steps + 64, length=length)
    decoder.begin(range(batch), prompts(batch, args.prompt), seeds=range(batch))
    while not decoder.burst(decoder.steps)[0]:
        pass
    first = time.perf_counter() - start
    begun, done = time.perf_counter(), 0
    while done < args.steps:
        decoder.burst(decoder.steps)
        done += decoder.steps
    seconds = time.perf_counter() - begun
    record = {"tokens_s": batch * done / seconds, "ms": 1e3 * seconds / done, "first_s": first}
    if device.type == "cuda":
        record["peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
        record |= on_the_gpu(args, decoder, device)
    return record


def on_the_gpu(args, decoder: Decoder, device: torch.device) -> dict:
    """Time replays by events, and count the launches of a step, with its kernels if asked.

    Args:
        args: of the command line.
        decoder: with a captured step.
        device: of the decoder.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.inference_mode():
        begin.record()
        for _ in range(32):
            decoder._graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        record: dict = {"gpu_ms": begin.elapsed_time(end) / 32}
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            decoder._graph.replay()
            torch.cuda.synchronize(device)
    kernels: dict[str, tuple[int, float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count, us = kernels.get(event.name[:60], (0, 0.0))
            kernels[event.name[:60]] = count + 1, us + event.time_range.elapsed_us()
    record["launches"] = sum(count for count, _ in kernels.values())
    if args.kernels:
        for name, (count, us) in sorted(kernels.items(), key=lambda item: -item[1][1])[:14]:
            print(f"  {us:9.1f} us {count:5d} x {name}")
    return record


@torch.inference_mode()
def check(model: LanguageModel, device: torch.device, count: int = 24) -> str:
    """Say whether captured greedy tokens in float32 are the model's own, of ragged prompts.

    In few rows, and in as many as other kernels are for.

    Args:
        model: to be checked.
        device: of the model.
        count: tokens to compare.
    """
    ragged = [row[: 1 + 40 * i] for i, row in enumerate(prompts(4, 128))]
    expected = []
    for prompt in ragged:
        tokens, state, row = torch.tensor([prompt], device=device), model.init_state(1), []
        for _ in range(count):
            output = model(tokens, state=state)
            state, tokens = output.state, output.logits[:, -1:].argmax(-1)
            row.append(int(tokens))
        expected.append(row)
    same = []
    for copies in (1, 16):
        given = ragged * copies
        found = Decoder(model, len(given)).complete(given, max_new_tokens=count)
        pairs = zip(found, expected * copies, strict=True)
        equal = sum(prefix(row, own) for row, own in pairs)
        same.append(f"{equal} of {count * len(given)} in {len(given)} rows")
    return f"greedy tokens in float32 equal to the model's own: {', '.join(same)}"


def prefix(a: list[int], b: list[int]) -> int:
    """Return how many tokens two lists begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def first_token(args, device: torch.device) -> None:
    """Time the first token of the first model, from here on and from the process's start."""
    imported = time.perf_counter()
    model = build(args.models[0], device, getattr(torch, args.dtype))
    synchronize(device)
    built = time.perf_counter()
    given = prompts(1, args.prompt)
    tokens = next(pdn.generate(model, given, max_new_tokens=32, temperature=0))
    done = time.perf_counter()
    next(pdn.generate(model, given, max_new_tokens=32, temperature=0))
    again = time.perf_counter()
    age = time.time() - process_start()
    print(
        f"first token {int(tokens[0])}: model {built - imported:.2f} s, decoder and token "
        f"{done - built:.2f} s, since the process began {age - again + done:.2f} s; another "
        f"decoder and token {again - done:.2f} s",
        flush=True,
    )


def process_start() -> float:
    """Return when this process began, in seconds since the epoch."""
    ticks = float(
        Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    )
    uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def peer(args, device: torch.device) -> list[dict]:
    """Time FLA's released class of the same size without preconditioner, by its generate()."""
    records = []
    try:
        from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

        compile_together()
        config = GatedDeltaNetConfig(
            hidden_size=1024, num_hidden_layers=24, num_heads=8, head_dim=128, expand_v=1,
            use_gate=False, intermediate_size=2816, vocab_size=VOCABULARY, tie_word_embeddings=True,
        )  # fmt: skip
        model = GatedDeltaNetForCausalLM(config).to(device, getattr(torch, args.dtype)).eval()
        for batch in args.batches[:2]:
            tokens = torch.tensor(prompts(batch, args.prompt), device=device)
            options = dict(do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)
            start = time.perf_counter()
            model.generate(tokens, max_new_tokens=4, min_new_tokens=4, **options)
            synchronize(device)
            first = time.perf_counter() - start
            start, count = time.perf_counter(), 32
            model.generate(tokens, max_new_tokens=count, min_new_tokens=count, **options)
            synchronize(device)
            ms = 1e3 * (time.perf_counter() - start) / count
            record = {"model": "FLA GatedDeltaNet", "batch": batch, "ms": ms}
            records.append(record | {"tokens_s": 1e3 * batch / ms, "first_s": first})
            print(records[-1], flush=True)
    except Exception as error:
        print(f"the peer failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return records
