"""The two serial kernels on compute capability 9.0: ``scan.py`` with its memory traffic taken off
the warps that compute.

A program scans one sequence of one head. Two warpgroups hold half of the values each, as rows of
the transposed state, and need nothing of one another: the state, the solution and what the state
takes in are left operands that stay in registers. Other warps have the next chunk's tiles copied
into shared memory meanwhile; forward, those of ``hopper_forward.py``. For bfloat16, K = V = 128 and
sequences of full chunks that are not cut; ``launch.py`` takes the other kernels for all else.
"""

# Gluon's types are of a call from Python, which a kernel is none, as in common.py.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pdn.ops.triton.common import (
    BETA,
    DECAY_SUM,
    READ_K,
    READ_Q,
    ROWS,
    SCALAR,
    WRITE_K,
    C,
    await_inputs,
    exp,
)
from pdn.ops.triton.hopper import PLAIN, SWIZZLED, TILE, D, zero

HALF = gl.constexpr(64)  # values of a warpgroup
WARPS = 4  # of a warpgroup, as which the kernels are launched
STAGES = gl.constexpr(2)  # chunks that are in shared memory at once
SQUARE = gl.constexpr(64 * 64 * 2)  # bytes
FACTORS = gl.constexpr(8)  # rows of a chunk's scalars that are copied, the last of them not its own
UNSWIZZLED = gl.constexpr(gl.NVMMASharedLayout(0, 32, 2))
WIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
NARROW = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT_WIDE = gl.constexpr(gl.DotOperandLayout(0, WIDE, 2))
LEFT_NARROW = gl.constexpr(gl.DotOperandLayout(0, NARROW, 2))
TOKENS = gl.constexpr(gl.SliceLayout(0, NARROW))
KEYS = gl.constexpr(gl.SliceLayout(0, WIDE))


@gluon.jit
def allocate_tiles(KEY_WRITES: gl.constexpr):
    """Return room for q, k, w, values, a chunk's scalars, T and P, of every stage."""
    q_tile = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, D], SWIZZLED)
    k_tile = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, D], SWIZZLED)
    w_tile = k_tile
    if not KEY_WRITES:
        w_tile = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, D], SWIZZLED)
    v_tile = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, C, HALF], SWIZZLED)
    s_tile = gl.allocate_shared_memory(gl.float32, [STAGES, FACTORS, C], UNSWIZZLED)
    T_tile = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, C], SWIZZLED)
    P_tile = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, C], SWIZZLED)
    return q_tile, k_tile, w_tile, v_tile, s_tile, T_tile, P_tile


@gluon.jit
def chunk_barriers():
    """Return barriers for keys, for values, for T and P, and for room for keys and for values.

    At those for room, both warpgroups arrive.
    """
    have_keys = mbarrier.allocate_mbarrier(batch=STAGES)
    have_values = mbarrier.allocate_mbarrier(batch=STAGES)
    ready = mbarrier.allocate_mbarrier(batch=STAGES)
    free_keys = mbarrier.allocate_mbarrier(batch=STAGES)
    free_values = mbarrier.allocate_mbarrier(batch=STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(have_keys.index(stage), count=1)
        mbarrier.init(have_values.index(stage), count=1)
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free_keys.index(stage), count=2)
        mbarrier.init(free_values.index(stage), count=2)
    fence_async_shared()
    return have_keys, have_values, ready, free_keys, free_values


@gluon.jit
def row_of(scalars, row: gl.constexpr):
    """Return a row of a chunk's scalars, [C] in shared memory."""
    return scalars._reinterpret(gl.float32, [FACTORS * C], PLAIN).slice(row * C, C)


@gluon.jit
def factors(scalars, row: gl.constexpr):
    """Return a row of a chunk's scalars as factors of columns, [1, C]."""
    return row_of(scalars, row).load(TOKENS)[None, :]


@gluon.jit
def whole_decay(scalars):
    """Return e^(G_C), [1, 1]."""
    return exp(row_of(scalars, DECAY_SUM).slice(C - 1, 1).load(KEYS))[None, :]


@gluon.jit
def operand(x):
    """Return x [HALF, C] as the left operand of a product, in registers."""
    return gl.convert_layout(x.to(gl.bfloat16), LEFT_NARROW)


@gluon.jit
def fetch_keys(
    q, k, w, i, h, stage, q_tile, k_tile, w_tile, have_keys,
    QG: gl.constexpr, KG: gl.constexpr, KEY_WRITES: gl.constexpr,
):  # fmt: skip
    """Have q, k and, if it is another, the write key of chunk i brought."""
    row = i * C
    have = have_keys.index(stage)
    mbarrier.expect(have, 2 * TILE if KEY_WRITES else 3 * TILE)
    tma.async_copy_global_to_shared(k, [row, (h // KG) * D], have, k_tile.index(stage))
    if not KEY_WRITES:
        tma.async_copy_global_to_shared(w, [row, h * D], have, w_tile.index(stage))
    tma.async_copy_global_to_shared(q, [row, (h // QG) * D], have, q_tile.index(stage))


@gluon.jit
def fetch_values(v, i, h, stage, v_tile, have_values):
    """Have the values of chunk i brought, half of them for each warpgroup."""
    have = have_values.index(stage)
    mbarrier.expect(have, TILE)
    tma.async_copy_global_to_shared(v, [i * C, h * D], have, v_tile.index(2 * stage))
    tma.async_copy_global_to_shared(v, [i * C, h * D + HALF], have, v_tile.index(2 * stage + 1))


@gluon.jit
def scan_forward(
    o, x, states, first, count, h, q_tile, k_tile, w_tile, v_tile, s_tile, T_tile, P_tile,
    o_tile, S_tile, have_keys, have_values, ready, free_keys, free_values,
    PART: gl.constexpr, HV: gl.constexpr, DECAY: gl.constexpr, KEY_WRITES: gl.constexpr,
    SAVE: gl.constexpr,
):  # fmt: skip
    """What a warpgroup does forward: ``forward_kernel`` of half of the values.

    Solutions take the place of the values that they are of.
    """
    S = gl.zeros([HALF, D], gl.float32, WIDE)
    nothing = gl.zeros([HALF, C], gl.float32, NARROW)
    for m in range(count):
        stage = m & 1
        phase = (m >> 1) & 1
        i = first + m
        slot = i * HV + h
        scalars = s_tile.index(stage)
        o_part = o_tile.index(PART + zero())
        S_part = S_tile.index(PART + zero())
        mbarrier.wait(have_keys.index(stage), phase)
        state = S.to(gl.bfloat16)
        left = gl.convert_layout(state, LEFT_WIDE)
        key = k_tile.index(stage).permute([1, 0])
        erased = warpgroup_mma(left, key, nothing, use_acc=False, is_async=True)

        # beside it: what does not need it
        tma.store_wait(0)
        gl.barrier()
        if m > 0:
            mbarrier.arrive(free_values.index(stage ^ 1), count=1)
        S_part.store(state)
        fence_async_shared()
        gl.barrier()
        mbarrier.wait(have_values.index(stage), phase)
        v_part = v_tile.index(2 * stage + PART).permute([1, 0])
        mbarrier.wait(ready.index(stage), phase)
        erased = warpgroup_mma_wait(0, [erased])
        u = v_part.load(NARROW).to(gl.float32)
        u -= erased * factors(scalars, READ_K)
        inverse = T_tile.index(stage).permute([1, 0])
        solved = warpgroup_mma(operand(u), inverse, nothing, use_acc=False, is_async=True)
        query = q_tile.index(stage).permute([1, 0])  # for the state in registers there is no room
        out = warpgroup_mma(S_part, query, nothing, use_acc=False, is_async=True)
        if DECAY == SCALAR:
            S *= whole_decay(scalars)
        solved = warpgroup_mma_wait(1, [solved])
        if SAVE:
            v_part.store(solved.to(gl.bfloat16))
        taken = solved * factors(scalars, BETA)
        write = k_tile.index(stage)
        if not KEY_WRITES:
            write = w_tile.index(stage)
        S = warpgroup_mma(operand(taken * factors(scalars, WRITE_K)), write, S, is_async=True)
        out = warpgroup_mma_wait(1, [out])
        out *= factors(scalars, READ_Q)
        score = P_tile.index(stage).permute([1, 0])
        out = warpgroup_mma(operand(taken), score, out, is_async=True)
        S, out = warpgroup_mma_wait(0, [S, out])
        o_part.permute([1, 0]).store(out.to(gl.bfloat16))
        fence_async_shared()
        gl.barrier()
        mbarrier.arrive(free_keys.index(stage), count=1)
        at_values = h * D + PART * HALF
        tma.async_copy_shared_to_global(o, [i * C, at_values], o_part)
        if SAVE:
            x_part = v_tile.index(2 * stage + PART)
            tma.async_copy_shared_to_global(x, [i * C, at_values], x_part)
            tma.async_copy_shared_to_global(states, [slot * D + PART * HALF, 0], S_part)
    tma.store_wait(0)


@gluon.jit
def fetch_backward(
    q, k, w, do, table, T_in, P_in, last, count, h, q_tile, k_tile, w_tile, g_tile, s_tile, T_tile,
    P_tile, have_keys, have_values, ready, free_keys, free_values,
    HV: gl.constexpr, QG: gl.constexpr, KG: gl.constexpr,
):  # fmt: skip
    """Do what the copying warp does backward: have the tiles of one chunk after the other brought,
    as soon as there is room.
    """
    for m in range(count):
        stage = m & 1
        free = ((m >> 1) & 1) ^ 1
        i = last - m
        slot = i * HV + h
        mbarrier.wait(free_keys.index(stage), free)
        fetch_keys(q, k, w, i, h, stage, q_tile, k_tile, w_tile, have_keys, QG, KG, False)
        have = ready.index(stage)
        mbarrier.expect(have, 2 * SQUARE + FACTORS * C * 4)
        tma.async_copy_global_to_shared(table, [slot * ROWS, 0], have, s_tile.index(stage))
        tma.async_copy_global_to_shared(T_in, [slot * C, 0], have, T_tile.index(stage))
        tma.async_copy_global_to_shared(P_in, [slot * C, 0], have, P_tile.index(stage))
        mbarrier.wait(free_values.index(stage), free)
        fetch_values(do, i, h, stage, g_tile, have_values)


@gluon.jit
def scan_reverse(
    dv, adjoints, last, count, h, q_tile, k_tile, w_tile, g_tile, s_tile, T_tile, P_tile,
    E_tile, have_keys, have_values, ready, free_keys, free_values,
    PART: gl.constexpr, HV: gl.constexpr, DECAY: gl.constexpr,
):  # fmt: skip
    """What a warpgroup does backward: ``reverse_kernel`` of half of the values.

    The gradients of the values take the place of those of the outputs.
    """
    E = gl.zeros([HALF, D], gl.float32, WIDE)
    nothing = gl.zeros([HALF, C], gl.float32, NARROW)
    for m in range(count):
        stage = m & 1
        phase = (m >> 1) & 1
        i = last - m
        slot = i * HV + h
        scalars = s_tile.index(stage)
        E_part = E_tile.index(PART + zero())
        mbarrier.wait(have_keys.index(stage), phase)
        adjoint = E.to(gl.bfloat16)
        left = gl.convert_layout(adjoint, LEFT_WIDE)
        write = w_tile.index(stage).permute([1, 0])
        d = warpgroup_mma(left, write, nothing, use_acc=False, is_async=True)
        mbarrier.wait(have_values.index(stage), phase)
        mbarrier.wait(ready.index(stage), phase)
        g = g_tile.index(2 * stage + PART).permute([1, 0])
        score = P_tile.index(stage)
        of_P = warpgroup_mma(g, score, nothing, use_acc=False, is_async=True)

        # beside them: what does not need them
        tma.store_wait(0)
        gl.barrier()
        if m > 0:
            mbarrier.arrive(free_values.index(stage ^ 1), count=1)
        E_part.store(adjoint)
        read = operand(g.load(NARROW).to(gl.float32) * factors(scalars, READ_Q))
        d, of_P = warpgroup_mma_wait(0, [d, of_P])
        d = (d * factors(scalars, WRITE_K) + of_P) * factors(scalars, BETA)
        inverse = T_tile.index(stage)
        d = warpgroup_mma(operand(d), inverse, nothing, use_acc=False, is_async=True)
        if DECAY == SCALAR:
            E *= whole_decay(scalars)
        E = warpgroup_mma(read, q_tile.index(stage), E, is_async=True)
        d = warpgroup_mma_wait(1, [d])
        erased = operand(-(d * factors(scalars, READ_K)))
        E = warpgroup_mma(erased, k_tile.index(stage), E, is_async=True)
        E = warpgroup_mma_wait(0, [E])
        g.store(d.to(gl.bfloat16))
        fence_async_shared()
        gl.barrier()
        mbarrier.arrive(free_keys.index(stage), count=1)
        d_part = g_tile.index(2 * stage + PART)
        tma.async_copy_shared_to_global(dv, [i * C, h * D + PART * HALF], d_part)
        tma.async_copy_shared_to_global(adjoints, [slot * D + PART * HALF, 0], E_part)
    tma.store_wait(0)


@gluon.jit
def reverse_scan_kernel(
    q, k, w, do, table, T_in, P_in, dv, adjoints, chunks,
    HV: gl.constexpr, QG: gl.constexpr, KG: gl.constexpr, DECAY: gl.constexpr,
):  # fmt: skip
    """``reverse_kernel`` of whole sequences of so many full chunks, from zero, with a write key of
    its own; by descriptors of matrices [M, H K] and [M, HV V], of the scalars [NT HV ROWS, C], of
    the squares [NT HV C, C] and of the adjoints [NT HV V, K].
    """
    await_inputs()
    last = (gl.program_id(0) + 1) * chunks - 1
    h = gl.program_id(1)
    q_tile, k_tile, w_tile, g_tile, s_tile, T_tile, P_tile = allocate_tiles(False)
    E_tile = gl.allocate_shared_memory(gl.bfloat16, [2, HALF, D], SWIZZLED)
    have_keys, have_values, ready, free_keys, free_values = chunk_barriers()
    gl.warp_specialize(
        [
            (scan_reverse, (
                dv, adjoints, last, chunks, h, q_tile, k_tile, w_tile, g_tile, s_tile, T_tile,
                P_tile, E_tile, have_keys, have_values, ready, free_keys, free_values, 0, HV, DECAY,
            )),
            (scan_reverse, (
                dv, adjoints, last, chunks, h, q_tile, k_tile, w_tile, g_tile, s_tile, T_tile,
                P_tile, E_tile, have_keys, have_values, ready, free_keys, free_values, 1, HV, DECAY,
            )),
            (fetch_backward, (
                q, k, w, do, table, T_in, P_in, last, chunks, h, q_tile, k_tile, w_tile, g_tile,
                s_tile, T_tile, P_tile, have_keys, have_values, ready, free_keys, free_values,
                HV, QG, KG,
            )),
        ],
        [4, 1],  # warps of the other two, and their registers
        [240, 24],
    )  # fmt: skip
