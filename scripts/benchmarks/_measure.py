"""Clocks shared by the benchmarks.

Times are medians in milliseconds unless a name says otherwise.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from pdn.wording import first_line


@dataclass
class Timing:
    """Holds the clocks of one call.

    Attributes:
        wall_ms: one eager call of many in a row.
        host_ms: until the call returns, on an idle device.
        gpu_ms: device time of one call, by CUDA events over graph replays, or the sum of its
            kernels where a graph cannot be captured (``method`` says which; None on a CPU).
        peak_mib: above what was allocated before the call.
        kernels: name -> (launches, ms).
    """

    first_call_s: float
    wall_ms: float
    host_ms: float
    gpu_ms: float | None = None
    method: str = "cpu clock"
    kernel_sum_ms: float | None = None
    launches: int | None = None
    peak_mib: float | None = None
    kernels: dict[str, tuple[int, float]] = field(default_factory=dict)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    call: Callable[[], object], device: torch.device, steps: int, together: int = 1
) -> Timing:
    """Time one call by all clocks.

    The first call, with whatever it compiles or tunes, is timed apart.

    Args:
        call: to be timed.
        device: that it runs on.
        steps: calls to take the median of.
        together: calls in one graph. Starting a graph takes 5 to 15 us, which a call of one small
            kernel should not be charged.
    """
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    first = time.perf_counter() - start
    for _ in range(2):
        call()
    timing = Timing(first, _wall(call, device, steps), _host(call, device, min(steps, 20)))
    if device.type == "cuda":
        timing.peak_mib = _peak(call, device)
        timing.kernels = _kernels(call, device)
        timing.launches = sum(n for n, _ in timing.kernels.values())
        timing.kernel_sum_ms = sum(ms for _, ms in timing.kernels.values())
        replay, timing.method = _capture(call, device, together)
        timing.gpu_ms = (
            timing.kernel_sum_ms if replay is None else _events(replay, steps) / together
        )
    return timing


def _wall(call, device, steps) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / steps


def _host(call, device, steps) -> float:
    times = []
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    synchronize(device)
    return statistics.median(times)


def _peak(call, device) -> float:
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _kernels(call, device) -> dict[str, tuple[int, float]]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the profiler's own start-up disturbs its first run
        with torch.profiler.profile(activities=activities) as profile:
            call()
            synchronize(device)
    counts, times = Counter(), Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts[event.name] += 1
            times[event.name] += event.time_range.elapsed_us() / 1e3
    return {name: (counts[name], ms) for name, ms in times.most_common()}


def _capture(call, device, together) -> tuple[Callable[[], None] | None, str]:
    """Return the replay of a CUDA graph of so many calls.

    None, and why, where they cannot be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(together):
                call()
    except (
        Exception
    ) as error:  # a host synchronisation inside the call, or a kernel still to be tuned
        torch.cuda.synchronize(device)
        return None, f"kernel sum ({first_line(error)[:60]})"
    return graph.replay, "graph"


def _events(replay, steps) -> float:
    for _ in range(3):
        replay()
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(steps)
    ]
    for start, end in pairs:
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def environment(device: torch.device) -> dict[str, str]:
    """Return what a number depends on."""
    versions = {}
    rivals = "flash-linear-attention", "flash-qla", "tilelang", "nvidia-cudnn-frontend"
    for name in ("torch", "triton", *rivals):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    )
    return {
        "device": name,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpus": str(os.cpu_count()),
        **versions,
    }


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def markdown(header: list[str], rows: list[list[object]]) -> str:
    def text(x):
        return "–" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(text(x) for x in line) + " |" for line in lines)
