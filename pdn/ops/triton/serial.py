"""What the serial kernels read, and which scans over chunks those of ``hopper_forward.py`` and
``hopper_scan.py`` do, with their launches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pdn.ops.triton import compiled
from pdn.ops.triton.common import CHUNK
from pdn.ops.triton.compiled import Tiles, cdiv, run
from pdn.ops.triton.contract import Inputs, Options, Results, Saved
from pdn.ops.triton.sizes import RESCALED_KEY, RESCALED_QUERY, VECTOR, Problem

SHORT = 8  # chunks of a sequence


def keys_of(p: Problem, i: Inputs, saved: Saved) -> tuple[Tensor | None, ...]:
    """Return query, key, B times either and write key, as the kernels of one chunk read them."""
    return i.q, i.k, saved.rescaled, saved.rescaled if p.write == RESCALED_KEY else i.write_k


def operands(p: Problem, i: Inputs, saved: Saved) -> tuple[Tensor, Tensor, Tensor, dict]:
    """Return query, key and write key as the serial kernels read them.

    The constants that say how come last.
    """
    group = p.HV // p.H
    if p.decay == VECTOR:
        return saved.query, saved.key, saved.write, dict(QG=1, KG=1, WG=1, KEY_WRITES=False)
    *_, write_k = keys_of(p, i, saved)
    query = saved.rescaled if p.write == RESCALED_QUERY else i.q
    write = i.k if write_k is None else write_k
    groups = dict(QG=group if query is i.q else 1, KG=group, WG=group if write is i.k else 1)
    return query, i.k, write, groups | dict(KEY_WRITES=write is i.k)


def scan_programs(
    p: Problem, i: Inputs, options: Options, *states: Tensor | None, values: Tensor
) -> int:
    """Return as how many programs the kernels here run at once, 0 if they do not scan this problem.

    Args:
        p, i, options: of the pass.
        states: those before or after the sequences, which these kernels do not take.
        values: what is scanned with the keys: v, or the gradient of o.
    """
    if not (p.whole_tiles and options.online and not p.segment and options.pieces == 1):
        return 0
    if any(x is not None and x.numel() for x in states):
        return 0
    if any(x.data_ptr() % 16 for x in (i.q, i.k, values)):
        return 0
    return compiled.persistent_programs(compiled.current_device())


def prepare_and_scan(
    p: Problem, i: Inputs, options: Options, saved: Saved, results: Results
) -> bool:
    """Do what ``prepare`` and ``run_forward`` do, by one kernel.

    A program of it takes longer over a chunk than one of ``forward_kernel``, and ``prepare_kernel``
    has chunks enough for all multiprocessors: it is for problems that fill four fifths of them, and
    for short sequences, whose launches take longer.

    Returns whether that was done: not every problem has one.
    """
    at_once = scan_programs(p, i, options, i.S, results.S, values=i.v)
    programs, chunks = p.B * p.HV, p.NT // p.B
    if not at_once or (chunks > SHORT and 5 * programs < 4 * at_once * cdiv(programs, at_once)):
        return False
    from pdn.ops.triton.hopper_forward import fused_forward_kernel

    *keys, layout = operands(p, i, saved)
    x, states = (saved.x, saved.states) if options.save else (results.o, saved.T)  # or anything
    run(fused_forward_kernel, (p.B, p.HV),
        *(tokens(x, p.K) for x in keys), tokens(i.v, p.V // 2),
        i.log_decay, i.A_log, i.dt_bias, i.beta, saved.table, rows(saved.T), rows(saved.P),
        tokens(results.o, p.V // 2), tokens(x, p.V // 2), rows(states), chunks,
        KEY_WRITES=layout["KEY_WRITES"], SCALE=options.scale, L2NORM=options.qk_l2norm,
        RAW=i.A_log is not None, RANGE=options.beta_range, SAVE=options.save,
        **constants(p, layout),
    )  # fmt: skip
    return True


def scan_reverse(
    p: Problem, i: Inputs, options: Options, saved: Saved, do: Tensor, dS: Tensor | None,
    dv: Tensor, adjoints: Tensor,
) -> bool:  # fmt: skip
    """Do what ``run_reverse`` does, by a kernel for the preconditioned key.

    With the key itself the other one is faster. Returns whether that was done.
    """
    if p.write != RESCALED_KEY or not scan_programs(p, i, options, i.S, dS, values=do):
        return False
    from pdn.ops.triton.hopper_scan import FACTORS, UNSWIZZLED, reverse_scan_kernel

    *keys, layout = operands(p, i, saved)
    factors = Tiles(saved.table.view(-1, CHUNK), (FACTORS.value, CHUNK), UNSWIZZLED.value)
    run(reverse_scan_kernel, (p.B, p.HV),
        *(tokens(x, p.K) for x in keys), tokens(do, p.V // 2),
        factors, rows(saved.T), rows(saved.P), tokens(dv, p.V // 2), rows(adjoints), p.NT // p.B,
        **constants(p, layout),
    )  # fmt: skip
    return True


def tokens(x: Tensor, columns: int) -> Tiles:
    """Describe [.., heads, size] by tiles of a chunk and so many columns."""
    from pdn.ops.triton.hopper import SWIZZLED

    return Tiles(x.view(-1, x.shape[-2] * x.shape[-1]), (CHUNK, columns), SWIZZLED.value)


def rows(x: Tensor) -> Tiles:
    """Describe [.., rows, size] by tiles of 64 whole rows."""
    from pdn.ops.triton.hopper import SWIZZLED

    return Tiles(x.view(-1, x.shape[-1]), (CHUNK, x.shape[-1]), SWIZZLED.value)


def constants(p: Problem, layout: dict) -> dict[str, Any]:
    """Return the compile-time arguments and options of both kernels."""
    from pdn.ops.triton.hopper_scan import WARPS

    return dict(HV=p.HV, QG=layout["QG"], KG=layout["KG"], DECAY=p.decay, num_warps=WARPS)
