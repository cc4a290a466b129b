"""The launches of a forward and a backward pass, as two ``torch.library`` operators where something traces them.

``pdn::chunk_forward`` and ``pdn::chunk_backward`` take contiguous tensors and are opaque to torch.compile;
``pdn.ops.triton`` turns the arguments of ``pdn.ops`` into theirs. An absent optional result is an empty tensor.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pdn.ops.triton.common import CHUNK, NORM_Q, NUM_ROWS
from pdn.ops.triton.compiled import check_device, run
from pdn.ops.triton.curvature import (
    SCAN,
    adjoint_summary_kernel,
    finish_kernel,
    rescale_kernel,
    scan_kernel,
    summary_kernel,
)
from pdn.ops.triton.documents import document_tables
from pdn.ops.triton.gradients import gradient_kernel
from pdn.ops.triton.prepare import prepare_kernel
from pdn.ops.triton.scan import combine_kernel, forward_kernel, reverse_kernel
from pdn.ops.triton.sizes import (
    FROM_TENSOR,
    RESCALED_KEY,
    RESCALED_QUERY,
    VECTOR,
    Problem,
    Saved,
    absent,
    cdiv,
    empty_gradients,
    empty_results,
    padded,
    problem,
)
from pdn.ops.triton.steep import steep_gradient_kernel, steep_prepare_kernel
from pdn.ops.triton.sums import NUM_PARTS, sum_parameters, sum_rows
from pdn.ops.triton.vector import WIDTH, fold_kernel, vector_gradient_kernel


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None,
    write_k: Tensor | None, gP: Tensor | None, A_log_P: Tensor | None, dt_bias_P: Tensor | None, bP: Tensor | None,
    mu: Tensor | None, S: Tensor | None, A: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, l2norm: bool, delta: bool, on_query: bool, inverse: bool, bound: float, eps: float,
    range: float, range_P: float, save: bool, final: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """o [B, T, HV, V], the last S and A, and the fields of ``Saved``."""
    check_device(
        q,
        k,
        v,
        beta,
        log_decay,
        A_log,
        dt_bias,
        write_k,
        gP,
        A_log_P,
        dt_bias_P,
        bP,
        mu,
        S,
        A,
        cu_seqlens,
    )
    p = problem(q, v, log_decay, write_k, gP, cu_seqlens, on_query)
    o, S_last, A_last, *saved = empty_results(p, v, A_log is not None, delta, save, final)
    saved = Saved(*saved)
    if p.varlen:
        tables = document_tables(cu_seqlens, p.NT, p.segment, p.wholes)
        saved = saved._replace(**dict(zip(("chunks", "offsets", "segments"), tables)))
    if gP is not None:
        precondition(
            p,
            q,
            k,
            gP,
            A_log_P,
            dt_bias_P,
            bP,
            mu,
            A,
            saved,
            A_last,
            l2norm,
            inverse,
            bound,
            eps,
            range_P,
            save,
        )
    write_k = saved.rescaled if p.write == RESCALED_KEY else write_k
    keys = q, k, saved.rescaled, write_k
    gates = log_decay, A_log, dt_bias
    group = dict(GROUP=p.HV // p.H, WRITE=p.write)
    norms = dict(SCALE=scale, L2NORM=l2norm, RAW=A_log is not None)
    options = dict(DELTA=delta, HALF=p.dtype.itemsize == 2, PRECISION=p.precision, **p.common)
    results = saved.table, saved.T, saved.P, p.T
    if p.decay == VECTOR:
        folded = saved.query, saved.key if delta else saved.query, saved.write
        run(fold_kernel, (p.NT, p.HV, 2),
            *keys, *gates, saved.chunks, *folded, saved.growth, saved.gates, saved.ends, saved.steep, saved.table, p.T,
            DELTA=delta, **group, **norms, **p.common, **p.fold_config,
        )  # fmt: skip
        run(prepare_kernel, (p.NT, p.HV),
            *folded[:2], None, folded[2], None, None, None, beta, saved.chunks, saved.steep, *results,
            GROUP=1, WRITE=FROM_TENSOR, SCALE=1.0, L2NORM=False, RAW=False, RANGE=range, DECAY=VECTOR,
            **options, **p.prepare_config,
        )  # fmt: skip
        run(steep_prepare_kernel, (p.NT, p.HV),
            *keys, *gates, saved.chunks, *folded, saved.decay_sums, saved.ends, saved.steep, saved.table, saved.T, saved.P, p.T,
            RAW=A_log is not None, **group, **options | p.steep_config,
        )  # fmt: skip
    else:
        run(prepare_kernel, (p.NT, p.HV),
            *keys, *gates, beta, saved.chunks, saved.steep, *results, DECAY=p.decay, RANGE=range, **group, **norms, **options,
            **p.prepare_config,
        )  # fmt: skip
    query, key, write, layout = operands(p, q, k, write_k, saved)
    options = dict(DECAY=p.decay, DELTA=delta, PRECISION=p.precision, **layout, **p.common)
    run_forward(p, (query, key, write, v), saved, S, (o, S_last), options, save, final)
    return o, S_last, A_last, *saved


def run_forward(
    p: Problem, inputs, saved: Saved, S, outputs, options: dict, save: bool, final: bool
) -> None:
    """Scan over chunks. Sequences long enough to be cut are scanned three times, all segments at once: from the identity,
    which gives their transitions, from zero, and, once these are combined, from the segments' true states.
    """
    *keys, v = inputs
    o, S_last = outputs

    def launch(v, V, initial, starts, o, last, segments, **flags):
        config = p.serial_config(V, 3 if not flags["OUTPUT"] else None if p.decay == VECTOR else 2)
        run(forward_kernel, (cdiv(V, config["BV"]), segments, p.HV),
            *keys, v, saved.table, saved.ends, saved.T, saved.P, initial, starts,
            saved.chunks, saved.offsets, saved.segments, o, saved.x, saved.states, last, p.T, p.wholes,
            V=V, HAS_INITIAL=initial is not None, CONTINUES=starts is not None, HAS_VALUES=v is not None,
            SEGMENT=p.segment, **flags, **options, **config,
        )  # fmt: skip

    starts = None
    if p.segment:
        parts = saved.table.new_empty(p.wholes, p.HV, p.K, p.V)
        state_only = dict(OUTPUT=False, SAVE=False, FINAL=True)
        launch(None, p.K, None, None, None, saved.transitions, p.wholes, **state_only)
        launch(v, p.V, None, None, None, parts, p.wholes, **state_only)
        starts = combine(p, saved, parts, S, reverse=False)
    launch(v, p.V, S, starts, o, S_last, p.wholes + p.N, OUTPUT=True, SAVE=save, FINAL=final)


def combine(p: Problem, saved: Saved, parts: Tensor, initial, reverse: bool) -> Tensor:
    """The state after every segment but the last of its sequence, or the adjoint there [wholes, HV, K, V]."""
    starts = torch.empty_like(parts)
    block = min(32, padded(p.V))
    half = p.dtype.itemsize == 2
    run(combine_kernel, (cdiv(p.V, block), p.N, p.HV),
        saved.transitions, parts, initial, saved.offsets, saved.segments, starts, p.T, p.wholes,
        V=p.V, BV=block, HAS_INITIAL=initial is not None, REVERSE=reverse, SEGMENT=p.segment,
        HALF=half, num_warps=8, num_stages=2 if half else 1, **p.common,
    )  # fmt: skip
    return starts


def _apart(one_pass):
    """A pass as an operator computes it, no result of which may be another one too."""

    @functools.wraps(one_pass)
    def operator(*inputs):
        return tuple([x if x.numel() else torch.empty_like(x) for x in one_pass(*inputs)])

    return operator


chunk_forward = torch.library.custom_op("pdn::chunk_forward", _apart(forward_pass), mutates_args=())


@chunk_forward.register_fake
def _(
    q, k, v, beta, log_decay, A_log, dt_bias, write_k, gP, A_log_P, dt_bias_P, bP, mu, S, A, cu_seqlens,
    scale, l2norm, delta, on_query, inverse, bound, eps, range, range_P, save, final,
):  # fmt: skip
    p = problem(q, v, log_decay, write_k, gP, cu_seqlens, on_query)
    return empty_results(p, v, A_log is not None, delta, save, final)


def precondition(
    p: Problem,
    q,
    k,
    gP,
    A_log,
    dt_bias,
    bP,
    mu,
    A,
    saved: Saved,
    A_last: Tensor,
    l2norm,
    inverse,
    bound,
    eps,
    range_P,
    save,
) -> None:
    """The curvature before every chunk into ``saved.A``, after the last one into ``A_last``, and ``saved.rescaled``."""
    Z = torch.empty_like(saved.A)
    group = dict(GROUP=p.HV // p.H)
    run(summary_kernel, (p.NT, p.HV),
        k, gP, A_log, dt_bias, bP, saved.chunks, Z, saved.curvature_gates, p.T,
        L2NORM=l2norm, RAW=A_log is not None, RANGE=range_P, **group, **p.common, **p.summary_config,
    )  # fmt: skip
    scan(p, Z, A, saved, saved.A, A_last, reverse=False)
    on_query = p.write == RESCALED_QUERY
    run(rescale_kernel, (p.NT, p.HV),
        q if on_query else k, k, mu, saved.A, saved.curvature_gates, saved.chunks, saved.rescaled, saved.curvature, p.T,
        ON_QUERY=on_query, SAVE=save, INVERSE=inverse, LOG_BOUND=math.log(bound), EPS=eps, **group, **p.common,
        **p.curvature_config,
    )  # fmt: skip


def scan(p: Problem, Z, initial, saved: Saved, before, last, reverse: bool) -> None:
    options = p.common | dict(BK=16)
    run(scan_kernel, (p.N, p.HV, cdiv(p.K, 16)),
        Z, saved.curvature_gates, initial, saved.offsets, before, last, p.T,
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
    options = dict(DECAY=p.decay, DELTA=delta, PRECISION=p.precision, **layout, **p.common)
    run_reverse(p, (query, key, write, do), saved, dS, (dv, adjoints, dS0), options, S is not None)
    write_k = saved.rescaled if p.write == RESCALED_KEY else write_k
    keys = q, k, saved.rescaled, write_k
    values = v, o, saved.x, do, dv, saved.table
    states = saved.states, adjoints, saved.chunks
    options = dict(
        SCALE=scale,
        L2NORM=l2norm,
        WRITE=p.write,
        RAW=A_log is not None,
        V=p.V,
        BV=p.gradient_values,
    )
    options |= dict(DELTA=delta, PRECISION=p.precision, **p.common)
    parts = saved.table.new_empty(p.NT, p.HV, NUM_PARTS)
    if p.decay == VECTOR:
        blocks = cdiv(p.K, WIDTH.value)
        d_rate = saved.table.new_empty((p.NT, p.HV, 1 + blocks) if A_log is not None else 0)
        d_bias = saved.table.new_empty((p.NT, p.HV, p.K) if A_log is not None else 0)
        run(vector_gradient_kernel, (p.NT, p.HV),
            query, key, write, saved.growth, saved.gates, A_log, *values, saved.ends, *states,
            dq, dk, dwrite, dlog_decay, dbeta, d_rate, d_bias, p.T, RANGE=range, **options | p.vector_config,
        )  # fmt: skip
        run(steep_gradient_kernel, (blocks, p.NT, p.HV),
            *keys, saved.gates, A_log, *values, saved.decay_sums, saved.ends, saved.steep, *states,
            dq, dk, dwrite, dlog_decay, d_rate, d_bias, p.T, GROUP=p.HV // p.H, **options | p.steep_config,
        )  # fmt: skip
        if A_log is not None:
            torch.sum(d_rate, (0, 2), out=dA_log)
            sum_rows(d_bias, ddt_bias)
    else:
        run(gradient_kernel, (p.NT, p.HV),
            *keys, log_decay, A_log, dt_bias, *values, *states, dq, dk, dwrite, dlog_decay, dbeta, parts, p.T,
            GROUP=p.HV // p.H, DECAY=p.decay, RANGE=range, **options | p.gradient_config,
        )  # fmt: skip
    if gP is not None:
        precondition_backward(
            p,
            q,
            k,
            gP,
            A_log_P,
            dt_bias_P,
            mu,
            dA,
            saved,
            parts,
            results,
            scale,
            l2norm,
            inverse,
            bound,
            eps,
            range_P,
        )
    if p.decay == VECTOR or A_log is None:
        dA_log = ddt_bias = None  # summed above, or not there
    *_, dA_log_P, ddt_bias_P, _, dmu, _, _ = results
    gradients = dA_log, ddt_bias, dA_log_P, ddt_bias_P, dmu
    sum_parameters(parts, *(x if x is not None and x.numel() else None for x in gradients))
    return results


def precondition_backward(
    p: Problem,
    q,
    k,
    gP,
    A_log,
    dt_bias,
    mu,
    dA,
    saved: Saved,
    parts,
    results,
    scale,
    l2norm,
    inverse,
    bound,
    eps,
    range_P,
) -> None:
    """The gradients of the preconditioner's arguments, and what is left of dk and dq.

    parts: of the parameters' gradients, see ``sum_parameters``.
    """
    dq, dk, *_, dwrite, dgP, _, _, dbP, _, _, dA0 = results
    on_query = p.write == RESCALED_QUERY
    Z, carry = torch.empty_like(saved.A), torch.empty_like(saved.A)
    options = dict(
        GROUP=p.HV // p.H,
        ON_QUERY=on_query,
        INVERSE=inverse,
        LOG_BOUND=math.log(bound),
        EPS=eps,
        **p.common,
    )
    options |= p.curvature_config
    run(adjoint_summary_kernel, (p.NT, p.HV),
        q, k, dq if on_query else dwrite, mu, saved.curvature, saved.curvature_gates, saved.chunks, Z, parts, p.T,
        **options,
    )  # fmt: skip
    scan(p, Z, dA, saved, carry, dA0, reverse=True)
    run(finish_kernel, (p.NT, p.HV),
        q, k, dq, dk, dwrite, gP, A_log, dt_bias, mu, saved.curvature, carry, saved.table[:, :, NORM_Q.value],
        saved.curvature_gates, saved.chunks, dgP, dbP, parts, p.T, NORM_STRIDE=NUM_ROWS * CHUNK,
        SCALE=scale, L2NORM=l2norm, RAW=A_log is not None, RANGE=range_P, **options,
        maxnreg=168,  # for as many it is arranged better than for what it takes, left alone
    )  # fmt: skip


def run_reverse(
    p: Problem, inputs, saved: Saved, dS, outputs, options: dict, initial: bool
) -> None:
    """Scan the adjoint over chunks; segments, if any, twice: from zero, then from the true adjoints."""
    dv, adjoints, dS0 = outputs
    config = p.serial_config(p.V, 3 if options["KEY_WRITES"] else 2)

    def launch(starts, first, **flags):
        run(reverse_kernel, (cdiv(p.V, config["BV"]), p.wholes + p.N, p.HV),
            *inputs, saved.table, saved.ends, saved.T, saved.P, dS, starts,
            saved.chunks, saved.offsets, saved.segments, dv, adjoints, first, p.T, p.wholes,
            V=p.V, HAS_FINAL=dS is not None, CONTINUES=starts is not None, SEGMENT=p.segment,
            **flags, **options, **config,
        )  # fmt: skip

    starts = None
    if p.segment:
        parts = saved.table.new_empty(p.wholes, p.HV, p.K, p.V)
        launch(None, parts, INITIAL=True, STORE=False)
        starts = combine(p, saved, parts, None, reverse=True)
    launch(starts, dS0, INITIAL=initial, STORE=True)


chunk_backward = torch.library.custom_op(
    "pdn::chunk_backward", _apart(backward_pass), mutates_args=()
)


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
    kept = ctx.saved_tensors
    tensors, saved, o = kept[:16], list(kept[16:-1]), kept[-1]
    q, v = tensors[0], tensors[2]
    if do is None:
        do = torch.zeros_like(v)
    final = [None if x is None or x.numel() == 0 else x.contiguous() for x in (dS, dA)]
    gradients = list(backward(o, do.contiguous(), *final, *tensors, saved, *ctx.options))
    group = v.shape[2] // q.shape[2]
    if group > 1:
        gradients[:2] = (x.unflatten(2, (-1, group)).sum(3) for x in gradients[:2])
    gradients = [
        None if x is None else gradient.to(x.dtype) for gradient, x in zip(gradients, tensors)
    ]
    return *gradients, None, *[None] * 11


chunk_forward.register_autograd(_gradients, setup_context=_save_operator)


class _Eager(torch.autograd.Function):
    """The operators' passes without the operators, whose dispatch takes the host longer than all launches."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward_pass(*inputs)
        _save(ctx, inputs, output)
        o, *states = output[:3]
        return o, *(None if x is absent(o, x.dtype) else x for x in states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dS, dA):
        return _gradients(ctx, do, dS, dA, backward=backward_pass)


def chunk(*inputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """o and the last S and A of ``forward_pass``, if it has them: as an operator where something traces, else directly."""
    traced = (
        torch.compiler.is_compiling()
        or type(inputs[0]) is not Tensor
        or _get_current_dispatch_mode() is not None
    )
    return chunk_forward(*inputs)[:3] if traced else _Eager.apply(*inputs)
