"""Faults on demand, for the tests that prove what a run survives.

Inert unless the environment sets ``PDN_FAULT``.

``PDN_FAULT=kind@step:rank``, several separated by commas; ``step`` may be a range (``nan@5-7:1``)
and ``rank`` a ``*``. A kind is an action, and the place where it strikes if that is not the end of
a step: ``kill@7:0``, ``kill-save@6:0``, ``stop-data@9:1``.

=======  =====================================================================
kill     SIGKILL to this process
stop     SIGSTOP to this process: it hangs without dying
term     SIGTERM to this process
hang     sleep for an hour
nan      the gradient of one parameter becomes NaN (place: ``backward``)
spike    one parameter of this rank grows a thousandfold (place: ``data``)
perturb  one parameter of this rank changes by one part in a thousand
raise    an exception that no code expects
=======  =====================================================================

Places: ``step`` (the default), ``backward``, ``data``, ``eval``, ``save`` (the writing thread,
before it publishes), ``replace`` (between the two renames of a checkpoint that takes the place of
another of its step), ``prune`` (an old checkpoint is half removed).
"""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

_FAULT = re.compile(
    r"(?P<action>[a-z]+)(-(?P<place>[a-z]+))?@(?P<first>\d+)(-(?P<last>\d+))?:(?P<rank>\d+|\*)"
)
_FACTORS = {"perturb": 1.001, "spike": 1000.0}
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


@dataclass(frozen=True)
class Fault:
    """Describes a fault: what, where in a step, and at which steps of which rank (None: of all)."""

    action: str
    place: str
    steps: range
    rank: int | None


_struck: set[tuple[Fault, int]] = set()


def parse(text: str) -> list[Fault]:
    """Return the faults that ``PDN_FAULT`` asks for; raise ``ValueError`` on any other text."""
    faults = []
    for word in filter(None, text.split(",")):
        match = _FAULT.fullmatch(word.strip())
        if match is None:
            raise ValueError(f"PDN_FAULT: {word!r}, expected kind@step:rank, e.g. kill-save@6:0")
        first = int(match["first"])
        place = match["place"] or {"nan": "backward", "spike": "data"}.get(match["action"], "step")
        rank = None if match["rank"] == "*" else int(match["rank"])
        faults.append(
            Fault(match["action"], place, range(first, int(match["last"] or first) + 1), rank)
        )
    return faults


def strike(
    place: str,
    step: int,
    model: nn.Module | None = None,
    before_change: Callable[[], None] | None = None,
) -> None:
    """Apply the faults due at ``place`` of ``step`` on this rank.

    Costs a look into the environment if there are none.

    Args:
        place: see the module's description.
        step: the step that is being taken or has just been completed, from 1.
        model: what ``nan``, ``spike`` and ``perturb`` act on.
        before_change: called before ``spike`` and ``perturb`` change weights, which a save may
            still be copying; None: no save is under way at this place.
    """
    text = os.environ.get("PDN_FAULT")
    if not text:
        return
    rank = int(os.environ.get("RANK", 0))
    for fault in parse(text):
        due = fault.place == place and step in fault.steps and fault.rank in (None, rank)
        if due and (fault, step) not in _struck:  # a run that was rewound passes a step twice
            _struck.add((fault, step))
            if fault.action in _FACTORS and before_change is not None:
                before_change()
            _apply(fault, model)


def _apply(fault: Fault, model: nn.Module | None) -> None:
    if fault.action in _SIGNALS:
        # To this thread: the process's own one may take long to be scheduled, and this one would go
        # on until then.
        signal.pthread_kill(threading.get_ident(), _SIGNALS[fault.action])
    elif fault.action == "hang":
        time.sleep(3600)
    elif fault.action == "nan":
        assert model is not None
        gradient = next(p.grad for p in model.parameters() if p.grad is not None)
        _local(gradient)[..., :1] = float("nan")
    elif fault.action in _FACTORS:
        assert model is not None
        with torch.no_grad():
            _local(next(model.parameters())).mul_(_FACTORS[fault.action])
    elif fault.action == "raise":
        raise RuntimeError(f"injected at {fault.place}")
    else:
        raise ValueError(f"PDN_FAULT: unknown action {fault.action!r}")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
