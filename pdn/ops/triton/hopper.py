"""The gradients of all chunks on compute capability 9.0: ``gradients.py`` with its memory traffic
taken off the warps that compute.

One program a multiprocessor goes through the chunks of all heads. A warp of its own has the next
chunk's tiles copied into shared memory as soon as the current chunk no longer needs theirs, and two
warpgroups multiply them where they lie. So 0.18 MB are always on their way, where ``gradients.py``
waits for its tiles in every program anew. For bfloat16 and K = V = 128, which fill the shared
memory, and chunks that are full; ``launch.py`` takes the other kernel for all else.
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
    RESCALED_KEY,
    ROWS,
    C,
    await_inputs,
    exp,
)
from pdn.ops.triton.gates import decay_gradient, gain_gradient
from pdn.ops.triton.sums import OF_A_LOG, OF_DT_BIAS, PARTS

SIZE = 128  # of keys and of values
D = gl.constexpr(SIZE)
TILE = gl.constexpr(64 * SIZE * 2)  # bytes of a chunk's rows
WARPS = 8  # that compute; the copying one comes beside them
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PAIRED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def plus(a, b):
    return a + b


@gluon.jit
def zero():
    """Return 0, of which the compiler does not know that it is.

    An address from it is computed where it is used. Of known ones, those of 56 products are kept
    over the whole loop, which takes more registers than there are, and what is spilt has no first
    cache beside so much shared memory.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def decay_tail(
    dG, across, raw, A, bias, dlog_decay, parts, t, HV: gl.constexpr, RAW: gl.constexpr,
    rows: gl.constexpr,
):  # fmt: skip
    """Store the decay's gradient of tile t, from that of the sums G [C], and [C] numbers that add
    up to what the whole chunk hands on.

    Every warp does all of it, so that none waits for another.
    """
    d_g = gl.associative_scan(dG, 0, plus, reverse=True) + gl.sum(across, 0)
    rate = exp(A) if RAW else 1.0
    d_raw, d_log_rate = decay_gradient(d_g, raw, rate, bias, RAW)
    i = t // HV
    at_row = (i * C + gl.arange(0, C, rows)).to(gl.int64) * HV + (t - i * HV)
    gl.store(dlog_decay + at_row, d_raw)
    if RAW:
        slot = t.to(gl.int64) * PARTS
        gl.store(parts + slot + OF_A_LOG, gl.sum(d_log_rate, 0))
        gl.store(parts + slot + OF_DT_BIAS, gl.sum(d_raw, 0))


@gluon.jit
def fetch_tiles(
    q, k, write, v, o, x, do, dv, states, adjoints, tiles, q_tile, k_tile, w_tile, v_tile, o_tile,
    x_tile, do_tile, dv_tile, S_tile, E_tile, have_rows, have_states, have_values, have_keys,
    free_values, free_keys, HV: gl.constexpr, GROUP: gl.constexpr, L2NORM: gl.constexpr,
    WRITE: gl.constexpr,
):  # fmt: skip
    """Have every tile's operands brought as soon as there is room: the copying warp."""
    RESCALED: gl.constexpr = WRITE == RESCALED_KEY
    phase = 1  # of barriers on which nothing has arrived: the phase before has ended
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i = t // HV
        h = t - i * HV
        row = i * C
        own = h * D
        shared = (h // GROUP) * D
        mbarrier.wait(free_values, phase)
        mbarrier.expect(have_rows, 3 * TILE)
        tma.async_copy_global_to_shared(do, [row, own], have_rows, do_tile.index(0))
        tma.async_copy_global_to_shared(x, [row, own], have_rows, x_tile.index(0))
        tma.async_copy_global_to_shared(dv, [row, own], have_rows, dv_tile.index(0))
        mbarrier.expect(have_states, 4 * TILE)
        tma.async_copy_global_to_shared(states, [t * D, 0], have_states, S_tile.index(0))
        tma.async_copy_global_to_shared(adjoints, [t * D, 0], have_states, E_tile.index(0))
        if L2NORM:
            mbarrier.expect(have_values, TILE if RESCALED else 2 * TILE)
            if not RESCALED:
                tma.async_copy_global_to_shared(v, [row, own], have_values, v_tile)
            tma.async_copy_global_to_shared(o, [row, own], have_values, o_tile)
        mbarrier.wait(free_keys, phase)
        mbarrier.expect(have_keys, 3 * TILE if RESCALED else 2 * TILE)
        if RESCALED:
            tma.async_copy_global_to_shared(write, [row, own], have_keys, w_tile.index(0))
        tma.async_copy_global_to_shared(k, [row, shared], have_keys, k_tile.index(0))
        tma.async_copy_global_to_shared(q, [row, shared], have_keys, q_tile.index(0))
        phase ^= 1


@gluon.jit
def multiply_tiles(
    log_decay, A_log, dt_bias, table, dq, dk, dwrite, dlog_decay, dbeta, parts, tiles,
    q_tile, k_tile, w_tile, v_tile, o_tile, x_tile, do_tile, dv_tile, S_tile, E_tile, scores,
    dq_tile, dk_tile, along_q_row, along_k_row, kept_row, decay_row, scalars,
    have_rows, have_states, have_values, have_keys, free_values, free_keys,
    HV: gl.constexpr, SCALE: gl.constexpr, L2NORM: gl.constexpr, DECAY: gl.constexpr,
    RAW: gl.constexpr, RANGE: gl.constexpr, WRITE: gl.constexpr,
):  # fmt: skip
    """Do what ``gradient_kernel`` does, of one tile after the other: the other warps."""
    RESCALED: gl.constexpr = WRITE == RESCALED_KEY
    HALVES: gl.constexpr = gl.num_warps() // 4  # warpgroups, of which each has some columns
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, HALVES], [16, D // HALVES, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, HALVES], [16, C // HALVES, 16])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    rows: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])  # all in every warp
    pairs: gl.constexpr = gl.BlockedLayout([2, HALVES], [32, 1], [gl.num_warps(), 1], [1, 0])
    wide_rows: gl.constexpr = gl.SliceLayout(1, wide)
    square_rows: gl.constexpr = gl.SliceLayout(1, square)
    square_cols: gl.constexpr = gl.SliceLayout(0, square)
    flat_rows: gl.constexpr = gl.SliceLayout(1, flat)
    at_i = gl.arange(0, C, square_rows)[:, None]
    at_j = gl.arange(0, C, square_cols)[None, :]
    read_row = scalars.slice(0, HALVES * C)._reinterpret(gl.float32, [C, HALVES], PAIRED)

    first = gl.program_id(0)
    step = gl.num_programs(0)
    at_scalars = BETA * C + gl.arange(0, 4 * C, line)  # beta, G and the norms
    ahead = gl.load(table + first.to(gl.int64) * (ROWS * C) + at_scalars)
    ahead_G = gl.load(table + first.to(gl.int64) * (ROWS * C) + (DECAY_SUM * C + C - 1))
    dG = gl.zeros([C], gl.float32, rows)
    across = gl.zeros([C], gl.float32, rows)
    raw = gl.zeros([C], gl.float32, rows)
    A = 0.0
    bias = 0.0
    phase = 0
    for t in range(first, tiles, step):
        i = t // HV
        h = t - i * HV
        S = S_tile.index(zero())
        E = E_tile.index(zero())
        g = do_tile.index(zero())
        d = dv_tile.index(zero())
        x = x_tile.index(zero())
        scalars.store(ahead)
        G_C = ahead_G
        b = scalars.slice(0, C).load(wide_rows)
        G = scalars.slice((DECAY_SUM - BETA) * C, C).load(wide_rows)
        norm_q = scalars.slice((NORM_Q - BETA) * C, C).load(wide_rows)
        norm_k = scalars.slice((NORM_K - BETA) * C, C).load(wide_rows)
        b_flat = scalars.slice(0, C).load(flat_rows)

        mbarrier.wait(have_rows, phase)
        no_square = gl.zeros([C, C], gl.float32, square)
        no_wide = gl.zeros([C, D], gl.float32, wide)
        xt = x.permute([1, 0])
        of_P = warpgroup_mma(g, xt, no_square, use_acc=False, is_async=True)
        of_L = warpgroup_mma(d, xt, no_square, use_acc=False, is_async=True)
        mbarrier.wait(have_states, phase)
        d_query = warpgroup_mma(g, S, no_wide, use_acc=False, is_async=True)
        d_key = warpgroup_mma(d, S, no_wide, use_acc=False, is_async=True)
        d_write = warpgroup_mma(x, E, no_wide, use_acc=False, is_async=True)

        # The factors of rows and columns are in the [C, C] matrices, as in gradient_kernel.
        G_i = scalars.slice((DECAY_SUM - BETA) * C, C).load(square_rows)[:, None]
        G_j = scalars.slice((DECAY_SUM - BETA) * C, C).load(square_cols)[None, :]
        write_j = scalars.slice(0, C).load(square_cols)
        write_j *= scalars.slice((NORM_K - BETA) * C, C).load(square_cols)
        q_i = scalars.slice((NORM_Q - BETA) * C, C).load(square_rows)[:, None]
        k_i = scalars.slice((NORM_K - BETA) * C, C).load(square_rows)[:, None]
        of_P, of_L = warpgroup_mma_wait(3, [of_P, of_L])
        if RESCALED:  # what is stored from the scores' memory must have left it
            tma.store_wait(0)
            gl.barrier()
        factor = exp(gl.where(at_i >= at_j, G_i - G_j, float("-inf"))) * write_j[None, :]
        scores.index(0).store((of_P * factor * q_i).to(gl.bfloat16))
        dL = gl.where(at_i > at_j, -of_L * factor * k_i, 0.0)
        scores.index(1).store(dL.to(gl.bfloat16))

        # The first products end one after the other; the second ones begin as they do.
        fence_async_shared()
        gl.barrier()
        grow = exp(G)
        mbarrier.wait(have_keys, phase)
        q = q_tile.index(zero())
        k = k_tile.index(zero())
        w = k
        if RESCALED:
            w = w_tile.index(zero())
        dP = scores.index(zero())
        dL = scores.index(1 + zero())
        d_query = warpgroup_mma_wait(2, [d_query])
        d_query = d_query * (grow * norm_q)[:, None]
        d_query = warpgroup_mma(dP, w, d_query, is_async=True)

        # sums along values, beside the products
        d_flat = d.load(flat).to(gl.float32)
        along_w = gl.sum(d_flat * x.load(flat).to(gl.float32), 1)
        d_beta = gain_gradient(along_w / b_flat, b_flat, RANGE)
        if L2NORM:
            mbarrier.wait(have_values, phase)
            if not RESCALED:
                along_v = gl.sum(d_flat * v_tile.load(flat).to(gl.float32), 1)
                along_k_row.store(2.0 * along_w - along_v)
            o_flat = o_tile.load(flat).to(gl.float32)
            along_q_row.store(gl.sum(g.load(flat).to(gl.float32) * o_flat, 1))
        d_key = warpgroup_mma_wait(2, [d_key])
        d_key = d_key * (-grow * norm_k)[:, None]
        d_key = warpgroup_mma(dL, w, d_key, is_async=True)
        if DECAY != NO_DECAY:
            kept = S.slice(0, C).load(flat).to(gl.float32) * E.slice(0, C).load(flat).to(gl.float32)
            S_low = S.slice(C, C).load(flat).to(gl.float32)
            kept += S_low * E.slice(C, C).load(flat).to(gl.float32)
            kept_row.store(gl.sum(kept, 1))
        d_write = warpgroup_mma_wait(2, [d_write])
        d_write = d_write * (exp(G_C - G) * b * norm_k)[:, None]
        wx = w.load(wide)
        if DECAY != NO_DECAY:
            read = gl.reshape(wx.to(gl.float32) * d_write, [C, HALVES, D // HALVES])
            read_row.store(gl.sum(read, 2))
        d_write = warpgroup_mma(dP.permute([1, 0]), q, d_write, is_async=True)
        d_write = warpgroup_mma(dL.permute([1, 0]), k, d_write, is_async=True)
        gl.barrier()
        mbarrier.arrive(free_values, count=1)
        # Not before the fence, which would wait for it.
        after = table + gl.minimum(t + step, tiles - 1).to(gl.int64) * (ROWS * C)
        ahead = gl.load(after + at_scalars)
        ahead_G = gl.load(after + (DECAY_SUM * C + C - 1))
        at_flat = (i * C + gl.arange(0, C, flat_rows)).to(gl.int64) * HV + h
        gl.store(dbeta + at_flat, d_beta)
        if DECAY != NO_DECAY:  # noqa: SIM102 (of the other kind, without the pointers)
            if t > first:
                decay_tail(dG, across, raw, A, bias, dlog_decay, parts, t - step, HV, RAW, rows)
        qx = q.load(wide).to(gl.float32)
        kx = wx
        if RESCALED:
            kx = k.load(wide)
        kx = kx.to(gl.float32)
        wx = wx.to(gl.float32)
        d_query, d_key, d_write = warpgroup_mma_wait(0, [d_query, d_key, d_write])
        if DECAY != NO_DECAY:
            pairs_G = qx * d_query + kx * d_key - wx * d_write
            decay_row.store(gl.sum(gl.reshape(pairs_G, [C, HALVES, D // HALVES]), 2))
        if not RESCALED:
            tma.store_wait(0)
        gl.barrier()
        mbarrier.arrive(free_keys, count=1)

        if L2NORM:
            along_q = along_q_row.load(wide_rows) * norm_q * norm_q / (SCALE * SCALE)
            d_query -= along_q[:, None] * qx
        dq_tile.store(d_query.to(gl.bfloat16))
        if RESCALED:
            dw_tile = scores._reinterpret(gl.bfloat16, [C, D], SWIZZLED)
            dw_tile.store(d_write.to(gl.bfloat16))
        else:
            d_key += d_write
            if L2NORM:
                d_key -= (norm_k * norm_k * along_k_row.load(wide_rows))[:, None] * kx
        dk_tile.store(d_key.to(gl.bfloat16))
        fence_async_shared()
        gl.barrier()
        tma.async_copy_shared_to_global(dq, [i * C, h * D], dq_tile)
        tma.async_copy_shared_to_global(dk, [i * C, h * D], dk_tile)
        if RESCALED:
            dw_tile = scores._reinterpret(gl.bfloat16, [C, D], SWIZZLED)
            tma.async_copy_shared_to_global(dwrite, [i * C, h * D], dw_tile)
        if DECAY != NO_DECAY:  # the rest beside the next tile's products
            dG = gl.convert_layout(gl.sum(decay_row.load(pairs), 1), rows)
            across = gl.convert_layout(gl.sum(read_row.load(pairs), 1), rows)
            across += exp(G_C) * kept_row.load(rows)
            at_rows = (i * C + gl.arange(0, C, rows)).to(gl.int64) * HV + h
            raw = gl.load(log_decay + at_rows).to(gl.float32)
            if RAW:
                A = gl.load(A_log + h).to(gl.float32)
                bias = gl.load(dt_bias + h).to(gl.float32)
        phase ^= 1
    if DECAY != NO_DECAY:
        last = first + (tiles - 1 - first) // step * step
        decay_tail(dG, across, raw, A, bias, dlog_decay, parts, last, HV, RAW, rows)
    tma.store_wait(0)


@gluon.jit
def persistent_gradient_kernel(
    q, k, write, log_decay, A_log, dt_bias, v, o, x, do, dv, table, states, adjoints,
    dq, dk, dwrite, dlog_decay, dbeta, parts, tiles,
    HV: gl.constexpr, GROUP: gl.constexpr, SCALE: gl.constexpr, L2NORM: gl.constexpr,
    DECAY: gl.constexpr, RAW: gl.constexpr, RANGE: gl.constexpr, WRITE: gl.constexpr,
):  # fmt: skip
    """``gradient_kernel`` of bfloat16, K = V = 128 and full chunks without documents; by
    descriptors of matrices [M, H K] or [M, HV V], those of states [NT HV V, K].

    tiles: NT * HV, of which every program takes as many as there are programs apart.
    """
    await_inputs()
    RESCALED: gl.constexpr = WRITE == RESCALED_KEY
    do_tile = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SWIZZLED)
    dv_tile = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SWIZZLED)
    x_tile = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SWIZZLED)
    S_tile = gl.allocate_shared_memory(gl.bfloat16, [1, D, D], SWIZZLED)
    E_tile = gl.allocate_shared_memory(gl.bfloat16, [1, D, D], SWIZZLED)
    q_tile = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SWIZZLED)
    k_tile = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SWIZZLED)
    dq_tile = gl.allocate_shared_memory(gl.bfloat16, [C, D], SWIZZLED)
    dk_tile = gl.allocate_shared_memory(gl.bfloat16, [C, D], SWIZZLED)
    scores = gl.allocate_shared_memory(gl.bfloat16, [2, C, C], SWIZZLED)
    w_tile = k_tile
    if RESCALED:
        w_tile = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SWIZZLED)
    v_tile = dq_tile
    o_tile = dq_tile
    if L2NORM:
        o_tile = gl.allocate_shared_memory(gl.bfloat16, [C, D], SWIZZLED)
        if not RESCALED:
            v_tile = gl.allocate_shared_memory(gl.bfloat16, [C, D], SWIZZLED)
    along_q_row = gl.allocate_shared_memory(gl.float32, [C], PLAIN)
    along_k_row = gl.allocate_shared_memory(gl.float32, [C], PLAIN)
    kept_row = gl.allocate_shared_memory(gl.float32, [C], PLAIN)
    decay_row = gl.allocate_shared_memory(gl.float32, [C, gl.num_warps() // 4], PAIRED)
    scalars = gl.allocate_shared_memory(gl.float32, [4 * C], PLAIN)
    have_rows = mbarrier.allocate_mbarrier()
    have_states = mbarrier.allocate_mbarrier()
    have_values = mbarrier.allocate_mbarrier()
    have_keys = mbarrier.allocate_mbarrier()
    free_values = mbarrier.allocate_mbarrier()
    free_keys = mbarrier.allocate_mbarrier()
    mbarrier.init(have_rows, count=1)
    mbarrier.init(have_states, count=1)
    mbarrier.init(have_values, count=1)
    mbarrier.init(have_keys, count=1)
    mbarrier.init(free_values, count=1)
    mbarrier.init(free_keys, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply_tiles, (
                log_decay, A_log, dt_bias, table, dq, dk, dwrite, dlog_decay, dbeta, parts, tiles,
                q_tile, k_tile, w_tile, v_tile, o_tile, x_tile, do_tile, dv_tile, S_tile, E_tile,
                scores, dq_tile, dk_tile, along_q_row, along_k_row, kept_row, decay_row, scalars,
                have_rows, have_states, have_values, have_keys, free_values, free_keys,
                HV, SCALE, L2NORM, DECAY, RAW, RANGE, WRITE,
            )),
            (fetch_tiles, (
                q, k, write, v, o, x, do, dv, states, adjoints, tiles, q_tile, k_tile, w_tile,
                v_tile, o_tile, x_tile, do_tile, dv_tile, S_tile, E_tile,
                have_rows, have_states, have_values, have_keys, free_values, free_keys,
                HV, GROUP, L2NORM, WRITE,
            )),
        ],
        [1],  # warps of the copying one, and their registers
        [40],
    )  # fmt: skip
