"""What a call of the kernels is given, keeps and returns, by name.

Tuples are flat only where ``torch.library`` wants arguments one by one; ``schema`` writes that
border from the fields. Letters: B batch, T time, M = B * T, H key heads, HV value heads, K key
size, V value size, N sequences, NT chunks of C tokens.
"""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

from torch import Tensor

from pdn.ops.recurrences import Solve


class Inputs(NamedTuple):
    """Holds the tensors of a call, contiguous; None where it has no such argument.

    A gate is activated, or a raw projection if its parameters (a decay's ``A_log``, a gain's range
    in ``Options``) are there. ``P_``: of the preconditioner, whose tensors have HV heads here.
    """

    q: Tensor  # [B, T, H, K], like k, v and write_k in the dtype of the matrix products
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, HV, V]
    beta: Tensor  # [B, T, HV]
    log_decay: Tensor | None = None  # [B, T, HV] or [B, T, HV, K]
    A_log: Tensor | None = None  # [HV]
    dt_bias: Tensor | None = None  # [HV] or [HV, K]
    write_k: Tensor | None = None  # [B, T, HV, K]
    P_log_decay: Tensor | None = None  # [B, T, HV]
    P_A_log: Tensor | None = None  # [HV]
    P_dt_bias: Tensor | None = None  # [HV]
    P_beta: Tensor | None = None  # [B, T, HV]
    mu: Tensor | None = None  # [HV]
    S: Tensor | None = None  # [N, HV, K, V] the initial state
    A: Tensor | None = None  # [N, HV, K] the initial curvature
    cu_seqlens: Tensor | None = None  # [N + 1] int32
    # [3, B] int64, of a piece's rows, with cu_seqlens: the documents of the first and last token,
    # and whether (1 or 0) the first one goes on from the piece before
    rows: Tensor | None = None


class Options(NamedTuple):
    """Holds the numbers and switches of a call; see ``pdn.ops`` and ``DiagonalPreconditioner``."""

    solve: Solve
    scale: float
    qk_l2norm: bool
    beta_range: float  # of the sigmoid to apply to ``beta``; 0: it is activated
    P_beta_range: float
    inverse: bool  # the preconditioner's form
    bound: float
    eps: float
    save: bool  # for a backward pass
    final: bool  # return the last state
    group: str = ""  # ranks that have the pieces of each sequence, a name of ``pdn.ops.exchange``
    piece: int = 0  # which one this is
    pieces: int = 1  # of how many

    @property
    def online(self) -> bool:
        return self.solve == "online"

    @property
    def later(self) -> int:
        """Return how many pieces follow this one."""
        return self.pieces - 1 - self.piece


class Saved(NamedTuple):
    """Keeps what the backward pass reads besides the inputs; a field without a use is empty."""

    table: Tensor  # [NT, HV, ROWS, C] per-token scalars, see common.py
    rescaled: Tensor  # [M, HV, K] the preconditioner's B times the raw key or query
    query: Tensor  # [NT, HV, C, K] q' of a vector decay, see vector.py
    key: Tensor  # [NT, HV, C, K] k'
    write: Tensor  # [NT, HV, C, K] kw'
    growth: Tensor  # [NT, HV, C, K] e^R, for vector_gradient_kernel
    gates: Tensor  # [NT, HV, C, K] log-decays for it, if their gates are raw
    decay_sums: Tensor  # [NT, HV, C, K] G of steep blocks
    steep: Tensor  # [NT, HV, 2, K / WIDTH] int32, which halves of blocks of channels take the
    # careful products
    ends: Tensor  # [NT, HV, ENDS, K] what a vector decay does to the state at the ends of a chunk
    T: Tensor  # [NT, HV, C, C]
    P: Tensor  # [NT, HV, C, C]
    x: Tensor  # [M, HV, V] the solution of every chunk's triangular system
    states: Tensor  # [NT, HV, V, K] before every chunk
    # [wholes, HV, K, K] what segments do to the state, where sequences are cut; on a piece also
    # [B, ...] the last segments of the rows
    transitions: Tensor
    passing: (
        Tensor  # [later, B, HV, K, K] what later pieces do to the state, if one of them passes it
    )
    curvature_passing: Tensor  # [later, B, HV, 1] what they do to the curvature
    border: Tensor  # [wholes + N, 2] int32, on a piece with cu_seqlens: borders.py
    A: Tensor  # [NT, HV, K] the curvature before every chunk
    curvature: Tensor  # [NT, HV, C / R, K] the curvature before every R tokens, see curvature.py
    curvature_gates: Tensor  # [NT, HV, GATES, C] the preconditioner's per-token scalars
    chunks: Tensor  # [NT, 2] int32 first token and the one after the last, with cu_seqlens
    offsets: Tensor  # [N + 1] int32 first chunk of every sequence, with cu_seqlens
    segments: Tensor  # [wholes + N, 4] int32, with cu_seqlens where sequences are cut: documents.py


class Results(NamedTuple):
    """Holds the results of the forward pass."""

    o: Tensor  # [B, T, HV, V]
    S: Tensor  # [N, HV, K, V] the last state, empty if nobody asked
    A: Tensor  # [N, HV, K] the last curvature, empty without a preconditioner


class Gradients(NamedTuple):
    """Holds gradients by the ``Inputs`` of these names, in order; empty where there is no such one.

    Those of q, k and the gates have HV heads.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor
    A_log: Tensor
    dt_bias: Tensor
    write_k: Tensor
    P_log_decay: Tensor
    P_A_log: Tensor
    P_dt_bias: Tensor
    P_beta: Tensor
    mu: Tensor
    S: Tensor
    A: Tensor


assert Inputs._fields[: len(Gradients._fields)] == Gradients._fields

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", Solve: "str"}
_TYPES |= {kind: kind.__name__ for kind in (float, bool, int, str)}


def schema(*arguments: type | str, results: int) -> str:
    """Return an operator's schema.

    Args:
        arguments: named tuples, the fields of which become arguments, and arguments as they are.
        results: number of tensors returned.
    """
    words = []
    for part in arguments:
        if isinstance(part, str):
            words.append(part)
        else:
            words += [f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(part).items()]
    return f"({', '.join(words)}) -> ({', '.join(['Tensor'] * results)})"
