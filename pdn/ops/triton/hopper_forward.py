"""The forward pass on compute capability 9.0: ``prepare.py`` and the forward half of ``scan.py`` as
one kernel, in which what a chunk needs no state for is done one chunk ahead, beside the scan.

A program scans one sequence of one head. One warpgroup has keys and values brought, solves the
next chunk's triangular system and forms its scores; two scan, as ``hopper_scan.py`` says. So the
keys are read once, and T and P only written, for the backward pass.
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
    NO_DECAY,
    NORM_K,
    NORM_Q,
    READ_K,
    READ_Q,
    ROWS,
    WRITE_K,
    C,
    await_inputs,
    exp,
    inverse_root,
)
from pdn.ops.triton.gates import decay_of, gain_of
from pdn.ops.triton.hopper import PLAIN, SWIZZLED, D, plus, zero
from pdn.ops.triton.hopper_scan import (
    FACTORS,
    HALF,
    LEFT_NARROW,
    NARROW,
    TOKENS,
    allocate_tiles,
    chunk_barriers,
    factors,
    fetch_keys,
    fetch_values,
    row_of,
    scan_forward,
)

LANES = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))  # all of [C] in every warp
LINE = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))
FLAT = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
FLAT_ROWS = gl.constexpr(gl.SliceLayout(1, FLAT))
ROWS_OF = gl.constexpr(gl.SliceLayout(1, NARROW))
STEP = gl.constexpr(16)  # rows whose norms are taken at a time


@gluon.jit
def fetch_ahead(
    q, k, w, v, m, first, h, q_tile, k_tile, w_tile, v_tile, have_keys, have_values, free_keys,
    free_values, QG: gl.constexpr, KG: gl.constexpr, KEY_WRITES: gl.constexpr,
):  # fmt: skip
    """Have chunk m of the sequence brought, once what lies in its place is no longer needed."""
    stage = m & 1
    free = ((m >> 1) & 1) ^ 1
    mbarrier.wait(free_keys.index(stage), free)
    fetch_keys(q, k, w, first + m, h, stage, q_tile, k_tile, w_tile, have_keys, QG, KG, KEY_WRITES)
    mbarrier.wait(free_values.index(stage), free)
    fetch_values(v, first + m, h, stage, v_tile, have_values)


@gluon.jit
def store_inverse_norms(query, key, norms):
    """Store rsqrt(|x|^2 + 1e-6) of the rows of q and of k [C, K] behind one another."""
    for r in gl.static_range(0, C, STEP):
        of_q = query.slice(r, STEP).load(FLAT).to(gl.float32)
        norms.slice(r, STEP).store(inverse_root(gl.sum(of_q * of_q, 1)))
        of_k = key.slice(r, STEP).load(FLAT).to(gl.float32)
        norms.slice(C + r, STEP).store(inverse_root(gl.sum(of_k * of_k, 1)))


@gluon.jit
def store_scalars(scalars, norm_q, norm_k, b, G, step):
    """Store a chunk's rows of the table, from [C] in every warp."""
    whole = gl.sum(gl.where(step == C - 1, G, 0.0), 0)
    grow = exp(G)
    row_of(scalars, READ_Q).store(norm_q * grow)
    row_of(scalars, READ_K).store(norm_k * grow)
    row_of(scalars, WRITE_K).store(norm_k * exp(whole - G))
    row_of(scalars, BETA).store(b)
    row_of(scalars, DECAY_SUM).store(G)
    row_of(scalars, NORM_Q).store(norm_q)
    row_of(scalars, NORM_K).store(norm_k)


@gluon.jit
def unit_lower_inverse(L, system, even, odd, at_i, at_j):
    """Return (I + L)^-1 of a strictly lower L [C, C] by doubling, as ``prepare.py`` does.

    X has inverted diagonal blocks alone, so those of X L X are what the masked L would give.

    system: room for L in float16; even, odd: for X, which one level reads while the next one may
        already be stored.
    """
    nothing = gl.zeros([C, C], gl.float32, NARROW)
    system.store(L.to(gl.float16))
    X = gl.where(at_i == at_j, 1.0, 0.0)
    X -= gl.where(((at_i & 1) == 1) & (at_j == at_i - 1), L, 0.0)
    for n in gl.static_range(5):
        half = X.to(gl.float16)
        blocks = odd if n % 2 == 1 else even
        blocks.store(half)
        fence_async_shared()
        gl.barrier()
        left = gl.convert_layout(half, LEFT_NARROW)
        Y = warpgroup_mma(left, system, nothing, use_acc=False, is_async=True)
        Y = warpgroup_mma_wait(0, [Y])
        left = gl.convert_layout(Y.to(gl.float16), LEFT_NARROW)
        Y = warpgroup_mma(left, blocks, nothing, use_acc=False, is_async=True)
        Y = warpgroup_mma_wait(0, [Y])
        block_i = at_i >> (n + 1)
        X -= gl.where(((block_i & 1) == 1) & ((at_j >> (n + 1)) == block_i - 1), Y, 0.0)
    return X


@gluon.jit
def prepare_ahead(
    q, k, w, v, log_decay, A_log, dt_bias, beta, table, T_out, P_out, first, count, h,
    q_tile, k_tile, w_tile, v_tile, s_tile, T_tile, P_tile, X_tile, norms, have_keys, have_values,
    ready, free_keys, free_values, HV: gl.constexpr, QG: gl.constexpr, KG: gl.constexpr,
    SCALE: gl.constexpr, L2NORM: gl.constexpr, DECAY: gl.constexpr, RAW: gl.constexpr,
    RANGE: gl.constexpr, KEY_WRITES: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    """Do what a warpgroup does for the other two: bring one chunk after the other, and of each what
    ``prepare_kernel`` does.
    """
    fetch_ahead(
        q, k, w, v, 0, first, h, q_tile, k_tile, w_tile, v_tile, have_keys, have_values, free_keys,
        free_values, QG, KG, KEY_WRITES,
    )  # fmt: skip
    nothing = gl.zeros([C, C], gl.float32, NARROW)
    step = gl.arange(0, C, LANES)
    at = (first * C + step).to(gl.int64) * HV + h
    ahead_b = gl.load(beta + at)
    ahead_g = ahead_b
    bias = 0.0
    rate = 1.0
    if DECAY != NO_DECAY:
        ahead_g = gl.load(log_decay + at)
        if RAW:
            rate = exp(gl.load(A_log + h).to(gl.float32))
            bias = gl.load(dt_bias + h).to(gl.float32)
    for m in range(count):
        stage = m & 1
        i = first + m
        scalars = s_tile.index(stage)
        mbarrier.wait(have_keys.index(stage), (m >> 1) & 1)
        query = q_tile.index(stage)
        key = k_tile.index(stage)
        write = key
        if not KEY_WRITES:
            write = w_tile.index(stage)
        L = warpgroup_mma(key, write.permute([1, 0]), nothing, use_acc=False, is_async=True)

        # the scalars, beside it
        if L2NORM:
            store_inverse_norms(query, key, norms)
        gl.barrier()
        norm_q = gl.full([C], SCALE, gl.float32, LANES)
        norm_k = gl.full([C], 1.0, gl.float32, LANES)
        if L2NORM:
            norm_q *= norms.slice(0, C).load(LANES)
            norm_k = norms.slice(C, C).load(LANES)
        b = gain_of(ahead_b.to(gl.float32), RANGE)
        b = gl.where(gl.abs(b) < 1e-20, 1e-20, b)
        G = gl.zeros([C], gl.float32, LANES)
        if DECAY != NO_DECAY:
            G = decay_of(ahead_g.to(gl.float32), rate, bias, RAW)
            G = gl.associative_scan(G, 0, plus)
        store_scalars(scalars, norm_q, norm_k, b, G, step)
        gl.barrier()

        gain_j = row_of(scalars, BETA).load(TOKENS) * row_of(scalars, NORM_K).load(TOKENS)
        norm_i = row_of(scalars, NORM_K).load(ROWS_OF)
        at_i = zero() + gl.arange(0, C, ROWS_OF)[:, None]  # made anew: there is no room to keep it
        at_j = zero() + gl.arange(0, C, TOKENS)[None, :]
        L = warpgroup_mma_wait(0, [L])
        L = gl.where(at_i > at_j, L * (norm_i[:, None] * gain_j[None, :]), 0.0)
        system = T_tile.index(stage)._reinterpret(gl.float16, [C, C], SWIZZLED)
        odd = P_tile.index(stage)._reinterpret(gl.float16, [C, C], SWIZZLED)
        tma.store_wait(2)  # what left this stage's tiles is not the last chunk's
        gl.barrier()
        X = unit_lower_inverse(L, system, X_tile, odd, at_i, at_j)

        P = warpgroup_mma(query, write.permute([1, 0]), nothing, use_acc=False, is_async=True)
        G_i = row_of(scalars, DECAY_SUM).load(ROWS_OF)[:, None]
        decay = exp(gl.where(at_i >= at_j, G_i - factors(scalars, DECAY_SUM), float("-inf")))
        gl.barrier()
        T_tile.index(stage).store((X * decay).to(gl.bfloat16))
        norm_i = row_of(scalars, NORM_Q).load(ROWS_OF)
        norm_j = row_of(scalars, NORM_K).load(TOKENS)
        P = warpgroup_mma_wait(0, [P])
        P_tile.index(stage).store((P * (norm_i[:, None] * norm_j[None, :]) * decay).to(gl.bfloat16))
        fence_async_shared()
        gl.barrier()
        mbarrier.arrive(ready.index(stage), count=1)
        slot = i * HV + h
        if SAVE:
            tma.async_copy_shared_to_global(T_out, [slot * C, 0], T_tile.index(stage))
            tma.async_copy_shared_to_global(P_out, [slot * C, 0], P_tile.index(stage))
            line = gl.arange(0, FACTORS * C, LINE)
            all_rows = scalars._reinterpret(gl.float32, [FACTORS * C], PLAIN).load(LINE)
            to = table + slot.to(gl.int64) * (ROWS * C) + line
            gl.store(to, all_rows, mask=line < ROWS * C)
        after = gl.minimum(i + 1, first + count - 1)  # not before the fence, which would wait
        at = (after * C + step).to(gl.int64) * HV + h
        ahead_b = gl.load(beta + at)
        if DECAY != NO_DECAY:
            ahead_g = gl.load(log_decay + at)
        if m + 1 < count:
            fetch_ahead(
                q, k, w, v, m + 1, first, h, q_tile, k_tile, w_tile, v_tile, have_keys,
                have_values, free_keys, free_values, QG, KG, KEY_WRITES,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def fused_forward_kernel(
    q, k, w, v, log_decay, A_log, dt_bias, beta, table, T_out, P_out, o, x, states, chunks,
    HV: gl.constexpr, QG: gl.constexpr, KG: gl.constexpr, SCALE: gl.constexpr, L2NORM: gl.constexpr,
    DECAY: gl.constexpr, RAW: gl.constexpr, RANGE: gl.constexpr, KEY_WRITES: gl.constexpr,
    SAVE: gl.constexpr,
):  # fmt: skip
    """``prepare_kernel`` and ``forward_kernel`` of whole sequences of so many full chunks, from
    zero; by descriptors of matrices [M, H K] and [M, HV V], of the squares [NT HV C, C] and of the
    states [NT HV V, K].
    """
    await_inputs()
    first = gl.program_id(0) * chunks
    h = gl.program_id(1)
    q_tile, k_tile, w_tile, v_tile, s_tile, T_tile, P_tile = allocate_tiles(KEY_WRITES)
    X_tile = gl.allocate_shared_memory(gl.float16, [C, C], SWIZZLED)
    norms = gl.allocate_shared_memory(gl.float32, [2 * C], PLAIN)
    o_tile = gl.allocate_shared_memory(gl.bfloat16, [2, C, HALF], SWIZZLED)
    S_tile = gl.allocate_shared_memory(gl.bfloat16, [2, HALF, D], SWIZZLED)
    have_keys, have_values, ready, free_keys, free_values = chunk_barriers()
    gl.warp_specialize(
        [
            (scan_forward, (
                o, x, states, first, chunks, h, q_tile, k_tile, w_tile, v_tile, s_tile,
                T_tile, P_tile, o_tile, S_tile, have_keys, have_values, ready, free_keys,
                free_values, 0, HV, DECAY, KEY_WRITES, SAVE,
            )),
            (scan_forward, (
                o, x, states, first, chunks, h, q_tile, k_tile, w_tile, v_tile, s_tile,
                T_tile, P_tile, o_tile, S_tile, have_keys, have_values, ready, free_keys,
                free_values, 1, HV, DECAY, KEY_WRITES, SAVE,
            )),
            (prepare_ahead, (
                q, k, w, v, log_decay, A_log, dt_bias, beta, table, T_out, P_out, first, chunks, h,
                q_tile, k_tile, w_tile, v_tile, s_tile, T_tile, P_tile, X_tile, norms, have_keys,
                have_values, ready, free_keys, free_values,
                HV, QG, KG, SCALE, L2NORM, DECAY, RAW, RANGE, KEY_WRITES, SAVE,
            )),
        ],
        [4, 4],  # warps of all but the first, and their registers
        [176, 152],
    )  # fmt: skip
