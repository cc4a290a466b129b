"""The launches of a forward and a backward pass, as two ``torch.library`` operators where something traces them.

``pdn::chunk_forward`` and ``pdn::chunk_backward`` take contiguous tensors and are opaque to torch.compile;
``pdn.ops.triton`` turns the arguments of ``pdn.ops`` into theirs. An absent optional result is an empty tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pdn.ops.triton.common import CHUNK, NUM_ROWS
from pdn.ops.triton.compiled import run
from pdn.ops.triton.curvature import (
    NUM_GATES,
    SCAN,
    adjoint_summary_kernel,
    finish_kernel,
    rescale_kernel,
    scan_kernel,
    summary_kernel,
)
from pdn.ops.triton.gradients import gradient_kernel
from pdn.ops.triton.prepare import prepare_kernel
from pdn.ops.triton.scan import combine_kernel, forward_kernel, reverse_kernel
from pdn.ops.triton.vector import (
    WIDTH,
    prepare_vector_kernel,
    score_gradient_kernel,
    steep_gradient_kernel,
    steep_prepare_kernel,
    vector_gradient_kernel,
)

FROM_KEY, FROM_TENSOR, RESCALED_KEY, RESCALED_QUERY = range(4)
NO_DECAY, SCALAR, VECTOR = range(3)
NORM_Q = 5  # a row of the table


MIN_SEGMENT = 16  # chunks; three scans of a segment against one of the sequence
PROGRAMS = 128  # what fills a device with the serial kernels: one a multiprocessor


class Saved(NamedTuple):
    """What the backward pass reads besides the inputs."""

    table: Tensor  # [NT, HV, ROWS, C] per-token scalars, see common.py
    rescaled: Tensor  # [M, HV, K] the preconditioner's B times the raw key or query
    query: Tensor  # [M, HV, K] e^G q of a vector decay
    key: Tensor  # [M, HV, K] e^G k
    write: Tensor  # [M, HV, K] e^(G_C - G) kw
    decay_sums: Tensor  # [NT, HV, C, K] G
    steep: Tensor  # [NT, HV, K / WIDTH] int32, which blocks of channels take the careful products
    last_decay: Tensor  # [NT, HV, K] e^(G_C)
    T: Tensor  # [NT, HV, C, C]
    P: Tensor  # [NT, HV, C, C]
    x: Tensor  # [M, HV, V] the solution of every chunk's triangular system
    states: Tensor  # [NT, HV, V, K] before every chunk
    transitions: Tensor  # [B * segments, HV, K, K] what every segment does to the state, where sequences are cut
    A: Tensor  # [NT, HV, K] the curvature before every chunk
    curvature: Tensor  # [M, HV, K] of every token
    gates: Tensor  # [NT, HV, GATES, C] the preconditioner's per-token scalars, see curvature.py
    chunks: Tensor  # [NT, 2] int32 first token and the one after the last, with cu_seqlens
    offsets: Tensor  # [N + 1] int32 first chunk of every sequence, with cu_seqlens


class Problem(NamedTuple):
    """Sizes and switches of one call, the same forward and backward."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int
    NT: int
    varlen: bool
    decay: int
    write: int
    dtype: torch.dtype

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def common(self) -> dict:
        acc = triton.language.float64 if self.dtype == torch.float64 else triton.language.float32
        return dict(HV=self.HV, K=self.K, BK=padded(self.K), VARLEN=self.varlen, ACC=acc)

    @property
    def precision(self) -> str:
        return "tf32" if self.dtype.itemsize == 2 else "bf16x6"

    def serial_config(self, V: int) -> dict:
        """Of V values, those that a program of the serial kernels takes, its warps and its pipeline depth."""
        if self.dtype.itemsize > 2:
            return dict(BV=min(64, padded(V)), num_warps=4, num_stages=1)
        if padded(V) == 128 and self.K <= 128:
            return dict(BV=128, num_warps=8, num_stages=2)
        return dict(BV=min(64, padded(V)), num_warps=4, num_stages=2 if self.K <= 128 else 1)

    @property
    def segment(self) -> int:
        """Chunks after which sequences are cut, so that few and long ones fill the device; 0: they are not."""
        if self.varlen or self.K > 128:
            return 0
        programs = self.B * self.HV * cdiv(self.V, self.serial_config(self.V)["BV"])
        length = max(MIN_SEGMENT, cdiv(self.T, CHUNK) * programs // PROGRAMS)
        return length if cdiv(self.T, CHUNK) >= 4 * length else 0

    @property
    def segments(self) -> int:
        """Of each sequence."""
        return cdiv(cdiv(self.T, CHUNK), self.segment) if self.segment else 0

    @property
    def gradient_config(self) -> dict:
        """Keys a step of the gradient kernel takes, its warps and its pipeline depth."""
        return dict(BK=16 if self.dtype.itemsize > 2 else 32, num_warps=4, num_stages=2 if self.K <= 128 else 1)

    @property
    def gradient_values(self) -> int:
        """Values that the gradient kernels hold at once: all of them where shared memory has room."""
        return 32 if self.dtype.itemsize > 2 else min(128, padded(self.V))

    @property
    def prepare_config(self) -> dict:
        """Registers for a third program a multiprocessor, where that spills nothing."""
        return dict(num_warps=4) | (dict(maxnreg=168) if self.dtype.itemsize == 2 and self.K <= 128 else {})

    @property
    def vector_config(self) -> dict:
        """The same of the chunk kernels of a vector decay."""
        return dict(BK=WIDTH, num_warps=4, num_stages=1)


def padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def problem(q: Tensor, v: Tensor, log_decay, write_k, gP, cu_seqlens, on_query: bool) -> Problem:
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    decay = NO_DECAY if log_decay is None else SCALAR if log_decay.ndim == 3 else VECTOR
    write = FROM_KEY if write_k is None else FROM_TENSOR
    if gP is not None:
        write = RESCALED_QUERY if on_query else RESCALED_KEY
    if cu_seqlens is None:
        N, NT = B, B * -(-T // CHUNK)
    else:
        N = cu_seqlens.shape[0] - 1
        NT = B * T // CHUNK + N
    return Problem(B, T, H, HV, K, V, N, NT, cu_seqlens is not None, decay, write, v.dtype)


def chunk_table(cu_seqlens: Tensor, NT: int) -> tuple[Tensor, Tensor]:
    """(chunks [NT, 2], offsets [N + 1]) on the device, without reading a length on the host."""
    counts = (cu_seqlens.diff() + (CHUNK - 1)) // CHUNK
    offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    slots = torch.arange(NT, device=cu_seqlens.device, dtype=torch.int32)
    document = torch.searchsorted(offsets[1:], slots, right=True, out_int32=True).clamp(max=counts.shape[0] - 1)
    start = cu_seqlens[document] + (slots - offsets[document]) * CHUNK
    end = torch.minimum(start + CHUNK, cu_seqlens[document + 1])
    used = slots < offsets[-1]
    return torch.stack([start * used, end * used], 1).contiguous(), offsets


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None,
    write_k: Tensor | None, gP: Tensor | None, A_log_P: Tensor | None, dt_bias_P: Tensor | None, bP: Tensor | None,
    mu: Tensor | None, S: Tensor | None, A: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, l2norm: bool, delta: bool, on_query: bool, inverse: bool, bound: float, eps: float,
    range: float, range_P: float, save: bool, final: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """o [B, T, HV, V], the last S and A, and the fields of ``Saved``."""
    p = problem(q, v, log_decay, write_k, gP, cu_seqlens, on_query)
    o, S_last, A_last, *saved = empty_results(p, v, delta, save, final)
    saved = Saved(*saved)
    if p.varlen:
        saved = saved._replace(**dict(zip(("chunks", "offsets"), chunk_table(cu_seqlens, p.NT))))
    if gP is not None:
        precondition(p, q, k, gP, A_log_P, dt_bias_P, bP, mu, A, saved, A_last, l2norm, inverse, bound, eps, range_P, save)
    write_k = saved.rescaled if p.write == RESCALED_KEY else write_k
    keys = q, k, saved.rescaled, write_k
    inputs = *keys, log_decay, A_log, dt_bias, beta, saved.chunks, saved.table
    options = dict(GROUP=p.HV // p.H, WRITE=p.write, DELTA=delta, HALF=p.dtype.itemsize == 2, PRECISION=p.precision)
    options |= p.common()
    gates = dict(SCALE=scale, L2NORM=l2norm, RAW=A_log is not None, RANGE=range)
    if p.decay == VECTOR:
        options |= p.vector_config
        run(prepare_vector_kernel, (p.NT, p.HV),
            *inputs, saved.decay_sums, saved.steep, saved.query, saved.key, saved.write, saved.last_decay, saved.T, saved.P, p.T,
            **gates, **options,
        )  # fmt: skip
        run(
            steep_prepare_kernel,
            (p.NT, p.HV),
            *keys,
            saved.chunks,
            saved.table,
            saved.decay_sums,
            saved.steep,
            saved.T,
            saved.P,
            p.T,
            **options,
        )
    else:
        run(prepare_kernel, (p.NT, p.HV), *inputs, saved.T, saved.P, p.T, DECAY=p.decay, **gates, **options, **p.prepare_config)
    query, key, write, layout = operands(p, q, k, write_k, saved)
    options = dict(DECAY=p.decay, DELTA=delta, PRECISION=p.precision, **layout, **p.common())
    run_forward(p, (query, key, write, v), saved, S, (o, S_last), options, save, final)
    return o, S_last, A_last, *saved


def run_forward(p: Problem, inputs, saved: Saved, S, outputs, options: dict, save: bool, final: bool) -> None:
    """The scan over chunks. A sequence long enough to be cut is scanned three times, all its segments at once: from the
    identity, which gives their transitions, from zero, and, once these are combined, from the segments' true states.
    """
    *keys, v = inputs
    o, S_last = outputs

    def launch(v, V, initial, o, last, sequences, **flags):
        config = p.serial_config(V)
        run(forward_kernel, (cdiv(V, config["BV"]), sequences, p.HV),
            *keys, v, saved.table, saved.last_decay, saved.T, saved.P, initial, saved.chunks, saved.offsets,
            o, saved.x, saved.states, last, p.T,
            V=V, HAS_INITIAL=initial is not None, HAS_VALUES=v is not None, **flags, **options, **config,
        )  # fmt: skip

    if p.segment == 0:
        return launch(v, p.V, S, o, S_last, p.N, OUTPUT=True, SAVE=save, FINAL=final, SEGMENT=0)
    count = p.B * p.segments
    ends = saved.table.new_empty(count, p.HV, p.K, p.V)
    eye = torch.eye(p.K, dtype=p.acc, device=ends.device).expand(count, p.HV, p.K, p.K).contiguous()
    state_only = dict(OUTPUT=False, SAVE=False, FINAL=True, SEGMENT=p.segment)
    launch(None, p.K, eye, None, saved.transitions, count, **state_only)
    launch(v, p.V, None, None, ends, count, **state_only)
    starts = combine(p, saved.transitions, ends, S, reverse=False)
    launch(v, p.V, starts, o, ends, count, OUTPUT=True, SAVE=save, FINAL=final, SEGMENT=p.segment)
    if final:
        S_last.copy_(ends.unflatten(0, (p.B, -1))[:, -1])


def combine(p: Problem, transitions, offsets, initial, reverse: bool) -> Tensor:
    """The state before every segment, or the adjoint after it."""
    starts = torch.empty_like(offsets)
    block = min(32, padded(p.V))
    run(combine_kernel, (cdiv(p.V, block), p.B, p.HV),
        transitions, offsets, initial, starts, p.segments,
        HV=p.HV, K=p.K, BK=padded(p.K), V=p.V, BV=block, HAS_INITIAL=initial is not None, REVERSE=reverse,
        ACC=p.common()["ACC"], HALF=p.dtype.itemsize == 2, num_warps=8, num_stages=2 if p.dtype.itemsize == 2 else 1,
    )  # fmt: skip
    return starts


def empty_results(p: Problem, like: Tensor, delta: bool, save: bool, final: bool) -> tuple[Tensor, ...]:
    """Uninitialised results of ``chunk_forward``; the shapes its fake uses too."""

    def empty(needed, *shape, dtype=p.dtype):
        return like.new_empty(shape if needed else (0,), dtype=dtype)

    M, HV, K, V, NT = p.B * p.T, p.HV, p.K, p.V, p.NT
    preconditioned = p.write in (RESCALED_KEY, RESCALED_QUERY)
    vector = p.decay == VECTOR
    return (
        like.new_empty(p.B, p.T, HV, V),
        empty(final, p.N, HV, K, V, dtype=p.acc),
        empty(preconditioned, p.N, HV, K, dtype=p.acc),
        empty(True, NT, HV, NUM_ROWS, CHUNK, dtype=p.acc),
        empty(preconditioned, M, HV, K),
        empty(vector, M, HV, K),
        empty(vector and delta, M, HV, K),
        empty(vector, M, HV, K),
        empty(vector, NT, HV, CHUNK, K, dtype=p.acc),
        empty(vector, NT, HV, cdiv(K, WIDTH), dtype=torch.int32),
        empty(vector, NT, HV, K, dtype=p.acc),
        empty(delta, NT, HV, CHUNK, CHUNK),
        empty(True, NT, HV, CHUNK, CHUNK),
        empty(save and delta, M, HV, V),
        empty(save, NT, HV, V, K),
        empty(p.segment > 0, p.B * p.segments, HV, K, K, dtype=p.acc),
        empty(preconditioned, NT, HV, K, dtype=p.acc),
        empty(preconditioned and save, M, HV, K, dtype=p.dtype if p.dtype == torch.bfloat16 else p.acc),
        empty(preconditioned, NT, HV, NUM_GATES, CHUNK, dtype=p.acc),
        empty(p.varlen, NT, 2, dtype=torch.int32),
        empty(p.varlen, p.N + 1, dtype=torch.int32),
    )


chunk_forward = torch.library.custom_op("pdn::chunk_forward", forward_pass, mutates_args=())


@chunk_forward.register_fake
def _(
    q, k, v, beta, log_decay, A_log, dt_bias, write_k, gP, A_log_P, dt_bias_P, bP, mu, S, A, cu_seqlens,
    scale, l2norm, delta, on_query, inverse, bound, eps, range, range_P, save, final,
):  # fmt: skip
    p = problem(q, v, log_decay, write_k, gP, cu_seqlens, on_query)
    return empty_results(p, v, delta, save, final)


def precondition(
    p: Problem, q, k, gP, A_log, dt_bias, bP, mu, A, saved: Saved, A_last: Tensor, l2norm, inverse, bound, eps, range_P, save
) -> None:
    """The curvature before every chunk into ``saved.A``, after the last one into ``A_last``, and ``saved.rescaled``."""
    Z = torch.empty_like(saved.A)
    group = dict(GROUP=p.HV // p.H)
    run(summary_kernel, (p.NT, p.HV),
        k, gP, A_log, dt_bias, bP, saved.chunks, Z, saved.gates, p.T,
        L2NORM=l2norm, RAW=A_log is not None, RANGE=range_P, **group, **p.common(), num_warps=2,
    )  # fmt: skip
    scan(p, Z, A, saved, saved.A, A_last, reverse=False)
    on_query = p.write == RESCALED_QUERY
    run(rescale_kernel, (p.NT, p.HV),
        q if on_query else k, k, mu, saved.A, saved.gates, saved.chunks, saved.rescaled, saved.curvature, p.T,
        ON_QUERY=on_query, SAVE=save, INVERSE=inverse, LOG_BOUND=math.log(bound), EPS=eps, **group, **p.common(), num_warps=1,
    )  # fmt: skip


def scan(p: Problem, Z, initial, saved: Saved, before, last, reverse: bool) -> None:
    options = p.common() | dict(BK=16)
    run(scan_kernel, (p.N, p.HV, cdiv(p.K, 16)),
        Z, saved.gates, initial, saved.offsets, before, last, p.T,
        HAS_INITIAL=initial is not None, REVERSE=reverse, L=SCAN, **options, num_warps=4,
    )  # fmt: skip


def operands(p: Problem, q, k, write_k, saved: Saved) -> tuple[Tensor, Tensor, Tensor, dict]:
    """Query, key and write key as the serial kernels read them, and the constants that say how."""
    group = p.HV // p.H
    if p.decay == VECTOR:
        return saved.query, saved.key, saved.write, dict(QG=1, KG=1, WG=1, KEY_WRITES=False)
    query = saved.rescaled if p.write == RESCALED_QUERY else q
    write = saved.rescaled if p.write == RESCALED_KEY else k if write_k is None else write_k
    groups = dict(QG=group if query is q else 1, KG=group, WG=group if write is k else 1)
    return query, k, write, groups | dict(KEY_WRITES=write is k)


def backward_pass(
    o: Tensor, do: Tensor, dS: Tensor | None, dA: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None,
    write_k: Tensor | None, gP: Tensor | None, A_log_P: Tensor | None, dt_bias_P: Tensor | None, bP: Tensor | None,
    mu: Tensor | None, S: Tensor | None, A: Tensor | None, cu_seqlens: Tensor | None,
    saved: list[Tensor],
    scale: float, l2norm: bool, delta: bool, on_query: bool, inverse: bool, bound: float, eps: float,
    range: float, range_P: float,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """Gradients of the first 15 tensors of ``chunk_forward``; empty where there is no such argument."""
    p = problem(q, v, log_decay, write_k, gP, cu_seqlens, on_query)
    saved = Saved(*saved)
    results = empty_gradients(p, v, beta, log_decay, A_log, dt_bias, gP, A_log_P, bP, S, inverse)
    dq, dk, dv, dbeta, dlog_decay, dA_log, ddt_bias, dwrite, *_, dS0, _ = results
    query, key, write, layout = operands(p, q, k, write_k, saved)
    adjoints = torch.empty_like(saved.states)
    options = dict(DECAY=p.decay, DELTA=delta, PRECISION=p.precision, **layout, **p.common())
    run_reverse(p, (query, key, write, do), saved, dS, (dv, adjoints, dS0), options, S is not None)
    write_k = saved.rescaled if p.write == RESCALED_KEY else write_k
    inputs = q, k, saved.rescaled, write_k, log_decay, A_log, dt_bias, v
    values = dict(V=p.V, BV=p.gradient_values, DELTA=delta, PRECISION=p.precision, **p.common())
    options = dict(GROUP=p.HV // p.H, SCALE=scale, L2NORM=l2norm, WRITE=p.write, RAW=A_log is not None, **values)
    if p.decay == VECTOR:
        blocks = cdiv(p.K, WIDTH)
        wide = torch.float32 if p.dtype == torch.float16 else p.dtype
        dP, dL = saved.P.new_empty(2, *saved.P.shape, dtype=wide)
        along = saved.table.new_empty(p.NT, p.HV, 3, CHUNK)
        run(score_gradient_kernel, (p.NT, p.HV),
            v, o, saved.x, do, dv, saved.table, saved.chunks, dP, dL, along, dbeta, p.T, RANGE=range,
            **{name: x for name, x in values.items() if name not in ("K", "BK")}, num_warps=4,
        )  # fmt: skip
        d_rate = saved.table.new_empty((p.NT, p.HV, blocks) if A_log is not None else 0)
        d_bias = saved.table.new_empty((p.NT, p.HV, p.K) if A_log is not None else 0)
        inputs = *inputs, saved.x, do, dv, saved.table, saved.decay_sums, saved.steep, saved.states, adjoints, saved.chunks
        inputs = *inputs, dP, dL, along, dq, dk, dwrite, dlog_decay
        for kernel in vector_gradient_kernel, steep_gradient_kernel:
            run(kernel, (blocks, p.NT, p.HV), *inputs, d_rate, d_bias, p.T, **options | p.vector_config)
        if A_log is not None:
            torch.sum(d_rate, (0, 2), out=dA_log)
            torch.sum(d_bias, 0, out=ddt_bias)
    else:
        parts = saved.table.new_empty((p.NT, p.HV, 2) if A_log is not None else 0)
        run(gradient_kernel, (p.NT, p.HV),
            *inputs, o, saved.x, do, dv, saved.table, saved.states, adjoints, saved.chunks,
            dq, dk, dwrite, dlog_decay, dbeta, parts, p.T, DECAY=p.decay, RANGE=range, **options | p.gradient_config,
        )  # fmt: skip
        if A_log is not None:
            torch.sum(parts[..., 0], 0, out=dA_log)
            torch.sum(parts[..., 1], 0, out=ddt_bias)
    if gP is not None:
        precondition_backward(
            p, q, k, gP, A_log_P, dt_bias_P, mu, dA, saved, results, scale, l2norm, inverse, bound, eps, range_P
        )
    return results


def precondition_backward(
    p: Problem, q, k, gP, A_log, dt_bias, mu, dA, saved: Saved, results, scale, l2norm, inverse, bound, eps, range_P
) -> None:
    """The gradients of the preconditioner's arguments, and what is left of dk and dq."""
    dq, dk, *_, dwrite, dgP, dA_log, ddt_bias, dbP, dmu, _, dA0 = results
    on_query = p.write == RESCALED_QUERY
    Z, carry = torch.empty_like(saved.A), torch.empty_like(saved.A)
    parts = saved.A.new_empty(p.NT, p.HV)
    options = dict(GROUP=p.HV // p.H, INVERSE=inverse, LOG_BOUND=math.log(bound), EPS=eps, **p.common(), num_warps=1)
    run(adjoint_summary_kernel, (p.NT, p.HV),
        q if on_query else k, dq if on_query else dwrite, mu, saved.curvature, saved.gates, saved.chunks, Z, parts, p.T,
        **options,
    )  # fmt: skip
    scan(p, Z, dA, saved, carry, dA0, reverse=True)
    parameters = saved.A.new_empty((p.NT, p.HV, 2) if A_log is not None else 0)
    run(finish_kernel, (p.NT, p.HV),
        q, k, dq, dk, dwrite, gP, A_log, dt_bias, mu, saved.curvature, carry, saved.table[:, :, NORM_Q], saved.gates,
        saved.chunks, dgP, dbP, parameters, p.T, NORM_STRIDE=NUM_ROWS * CHUNK,
        SCALE=scale, L2NORM=l2norm, ON_QUERY=on_query, RAW=A_log is not None, RANGE=range_P, **options,
    )  # fmt: skip
    if not inverse:
        torch.sum(parts, 0, out=dmu)
    if A_log is not None:
        torch.sum(parameters[..., 0], 0, out=dA_log)
        torch.sum(parameters[..., 1], 0, out=ddt_bias)


def run_reverse(p: Problem, inputs, saved: Saved, dS, outputs, options: dict, initial: bool) -> None:
    """The adjoint's scan over chunks; segments, if any, twice: from zero, then from the true adjoints."""
    dv, adjoints, dS0 = outputs
    config = p.serial_config(p.V)

    def launch(last, first, sequences, **flags):
        run(reverse_kernel, (cdiv(p.V, config["BV"]), sequences, p.HV),
            *inputs, saved.table, saved.last_decay, saved.T, saved.P, last, saved.chunks, saved.offsets,
            dv, adjoints, first, p.T, V=p.V, HAS_FINAL=last is not None, **flags, **options, **config,
        )  # fmt: skip

    if p.segment == 0:
        return launch(dS, dS0, p.N, INITIAL=initial, STORE=True, SEGMENT=0)
    count = p.B * p.segments
    starts = saved.table.new_empty(count, p.HV, p.K, p.V)
    launch(None, starts, count, INITIAL=True, STORE=False, SEGMENT=p.segment)
    ends = combine(p, saved.transitions, starts, dS, reverse=True)
    launch(ends, starts, count, INITIAL=initial, STORE=True, SEGMENT=p.segment)
    if initial:
        dS0.copy_(starts.unflatten(0, (p.B, -1))[:, 0])


def empty_gradients(p: Problem, v, beta, log_decay, A_log, dt_bias, gP, A_log_P, bP, S, inverse: bool) -> tuple[Tensor, ...]:
    """Uninitialised gradients, dq, dk and every gate's with HV heads; the shapes the fake uses too."""

    def empty(needed, *shape, dtype=p.acc):
        return v.new_empty(shape if needed else (0,), dtype=dtype)

    def like(x):
        return empty(False) if x is None else torch.empty_like(x)

    per_head = p.B, p.T, p.HV
    preconditioned = gP is not None
    return (
        empty(True, *per_head, p.K, dtype=p.dtype),
        empty(True, *per_head, p.K, dtype=p.dtype),
        torch.empty_like(v),
        like(beta),
        like(log_decay),
        empty(A_log is not None, p.HV),
        empty(A_log is not None, *(() if dt_bias is None else dt_bias.shape)),
        empty(p.write in (FROM_TENSOR, RESCALED_KEY), *per_head, p.K, dtype=p.dtype),
        like(gP),
        empty(A_log_P is not None, p.HV),
        empty(A_log_P is not None, p.HV),
        like(bP),
        empty(preconditioned and not inverse, p.HV),
        empty(S is not None, p.N, p.HV, p.K, p.V),
        empty(preconditioned, p.N, p.HV, p.K),
    )


chunk_backward = torch.library.custom_op("pdn::chunk_backward", backward_pass, mutates_args=())


@chunk_backward.register_fake
def _(
    o, do, dS, dA, q, k, v, beta, log_decay, A_log, dt_bias, write_k, gP, A_log_P, dt_bias_P, bP, mu, S, A, cu_seqlens, saved,
    scale, l2norm, delta, on_query, inverse, bound, eps, range, range_P,
):  # fmt: skip
    p = problem(q, v, log_decay, write_k, gP, cu_seqlens, on_query)
    return empty_gradients(p, v, beta, log_decay, A_log, dt_bias, gP, A_log_P, bP, S, inverse)


def _save(ctx, inputs, output):
    *tensors, scale, l2norm, delta, on_query, inverse, bound, eps, range, range_P, _, _ = inputs
    ctx.options = scale, l2norm, delta, on_query, inverse, bound, eps, range, range_P
    ctx.save_for_backward(*tensors, *output[3:], output[0])
    ctx.set_materialize_grads(False)


def _save_operator(ctx, inputs, output):
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[3:])


def _gradients(ctx, do, dS, dA, *_, backward=chunk_backward):
    tensors = ctx.saved_tensors[:16]
    *saved, o = ctx.saved_tensors[16:]
    q, v = tensors[0], tensors[2]
    if do is None:
        do = torch.zeros_like(v)
    final = [None if x is None or x.numel() == 0 else x.contiguous() for x in (dS, dA)]
    gradients = list(backward(o, do.contiguous(), *final, *tensors, saved, *ctx.options))
    group = v.shape[2] // q.shape[2]
    if group > 1:
        gradients[:2] = (x.unflatten(2, (-1, group)).sum(3) for x in gradients[:2])
    gradients = [None if x is None else gradient.to(x.dtype) for gradient, x in zip(gradients, tensors)]
    return *gradients, None, *[None] * 11


chunk_forward.register_autograd(_gradients, setup_context=_save_operator)


class _Eager(torch.autograd.Function):
    """The operators' passes without the operators, whose dispatch takes the host longer than all launches."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward_pass(*inputs)
        _save(ctx, inputs, output)
        return output[:3]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dS, dA):
        return _gradients(ctx, do, dS, dA, backward=backward_pass)


def chunk(*inputs) -> tuple[Tensor, Tensor, Tensor]:
    """o and the last S and A of ``forward_pass``: as an operator where something traces, else directly."""
    traced = torch.compiler.is_compiling() or type(inputs[0]) is not Tensor or _get_current_dispatch_mode() is not None
    return chunk_forward(*inputs)[:3] if traced else _Eager.apply(*inputs)
