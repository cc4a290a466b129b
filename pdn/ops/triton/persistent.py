"""Which gradients of chunks the persistent kernel computes, and its launch."""

from __future__ import annotations

from torch import Tensor

from pdn.ops.triton import compiled
from pdn.ops.triton.common import CHUNK
from pdn.ops.triton.compiled import Tiles, cdiv, run
from pdn.ops.triton.contract import Gradients, Inputs, Options, Saved
from pdn.ops.triton.sizes import RESCALED_KEY, Problem


def persistent_programs(p: Problem, i: Inputs, options: Options) -> int:
    """Return as how many programs ``persistent_gradient_kernel`` runs, 0 if it does not.

    Each has two chunks of a head at least, so that the smallest problem goes around its loop, too.
    """
    if not (p.whole_tiles and options.online) or any(x.data_ptr() % 16 for x in (i.q, i.k, i.v)):
        return 0
    return min(compiled.persistent_programs(compiled.current_device()), cdiv(p.NT * p.HV, 2))


def persistent_gradients(
    p: Problem,
    i: Inputs,
    options: Options,
    saved: Saved,
    o: Tensor,
    do: Tensor,
    adjoints: Tensor,
    g: Gradients,
    parts: Tensor,
) -> bool:
    """Do what ``chunk_gradients`` does, by a kernel of one program a multiprocessor.

    Returns whether that was done: not every problem has one.
    """
    programs = persistent_programs(p, i, options)
    if not programs:
        return False
    from pdn.ops.triton.hopper import SWIZZLED, WARPS, persistent_gradient_kernel

    def rows(x, tile=CHUNK):
        columns = x.shape[-1] if tile > CHUNK else x.shape[-2] * x.shape[-1]
        return Tiles(x.view(-1, columns), (tile, x.shape[-1]), SWIZZLED.value)

    rescaled = p.write == RESCALED_KEY
    run(persistent_gradient_kernel, (programs,),
        rows(i.q), rows(i.k), rows(saved.rescaled if rescaled else i.k),
        i.log_decay, i.A_log, i.dt_bias, rows(i.v), rows(o), rows(saved.x), rows(do), rows(g.v),
        saved.table, rows(saved.states, p.V), rows(adjoints, p.V),
        rows(g.q), rows(g.k), rows(g.write_k if rescaled else g.k), g.log_decay, g.beta, parts,
        p.NT * p.HV,
        HV=p.HV, GROUP=p.HV // p.H, SCALE=options.scale, L2NORM=options.qk_l2norm, DECAY=p.decay,
        RAW=i.A_log is not None, RANGE=options.beta_range, WRITE=p.write, num_warps=WARPS,
    )  # fmt: skip
    return True


def persistent_vector_gradients(
    p: Problem,
    i: Inputs,
    options: Options,
    saved: Saved,
    o: Tensor,
    do: Tensor,
    adjoints: Tensor,
    g: Gradients,
    sums: list[Tensor],
) -> None:
    """Do what ``vector_gradient_kernel`` does, by a kernel of one program a multiprocessor.

    For problems of which ``sizes.has_persistent_vector`` says that they have it.

    Args:
        p, i, options, saved, o, do, adjoints, g: of ``chunk_gradients``.
        sums: the chunks' parts of dA_log and ddt_bias, to write to.
    """
    from pdn.ops.triton.hopper import SWIZZLED, WARPS
    from pdn.ops.triton.hopper_vector import persistent_vector_gradient_kernel

    def folded(x, tile=CHUNK):
        return Tiles(x.view(-1, x.shape[-1]), (tile, x.shape[-1]), SWIZZLED.value)

    def rows(x):
        return Tiles(x.view(-1, p.HV * x.shape[-1]), (CHUNK, x.shape[-1]), SWIZZLED.value)

    def given(x):
        return rows(x if x.data_ptr() % 16 == 0 else x.clone())

    programs = compiled.persistent_programs(compiled.current_device())
    # each with two chunks of a head at least, as in persistent_programs
    run(persistent_vector_gradient_kernel, (min(programs, cdiv(p.NT * p.HV, 2)),),
        folded(saved.query), folded(saved.key), folded(saved.write),
        given(i.log_decay), i.A_log, i.dt_bias,
        given(i.v), rows(o), rows(saved.x), given(do), rows(g.v), saved.table, saved.ends,
        saved.steep, folded(saved.states, p.V), folded(adjoints, p.V),
        rows(g.q), rows(g.k), rows(g.write_k if p.write == RESCALED_KEY else g.k),
        rows(g.log_decay), g.beta, *sums, p.NT * p.HV,
        HV=p.HV, SCALE=options.scale, L2NORM=options.qk_l2norm, RAW=i.A_log is not None,
        RANGE=options.beta_range, WRITE=p.write, num_warps=WARPS,
    )  # fmt: skip
