"""What the shapes of a call have to be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pdn.ops.types import (
    CallOptions,
    DiagonalPreconditioner,
    RecurrentState,
    SigmoidGain,
    SoftplusDecay,
)


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, state: Tensor | None
) -> None:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected [B, T, C] and [C, W] "
            "with W >= 1"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias {tuple(bias.shape)}: expected [C] with C of weight {tuple(weight.shape)}"
        )
    check_documents(cu_seqlens)
    if state is None:
        return
    expected = x.shape[0], weight.shape[1] - 1, x.shape[2]
    if state.shape != expected:
        raise ValueError(
            f"state {tuple(state.shape)}: expected the W - 1 inputs before x, {expected}"
        )


def convolutions(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    states: Sequence[Tensor],
    cu_seqlens: Tensor | None,
) -> tuple[list[tuple[Tensor, Tensor, Tensor | None]], Tensor]:
    """Return the channels, the weight and the bias of each convolution, and the channels left.

    The arguments are those of ``pdn.ops.short_convolutions``.

    Raises:
        ValueError: shapes that do not fit together.
    """
    sizes, n = [weight.shape[0] for weight in weights], len(weights)
    rest = x.shape[-1] - sum(sizes)
    if rest < 0 or len(biases) not in (0, n) or len(states) not in (0, n):
        raise ValueError(
            f"x {tuple(x.shape)}, weights {[tuple(w.shape) for w in weights]}, {len(biases)} "
            f"biases and {len(states)} states: expected [B, T, C], weights [C_i, W] of at most C "
            "channels together, and no bias and state or one for each"
        )
    *parts, left = x.split([*sizes, rest], -1)
    none = [None] * n
    each = list(zip(parts, weights, biases or none, strict=True))
    for own, state in zip(each, states or none, strict=True):
        check_convolution(*own, cu_seqlens, state)
    return each, left


def check_shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    for name, x in {"q": q, "k": k, "v": v}.items():
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            found = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(f"{name}: found {found}; expected a floating-point tensor")
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)}: expected the same [B, T, H, K]"
        )
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"v {tuple(v.shape)}: expected [B, T, HV, V] with B, T of q {tuple(q.shape)} and HV a "
            "multiple of its H"
        )
    check_documents(cu_seqlens)


def check_gates(
    q: Tensor, v: Tensor, write: Tensor | DiagonalPreconditioner | None, options: CallOptions
) -> None:
    """Raise ValueError for gates and states that are not of the sizes of q and v.

    PyTorch would stretch some of them to those sizes, and a kernel reads beyond their ends.

    Args:
        q, v: [B, T, H, K] and [B, T, HV, V].
        write: the write key or preconditioner.
        options: the other arguments of the call.
    """
    (*_, H, K), (B, T, HV, V) = q.shape, v.shape
    each, shared = (B, T, HV), (B, T, H)  # value head; key head
    gains: Any = options.get("beta")
    _expect("beta", gains.x if isinstance(gains, SigmoidGain) else gains, each)
    _check_decay("log_decay", options["log_decay"], each, K)
    if isinstance(write, DiagonalPreconditioner):
        gain = write.beta.x if isinstance(write.beta, SigmoidGain) else write.beta
        _expect("beta of the preconditioner", gain, each, shared)
        heads = gain.shape[:3]
        _check_decay("log_decay of the preconditioner", write.log_decay, heads, None)
        _expect("mu", write.mu, heads[2:])
    else:
        _expect("write_k", write, (*each, K), (*shared, K))
    state = options["state"]
    if state is None:
        return
    if not isinstance(state, RecurrentState):
        raise ValueError(
            f"state: found a {type(state).__name__}; expected a RecurrentState or None"
        )
    cu_seqlens = options["cu_seqlens"]
    counts = [B] if cu_seqlens is None else [cu_seqlens.shape[0] - 1, B]
    _expect("state.S", state.S, *((n, HV, K, V) for n in counts))
    if isinstance(write, DiagonalPreconditioner):
        n = state.S.shape[0]
        _expect("state.A", state.A, (n, HV, K), (n, H, K))


def _check_decay(name: str, given: Any, heads: tuple[int, ...], key: int | None) -> None:
    """Raise ValueError for a log-decay that is neither [*heads] nor [*heads, key], if any."""
    shapes = [heads] if key is None else [heads, (*heads, key)]
    if not isinstance(given, SoftplusDecay):
        return _expect(name, given, *shapes)
    _expect(f"{name}.x", given.x, *shapes)
    _expect(f"{name}.A_log", given.A_log, heads[2:])
    _expect(f"{name}.dt_bias", given.dt_bias, given.x.shape[2:])


def _expect(name: str, x: Any, *shapes: Sequence[int]) -> None:
    """Raise ValueError unless x is None or a tensor of one of these shapes."""
    _expect_tensor(name, x)
    if x is not None and not any(x.shape == tuple(shape) for shape in shapes):
        expected = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(map(tuple, shapes)))
        raise ValueError(f"{name} {tuple(x.shape)}: expected {expected}")


def _expect_tensor(name: str, x: Any) -> None:
    if x is not None and not isinstance(x, Tensor):
        raise ValueError(f"{name}: found a {type(x).__name__}; expected a tensor")


def check_first_derivative(what: str, instead: str) -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated, where ``what`` cannot be.

    torch's ``once_differentiable`` does so only if the incoming gradient depends on something: the
    second derivatives of a loss would be wrong, and nothing said.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{what}: found create_graph=True; expected first derivatives only; {instead}"
        )


def check_on_gpu(x: Tensor) -> None:
    """Raise ValueError where the Triton kernels cannot read x."""
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"device = {x.device}: the Triton kernels need a CUDA device; use backend='auto'"
        )


def check_documents(cu_seqlens: Tensor | None) -> None:
    _expect_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32):
        raise ValueError(
            f"cu_seqlens: expected int32 [N + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )


def check_boundaries(cu_seqlens: Tensor | None, batch: int, time: int) -> None:
    """Raise ValueError for documents that do not cover every row of [batch, time] in order.

    Only on a CPU, and in no graph: on a GPU a look at the values would wait for it.
    """
    if type(cu_seqlens) is not Tensor or cu_seqlens.device.type != "cpu" or not time:
        return
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if torch.compiler.is_compiling() or functorch.is_functorch_wrapped_tensor(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    rows = range(0, batch * time + 1, time)
    if not ends or ends[0] != 0 or ends[-1] != rows[-1] or ends != sorted(ends):
        raise ValueError(
            f"cu_seqlens {_shown(ends)}: expected ascending entries from 0 to B * T = {rows[-1]}"
        )
    if missing := sorted(set(rows) - set(ends)):
        raise ValueError(
            f"cu_seqlens {_shown(ends)}: has no {missing[0]}; expected every multiple of T = "
            f"{time}, since no document goes on in the next row"
        )


def _shown(ends: list[int]) -> str:
    return str(ends) if len(ends) <= 8 else f"[{', '.join(map(str, ends[:4]))}, …, {ends[-1]}]"
