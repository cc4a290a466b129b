"""Sums over what programs leave apart, so that they need no atomics and every run adds in the same
order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pdn.ops.triton.common import await_inputs
from pdn.ops.triton.compiled import cdiv, run

COLUMNS = 32  # of a program
ROWS = 128  # at a time

# Which of a program's PARTS is the gradient of what, see ``sum_parameters``.
OF_A_LOG = tl.constexpr(0)
OF_DT_BIAS = tl.constexpr(1)
OF_A_LOG_P = tl.constexpr(2)
OF_DT_BIAS_P = tl.constexpr(3)
OF_MU = tl.constexpr(4)
NUM_PARTS = 5
PARTS = tl.constexpr(NUM_PARTS)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(parts, out, count, N: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """The sum over rows [N] of parts [count, N]."""
    await_inputs()
    row = tl.arange(0, BR)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    sums = tl.zeros([BR, BN], dtype=parts.dtype.element_ty)
    for base in range(0, count, BR):
        at = (base + row).to(tl.int64)[:, None] * N + n[None, :]
        sums += tl.load(
            parts + at, mask=(base + row < count)[:, None] & (n < N)[None, :], other=0.0
        )
    tl.store(out + n, tl.sum(sums, 0), mask=n < N)


def sum_rows(parts: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.sum(parts, 0, out=out)`` of contiguous tensors; torch's takes several times as long
    where rows are short.
    """
    if out is None:
        out = parts.new_empty(parts.shape[1:])
    N = out.numel()
    run(
        sum_kernel,
        (cdiv(N, COLUMNS),),
        parts,
        out,
        parts.shape[0],
        N=N,
        BN=COLUMNS,
        BR=ROWS,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["count"])
def parameters_kernel(
    parts, A_log, dt_bias, A_log_P, dt_bias_P, mu, count,
    HV: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Gradients of a head's parameters [HV] each, those that are there, from parts [count, HV,
    PARTS].
    """
    await_inputs()
    row = tl.arange(0, BR)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    N: tl.constexpr = HV * PARTS
    sums = tl.zeros([BR, BN], dtype=parts.dtype.element_ty)
    for base in range(0, count, BR):
        at = (base + row).to(tl.int64)[:, None] * N + n[None, :]
        keep = (base + row < count)[:, None] & (n < N)[None, :]
        sums += tl.load(parts + at, mask=keep, other=0.0)
    sums = tl.sum(sums, 0)
    h = n // PARTS
    which = tl.where(n < N, n % PARTS, -1)
    if A_log is not None:
        tl.store(A_log + h, sums, mask=which == OF_A_LOG)
    if dt_bias is not None:
        tl.store(dt_bias + h, sums, mask=which == OF_DT_BIAS)
    if A_log_P is not None:
        tl.store(A_log_P + h, sums, mask=which == OF_A_LOG_P)
    if dt_bias_P is not None:
        tl.store(dt_bias_P + h, sums, mask=which == OF_DT_BIAS_P)
    if mu is not None:
        tl.store(mu + h, sums, mask=which == OF_MU)


def sum_parameters(parts: Tensor, *gradients: Tensor | None) -> None:
    """Sum what the programs left apart, parts [count, HV, PARTS], into the gradients [HV] in the
    order of the parts.

    A part whose gradient is None need not have been written.
    """
    count, heads, _ = parts.shape
    if any(x is not None for x in gradients):
        grid = (cdiv(heads * NUM_PARTS, COLUMNS),)
        options = dict(BN=COLUMNS, BR=ROWS, num_warps=4)
        run(parameters_kernel, grid, parts, *gradients, count, HV=heads, **options)
