"""The state after a call, put where the caller wants it."""

from __future__ import annotations

from torch import Tensor

from pdn.ops.types import CallOptions, RecurrentState


def run_in_place(
    module, name: str, q: Tensor, k: Tensor, v: Tensor, options: CallOptions
) -> tuple[Tensor, RecurrentState]:
    """Overwrite the state of a call: by the decoding step's kernel itself, else by a copy."""
    state, op = options["state"], getattr(module, name)
    if state is not None and module.__name__ == "pdn.ops.triton.step":
        return op(q, k, v, **options, in_place=True)
    o, new = op(q, k, v, **options | {"return_state": True})
    return o, overwrite(state, new)


def with_curvature(
    state: RecurrentState | None, final: RecurrentState, A: Tensor, overwritten: bool
) -> RecurrentState:
    """Return the state after a call whose curvature was computed before it.

    Args:
        state: of before the call, which ``overwritten`` writes to.
        final: after it, without A.
        A: [B or N, H, K], after it.
        overwritten: as the op takes ``in_place``.
    """
    final = RecurrentState(final.S, A)
    return overwrite(state, final) if overwritten else final


def overwrite(state: RecurrentState | None, new: RecurrentState) -> RecurrentState:
    """Return ``state`` with the values of ``new``."""
    if state is None:
        raise ValueError("in_place=True without a state: expected one to write to")
    state.S.copy_(new.S)
    if state.A is not None:
        if new.A is None:
            raise ValueError("state.A is given: expected None without a preconditioner")
        state.A.copy_(new.A)
    return state
