"""A profiler's trace by part of the model: what of a step is mixer, MLP, head, optimiser, waiting.

Names of modules do not survive compilation, and a compiled block runs as one region. So parts are
told from what does survive: the shapes of products with weights, the operators and kernels of the
recurrences, the vocabulary, and the range around the optimiser. A kernel without such a mark
belongs to the part whose marks come before and after it on its stream; between marks of two parts
lie norms and residuals, which the compiler may have fused with either.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STEPS = "profiled steps"  # ranges of the host that the table is made of
UPDATE = "optimizer"
MIXER, MLP, HEAD, OPTIMISER = "mixer", "MLP", "embedding and head", "optimiser"
COMMUNICATION, COPIES = "communication", "copies to and from the host"
BETWEEN = "norms and residuals"
IDLE = "idle"
ORDER = (MIXER, MLP, HEAD, BETWEEN, OPTIMISER, COMMUNICATION, COPIES, IDLE)
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm", "mkldnn::_linear_pointwise")
COLLECTIVES = ("c10d::", "fsdp::", "nccl:", "gloo:", "record_param_comms")
OF_MIXERS = ("pdn::", "aten::scaled_dot_product", "aten::_scaled_dot_product", "aten::conv1d")
OF_HEAD = ("aten::embedding", "_LinearCrossEntropy")
ALIGNED = 64  # rows of which a joint product has a multiple: ``pdn.models.mixers.axes``
SAID_ROWS = 3  # kernels of each part that are printed


@dataclass(frozen=True)
class Products:
    """Tells the products with weights apart by their sizes.

    Attributes:
        tokens: of a forward pass, one for each size that occurs.
        weights: (part, the sizes of a weight).
        joint: the same of several weights of one module that read the same and may be one product:
            of as many rows as some or all of them have, filled up or not.
    """

    tokens: frozenset[int]
    weights: frozenset[tuple[str, frozenset[int]]]
    joint: frozenset[tuple[str, frozenset[int]]]

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], tokens: Iterable[int]) -> Products:
        """Take them from the shapes of parameters by name, as of ``LanguageModel``."""
        marks = {".mixer.": MIXER, ".attn.": MIXER, ".mlp.": MLP}  # attn: of FLA's models
        marks |= {"embedding": HEAD, "head.": HEAD}
        rows: dict[tuple[str, str, int], list[int]] = {}
        for name, shape in shapes.items():
            for mark, part in marks.items():
                before, found, _ = f".{name}".partition(mark)
                if len(shape) == 2 and found:
                    rows.setdefault((part, before, shape[1]), []).append(shape[0])
        modules = {(part, width, tuple(sorted(own))) for (part, _, width), own in rows.items()}
        weights = {(part, frozenset([n, width])) for part, width, own in modules for n in own}
        joint = {
            (part, frozenset([n, width]))
            for part, width, own in modules
            for count in range(2, len(own) + 1)
            for some in itertools.combinations(own, count)
            for n in (sum(some), sum(some) + -sum(some) % ALIGNED)
        }
        return cls(frozenset(tokens), frozenset(weights), frozenset(joint))

    def part(self, matrices: Collection[Sequence[int]]) -> str | None:
        """Return the part of a product of matrices of these shapes; None if several could be."""
        sizes = {size for shape in matrices for size in shape}
        if any(part == HEAD and weight <= sizes for part, weight in self.weights):
            return HEAD  # in slices of the tokens
        for weights in (self.weights, self.joint):
            found = {
                part
                for part, weight in weights
                if any(weight | {count} == sizes for count in self.tokens)
            }
            if found:
                return found.pop() if len(found) == 1 else None
        return None


@dataclass(frozen=True)
class Table:
    """Holds what ``by_part`` found, in milliseconds a step.

    Attributes:
        parts: part -> (milliseconds, its launches); ``communication`` is what no computation
            hides, ``idle`` when the device, or on a CPU torch, had nothing to do. They add up to
            ``step_ms``.
        kernels: (part, kernel or operator, milliseconds, launches), those that take longest first.
        step_ms: wall time of a step.
        hidden_ms: of communication that ran beside computation.
        host_waits_ms: for which the host waited for the device.
        on_gpu: whether it is the device's time; else the host's.
    """

    parts: dict[str, tuple[float, float]]
    kernels: list[tuple[str, str, float, float]]
    step_ms: float
    hidden_ms: float
    host_waits_ms: float
    on_gpu: bool

    @property
    def added_up(self) -> float:
        """Return the sum of the parts over the wall time: 1, unless work ran on several streams."""
        return sum(ms for ms, _ in self.parts.values()) / self.step_ms

    @property
    def named(self) -> float:
        """Return which share of the computation has a part of its own."""
        times = {part: ms for part, (ms, _) in self.parts.items() if part != IDLE}
        return 1 - times.get(BETWEEN, 0.0) / (sum(times.values()) or 1.0)


@dataclass(frozen=True)
class _Item:
    """Describes a kernel that ran, or an operator without those that it called. In us."""

    start: float
    end: float
    lane: object  # stream or thread
    name: str
    chain: tuple[dict, ...]  # the operators and ranges of the host that it is within
    kind: str

    @property
    def is_copy(self) -> bool:
        return self.kind == "gpu_memcpy" and "DtoD" not in self.name


def read_trace(file: Path) -> list[dict]:
    """Return the events of a Chrome trace, compressed or not."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as text:
        return json.load(text)["traceEvents"]


def by_part(events: Sequence[dict], products: Products, steps: int) -> Table:
    """Return the time of each part.

    Args:
        events: of a trace with shapes, with a range ``STEPS`` around so many steps and ranges
            ``UPDATE`` around the optimiser's.
        products: the model's.
        steps: in the range.

    Raises:
        ValueError: no such range.
    """
    spans = [e for e in events if e.get("ph") == "X"]
    ranges = (e for e in spans if e["name"] == STEPS and e.get("cat") == "user_annotation")
    whole = next(ranges, None)
    if whole is None:
        raise ValueError(f"found no range {STEPS!r} in the trace")
    begin, end = whole["ts"], whole["ts"] + whole["dur"]
    on_gpu = any(e.get("cat") == "kernel" for e in spans)
    items = list(_device_items(spans) if on_gpu else _host_items(spans))
    items = sorted(
        (i for i in items if i.end > begin and i.start < end), key=lambda item: item.start
    )
    parts = _parts(items, products)
    computing = _union(i for i, part in zip(items, parts, strict=True) if part != COMMUNICATION)
    communicating = _union(i for i, part in zip(items, parts, strict=True) if part == COMMUNICATION)
    busy = _length(_union(items))
    exposed = busy - _length(computing)
    times: dict[str, float] = defaultdict(float)
    launches: dict[str, float] = defaultdict(float)
    kernels: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for item, part in zip(items, parts, strict=True):
        ms = (item.end - item.start) / 1e3 / steps
        times[part] += ms
        launches[part] += 1
        kernels[part, item.name][0] += ms
        kernels[part, item.name][1] += 1
    if COMMUNICATION in times:
        times[COMMUNICATION] = exposed / 1e3 / steps
    times[IDLE] = max(0.0, end - begin - busy) / 1e3 / steps
    waits = [e for e in spans if "Synchronize" in e["name"] and begin <= e["ts"] < end]
    return Table(
        parts={part: (times[part], launches[part] / steps) for part in ORDER if part in times},
        kernels=sorted(
            ((*key, ms, count / steps) for key, (ms, count) in kernels.items()),
            key=lambda row: -row[2],
        ),
        step_ms=(end - begin) / 1e3 / steps,
        hidden_ms=(_length(communicating) - exposed) / 1e3 / steps,
        host_waits_ms=sum(e["dur"] for e in waits) / 1e3 / steps,
        on_gpu=on_gpu,
    )


def _device_items(spans: Sequence[dict]) -> Iterator[_Item]:
    """Yield what ran on the device, with what the host was within when it launched it."""
    launched = {
        e["args"]["correlation"]: e
        for e in spans
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    chains = _Chains(spans)
    for e in spans:
        if e.get("cat") in ON_DEVICE:
            args = e.get("args", {})
            launch = launched.get(args.get("correlation"))
            chain = chains.at(launch["tid"], launch["ts"]) if launch else ()
            yield _Item(e["ts"], e["ts"] + e["dur"], args.get("stream"), e["name"], chain, e["cat"])


def _host_items(spans: Sequence[dict]) -> Iterator[_Item]:
    """Yield the operators' own times: pieces in which no operator that they called ran."""
    for tid, pieces in _Chains(spans).pieces.items():
        for start, end, chain in pieces:
            operators = [e for e in chain if e["cat"] == "cpu_op"]
            if operators and end > start:
                yield _Item(start, end, tid, operators[-1]["name"], chain, "cpu_op")


class _Chains:
    """Tells what a thread was within at any time: its operators and ranges, outermost first."""

    def __init__(self, spans: Sequence[dict]):
        by_thread: dict[object, list[dict]] = defaultdict(list)
        for e in spans:
            if e.get("cat") in ("cpu_op", "user_annotation"):
                by_thread[e["tid"]].append(e)
        self.pieces = {tid: list(_pieces(own)) for tid, own in by_thread.items()}
        self._starts = {tid: [p[0] for p in pieces] for tid, pieces in self.pieces.items()}

    def at(self, tid: object, time: float) -> tuple[dict, ...]:
        starts = self._starts.get(tid, [])
        place = bisect_right(starts, time) - 1
        if place < 0:
            return ()
        _, end, chain = self.pieces[tid][place]
        return chain if time <= end else ()


def _pieces(spans: Iterable[dict]) -> Iterator[tuple[float, float, tuple[dict, ...]]]:
    """Cut the nested spans of one thread into pieces, each with the spans that it lies within."""
    stack: list[dict] = []
    at = 0.0
    for span in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
        while stack and _end(stack[-1]) <= span["ts"]:
            yield at, _end(stack[-1]), tuple(stack)
            at = _end(stack.pop())
        if stack:
            yield at, span["ts"], tuple(stack)
        stack.append(span)
        at = span["ts"]
    while stack:
        yield at, _end(stack[-1]), tuple(stack)
        at = max(at, _end(stack.pop()))


def _end(span: dict) -> float:
    return span["ts"] + span["dur"]


def _parts(items: Sequence[_Item], products: Products) -> list[str]:
    """Return the part of each item: by its own mark, or by those around it on its lane."""
    marks = [_mark(item, products) for item in items]
    lanes: dict[object, list[int]] = defaultdict(list)
    for i, (item, mark) in enumerate(zip(items, marks, strict=True)):
        if mark not in (COMMUNICATION, COPIES):  # they may run at any time
            lanes[item.lane].append(i)
    for own in lanes.values():
        following: list[str | None] = []
        after = None
        for i in reversed(own):
            following.append(after)
            after = marks[i] or after
        before = None
        for i, after in zip(own, reversed(following), strict=True):
            if marks[i] is None:
                marks[i] = before if before == after and before is not None else None
            else:
                before = marks[i]
    return [mark or BETWEEN for mark in marks]


def _mark(item: _Item, products: Products) -> str | None:
    names = [e["name"] for e in item.chain]
    if "nccl" in item.name.lower() or any(n.startswith(COLLECTIVES) for n in names):
        return COMMUNICATION
    if item.is_copy:
        return COPIES
    if UPDATE in names or "aten::_foreach_norm" in names:
        return OPTIMISER
    if any(n.startswith(OF_MIXERS) for n in names):
        return MIXER
    if any(n.startswith(OF_HEAD) for n in names):
        return HEAD
    product = next((e for e in reversed(item.chain) if e["name"] in PRODUCTS), None)
    if product is not None:
        shapes = [shape for shape in product.get("args", {}).get("Input Dims", ()) if shape]
        return products.part([shape[-2:] for shape in shapes if len(shape) in (2, 3)])
    own = item.kind == "kernel" and not item.name.startswith(("triton_", "void ", "Memset"))
    if own and not any(n.startswith("aten::") for n in names):
        return MIXER  # launched by hand: only the recurrences have kernels of their own
    return None


def _union(items: Iterable[_Item]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for item in items:  # in order of their starts
        if merged and item.start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], item.end)
        else:
            merged.append((item.start, item.end))
    return merged


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


def lines(table: Table, data_ms: float | None = None) -> list[str]:
    """Put a table into text.

    Args:
        table: of ``by_part``.
        data_ms: for which the host waited for a step's data, if that was measured.
    """
    where = "of the GPU" if table.on_gpu else "of torch's operators on the CPU"
    found = [f"{table.step_ms:.2f} ms a step, {where}:"]
    for part, (ms, launches) in table.parts.items():
        share = ms / table.step_ms
        counted = f"{launches:8.0f} launches" if launches else ""
        found.append(f"  {part:<28} {ms:10.3f} ms  {share:6.1%} {counted}".rstrip())
        own = [row for row in table.kernels if row[0] == part][:SAID_ROWS]
        found += [f"    {ms:10.3f} ms  {count:6.0f} x {name[:90]}" for _, name, ms, count in own]
    if table.hidden_ms > 0:
        found.append(f"  communication beside computation: {table.hidden_ms:.3f} ms")
    waits = [] if data_ms is None else [f"for data {data_ms:.3f} ms"]
    waits += [f"for the device {table.host_waits_ms:.3f} ms"] if table.on_gpu else []
    if waits:
        found.append(f"  the host waited {', '.join(waits)}")
    found.append(
        f"  check: the parts add up to {table.added_up:.1%} of the wall time; {table.named:.1%} of "
        "what ran has a part of its own"
    )
    return found


def write(table: Table, directory: Path) -> None:
    """Write ``parts.csv`` and ``kernels.csv``, in milliseconds and launches a step."""
    rows = [
        (part, f"{ms:.4f}", f"{ms / table.step_ms:.4f}", f"{launches:g}")
        for part, (ms, launches) in table.parts.items()
    ]
    kernels = [(*key, f"{ms:.4f}", f"{launches:g}") for *key, ms, launches in table.kernels]
    for name, header, body in (
        ("parts.csv", ("part", "ms", "share", "launches"), rows),
        ("kernels.csv", ("part", "kernel", "ms", "launches"), kernels),
    ):
        with open(directory / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *body])
