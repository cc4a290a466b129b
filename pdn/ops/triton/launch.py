"""The launches of a forward and a backward pass.

As two ``torch.library`` operators where something traces them, ``pdn::chunk_forward`` and
``pdn::chunk_backward``, which take contiguous tensors and are opaque to torch.compile.
``pdn.ops.triton`` turns the arguments of ``pdn.ops`` into theirs. An absent optional result is an
empty tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pdn.ops import exchange
from pdn.ops.checks import check_first_derivative
from pdn.ops.triton import borders, serial
from pdn.ops.triton.borders import scan
from pdn.ops.triton.common import CHUNK, NORM_Q, NUM_ROWS
from pdn.ops.triton.compiled import cdiv, check_device, run
from pdn.ops.triton.contract import Gradients, Inputs, Options, Results, Saved, schema
from pdn.ops.triton.curvature import (
    adjoint_summary_kernel,
    finish_kernel,
    rescale_kernel,
    summary_kernel,
)
from pdn.ops.triton.documents import document_tables
from pdn.ops.triton.gradients import gradient_kernel
from pdn.ops.triton.persistent import persistent_gradients, persistent_vector_gradients
from pdn.ops.triton.prepare import prepare_kernel
from pdn.ops.triton.scan import forward_kernel, reverse_kernel
from pdn.ops.triton.serial import keys_of, operands
from pdn.ops.triton.sizes import (
    FROM_TENSOR,
    RESCALED_QUERY,
    VECTOR,
    Problem,
    absent,
    empty_gradients,
    empty_results,
    problem,
)
from pdn.ops.triton.steep import steep_gradient_kernel, steep_prepare_kernel
from pdn.ops.triton.sums import NUM_PARTS, sum_parameters, sum_rows
from pdn.ops.triton.vector import NUM_RATES, WIDTH, fold_kernel, vector_gradient_kernel


def forward_pass(inputs: Inputs, options: Options) -> tuple[Results, Saved]:
    """Return what a call computes, and what its backward pass reads."""
    i = inputs
    check_device(*i)
    exchange.phase("scan")
    p = problem(i, options.solve)
    results, saved = empty_results(p, i, options)
    if i.cu_seqlens is not None:
        tables = document_tables(i.cu_seqlens, p.NT, p.segment, p.wholes)
        saved = saved._replace(**dict(zip(("chunks", "offsets", "segments"), tables)))
        if i.rows is not None:
            borders.border_tables(p, i.rows, saved)
    if i.P_log_decay is not None:
        precondition(p, i, options, saved, results.A)
    if not serial.prepare_and_scan(p, i, options, saved, results):
        prepare(p, i, options, saved)
        run_forward(p, i, options, saved, results)
    exchange.phase("other")
    return results, saved


def prepare(p: Problem, i: Inputs, options: Options, saved: Saved) -> None:
    """Solve every chunk's triangular system, and fold a vector decay with the norms."""
    keys = keys_of(p, i, saved)
    gates = i.log_decay, i.A_log, i.dt_bias
    raw = i.A_log is not None
    group = dict(GROUP=p.HV // p.H, WRITE=p.write)
    norms = dict(SCALE=options.scale, L2NORM=options.qk_l2norm, RAW=raw)
    solve = dict(
        DELTA=options.online, HALF=p.dtype.itemsize == 2, PRECISION=p.precision, **p.common
    )
    results = saved.table, saved.T, saved.P, p.T
    if p.decay != VECTOR:
        run(prepare_kernel, (p.NT, p.HV),
            *keys, *gates, i.beta, saved.chunks, saved.steep, *results,
            DECAY=p.decay, RANGE=options.beta_range, **group, **norms, **solve, **p.prepare_config,
        )  # fmt: skip
        return
    folded = saved.query, saved.key if options.online else saved.query, saved.write
    run(fold_kernel, (p.NT, p.HV, 2),
        *keys, *gates, saved.chunks, *folded, saved.growth, saved.gates, saved.ends, saved.steep,
        saved.table, p.T,
        DELTA=options.online, FACTORS=saved.growth.numel() > 0, **group, **norms, **p.common,
        **p.fold_config,
    )  # fmt: skip
    run(prepare_kernel, (p.NT, p.HV),
        *folded[:2], None, folded[2], None, None, None, i.beta, saved.chunks, saved.steep, *results,
        GROUP=1, WRITE=FROM_TENSOR, SCALE=1.0, L2NORM=False, RAW=False, RANGE=options.beta_range,
        DECAY=VECTOR, **solve, **p.prepare_config,
    )  # fmt: skip
    run(steep_prepare_kernel, (p.NT, p.HV),
        *keys, *gates, saved.chunks, *folded, saved.decay_sums, saved.ends, saved.steep, *results,
        RAW=raw, **group, **solve | p.steep_config,
    )  # fmt: skip


def run_forward(p: Problem, i: Inputs, options: Options, saved: Saved, results: Results) -> None:
    """Scan over chunks.

    Sequences long enough to be cut are scanned three times, all segments at once: from the
    identity, which gives their transitions, from zero, and, once these are combined, from the
    segments' true states. So are pieces of longer sequences, whose true states come from other
    ranks: each is a segment at least.
    """
    *keys, layout = operands(p, i, saved)
    split = options.pieces > 1
    constants = serial_constants(p, options, layout)

    def launch(v, V, initial, starts, o, last, segments, **flags):
        config = p.serial_config(V, 3 if not flags["OUTPUT"] else None if p.decay == VECTOR else 2)
        run(forward_kernel, (cdiv(V, config["BV"]), segments, p.HV),
            *keys, v, saved.table, saved.ends, saved.T, saved.P, initial, starts,
            saved.chunks, saved.offsets, saved.segments, saved.border, o, saved.x, saved.states,
            last, p.T, p.wholes,
            V=V, BORDER=split, HAS_INITIAL=initial is not None, CONTINUES=starts is not None,
            HAS_VALUES=v is not None, SEGMENT=p.segment, **flags, **constants, **config,
        )  # fmt: skip

    starts = None
    if p.segment or split:
        exchange.phase("local summary")
        parts = saved.table.new_empty(p.wholes + (p.B if split else 0), p.HV, p.K, p.V)
        state_only = dict(OUTPUT=False, SAVE=False, FINAL=True)
        segments = p.wholes + (p.N if split else 0)
        if saved.transitions.numel():
            launch(None, p.K, None, None, None, saved.transitions, segments, **state_only)
        launch(i.v, p.V, None, None, None, parts, segments, **state_only)
        if split:
            starts = borders.states_before(p, i, options, saved, parts)
        else:
            starts = torch.empty_like(parts)
            borders.combine(p, saved, parts, i.S, reverse=False, starts=starts)
        exchange.phase("scan")
    wanted = dict(OUTPUT=True, SAVE=options.save, FINAL=options.final)
    launch(i.v, p.V, i.S, starts, results.o, results.S, p.wholes + p.N, **wanted)


def serial_constants(p: Problem, options: Options, layout: dict) -> dict:
    """Return the compile-time arguments that both serial kernels take."""
    switches = dict(DECAY=p.decay, DELTA=options.online, PRECISION=p.precision)
    return switches | layout | p.common


def precondition(p: Problem, i: Inputs, options: Options, saved: Saved, last: Tensor) -> None:
    """Compute the curvature before every chunk, and after the last one, and ``saved.rescaled``.

    They go into ``saved.A`` and ``last``.
    """
    Z = torch.empty_like(saved.A)
    group = dict(GROUP=p.HV // p.H)
    exchange.phase("local summary")
    run(summary_kernel, (p.NT, p.HV),
        i.k, i.P_log_decay, i.P_A_log, i.P_dt_bias, i.P_beta, saved.chunks, Z,
        saved.curvature_gates, p.T,
        L2NORM=options.qk_l2norm, RAW=i.P_A_log is not None, RANGE=options.P_beta_range,
        **group, **p.common, **p.summary_config,
    )  # fmt: skip
    initial = i.A
    if options.pieces > 1:
        initial = borders.curvature_before(p, i, options, saved, Z, last)
    exchange.phase("scan")
    scan(p, Z, initial, saved, saved.A, last, reverse=False)
    on_query = p.write == RESCALED_QUERY
    run(rescale_kernel, (p.NT, p.HV),
        i.q if on_query else i.k, i.k, i.mu, saved.A, saved.curvature_gates, saved.chunks,
        saved.rescaled, saved.curvature, p.T,
        ON_QUERY=on_query, SAVE=options.save, INVERSE=options.inverse,
        LOG_BOUND=math.log(options.bound), EPS=options.eps, **group, **p.common,
        **p.curvature_config,
    )  # fmt: skip


def backward_pass(
    o: Tensor, do: Tensor, last: tuple, inputs: Inputs, saved: Saved, options: Options
) -> Gradients:
    """Differentiate ``forward_pass``.

    Args:
        o: its result.
        do: the gradient of that.
        last: those of the last S and A, None for zero.
        inputs, saved, options: as there.
    """
    i, (dS, dA) = inputs, last
    exchange.phase("scan")
    p = problem(i, options.solve)
    gradients = empty_gradients(p, i, options)
    parts = saved.table.new_empty(p.NT, p.HV, NUM_PARTS)
    adjoints = run_reverse(p, i, options, saved, do, dS, gradients)
    chunk_gradients(p, i, options, saved, o, do, adjoints, gradients, parts)
    if i.P_log_decay is not None:
        precondition_backward(p, i, options, saved, dA, gradients, parts)
    g = gradients
    sums: list[Tensor | None] = [g.A_log, g.dt_bias, g.P_A_log, g.P_dt_bias, g.mu]
    if p.decay == VECTOR or i.A_log is None:
        sums[:2] = None, None  # summed already, or not there
    sum_parameters(parts, *(x if x is not None and x.numel() else None for x in sums))
    exchange.phase("other")
    return gradients


def chunk_gradients(
    p: Problem,
    i: Inputs,
    options: Options,
    saved: Saved,
    o: Tensor,
    do: Tensor,
    adjoints: Tensor,
    g: Gradients,
    parts: Tensor,
) -> None:
    """Differentiate within chunks, all at once.

    Args:
        p, i, options, saved, o, do: of the backward pass.
        adjoints: [NT, HV, V, K] of the states before every chunk.
        g: what to write to; that of v is there already.
        parts: [NT, HV, PARTS] of the parameters' gradients, see ``sum_parameters``.
    """
    keys = keys_of(p, i, saved)
    raw = i.A_log is not None
    gates = i.log_decay, i.A_log, i.dt_bias
    values = i.v, o, saved.x, do, g.v, saved.table
    states = saved.states, adjoints, saved.chunks
    constants = dict(SCALE=options.scale, L2NORM=options.qk_l2norm, WRITE=p.write, RAW=raw)
    constants |= dict(V=p.V, BV=p.gradient_values, DELTA=options.online, PRECISION=p.precision)
    constants |= p.common
    if persistent_gradients(p, i, options, saved, o, do, adjoints, g, parts):
        return
    if p.decay != VECTOR:
        run(gradient_kernel, (p.NT, p.HV),
            *keys, *gates, *values, *states,
            g.q, g.k, g.write_k, g.log_decay, g.beta, parts, p.T,
            GROUP=p.HV // p.H, DECAY=p.decay, RANGE=options.beta_range,
            **constants | p.gradient_config,
        )  # fmt: skip
        return
    query, key, write, _ = operands(p, i, saved)
    blocks = cdiv(p.K, WIDTH.value)
    sums = [saved.table.new_empty((p.NT, p.HV, n) if raw else 0) for n in (NUM_RATES + blocks, p.K)]
    if saved.growth.numel():
        run(vector_gradient_kernel, (p.NT, p.HV),
            query, key, write, saved.growth, saved.gates, i.A_log, *values, saved.ends, *states,
            g.q, g.k, g.write_k, g.log_decay, g.beta, *sums, p.T,
            RANGE=options.beta_range, **constants | p.vector_config,
        )  # fmt: skip
    else:
        persistent_vector_gradients(p, i, options, saved, o, do, adjoints, g, sums)
    run(steep_gradient_kernel, (blocks, p.NT, p.HV),
        *keys, *gates, *values, saved.decay_sums, saved.ends, saved.steep, *states,
        g.q, g.k, g.write_k, g.log_decay, *sums, p.T,
        GROUP=p.HV // p.H, **constants | p.steep_config,
    )  # fmt: skip
    if raw:
        torch.sum(sums[0], (0, 2), out=g.A_log)
        sum_rows(sums[1], g.dt_bias)


def precondition_backward(
    p: Problem,
    i: Inputs,
    options: Options,
    saved: Saved,
    dA: Tensor | None,
    g: Gradients,
    parts: Tensor,
) -> None:
    """Differentiate by the preconditioner's arguments, and add what is left to dk and dq.

    Args:
        p, i, options, saved: of the backward pass.
        dA: the gradient of the last curvature.
        g: what to write to; those of q, k and the write key are there already.
        parts: [NT, HV, PARTS] of the parameters' gradients, see ``sum_parameters``.
    """
    on_query = p.write == RESCALED_QUERY
    Z, carry = torch.empty_like(saved.A), torch.empty_like(saved.A)
    constants = dict(
        GROUP=p.HV // p.H,
        ON_QUERY=on_query,
        INVERSE=options.inverse,
        LOG_BOUND=math.log(options.bound),
        EPS=options.eps,
        **p.common,
    )
    constants |= p.curvature_config
    run(adjoint_summary_kernel, (p.NT, p.HV),
        i.q, i.k, g.q if on_query else g.write_k, i.mu, saved.curvature, saved.curvature_gates,
        saved.chunks, Z, parts, p.T, **constants,
    )  # fmt: skip
    if options.pieces > 1:
        dA = borders.carry_after(p, i, options, saved, Z, carry, g.A)
    scan(p, Z, dA, saved, carry, g.A, reverse=True)
    run(finish_kernel, (p.NT, p.HV),
        i.q, i.k, g.q, g.k, g.write_k, i.P_log_decay, i.P_A_log, i.P_dt_bias, i.mu,
        saved.curvature, carry, saved.table[:, :, NORM_Q.value], saved.curvature_gates,
        saved.chunks, g.P_log_decay, g.P_beta, parts, p.T, NORM_STRIDE=NUM_ROWS * CHUNK,
        SCALE=options.scale, L2NORM=options.qk_l2norm, RAW=i.P_A_log is not None,
        RANGE=options.P_beta_range, **constants,
        maxnreg=168,  # for as many it is arranged better than for what it takes, left alone
    )  # fmt: skip


def run_reverse(
    p: Problem, i: Inputs, options: Options, saved: Saved, do: Tensor, dS, g: Gradients
) -> Tensor:
    """Scan the adjoint over chunks; segments, if any, twice: from zero, then from the true ones.

    Writes the gradients of v and of the initial state.

    Returns:
        The adjoints of the states before every chunk, [NT, HV, V, K].
    """
    *keys, layout = operands(p, i, saved)
    constants = serial_constants(p, options, layout)
    config = p.serial_config(p.V, 3 if layout["KEY_WRITES"] else 2)
    split = options.pieces > 1
    adjoints = torch.empty_like(saved.states)
    if serial.scan_reverse(p, i, options, saved, do, dS, g.v, adjoints):
        return adjoints

    def launch(starts, first, **flags):
        run(reverse_kernel, (cdiv(p.V, config["BV"]), p.wholes + p.N, p.HV),
            *keys, do, saved.table, saved.ends, saved.T, saved.P, dS, starts,
            saved.chunks, saved.offsets, saved.segments, saved.border, g.v, adjoints, first, p.T,
            p.wholes,
            V=p.V, BORDER=split, HAS_FINAL=dS is not None, CONTINUES=starts is not None,
            SEGMENT=p.segment, **flags, **constants, **config,
        )  # fmt: skip

    starts = None
    if p.segment or split:
        exchange.phase("local summary")
        parts = saved.table.new_empty(p.wholes + (p.B if split else 0), p.HV, p.K, p.V)
        launch(None, parts, INITIAL=True, STORE=False)
        if split:
            starts = borders.adjoints_after(p, i, options, saved, parts)
        else:
            starts = torch.empty_like(parts)
            borders.combine(p, saved, parts, reverse=True, starts=starts)
        exchange.phase("scan")
    launch(starts, g.S, INITIAL=i.S is not None, STORE=True)
    return adjoints


# ------------------------------------------------------------ as operators


NUM_INPUTS, NUM_RESULTS = len(Inputs._fields), len(Results._fields)


def _apart(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return results as an operator may: none of them may be another one too."""
    return tuple([x if x.numel() else torch.empty_like(x) for x in results])


@torch.library.custom_op(
    "pdn::chunk_forward",
    mutates_args=(),
    schema=schema(Inputs, Options, results=NUM_RESULTS + len(Saved._fields)),
)
def chunk_forward(*flat):
    results, saved = forward_pass(*_unflatten(flat))
    return _apart((*results, *saved))


@chunk_forward.register_fake
def _(*flat):
    inputs, options = _unflatten(flat)
    results, saved = empty_results(problem(inputs, options.solve), inputs, options)
    return *results, *saved


@torch.library.custom_op(
    "pdn::chunk_backward",
    mutates_args=(),
    schema=schema(
        *("Tensor o", "Tensor do", "Tensor? dS", "Tensor? dA", "Tensor[] saved"),
        *(Inputs, Options),
        results=len(Gradients._fields),
    ),
)
def chunk_backward(o, do, dS, dA, saved, *flat):
    inputs, options = _unflatten(flat)
    return _apart(backward_pass(o, do, (dS, dA), inputs, Saved(*saved), options))


@chunk_backward.register_fake
def _(o, do, dS, dA, saved, *flat):
    inputs, options = _unflatten(flat)
    return tuple(empty_gradients(problem(inputs, options.solve), inputs, options))


def _unflatten(flat) -> tuple[Inputs, Options]:
    return Inputs(*flat[:NUM_INPUTS]), Options(*flat[NUM_INPUTS:])


def _save(ctx, inputs: Inputs, options: Options, o: Tensor, saved: tuple[Tensor, ...]) -> None:
    ctx.options = options
    ctx.save_for_backward(*inputs, *saved, o)
    ctx.set_materialize_grads(False)


def _save_operator(ctx, inputs, output):
    saved = output[NUM_RESULTS:]
    _save(ctx, *_unflatten(inputs), output[0], saved)
    ctx.mark_non_differentiable(*saved)


def _gradients(ctx, do, dS, dA, backward) -> tuple[Tensor | None, ...]:
    """Return gradients in the order, dtypes and numbers of heads of the flat inputs."""
    kept = ctx.saved_tensors
    inputs, saved, o = Inputs(*kept[:NUM_INPUTS]), Saved(*kept[NUM_INPUTS:-1]), kept[-1]
    if do is None:
        do = torch.zeros_like(inputs.v)
    last = [None if x is None or x.numel() == 0 else x.contiguous() for x in (dS, dA)]
    gradients = list(backward(o, do.contiguous(), last, inputs, saved, ctx.options))
    group = inputs.v.shape[2] // inputs.q.shape[2]
    if group > 1:
        gradients[:2] = (x.unflatten(2, (-1, group)).sum(3) for x in gradients[:2])
    gradients = [
        None if x is None else gradient.to(x.dtype) for gradient, x in zip(gradients, inputs)
    ]
    return *gradients, None, None, *[None] * len(ctx.options)


def _through_operator(o, do, last, inputs, saved, options) -> tuple[Tensor, ...]:
    return chunk_backward(o, do, *last, list(saved), *inputs, *options)


def _operator_gradients(ctx, do, dS, dA, *_):
    return _gradients(ctx, do, dS, dA, _through_operator)


chunk_forward.register_autograd(_operator_gradients, setup_context=_save_operator)


class _Eager(torch.autograd.Function):
    """Runs the passes without the operators.

    The dispatch of those takes the host longer than all launches.
    """

    @staticmethod
    def forward(ctx, *flat):
        inputs, options = _unflatten(flat)
        results, saved = forward_pass(inputs, options)
        _save(ctx, inputs, options, results.o, saved)
        o, *states = results
        return o, *(None if x is absent(o, x.dtype) else x for x in states)

    @staticmethod
    def backward(ctx, *grad_outputs):
        check_first_derivative("the Triton kernels", "use backend='chunkwise'")
        do, dS, dA = grad_outputs
        return _gradients(ctx, do, dS, dA, backward_pass)


def chunk(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return o and the last S and A of ``forward_pass``, if it has them.

    As an operator where something traces, else directly.
    """
    traced = (
        torch.compiler.is_compiling()
        or type(inputs.q) is not Tensor
        or _get_current_dispatch_mode() is not None
    )
    if traced:
        return chunk_forward(*inputs, *options)[:NUM_RESULTS]
    return _Eager.apply(*inputs, *options)
