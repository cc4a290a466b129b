"""Sums over what programs leave apart, so that they need no atomics and every run adds in the same order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pdn.ops.triton.compiled import run

COLUMNS = 32  # of a program
ROWS = 128  # at a time


@triton.jit(do_not_specialize=["count"])
def sum_kernel(parts, out, count, N: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """The sum over rows [N] of parts [count, N]."""
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
    """``torch.sum(parts, 0, out=out)`` of contiguous tensors; torch's takes several times as long where rows are short."""
    if out is None:
        out = parts.new_empty(parts.shape[1:])
    N = out.numel()
    run(
        sum_kernel,
        (triton.cdiv(N, COLUMNS),),
        parts,
        out,
        parts.shape[0],
        N=N,
        BN=COLUMNS,
        BR=ROWS,
        num_warps=4,
    )
    return out
