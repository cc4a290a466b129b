"""What a run shows while it trains: utilisation of the device, and one line of progress."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pdn.runs.output import note
from pdn.runs.summary import duration

# Dense bf16 matrix throughput without sparsity, FLOP/s, from the vendors' data sheets; by the whole
# name that the driver gives, without the maker, the memory's size, and its kind where that is HBM3:
# an H100 with another kind of memory is another device.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A100-SXM4": 312e12,
    "A100-PCIE": 312e12,
    "A100 PCIe": 312e12,
    "A40": 149e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
_MAKER = re.compile(r"^NVIDIA |^Tesla |\bGeForce ")
_MEMORY = re.compile(r"[ -]\d+G[Bb]?\b|[ -]HBM3e?\b")


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak in FLOP/s for bf16, None where it is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Return the peak of the GPU that the driver calls ``name``.

    None for one that is not in the table, such as a slice of a GPU.
    """
    while (shorter := _MAKER.sub("", name)) != name:
        name = shorter
    return PEAK_BF16_FLOPS.get(_MEMORY.sub("", name).strip())


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats, inf where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def engineering(x: float) -> str:
    """Write a number with three digits and a unit: 12.3K, 4.56M, 1.2B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(x) >= limit:
            return f"{x / limit:.3g}{unit}"
    return f"{x:.3g}"


@contextlib.contextmanager
def passing_line(*, enabled: bool) -> Iterator[Callable[[str], None] | None]:
    """Yield a function that shows what is going on before training.

    In a terminal it has one changing line, elsewhere a line every 10 s.

    None on ranks that stay silent.
    """
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    if not enabled:
        yield None
    elif console.is_terminal:
        with console.status("") as status:
            yield lambda line: status.update(escape(line))
    else:
        printed = -math.inf

        def say(line: str) -> None:
            nonlocal printed
            if time.monotonic() - printed >= ProgressLine.PLAIN_SECONDS:
                printed = time.monotonic()
                print(line, flush=True)

        yield say


class ProgressLine:
    """Shows a bar with loss, speed and ETA in a terminal, a plain line now and then elsewhere.

    Silent on other ranks.

    Args:
        total, start: steps of the whole run, and steps already done.
        enabled: false on all ranks but the main one.
    """

    PLAIN_SECONDS = 10.0
    WINDOW = 200  # updates that the remaining time is told from

    def __init__(self, total: int, start: int, *, enabled: bool):
        self.enabled = enabled
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self.total, self.start, self.step = total, start, start
        self._began, self._printed = time.monotonic(), -math.inf
        self._updates: deque[tuple[float, int]] = deque(maxlen=self.WINDOW)
        self._bar = None
        if enabled and self.console.is_terminal:
            columns = (
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=total, completed=start, text="")
            self._bar.start()

    def update(self, step: int, record: dict) -> None:
        if not self.enabled:
            return
        self.step = step
        mfu = f"  mfu {record['mfu']:.1%}" if record.get("mfu") is not None else ""
        speed = engineering(record["tokens_per_second"])
        text = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {speed} tok/s{mfu}"
        now = time.monotonic()
        self._updates.append((now, step))
        text += f"  elapsed {duration(now - self._began)}  eta {duration(self.remaining(now))}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        if now - self._printed >= self.PLAIN_SECONDS or step == self.total:
            self._printed = now
            line = f"step {step}/{self.total}  {text}"
            note(line) if self._bar is not None else self.say(line)

    def remaining(self, now: float) -> float:
        """Return the seconds to the last step, at the mean pace of the last updates.

        The first step, which compiles, tells nothing of the others once there are more.
        """
        first, last = self._updates[0], self._updates[-1]
        if last[1] == first[1]:
            first = (self._began, self.start)
        return (last[0] - first[0]) / max(1, last[1] - first[1]) * (self.total - last[1])

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one, and into the run's log."""
        if not self.enabled:
            return
        if self._bar is not None:  # what a terminal gets is not logged: frames of the bar are in it
            note(line)
        self.console.print(line, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
