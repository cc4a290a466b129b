"""One token of any of the recurrences in one launch, for decoding: norms, gates' activations,
preconditioner and state.

A program holds a [K, BV] tile of one head's state. Everything is float32 (float64 in float64),
whatever the inputs are. No gradient. Plain launches, which ``torch.compile`` and CUDA graphs take
as they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdn.ops.recurrences import Solve
from pdn.ops.triton.common import await_inputs
from pdn.ops.triton.compiled import check_device, run
from pdn.ops.triton.gates import softplus
from pdn.ops.types import (
    DiagonalPreconditioner,
    RecurrentState,
    SigmoidGain,
    SoftplusDecay,
    accumulation_dtype,
)

# how a gate arrives
ABSENT = tl.constexpr(0)  # a gain of one, a log-decay of zero
ACTIVATED = tl.constexpr(1)
RAW = tl.constexpr(2)  # the projection, with the parameters of its activation
# what rescales: nothing, a squashed or an inverse diagonal
SQUASH = tl.constexpr(1)
INVERSE = tl.constexpr(2)


@triton.jit
def gain(x, i, RANGE: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr):
    """A scalar gain at offset i."""
    if KIND == ABSENT:
        return tl.full([], 1.0, ACC)
    else:
        value = tl.load(x + i).to(ACC)
        return RANGE / (1.0 + tl.exp(-value)) if KIND == RAW else value


@triton.jit
def decay_factor(x, A_log, dt_bias, i, j, h, mask, KIND: tl.constexpr, ACC: tl.constexpr):
    """exp of the log-decay at offsets i; its bias is at offsets j, its rate belongs to head h."""
    value = tl.load(x + i, mask=mask, other=0.0).to(ACC)
    if KIND == RAW:
        rate = tl.exp(tl.load(A_log + h).to(ACC))
        value = -rate * softplus(value + tl.load(dt_bias + j, mask=mask, other=0.0).to(ACC))
    return tl.exp(value)


@triton.jit
def step_kernel(
    q, k, v, write_k, beta, decay, A_log, dt_bias, P_beta, P_decay, P_A_log, P_dt_bias, mu, S_in,
    A_in, clock,
    o, S_out, A_out,
    H, HV, HALF,
    SCALE: tl.constexpr, RANGE: tl.constexpr, P_RANGE: tl.constexpr, LOG_BOUND: tl.constexpr,
    EPS: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WRITE_GROUP: tl.constexpr,
    P_GROUP: tl.constexpr,
    BETA: tl.constexpr, DECAY: tl.constexpr, DIAGONAL: tl.constexpr, P_BETA: tl.constexpr,
    P_DECAY: tl.constexpr,
    PRECONDITIONER: tl.constexpr, HAS_WRITE: tl.constexpr, HAS_INITIAL: tl.constexpr,
    L2NORM: tl.constexpr, DELTA: tl.constexpr, CLOCKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of V, HV, N).

    CLOCKED: A_in and A_out are halves, HALF numbers each, of one buffer, which change places with
    every count of ``clock``; and states are read while the launch before may still run.
    """
    if not CLOCKED:
        await_inputs()
    h, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = n * HV + h
    group = HV // H
    hp = h // P_GROUP
    rp = n * (HV // P_GROUP) + hp
    i, j = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    m, mv = i < K, j < V
    tile = i.to(tl.int64)[:, None] * V + j.to(tl.int64)[None, :]
    mask = None  # which would take registers
    other = None
    if K != BK or V % BV != 0:
        mask = m[:, None] & mv[None, :]
        other = 0.0
    b_S = tl.zeros([BK, BV], ACC)
    b_A = tl.zeros([BK], ACC)
    if HAS_INITIAL:  # asked for before anything waits
        b_S = tl.load(S_in + row * (K * V) + tile, mask=mask, other=other).to(ACC)
        if PRECONDITIONER != ABSENT:
            if CLOCKED:
                second = tl.load(clock) % 2
                A_out = A_in + (1 - second) * HALF
                A_in += second * HALF
            b_A = tl.load(A_in + rp * K + i, mask=m, other=0.0).to(ACC)
    if CLOCKED:
        await_inputs()
    b_v = tl.load(v + row * V + j, mask=mv, other=0.0).to(ACC)
    b_beta = gain(beta, row, RANGE, BETA, ACC)
    b_decay = tl.full([BK], 1.0, ACC)
    if HAS_INITIAL and DECAY != ABSENT:
        if DIAGONAL:
            b_decay = decay_factor(decay, A_log, dt_bias, row * K + i, h * K + i, h, m, DECAY, ACC)
        else:
            b_decay *= decay_factor(decay, A_log, dt_bias, row, h, h, True, DECAY, ACC)
    at = (n * H + h // group) * K + i
    b_q, b_k = (
        tl.load(q + at, mask=m, other=0.0).to(ACC),
        tl.load(k + at, mask=m, other=0.0).to(ACC),
    )
    if L2NORM:
        b_q = b_q / tl.sqrt(tl.sum(b_q * b_q) + 1e-6)
        b_k = b_k / tl.sqrt(tl.sum(b_k * b_k) + 1e-6)
    b_q = b_q * SCALE
    b_write = b_k
    if HAS_WRITE:
        b_write = tl.load(
            write_k + (n * (HV // WRITE_GROUP) + h // WRITE_GROUP) * K + i, mask=m, other=0.0
        ).to(ACC)
    if PRECONDITIONER != ABSENT:
        if HAS_INITIAL:
            b_A *= decay_factor(P_decay, P_A_log, P_dt_bias, rp, hp, hp, True, P_DECAY, ACC)
        b_A += gain(P_beta, rp, P_RANGE, P_BETA, ACC) * b_k * b_k
        if PRECONDITIONER == SQUASH:
            r = tl.log(b_A + EPS) - tl.load(mu + hp).to(ACC)
            b_B = tl.exp(-LOG_BOUND * r / (1.0 + tl.abs(r)))
        else:
            b_B = 1.0 / (b_A + EPS)
        if DELTA:
            b_write = b_B * b_k
        else:
            b_q = b_B * b_q
        if (tl.program_id(0) == 0) & (h % P_GROUP == 0):
            tl.store(A_out + rp * K + i, b_A, mask=m)
    # Both sums are over the state as it came, so that neither waits for the other: the query is to
    # read the new one, which differs by an outer product.
    b_o = tl.sum(b_S * (b_decay * b_q)[:, None], 0)
    if DELTA:
        b_v -= tl.sum(b_S * (b_decay * b_k)[:, None], 0)
    b_v *= b_beta
    b_o += tl.sum(b_write * b_q) * b_v
    b_S = b_S * b_decay[:, None] + b_write[:, None] * b_v[None, :]
    tl.store(o + row * V + j, b_o.to(o.dtype.element_ty), mask=mv)
    tl.debug_barrier()  # S_out may be S_in: a tile smaller than the program is held more than once
    tl.store(S_out + row * (K * V) + tile, b_S, mask=mask)


def delta_rule(
    q,
    k,
    v,
    *,
    beta,
    log_decay,
    write_k,
    scale,
    qk_l2norm,
    state,
    return_state=True,
    cu_seqlens=None,
    in_place=False,
):
    """``pdn.ops.delta_rule`` of one token (T = 1).

    in_place: write the new state into the tensors of ``state``, which must be contiguous and of the
        accumulation dtype, and return it; a CUDA graph of the step then advances the same buffers
        at every replay.

    Raises:
        ValueError: more than one token, documents, a tensor that asks for a gradient, or a state
            that cannot be written
            in place.
    """
    preconditioner = write_k if isinstance(write_k, DiagonalPreconditioner) else None
    write_k = None if preconditioner else write_k
    _check(q, k, v, cu_seqlens)
    o, new = _step(
        "online", q, k, v, beta, log_decay, write_k, preconditioner, scale, qk_l2norm, state,
        in_place,
    )  # fmt: skip
    return o, new if return_state else None


def linear_attention(
    q,
    k,
    v,
    *,
    beta,
    log_decay,
    preconditioner,
    scale,
    qk_l2norm,
    state,
    return_state=True,
    cu_seqlens=None,
    in_place=False,
):
    """``pdn.ops.linear_attention`` of one token; the rest as ``delta_rule``."""
    _check(q, k, v, cu_seqlens)
    o, new = _step(
        "offline", q, k, v, beta, log_decay, None, preconditioner, scale, qk_l2norm, state, in_place
    )
    return o, new if return_state else None


def advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    solve: Solve,
    beta: Tensor | SigmoidGain | None,
    log_decay: Tensor | SoftplusDecay | None,
    write: Tensor | DiagonalPreconditioner | None,
    qk_l2norm: bool,
    S: Tensor,
    A: Tensor | None,
    clock: Tensor,
) -> Tensor:
    """See ``pdn.ops.decoding.advance``; the errors are those of ``delta_rule``."""
    preconditioner = write if isinstance(write, DiagonalPreconditioner) else None
    write_k = None if preconditioner else write
    _check(q, k, v, None)
    o, _ = _step(
        solve, q, k, v, beta, log_decay, write_k, preconditioner, None, qk_l2norm,
        RecurrentState(S, A), True, clock,
    )  # fmt: skip
    return o.flatten(1)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    if q.shape[1] != 1:
        raise ValueError(f"q {tuple(q.shape)}: the step takes one token a sequence, T = 1")
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: the step takes one token a sequence, without documents")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("the step has no gradient: call it under torch.no_grad()")


def _step(
    solve, q, k, v, beta, log_decay, write_k, preconditioner, scale, qk_l2norm, state, in_place,
    clock=None,
):  # fmt: skip
    N, _, H, K = q.shape
    HV, V = v.shape[2:]
    main_beta, main_decay = _gain(beta), _decay(log_decay)
    options: dict = dict(
        RANGE=main_beta.range,
        BETA=main_beta.kind,
        DECAY=main_decay.kind,
        DIAGONAL=main_decay.diagonal,
    )
    heads = None
    P_beta, P_decay, mu = _gain(None), _decay(None), None
    if preconditioner is not None:
        P_beta, P_decay, mu = (
            _gain(preconditioner.beta),
            _decay(preconditioner.log_decay),
            preconditioner.mu,
        )
        assert P_decay.x is not None  # of every preconditioner
        heads = P_decay.x.shape[2]
        options |= dict(
            P_GROUP=HV // heads, P_RANGE=P_beta.range, P_BETA=P_beta.kind, P_DECAY=P_decay.kind
        )
        options |= dict(LOG_BOUND=math.log(preconditioner.bound), EPS=preconditioner.eps)
        options["PRECONDITIONER"] = SQUASH if preconditioner.form == "squash" else INVERSE
    else:
        options |= dict(
            P_GROUP=1,
            P_RANGE=1.0,
            P_BETA=ABSENT,
            P_DECAY=ABSENT,
            LOG_BOUND=0.0,
            EPS=0.0,
            PRECONDITIONER=ABSENT,
        )
    acc = accumulation_dtype(v)
    shape_A = None if heads is None else (N, heads, K)
    S, A, new = _states(state, in_place, v, acc, (N, HV, K, V), shape_A, clock is not None)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    block, warps = _tile(N * HV, V)
    check_device(
        q, k, v, write_k, main_beta.x, main_decay.x, main_decay.A_log, main_decay.dt_bias,
        P_beta.x, P_decay.x, P_decay.A_log, P_decay.dt_bias, mu, S, A, clock,
    )  # fmt: skip
    run(
        step_kernel, (-(-V // block), HV, N),
        q.contiguous(), k.contiguous(), v.contiguous(), _contiguous(write_k), main_beta.x,
        main_decay.x, main_decay.A_log,
        main_decay.dt_bias, P_beta.x, P_decay.x, P_decay.A_log, P_decay.dt_bias, _contiguous(mu), S,
        A, clock,
        o, new.S, new.A,
        H, HV, math.prod(shape_A or ()), **options, SCALE=K**-0.5 if scale is None else scale,
        K=K, V=V, BK=max(16, 1 << (K - 1).bit_length()), BV=block,
        WRITE_GROUP=1 if write_k is None else HV // write_k.shape[2], HAS_WRITE=write_k is not None,
        HAS_INITIAL=state is not None, L2NORM=qk_l2norm, DELTA=solve == "online",
        CLOCKED=clock is not None,
        ACC=tl.float64 if acc == torch.float64 else tl.float32, num_warps=warps,
    )  # fmt: skip
    if in_place and A is not None and new.A is not None:
        A.copy_(new.A)  # not by the kernel: each of its blocks of V reads the old one
        new = RecurrentState(new.S, A)
    return o, new


class Gate(NamedTuple):
    """Describes a gate as the kernel takes it."""

    kind: tl.constexpr
    x: Tensor | None = None
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    range: float = 1.0
    diagonal: bool = False


def _gain(beta: Tensor | SigmoidGain | None) -> Gate:
    if beta is None:
        return Gate(ABSENT)
    if isinstance(beta, SigmoidGain):
        return Gate(RAW, beta.x.contiguous(), range=beta.range)
    return Gate(ACTIVATED, beta.contiguous())


def _decay(log_decay: Tensor | SoftplusDecay | None) -> Gate:
    if log_decay is None:
        return Gate(ABSENT)
    if isinstance(log_decay, SoftplusDecay):
        parameters = log_decay.A_log.contiguous(), log_decay.dt_bias.contiguous()
        return Gate(RAW, log_decay.x.contiguous(), *parameters, diagonal=log_decay.x.ndim == 4)
    return Gate(ACTIVATED, log_decay.contiguous(), diagonal=log_decay.ndim == 4)


def _states(
    state, in_place, like, acc, shape_S, shape_A, clocked
) -> tuple[Tensor | None, Tensor | None, RecurrentState]:
    """What the kernel reads (S, A) and where it writes; A is None without a preconditioner, and
    where it is written is None if the kernel finds that by a clock.
    """
    if in_place:
        if state is None:
            raise ValueError("state is None: a step in place needs a state to write to")
        for x in (state.S, state.A if shape_A else None):
            if x is not None and (x.dtype != acc or not x.is_contiguous()):
                raise ValueError(
                    f"state: a step in place needs contiguous {acc} tensors, got {x.dtype}, "
                    f"strides {x.stride()}"
                )
    S = A = None
    if state is not None:
        S = state.S.to(acc).contiguous()
        if shape_A and state.A is None:
            raise ValueError(
                "state.A is missing: a preconditioned recurrence carries its curvature accumulator"
            )
        A = state.A.to(acc).contiguous() if shape_A else None
    new_S = S if in_place and S is not None else like.new_empty(shape_S, dtype=acc)
    apart = shape_A and not clocked
    return S, A, RecurrentState(new_S, like.new_empty(shape_A, dtype=acc) if apart else None)


def _tile(heads: int, V: int) -> tuple[int, int]:
    """Return the values of a program, and its warps.

    Few heads are spread over the device, many read long rows.
    """
    block = 8 if heads < 64 else 32
    return min(block, 1 << (V - 1).bit_length()), 2 if block == 8 else 4


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
