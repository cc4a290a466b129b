"""Decisions that all ranks take alike: a flag, or the outcome of work that may fail on some.

Every function also works in one process without an initialised process group.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from pdn.errors import PdnError

T = TypeVar("T")


def is_distributed() -> bool:
    """Say whether a default process group exists in this process."""
    return dist.is_available() and dist.is_initialized()


def any_rank(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Return True on every rank if ``flag`` is true on any. Collective.

    Args:
        flag: this rank's view, e.g. "a signal arrived" or "my gradients are not finite".
        group: the process group, or None for the default one.
    """
    return max_over_ranks([float(flag)], group)[0] > 0


def max_over_ranks(values: list[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """Return the highest of each value over all ranks, on every rank. Collective.

    The tensor that is exchanged lives where the group's backend wants it.
    """
    if not is_distributed():
        return values
    on_gpu = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
    seen = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
    return seen.tolist()


def gather_or_raise(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Run ``work`` on every rank and return all results in rank order.

    If any rank fails, every rank raises its error: otherwise the others would wait in their next
    collective until a timeout. Collective.

    Args:
        work: called once, on this rank. It must not contain collectives of the same group.
        group: a group whose backend carries objects (gloo, or nccl with the device set), or None
            for the default one.

    Raises:
        PdnError: that of the lowest failing rank (anything with an ``exit_code``), on every rank.
        Exception: any other exception of this rank; the remaining ranks raise ``PdnError`` naming
            the rank.
    """
    if not is_distributed():
        return [work()]
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    report = failure
    if failure is not None and not hasattr(failure, "exit_code"):
        # Any other exception need not survive the journey; its own rank shows its traceback.
        report = PdnError(
            "INTERNAL", f"rank {dist.get_rank()}: {type(failure).__name__}: {failure}"
        )
    outcomes: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (report, result), group=group)
    first = next((failed for failed, _ in outcomes if failed is not None), None)
    if failure is not None and not hasattr(failure, "exit_code"):
        raise failure
    if first is not None:
        raise first from failure
    return [found for _, found in outcomes]


def run_or_raise(work: Callable[[], T]) -> T:
    """Run ``work`` on every rank and return this rank's result, which need not be picklable.

    If any rank fails, every rank raises, as in ``gather_or_raise``. Collective.
    """
    made: list[T] = []
    gather_or_raise(lambda: made.append(work()))
    return made[0]


def raise_on_all_ranks(failure: Exception | None) -> None:
    """Raise on every rank, if any has a failure: its own one, or that of another. Collective."""

    def work() -> None:
        if failure is not None:
            raise failure

    gather_or_raise(work)
