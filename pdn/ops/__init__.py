"""The recurrences of the zoo, as three functions, and the convolution before them. Everything else
is a backend of these.

Letters: B batch, T time, H key heads, HV value heads (a multiple of H), K key size, V value size, N
    sequences.

Online solve, ``delta_rule``::

    S_t = a_t S_{t-1} + beta_t kw_t (v_t - (a_t S_{t-1})^T k_t)^T        o_t = scale * S_t^T q_t

Offline solve, ``linear_attention``::

    S_t = a_t S_{t-1} + beta_t k_t v_t^T                                 o_t = scale * S_t^T qr_t

``a_t = exp(log_decay_t)``; ``kw`` is the write key and ``qr`` the read query: ``k`` and ``q``
themselves, or rescaled by the diagonal preconditioner (*Preconditioned DeltaNet*, arXiv 2604.21100,
table 1).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from pdn import verdicts
from pdn.ops import chunkwise, context, convolution, preconditioning, reference, rows
from pdn.ops.checks import (
    check_convolution,
    check_gates,
    check_on_gpu,
    check_shapes,
    convolutions,
)
from pdn.ops.recurrences import Solve
from pdn.ops.reference import expand_heads
from pdn.ops.states import run_in_place, with_curvature
from pdn.ops.types import (
    CallOptions,
    DeltaRuleOptions,
    DiagonalPreconditioner,
    LinearAttentionOptions,
    RecurrentState,
    SigmoidGain,
    SoftplusDecay,
    accumulation_dtype,
    axes_of,
    materialise,
)

__all__ = [
    "DiagonalPreconditioner",
    "RecurrentState",
    "SigmoidGain",
    "SoftplusDecay",
    "accumulation_dtype",
    "delta_rule",
    "diagonal_preconditioner",
    "linear_attention",
    "materialise",
    "observed",
    "set_default_backend",
    "short_convolution",
    "short_convolutions",
]

Backend = Literal["auto", "reference", "chunkwise", "triton", "fla"]
BACKENDS: tuple[Backend, ...] = Backend.__args__
_default_backend: Backend = "auto"
# What a call was: the op's name, its q, k, v, its other arguments, and the state after it
Observer = Callable[[str, Tensor, Tensor, Tensor, dict, RecurrentState], None]
_observer: Observer | None = None


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Show every call of ``delta_rule`` and ``linear_attention`` in this block to ``observer``.

    The calls compute what they always do, and their final state besides.
    """
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def _show(op: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict):
    """Make a call as if nobody looked, then show it."""
    global _observer
    observer, _observer = _observer, None
    assert observer is not None
    try:
        o, final = op(q, k, v, **options | {"return_state": True})
    finally:
        _observer = observer
    observer(op.__name__, q, k, v, options, final)
    return o, final if options["return_state"] or options["in_place"] else None


def set_default_backend(backend: Backend) -> None:
    """Set the backend of every call that names none.

    ``auto``: on a GPU the Triton kernels, once they are certified for the call's configuration
    (``pdn.certification``), else chunkwise. ``triton`` skips the certification.
    """
    global _default_backend
    _default_backend = named_backend(backend)


def named_backend(backend: Backend | None) -> Backend:
    """Return the backend of a call, the default one where it names none."""
    if backend is None:
        return _default_backend
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: expected one of {', '.join(BACKENDS)}")
    return backend


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | SigmoidGain,
    log_decay: Tensor | SoftplusDecay | None = None,
    write_k: Tensor | DiagonalPreconditioner | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    state: RecurrentState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    in_place: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, RecurrentState | None]:
    """Run the gated delta rule with separate read and write keys (online solve).

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V].
        beta: [B, T, HV], the gain.
        log_decay: None (no decay), [B, T, HV] (scalar) or [B, T, HV, K] (diagonal), <= 0.
        write_k: None (the key itself), [B, T, H or HV, K], or a preconditioner that rescales the
            (normalised) key;
            its gates have H or HV heads.
        scale: of the query; K ** -0.5 by default.
        qk_l2norm: normalise q and k per head, ``x * rsqrt(sum(x^2) + 1e-6)``; a ``write_k`` tensor
            is taken as it is.
        state: what to start from; zeros by default.
        return_state: also return the state after the last token.
        cu_seqlens: [N + 1] int32, ascending from 0 to B * T: document boundaries on the flattened
            token axis, at which S and A restart. It contains every multiple of T; repeated entries
            (empty documents) pad it to a fixed length. ``state`` then holds one entry per document;
            or one per row, [B, ...]: the row's first document goes on from it, and the state
            returned is that of the row's last document.
        in_place: write the state after the last token into the tensors of ``state``, contiguous and
            of the accumulation dtype, and return it. For decoding, without gradients.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final RecurrentState or None.

    Raises:
        ValueError: shapes that do not fit together, or, on a CPU, entries of ``cu_seqlens``.
    """
    options: DeltaRuleOptions = {
        "beta": beta, "log_decay": log_decay, "write_k": write_k, "scale": scale,
        "qk_l2norm": qk_l2norm, "state": state, "return_state": return_state,
        "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    check_shapes(q, k, v, cu_seqlens)
    check_gates(q, v, write_k, options)
    if state is not None and rows.is_of_rows(state.S, cu_seqlens, q.shape[0]):
        return rows.run(delta_rule, q, k, v, options | {"backend": backend})
    if _observer is not None:
        return _show(delta_rule, q, k, v, options | {"in_place": in_place, "backend": backend})
    piece = context.current()
    fused = piece is None or _takes_pieces(backend, "online", q, v, write_k, options)
    if isinstance(write_k, DiagonalPreconditioner) and not (fused and write_k.is_plain):
        options["write_k"], A = preconditioning.write_key(
            k, write_k, _diagonal(state, cu_seqlens, backend), normalise=qk_l2norm,
            heads=v.shape[2], beta=beta, log_decay=log_decay,
        )  # fmt: skip
        options["return_state"] = return_state or in_place
        o, final = delta_rule(q, k, v, backend=backend, **options)
        return o, final and with_curvature(state, final, A, in_place)
    if piece is not None:
        return _of_piece(piece, backend, "online", q, k, v, write_k, options, in_place), None
    module = _backend(backend, "online", q, v, write_k, options)
    if in_place:
        return run_in_place(module, "delta_rule", q, k, v, options)
    return module.delta_rule(q, k, v, **options)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | SigmoidGain | None = None,
    log_decay: Tensor | SoftplusDecay | None = None,
    preconditioner: DiagonalPreconditioner | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    state: RecurrentState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    in_place: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, RecurrentState | None]:
    """Run gated linear attention (offline solve).

    That is linear attention, Mamba-2, GLA, and their preconditioned forms.

    ``preconditioner`` rescales the query by the diagonal computed from the keys. All other
    arguments, the result and the errors are those of ``delta_rule``; ``beta=None`` is a gain of
    one.
    """
    options: LinearAttentionOptions = {
        "beta": beta, "log_decay": log_decay, "preconditioner": preconditioner, "scale": scale,
        "qk_l2norm": qk_l2norm, "state": state, "return_state": return_state,
        "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    check_shapes(q, k, v, cu_seqlens)
    check_gates(q, v, preconditioner, options)
    if state is not None and rows.is_of_rows(state.S, cu_seqlens, q.shape[0]):
        return rows.run(linear_attention, q, k, v, options | {"backend": backend})
    if _observer is not None:
        asked = options | {"in_place": in_place, "backend": backend}
        return _show(linear_attention, q, k, v, asked)
    piece = context.current()
    fused = piece is None or _takes_pieces(backend, "offline", q, v, preconditioner, options)
    if preconditioner is not None and not (fused and preconditioner.is_plain):
        q, k, A = preconditioning.query_and_key(
            q, k, preconditioner, _diagonal(state, cu_seqlens, backend), normalise=qk_l2norm,
            heads=v.shape[2],
        )  # fmt: skip
        options["preconditioner"], options["qk_l2norm"] = None, False
        options["return_state"] = return_state or in_place
        o, final = linear_attention(q.to(v.dtype), k.to(v.dtype), v, backend=backend, **options)
        return o, final and with_curvature(state, final, A, in_place)
    if piece is not None:
        o = _of_piece(piece, backend, "offline", q, k, v, preconditioner, options, in_place)
        return o, None
    module = _backend(backend, "offline", q, v, preconditioner, options)
    if in_place:
        return run_in_place(module, "linear_attention", q, k, v, options)
    return module.linear_attention(q, k, v, **options)


def _of_piece(
    piece: context.Piece, backend: Backend | None, solve: Solve, q: Tensor, k: Tensor, v: Tensor,
    write: Tensor | DiagonalPreconditioner | None, options: CallOptions, in_place: bool,
) -> Tensor:  # fmt: skip
    """Return o of a call on a piece of longer sequences; ``write`` as of ``_backend``."""
    name = "delta_rule" if solve == "online" else "linear_attention"
    asked = dict(state=options["state"], return_state=options["return_state"], in_place=in_place)
    context.without_state(name, **asked)
    if _takes_pieces(backend, solve, q, v, write, options):
        return getattr(_triton(step=False), name)(q, k, v, **options, piece=piece)[0]

    def run(v: Tensor, state: RecurrentState | None) -> tuple[Tensor, RecurrentState | None]:
        module = _backend(backend, solve, q, v, write, options)
        asked = options | {"state": state, "return_state": True}
        return getattr(module, name)(q, k, v, **asked)

    cu_seqlens = options["cu_seqlens"]
    if solve == "online":
        return context.online(run, v, q.shape[-1], cu_seqlens, piece)
    scale = q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    read = preconditioning.read_key(q, options["qk_l2norm"]) * scale
    read, log_decay = expand_heads(read, v.shape[2]), materialise(options["log_decay"])
    return context.offline(run, read, v, log_decay, cu_seqlens, piece)


def diagonal_preconditioner(
    k: Tensor,
    preconditioner: DiagonalPreconditioner,
    *,
    A: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the diagonal B_t [B, T, H, K] of every token, and the accumulator A after the last.

    A: [B or N, H, K], of rows or documents as the state of ``delta_rule``.

    k: [B, T, H, K], already normalised. For mixers that need B itself; ``delta_rule`` fuses it.
    """
    name = named_backend(backend)
    module = reference if name == "reference" else chunkwise
    if A is not None and cu_seqlens is not None and rows.is_of_rows(A, cu_seqlens, k.shape[0]):
        first, last = rows.ends_of_rows(cu_seqlens, *k.shape[:2])
        A = rows.to_documents(A, first, cu_seqlens.shape[0] - 1)
        B, A = diagonal_preconditioner(
            k, preconditioner, A=A, cu_seqlens=cu_seqlens, backend=backend
        )
        return B, A.index_select(0, last)
    if (piece := context.current()) is not None:
        context.without_state("diagonal_preconditioner", A=A)
        return context.diagonal_preconditioner(
            module.curvature, k, preconditioner, cu_seqlens, piece
        )
    return module.diagonal_preconditioner(k, preconditioner, A=A, cu_seqlens=cu_seqlens)


def _diagonal(state: RecurrentState | None, cu_seqlens: Tensor | None, backend: Backend | None):
    """Return ``diagonal_preconditioner`` as a call needs it."""
    options = dict(cu_seqlens=cu_seqlens, backend=backend)
    return functools.partial(diagonal_preconditioner, A=state and state.A, **options)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve each channel over time, causally, then SiLU.

    ``silu(sum_j weight[:, j] x_{t - W + 1 + j} + bias)``.

    Sums are float32 (float64 in float64), rounded once, to the dtype of x, whatever the dtype of
    the parameters.

    Args:
        x: [B, T, C].
        weight: [C, W], the last tap on the current token.
        bias: [C], zero by default.
        cu_seqlens: as for ``delta_rule``: no tap reaches over a document boundary.
        state: [B, W - 1, C], the inputs before x, of the document that each row begins with; zeros
            by default. With fewer than W - 1 tokens only PyTorch takes it.
        backend: the kernel for ``triton`` and ``fla``, PyTorch for ``reference`` and ``chunkwise``.

    Returns:
        y [B, T, C] in the dtype of x, and, if a state was given, the inputs before the next token,
            zero where they are of another document than the row's last one.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_convolution(x, weight, bias, cu_seqlens, state)
    piece = context.current()
    if piece is not None:
        context.without_state("short_convolution", state=state)
        context.check_width(weight.shape[1], x.shape[1])
    states = () if state is None else (state,)
    if _convolutions_have_a_kernel(backend, x, [(x, weight, bias)], states):
        kernels, biases = _triton(step=False), () if bias is None else (bias,)
        (y, *_), tails = kernels.short_convolutions(x, [weight], biases, states, cu_seqlens, piece)
        return y, tails[0] if states else None
    if piece is not None:
        state = context.inputs_before(x, weight.shape[1], piece)
    y, tail = convolution.short_convolution(x, weight, bias, cu_seqlens=cu_seqlens, state=state)
    return y, tail if piece is None else None


def short_convolutions(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    *,
    cu_seqlens: Tensor | None = None,
    states: Sequence[Tensor] = (),
    backend: Backend | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Convolve the channels of x by one table of taps after the other, as ``short_convolution``.

    For what one product of x makes: the gradient of the parts is one tensor then, written where it
    belongs.

    Args:
        x: [B, T, C].
        weights: [C_i, W] each, of at most C channels together.
        biases: [C_i] each, or none.
        cu_seqlens, backend: as of ``short_convolution``.
        states: [B, W - 1, C_i] each, as there, or none.

    Returns:
        y_i [B, T, C_i], with the channels of x that are left, if any are; and the next states, if
            there were some.

    Raises:
        ValueError: shapes that do not fit together.
    """
    each, left = convolutions(x, weights, biases, states, cu_seqlens)
    if _convolutions_have_a_kernel(backend, x, each, states):
        kernels, piece = _triton(step=False), context.current()
        return kernels.short_convolutions(x, weights, biases, states, cu_seqlens, piece)
    found = [
        short_convolution(*own, cu_seqlens=cu_seqlens, state=state, backend=backend)
        for own, state in zip(each, states or [None] * len(each), strict=True)
    ]
    ends = [end for _, end in found if end is not None]
    return [*(y for y, _ in found), *([left] if left.shape[-1] else [])], ends


def _convolutions_have_a_kernel(
    backend: Backend | None,
    x: Tensor,
    each: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    states: Sequence[Tensor],
) -> bool:
    """Return whether one call of the kernels computes all of ``each``, channels of x."""
    widths = {weight.shape[1] for _, weight, _ in each}
    if (states or context.current() is not None) and len(widths) > 1:
        return False  # inputs before are exchanged, or kept, for all together
    if states and not 1 <= max(widths) - 1 <= x.shape[1]:
        return False
    name = named_backend(backend)
    return all(_convolution_has_kernel(name, *own, bool(states)) for own in each)


def _backend(
    name: Backend | None,
    solve: Solve,
    q: Tensor,
    v: Tensor,
    write: Tensor | DiagonalPreconditioner | None,
    options: CallOptions,
):
    """Return the module that computes a call; ``write`` is its write key or preconditioner."""
    name = named_backend(name)
    if name == "reference":
        return reference
    if name == "chunkwise":
        return chunkwise
    if name == "fla":
        from pdn.ops import fla

        return fla
    step = False
    # A branch: in a graph for many lengths the comparison is a symbol, which no verdict takes.
    if q.shape[1] == 1 and options["cu_seqlens"] is None and not torch.is_grad_enabled():
        step = True
    if name == "triton":
        check_on_gpu(q)
        return _triton(step)
    if _triton_is_usable(solve, q, v, options["log_decay"], write, step):
        return _triton(step)
    return reference if q.shape[1] == 1 else chunkwise


def _takes_pieces(
    backend: Backend | None, solve: Solve, q: Tensor, v: Tensor,
    write: Tensor | DiagonalPreconditioner | None, options: CallOptions,
) -> bool:  # fmt: skip
    """Return whether the backend of a call takes pieces of longer sequences itself."""
    return _backend(backend, solve, q, v, write, options).__name__ == "pdn.ops.triton"


def _triton(step: bool) -> ModuleType:
    from pdn.ops import triton
    from pdn.ops.triton import step as one_token

    return one_token if step else triton


def _triton_is_usable(solve, q, v, log_decay, write, step) -> bool:
    if not q.is_cuda or v.dtype == torch.float64:
        return False
    decay, kind = axes_of(log_decay, write)
    asked = q.shape[-1], v.shape[-1], decay, kind, solve, v.dtype, step, torch.is_grad_enabled()
    return _certified(q.device, *asked)


def _certified(*configuration) -> bool:
    return verdicts.certifier().triton_is_usable(*configuration)


def _convolution_certified(*configuration) -> bool:
    return verdicts.certifier().convolution_is_usable(*configuration)


# Traced calls ask once, for real, and keep the verdict. As torch.compiler.assume_constant_result,
# which would load the compiler: a second of every start on a CPU.
for _function in (_certified, _convolution_certified):
    vars(_function)["_dynamo_marked_constant"] = True


def _convolution_has_kernel(
    name: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, continued: bool = False
) -> bool:
    if name in ("triton", "fla"):
        check_on_gpu(x)
        return True
    if name != "auto":
        return False
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    asked = *weight.shape, x.dtype, weight.dtype, bias is not None, continued
    return _convolution_certified(x.device, *asked)
