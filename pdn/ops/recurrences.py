"""The recurrences that the kernels know: three axes, and a name for every point that a model uses.

Certification, benchmarks and tests iterate over ``RECURRENCES``; an operator, a cache of verdicts
and a kernel's switch all take their words from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Solve = Literal["online", "offline"]  # the delta rule, or linear attention
Decay = Literal["none", "scalar", "diagonal"]
# what is written with: the key, another one, or the key rescaled by a preconditioner of that form
Write = Literal["key", "tensor", "squash", "inverse"]


@dataclass(frozen=True)
class Recurrence:
    """Names a point of the space of recurrences, with the options that its model calls it with.

    solve: "online" is ``pdn.ops.delta_rule``, "offline" ``pdn.ops.linear_attention``.
    decay: none, one number a head, or one a channel.
    write: the write key; of an offline solve the preconditioner rescales the query.
    qk_l2norm, scale: see ``pdn.ops.delta_rule``.
    """

    decay: Decay = "none"
    write: Write = "key"
    solve: Solve = "online"
    qk_l2norm: bool = True
    scale: float | None = None

    @property
    def online(self) -> bool:
        return self.solve == "online"

    @property
    def preconditioned(self) -> bool:
        return self.write in ("squash", "inverse")

    @property
    def op(self) -> str:
        """Name of the function in ``pdn.ops`` and in every backend."""
        return "delta_rule" if self.online else "linear_attention"


RECURRENCES = {
    "deltanet": Recurrence("none"),
    "gdn": Recurrence("scalar"),
    "kda": Recurrence("diagonal"),
    "pdn": Recurrence("none", "squash"),
    "pgdn": Recurrence("scalar", "squash"),
    "pkda": Recurrence("diagonal", "squash"),
    "linear_attention": Recurrence("none", solve="offline"),
    "mamba2": Recurrence("scalar", solve="offline", qk_l2norm=False, scale=1.0),
    "gla": Recurrence("diagonal", solve="offline"),
    "pla": Recurrence("none", "squash", "offline"),
    "pmamba2": Recurrence("scalar", "squash", "offline"),
    "pgla": Recurrence("diagonal", "squash", "offline"),
}

ONLINE = tuple(name for name, recurrence in RECURRENCES.items() if recurrence.online)
