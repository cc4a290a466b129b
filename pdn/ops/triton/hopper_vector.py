"""The gradients of all chunks with a decay per channel on compute capability 9.0.

It is to ``vector_gradient_kernel`` what ``hopper.py`` is to ``gradients.py``.

Products are transposed, [K, C]: a thread then has two channels and a quarter of the tokens, so
that sums over tokens, of which a decay per channel needs five, cross no warp. Results take the
place of operands in shared memory; the copying warp has them brought away and the next operands
brought there. The factors e^R come from the gates themselves: instructions, which there is time
for, in place of bytes, for which there is none.
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
    NORM_K,
    NORM_Q,
    RESCALED_KEY,
    ROWS,
    C,
    await_inputs,
    exp,
    inverse,
)
from pdn.ops.triton.gates import decay_of, decay_slope, gain_gradient
from pdn.ops.triton.hopper import PLAIN, SIZE, SWIZZLED, TILE, D, zero
from pdn.ops.triton.vector import ENDS, KEEP, RATES, WIDTH, lift

BLOCKS = gl.constexpr(SIZE // 16)  # of WIDTH channels


@gluon.jit
def from_lane(x, distance: gl.constexpr):
    """x of the lane whose number differs by ``distance``, a power of two."""
    if distance == 1:
        return gl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;", "=f,f", [x], gl.float32, False, 1
        )
    else:
        return gl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;", "=f,f", [x], gl.float32, False, 1
        )


@gluon.jit
def to_float(x):
    """float32 of bfloat16, two numbers in two instructions; the compiler's own way takes three."""
    return gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], gl.float32, True, 2
    )


@gluon.jit
def named_as(x, y):
    """x, whose elements are where those of y are, in y's layout."""
    return gl.convert_layout(x, y.type.layout, assert_trivial=True)


@gluon.jit
def suffix_sums(x, after, lane):
    """[D, C]: each token of x with all after it and ``after`` [D, C], of which column 0 is read.

    A product's layout: a lane has two tokens of each eight, with three lanes beside it, and the
    eights are its own. lane [D, C]: the token's number.
    """
    even, odd = gl.split(gl.reshape(x, [D, 8, 4, 2]))
    which, _ = gl.split(gl.reshape(lane, [D, 8, 4, 2]))
    # 1 where the lane beside, or the two across, have later tokens, else 0
    of_beside = gl.where((which // 2) % 2 == 0, 1.0, 0.0)
    of_across = gl.where((which // 4) % 2 == 0, 1.0, 0.0)
    pair = even + odd
    beside = from_lane(pair, 1)
    two = pair + beside
    across = from_lane(two, 2)
    later = of_beside * beside + of_across * across
    eights = gl.permute(two + across, [0, 2, 1])
    # exclusive sums of the eights from the end, by halves
    e4, o4 = gl.split(gl.reshape(eights, [D, 4, 4, 2]))
    e2, o2 = gl.split(gl.reshape(e4 + o4, [D, 4, 2, 2]))
    _, o1 = gl.split(e2 + o2)
    start, _ = gl.split(gl.reshape(after, [D, 8, 4, 2]))
    s4, _ = gl.split(gl.reshape(gl.permute(start, [0, 2, 1]), [D, 4, 4, 2]))
    s2, _ = gl.split(gl.reshape(s4, [D, 4, 2, 2]))
    s1, _ = gl.split(s2)
    y2 = named_as(gl.join(s1 + o1, s1), o2)
    y4 = named_as(gl.reshape(gl.join(y2 + o2, y2), [D, 4, 4]), o4)
    y8 = named_as(gl.reshape(gl.join(y4 + o4, y4), [D, 4, 8]), eights)
    last = odd + later + named_as(gl.permute(y8, [0, 2, 1]), odd)
    return named_as(gl.reshape(gl.join(even + last, last), [D, C]), x)


@gluon.jit
def move_vector_tiles(
    query, key, write, log_decay, v, o, x, do, dv, states, adjoints, dq, dk, dwrite, dlog_decay,
    tiles, q_tile, k_tile, w_tile, raw_tile, gate_tile, v_tile, o_tile, x_tile, do_tile, dv_tile,
    S_tile, E_tile, have_rows, have_states, have_v, have_o, have_keys, have_gates,
    free_values, free_scores, ready_keys, ready_decay,
    HV: gl.constexpr, L2NORM: gl.constexpr, RAW: gl.constexpr, WRITE: gl.constexpr,
):  # fmt: skip
    """What the copying warp does: have every tile's operands brought as soon as there is room, and
    its results taken away.
    """
    RESCALED: gl.constexpr = WRITE == RESCALED_KEY
    first = gl.program_id(0)
    step = gl.num_programs(0)
    phase = 1  # of barriers on which nothing has arrived: the phase before has ended
    for t in range(first, tiles, step):
        i = t // HV
        row = i * C
        own = (t - i * HV) * D
        was = t - step  # the tile whose results are where this one's operands go
        i_was = was // HV
        row_was = i_was * C
        own_was = (was - i_was * HV) * D
        mbarrier.wait(free_values, phase)
        mbarrier.expect(have_rows, 3 * TILE)
        tma.async_copy_global_to_shared(do, [row, own], have_rows, do_tile.index(0))
        tma.async_copy_global_to_shared(x, [row, own], have_rows, x_tile.index(0))
        tma.async_copy_global_to_shared(dv, [row, own], have_rows, dv_tile.index(0))
        mbarrier.expect(have_states, 4 * TILE)
        tma.async_copy_global_to_shared(states, [t * D, 0], have_states, S_tile.index(0))
        tma.async_copy_global_to_shared(adjoints, [t * D, 0], have_states, E_tile.index(0))
        if L2NORM:
            if not RESCALED:
                mbarrier.expect(have_v, TILE)
                tma.async_copy_global_to_shared(v, [row, own], have_v, v_tile)
                mbarrier.wait(free_scores, phase)
            mbarrier.expect(have_o, TILE)
            tma.async_copy_global_to_shared(o, [row, own], have_o, o_tile)
        mbarrier.wait(ready_keys, phase)
        if t > first:
            tma.async_copy_shared_to_global(dq, [row_was, own_was], q_tile.index(0))
            tma.async_copy_shared_to_global(dk, [row_was, own_was], k_tile.index(0))
            if RESCALED:
                tma.async_copy_shared_to_global(dwrite, [row_was, own_was], w_tile.index(0))
            tma.store_wait(0)
        mbarrier.expect(have_keys, 3 * TILE)
        tma.async_copy_global_to_shared(write, [t * C, 0], have_keys, w_tile.index(0))
        tma.async_copy_global_to_shared(key, [t * C, 0], have_keys, k_tile.index(0))
        tma.async_copy_global_to_shared(query, [t * C, 0], have_keys, q_tile.index(0))
        mbarrier.wait(ready_decay, phase)
        if t > first:
            tma.async_copy_shared_to_global(dlog_decay, [row_was, own_was], raw_tile.index(0))
            tma.store_wait(0)
        mbarrier.expect(have_gates, TILE)
        tma.async_copy_global_to_shared(log_decay, [row, own], have_gates, raw_tile.index(0))
        phase ^= 1
    last = first + (tiles - 1 - first) // step * step
    i_last = last // HV
    row_last = i_last * C
    own_last = (last - i_last * HV) * D
    mbarrier.wait(ready_keys, phase)
    tma.async_copy_shared_to_global(dq, [row_last, own_last], q_tile.index(0))
    tma.async_copy_shared_to_global(dk, [row_last, own_last], k_tile.index(0))
    if RESCALED:
        tma.async_copy_shared_to_global(dwrite, [row_last, own_last], w_tile.index(0))
    mbarrier.wait(ready_decay, phase)
    tma.async_copy_shared_to_global(dlog_decay, [row_last, own_last], raw_tile.index(0))
    tma.store_wait(0)


@gluon.jit
def multiply_vector_tiles(
    A_log, dt_bias, table, ends, steep, dbeta, d_rate, d_bias, tiles,
    q_tile, k_tile, w_tile, raw_tile, gate_tile, v_tile, o_tile, x_tile, do_tile, dv_tile,
    S_tile, E_tile, scores, sums, scalars,
    have_rows, have_states, have_v, have_o, have_keys, have_gates,
    free_values, free_scores, ready_keys, ready_decay,
    HV: gl.constexpr, SCALE: gl.constexpr, L2NORM: gl.constexpr, RAW: gl.constexpr,
    RANGE: gl.constexpr, WRITE: gl.constexpr,
):  # fmt: skip
    """What the other warps do: ``vector_gradient_kernel`` of one tile after the other."""
    RESCALED: gl.constexpr = WRITE == RESCALED_KEY
    HALVES: gl.constexpr = gl.num_warps() // 4  # warpgroups: of channels, of a score's columns
    tall: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, HALVES], [16, C // HALVES, 16])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    channels: gl.constexpr = gl.SliceLayout(1, tall)
    tokens: gl.constexpr = gl.SliceLayout(0, tall)
    square_rows: gl.constexpr = gl.SliceLayout(1, square)
    flat_rows: gl.constexpr = gl.SliceLayout(1, flat)
    at_j = gl.arange(0, C, square_rows)[:, None]
    at_i = gl.arange(0, C, gl.SliceLayout(0, square))[None, :]
    channel = gl.arange(0, D, channels)
    lane = gl.arange(0, C, tokens)[None, :] + gl.zeros([D, C], gl.int32, tall)
    # a warp's rows; their mean is between 16 w + 7 and 16 w + 8
    warp = (gl.sum(gl.reshape(channel, [RATES, D // RATES]), 1) - 120) // 256

    first = gl.program_id(0)
    step = gl.num_programs(0)
    at_scalars = BETA * C + gl.arange(0, 4 * C, line)  # beta, G and the norms
    ahead = gl.load(table + first.to(gl.int64) * (ROWS * C) + at_scalars)
    ahead_keep = gl.load(ends + (first.to(gl.int64) * ENDS + KEEP) * D + channel)
    flags = steep + first.to(gl.int64) * (2 * BLOCKS) + channel // WIDTH
    ahead_steep = gl.load(flags) | gl.load(flags + BLOCKS)
    ahead_rate = 0.0
    ahead_bias = gl.zeros([D], gl.float32, channels)
    if RAW:
        ahead_rate = gl.load(A_log + first % HV).to(gl.float32)
        ahead_bias = gl.load(dt_bias + (first % HV) * D + channel).to(gl.float32)
    phase = 0
    for t in range(first, tiles, step):
        i = t // HV
        h = t - i * HV
        S = S_tile.index(zero())
        E = E_tile.index(zero())
        g = do_tile.index(zero())
        d = dv_tile.index(zero())
        x = x_tile.index(zero())
        scalars.index(zero()).store(ahead)
        survives = ahead_keep / lift(gl.bfloat16)
        is_steep = ahead_steep
        bias = ahead_bias[:, None]
        rate = exp(ahead_rate) if RAW else 1.0

        mbarrier.wait(have_rows, phase)
        no_square = gl.zeros([C, C], gl.float32, square)
        no_tall = gl.zeros([D, C], gl.float32, tall)
        gt = g.permute([1, 0])
        dt = d.permute([1, 0])
        of_P = warpgroup_mma(x, gt, no_square, use_acc=False, is_async=True)
        of_L = warpgroup_mma(x, dt, no_square, use_acc=False, is_async=True)
        mbarrier.wait(have_states, phase)
        St = S.permute([1, 0])
        Et = E.permute([1, 0])
        d_query = warpgroup_mma(St, gt, no_tall, use_acc=False, is_async=True)
        d_key = warpgroup_mma(St, dt, no_tall, use_acc=False, is_async=True)
        d_write = warpgroup_mma(Et, x.permute([1, 0]), no_tall, use_acc=False, is_async=True)

        # sums along values, beside the products
        b_flat = scalars.index(zero()).slice(0, C).load(flat_rows)
        d_flat = to_float(d.load(flat))
        along_w = gl.sum(d_flat * to_float(x.load(flat)), 1)
        d_beta = gain_gradient(along_w * inverse(b_flat), b_flat, RANGE)
        if L2NORM:
            if not RESCALED:
                mbarrier.wait(have_v, phase)
                along_v = gl.sum(d_flat * to_float(v_tile.load(flat)), 1)
                sums.index(zero()).slice(C, C).store(2.0 * along_w - along_v)
            mbarrier.wait(have_o, phase)
            o_flat = to_float(o_tile.load(flat))
            along_q = gl.sum(to_float(g.load(flat)) * o_flat, 1)
            sums.index(zero()).slice(0, C).store(along_q / (SCALE * SCALE))
            if not RESCALED:
                gl.barrier()  # the scores take o's place
        b_j = scalars.index(zero()).slice(0, C).load(square_rows)[:, None]
        of_P, of_L = warpgroup_mma_wait(3, [of_P, of_L])
        scores.index(0).store(gl.where(at_i >= at_j, of_P * b_j, 0.0).to(gl.bfloat16))
        scores.index(1).store(gl.where(at_i > at_j, -of_L * b_j, 0.0).to(gl.bfloat16))
        S_low = to_float(S.slice(0, C).permute([1, 0]).load(tall))
        passed = S_low * to_float(E.slice(0, C).permute([1, 0]).load(tall))
        S_high = to_float(S.slice(C, C).permute([1, 0]).load(tall))
        passed += S_high * to_float(E.slice(C, C).permute([1, 0]).load(tall))
        kept = gl.sum(passed, 1) * survives
        d_query, d_key, d_write = warpgroup_mma_wait(0, [d_query, d_key, d_write])
        fence_async_shared()
        gl.barrier()
        mbarrier.arrive(free_values, count=1)

        mbarrier.wait(have_keys, phase)
        dP = scores.index(zero())
        dL = scores.index(1 + zero())
        q = q_tile.index(zero())
        k = k_tile.index(zero())
        w = w_tile.index(zero())
        qt = q.permute([1, 0])
        kt = k.permute([1, 0])
        wt = w.permute([1, 0])
        d_query = warpgroup_mma(wt, dP, d_query, is_async=True)
        d_key = warpgroup_mma(wt, dL, -d_key, is_async=True)
        b = scalars.index(zero()).slice(0, C).load(tokens) / lift(gl.bfloat16)
        d_write *= b[None, :]
        kept += gl.sum(to_float(wt.load(tall)) * d_write, 1)
        d_write = warpgroup_mma(qt, dP.permute([1, 0]), d_write, is_async=True)
        d_write = warpgroup_mma(kt, dL.permute([1, 0]), d_write, is_async=True)
        # Not before the fence, which would wait for it.
        after = gl.minimum(t + step, tiles - 1).to(gl.int64)
        ahead = gl.load(table + after * (ROWS * C) + at_scalars)
        ahead_keep = gl.load(ends + (after * ENDS + KEEP) * D + channel)
        flags = steep + after * (2 * BLOCKS) + channel // WIDTH
        ahead_steep = gl.load(flags) | gl.load(flags + BLOCKS)
        if RAW:
            ahead_rate = gl.load(A_log + after % HV).to(gl.float32)
            ahead_bias = gl.load(dt_bias + (after % HV) * D + channel).to(gl.float32)
        at_flat = (i * C + gl.arange(0, C, flat_rows)).to(gl.int64) * HV + h
        gl.store(dbeta + at_flat, d_beta)

        # What is left of the products is finished before the barrier behind which results take
        # the operands' places.
        mbarrier.wait(have_gates, phase)
        gate = to_float(raw_tile.index(zero()).permute([1, 0]).load(tall))
        gate = decay_of(gate, rate, bias, RAW)
        if RAW:
            gate_tile.index(zero()).permute([1, 0]).store(gate.to(gl.bfloat16))
        # from the middle row, as fold_kernel has them
        behind = gl.sum(gl.where(lane > C // 2, gate, 0.0), 1)
        behind = gl.zeros([D, C], gl.float32, tall) - behind[:, None]
        up = exp(gate - suffix_sums(gate, behind, lane))
        d_query, d_key, d_write = warpgroup_mma_wait(0, [d_query, d_key, d_write])
        numbers = scalars.index(zero())
        qx = to_float(qt.load(tall))
        dG = qx * d_query
        d_query *= up
        if L2NORM:
            along_q = sums.index(zero()).slice(0, C).load(tokens)[None, :]
            d_query -= along_q * (inverse(up) * qx)
        d_query *= numbers.slice((NORM_Q - BETA) * C, C).load(tokens)[None, :]
        dq = d_query.to(gl.bfloat16)
        dG += to_float(kt.load(tall)) * d_key
        wx = to_float(wt.load(tall))
        dG -= wx * d_write
        if L2NORM and not RESCALED:
            d_key -= sums.index(zero()).slice(C, C).load(tokens)[None, :] * wx
        d_key *= up
        d_write *= inverse(up)
        norm_k = numbers.slice((NORM_K - BETA) * C, C).load(tokens)[None, :]
        if RESCALED:
            dw = (norm_k * d_write).to(gl.bfloat16)
        else:
            d_key += d_write
        dk = (norm_k * d_key).to(gl.bfloat16)
        gl.barrier()
        if L2NORM and not RESCALED:
            mbarrier.arrive(free_scores, count=1)
        qt.store(dq)
        kt.store(dk)
        if RESCALED:
            wt.store(dw)
        fence_async_shared()
        gl.barrier()
        mbarrier.arrive(ready_keys, count=1)

        d_g = suffix_sums(dG, kept[:, None] + gl.zeros([D, C], gl.float32, tall), lane)
        slot = t.to(gl.int64)
        if RAW:
            gate = to_float(gate_tile.index(zero()).permute([1, 0]).load(tall))
            rates = gl.sum(d_g * gate, 1)
            rates = gl.where(is_steep != 0, 0.0, rates)  # a steep block adds its own
            rates = gl.sum(gl.reshape(rates, [RATES, D // RATES]), 1)
            gl.store(d_rate + slot * (RATES + BLOCKS) + warp, rates)
            gl.store(d_rate + slot * (RATES + BLOCKS) + RATES + warp, rates * 0.0)
            d_g *= decay_slope(gate, rate, False)
            gl.store(d_bias + slot * D + channel, gl.sum(d_g, 1))
        raw_tile.index(zero()).permute([1, 0]).store(d_g.to(gl.bfloat16))
        fence_async_shared()
        gl.barrier()
        mbarrier.arrive(ready_decay, count=1)
        phase ^= 1


@gluon.jit
def persistent_vector_gradient_kernel(
    query, key, write, log_decay, A_log, dt_bias, v, o, x, do, dv, table, ends, steep, states,
    adjoints, dq, dk, dwrite, dlog_decay, dbeta, d_rate, d_bias, tiles,
    HV: gl.constexpr, SCALE: gl.constexpr, L2NORM: gl.constexpr, RAW: gl.constexpr,
    RANGE: gl.constexpr, WRITE: gl.constexpr,
):  # fmt: skip
    """``vector_gradient_kernel`` of bfloat16, K = V = 128 and full chunks without documents; by
    descriptors of matrices [NT HV C, K] (of the folded operands), [M, HV V] and [M, HV K], those of
    states [NT HV V, K].

    d_rate: [NT, HV, RATES + BLOCKS].  tiles: NT * HV, of which every program takes as many as
    there are programs apart.
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
    w_tile = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SWIZZLED)
    raw_tile = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SWIZZLED)
    gate_tile = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SWIZZLED)
    scores = gl.allocate_shared_memory(gl.bfloat16, [2, C, C], SWIZZLED)
    o_tile = scores._reinterpret(gl.bfloat16, [C, D], SWIZZLED)
    v_tile = o_tile
    if L2NORM:
        v_tile = gl.allocate_shared_memory(gl.bfloat16, [C, D], SWIZZLED)
        if RESCALED:  # whose place o takes
            o_tile = v_tile
    sums = gl.allocate_shared_memory(gl.float32, [1, 2 * C], PLAIN)  # <q, dq> and <k, dk>
    scalars = gl.allocate_shared_memory(gl.float32, [1, 4 * C], PLAIN)
    have_rows = mbarrier.allocate_mbarrier()
    have_states = mbarrier.allocate_mbarrier()
    have_v = mbarrier.allocate_mbarrier()
    have_o = mbarrier.allocate_mbarrier()
    have_keys = mbarrier.allocate_mbarrier()
    have_gates = mbarrier.allocate_mbarrier()
    free_values = mbarrier.allocate_mbarrier()
    free_scores = mbarrier.allocate_mbarrier()
    ready_keys = mbarrier.allocate_mbarrier()
    ready_decay = mbarrier.allocate_mbarrier()
    mbarrier.init(have_rows, count=1)
    mbarrier.init(have_states, count=1)
    mbarrier.init(have_v, count=1)
    mbarrier.init(have_o, count=1)
    mbarrier.init(have_keys, count=1)
    mbarrier.init(have_gates, count=1)
    mbarrier.init(free_values, count=1)
    mbarrier.init(free_scores, count=1)
    mbarrier.init(ready_keys, count=1)
    mbarrier.init(ready_decay, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply_vector_tiles, (
                A_log, dt_bias, table, ends, steep, dbeta, d_rate, d_bias, tiles,
                q_tile, k_tile, w_tile, raw_tile, gate_tile, v_tile, o_tile, x_tile, do_tile,
                dv_tile, S_tile, E_tile, scores, sums, scalars,
                have_rows, have_states, have_v, have_o, have_keys, have_gates,
                free_values, free_scores, ready_keys, ready_decay,
                HV, SCALE, L2NORM, RAW, RANGE, WRITE,
            )),
            (move_vector_tiles, (
                query, key, write, log_decay, v, o, x, do, dv, states, adjoints,
                dq, dk, dwrite, dlog_decay, tiles,
                q_tile, k_tile, w_tile, raw_tile, gate_tile, v_tile, o_tile, x_tile, do_tile,
                dv_tile, S_tile, E_tile,
                have_rows, have_states, have_v, have_o, have_keys, have_gates,
                free_values, free_scores, ready_keys, ready_decay,
                HV, L2NORM, RAW, WRITE,
            )),
        ],
        [1],  # warps of the copying one, and their registers
        [40],
    )  # fmt: skip
