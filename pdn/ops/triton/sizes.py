"""What one call is: its sizes and switches, how its kernels are configured, and what they fill."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from pdn.ops.recurrences import Solve
from pdn.ops.triton import compiled
from pdn.ops.triton.common import CHUNK, NUM_ROWS
from pdn.ops.triton.compiled import cdiv
from pdn.ops.triton.contract import Gradients, Inputs, Options, Results, Saved
from pdn.ops.triton.curvature import NUM_GATES
from pdn.ops.triton.vector import NUM_ENDS, STEEP, STEEP_HALF, WIDTH

FROM_KEY, FROM_TENSOR, RESCALED_KEY, RESCALED_QUERY = range(4)
NO_DECAY, SCALAR, VECTOR = range(3)

MIN_SEGMENT = 16  # chunks; three scans of a segment against one of the sequence
PROGRAMS = 128  # what fills a device with the serial kernels: one a multiprocessor


@dataclass(frozen=True)
class Problem:
    """Holds the sizes and switches of one call, forward and backward, and what they imply."""

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

    @functools.cached_property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @functools.cached_property
    def common(self) -> dict:
        """Compile-time arguments of all kernels."""
        acc = tl.float64 if self.dtype == torch.float64 else tl.float32
        return dict(HV=self.HV, K=self.K, BK=padded(self.K), VARLEN=self.varlen, ACC=acc)

    @functools.cached_property
    def precision(self) -> str:
        return "tf32" if self.dtype.itemsize == 2 else "bf16x6"

    def serial_config(self, V: int, stages: int | None = None) -> dict:
        """Of V values, those that a program of the serial kernels takes, its warps, and its
        pipeline depth: of all loads, if that is given and the size the common one, else of those
        that products need. (Left alone, the assembler for compute capability 8.0 stops at 32
        registers.)
        """
        if self.dtype.itemsize > 2:
            return dict(BV=min(64, padded(V)), num_warps=4, STAGES=None, num_stages=1)
        if padded(V) == 128 and self.K <= 128:
            return dict(BV=128, num_warps=8, STAGES=stages, num_stages=2, maxnreg=255)
        return dict(
            BV=min(64, padded(V)), num_warps=4, STAGES=None, num_stages=2 if self.K <= 128 else 1
        )

    @functools.cached_property
    def segment(self) -> int:
        """Chunks after which sequences are cut, so that few and long ones fill the device; 0: they
        are not.

        With ``cu_seqlens`` a row of the batch may be one document or many: cut as if it were one,
        since documents shorter than a segment cost nothing more. A segment is scanned up to three
        times, so two are no gain.
        """
        if self.K > 128:
            return 0
        programs = self.B * self.HV * cdiv(self.V, self.serial_config(self.V)["BV"])
        length = max(MIN_SEGMENT, cdiv(cdiv(self.T, CHUNK), max(1, PROGRAMS // programs)))
        return length if cdiv(self.T, CHUNK) > 2 * length else 0

    @functools.cached_property
    def wholes(self) -> int:
        """Segments that have another after them in their sequence; with ``cu_seqlens``, at most so
        many.
        """
        if not self.segment:
            return 0
        if self.varlen:
            return self.B * self.T // (CHUNK * self.segment)
        return self.B * (cdiv(cdiv(self.T, CHUNK), self.segment) - 1)

    @functools.cached_property
    def whole_tiles(self) -> bool:
        """Whether the chunks are the full tiles that ``persistent_gradient_kernel`` is written
        for.
        """
        return self.full_tiles and self.decay != VECTOR

    @functools.cached_property
    def whole_vector_tiles(self) -> bool:
        """The same for ``persistent_vector_gradient_kernel``."""
        return self.full_tiles and self.decay == VECTOR

    @functools.cached_property
    def full_tiles(self) -> bool:
        return (
            self.dtype == torch.bfloat16
            and self.K == self.V == 128
            and self.T % CHUNK == 0
            and not self.varlen
            and self.write in (FROM_KEY, RESCALED_KEY)
        )

    @functools.cached_property
    def gradient_config(self) -> dict:
        """Keys a step of the gradient kernel takes, its warps and its pipeline depth."""
        return dict(
            BK=16 if self.dtype.itemsize > 2 else 32,
            num_warps=4,
            num_stages=2 if self.K <= 128 else 1,
        )

    @functools.cached_property
    def gradient_values(self) -> int:
        """Values that the gradient kernels hold at once: all where shared memory has room."""
        return 32 if self.dtype.itemsize > 2 else min(128, padded(self.V))

    @functools.cached_property
    def prepare_config(self) -> dict:
        """Registers for a third program a multiprocessor, where that spills nothing."""
        return dict(num_warps=4) | (
            dict(maxnreg=168) if self.dtype.itemsize == 2 and self.K <= 128 else {}
        )

    @functools.cached_property
    def summary_config(self) -> dict:
        """Tokens at a time, and the warps, of the preconditioner's summary."""
        return dict(ROWS=8, num_warps=1)

    @functools.cached_property
    def curvature_config(self) -> dict:
        """Tokens between two that A is kept of, and the warps, of the preconditioner's other
        kernels.
        """
        return dict(R=8 if self.K <= 128 and self.dtype.itemsize <= 4 else 4, num_warps=1)

    @functools.cached_property
    def fold_config(self) -> dict:
        """What makes a block of channels steep, and the warps."""
        limit = STEEP_HALF if self.dtype == torch.float16 else STEEP
        return dict(W=min(WIDTH.value, padded(self.K)), LIMIT=limit.value, num_warps=1)

    @functools.cached_property
    def vector_config(self) -> dict:
        """``gradient_config`` of a vector decay."""
        return dict(
            BK=WIDTH.value,
            num_warps=4,
            STAGES=3 if self.dtype.itemsize == 2 and self.K <= 128 else 1,
        )

    @functools.cached_property
    def steep_config(self) -> dict:
        """The same of the steep kernels."""
        return dict(BK=WIDTH.value, num_warps=4, num_stages=1)


def padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def problem(i: Inputs, solve: Solve) -> Problem:
    """Return the problem that a call is."""
    B, T, H, K = i.q.shape
    HV, V = i.v.shape[2:]
    decay = NO_DECAY if i.log_decay is None else SCALAR if i.log_decay.ndim == 3 else VECTOR
    write = FROM_KEY if i.write_k is None else FROM_TENSOR
    if i.P_log_decay is not None:
        write = RESCALED_KEY if solve == "online" else RESCALED_QUERY
    if i.cu_seqlens is None:
        N, NT = B, B * -(-T // CHUNK)
    else:
        N = i.cu_seqlens.shape[0] - 1
        NT = B * T // CHUNK + N
    numbers = all(type(size) is int for size in (B, T, H, HV, K, V, N))  # a tracer's may be symbols
    make = known if numbers else Problem
    return make(B, T, H, HV, K, V, N, NT, i.cu_seqlens is not None, decay, write, i.v.dtype)


known = functools.lru_cache(4096)(Problem)


def absent(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor, which stands for a result that a call does not have.

    It is always the same one, unless something traces.
    """
    return (
        _absent(like.device, dtype) if type(like) is Tensor else like.new_empty((0,), dtype=dtype)
    )


@functools.cache
def _absent(device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # such a tensor could not be saved for a backward pass
        return torch.empty(0, device=device, dtype=dtype)


def has_persistent_vector(p: Problem, i: Inputs, options: Options) -> bool:
    """Return whether ``persistent_vector_gradient_kernel`` differentiates the chunks.

    It reads the gates themselves, so what the other kernel would read is not kept.
    """
    return (
        p.whole_vector_tiles
        and options.online
        and i.log_decay is not None
        and i.log_decay.dtype == p.dtype
        and compiled.persistent_programs(compiled.current_device()) > 0
    )


def empty_results(p: Problem, i: Inputs, options: Options) -> tuple[Results, Saved]:
    """Return uninitialised results of the forward pass; the shapes its fake uses too."""

    def empty(needed, *shape, dtype=p.dtype):
        return i.v.new_empty(shape, dtype=dtype) if needed else absent(i.v, dtype)

    M, HV, K, V, NT = p.B * p.T, p.HV, p.K, p.V, p.NT
    online, save, raw = options.online, options.save, i.A_log is not None
    preconditioned, vector = p.write in (RESCALED_KEY, RESCALED_QUERY), p.decay == VECTOR
    factors = vector and save and not has_persistent_vector(p, i, options)
    rows = CHUNK // p.curvature_config["R"]
    split, later = options.pieces > 1, options.later
    cut = p.wholes + (p.B if split else 0)
    results = Results(
        o=i.v.new_empty(p.B, p.T, HV, V),
        S=empty(options.final, p.N, HV, K, V, dtype=p.acc),
        A=empty(preconditioned, p.N, HV, K, dtype=p.acc),
    )
    return results, Saved(
        table=empty(True, NT, HV, NUM_ROWS, CHUNK, dtype=p.acc),
        rescaled=empty(preconditioned, M, HV, K),
        query=empty(vector, NT, HV, CHUNK, K),
        key=empty(vector and online, NT, HV, CHUNK, K),
        write=empty(vector, NT, HV, CHUNK, K),
        growth=empty(factors, NT, HV, CHUNK, K),
        gates=empty(factors and raw, NT, HV, CHUNK, K),
        decay_sums=empty(vector, NT, HV, CHUNK, K, dtype=p.acc),
        steep=empty(vector, NT, HV, 2, cdiv(K, WIDTH.value), dtype=torch.int32),
        ends=empty(vector, NT, HV, NUM_ENDS, K, dtype=p.acc),
        T=empty(online, NT, HV, CHUNK, CHUNK),
        P=empty(True, NT, HV, CHUNK, CHUNK),
        x=empty(save and online, M, HV, V),
        states=empty(save, NT, HV, V, K),
        transitions=empty(p.segment > 0 or options.pieces > 2, cut, HV, K, K, dtype=p.acc),
        passing=empty(options.pieces > 2, later, p.B, HV, K, K, dtype=p.acc),
        curvature_passing=empty(split and preconditioned, later, p.B, HV, 1, dtype=p.acc),
        border=empty(split and p.varlen, p.wholes + p.N, 2, dtype=torch.int32),
        A=empty(preconditioned, NT, HV, K, dtype=p.acc),
        curvature=empty(preconditioned and save, NT, HV, rows, K, dtype=p.acc),
        curvature_gates=empty(preconditioned, NT, HV, NUM_GATES, CHUNK, dtype=p.acc),
        chunks=empty(p.varlen, NT, 2, dtype=torch.int32),
        offsets=empty(p.varlen, p.N + 1, dtype=torch.int32),
        segments=empty(p.varlen and p.segment > 0, p.wholes + p.N, 4, dtype=torch.int32),
    )


def empty_gradients(p: Problem, i: Inputs, options: Options) -> Gradients:
    """Return uninitialised gradients; the shapes the fake uses too."""

    def empty(needed, *shape, dtype=p.acc):
        return i.v.new_empty(shape, dtype=dtype) if needed else absent(i.v, dtype)

    def like(x):
        return empty(False) if x is None else torch.empty_like(x)

    key = p.B, p.T, p.HV, p.K
    raw, preconditioner_is_raw = i.A_log is not None, i.P_A_log is not None
    preconditioned = i.P_log_decay is not None
    return Gradients(
        q=empty(True, *key, dtype=p.dtype),
        k=empty(True, *key, dtype=p.dtype),
        v=torch.empty_like(i.v),
        beta=like(i.beta),
        log_decay=like(i.log_decay),
        A_log=empty(raw, p.HV),
        dt_bias=empty(raw, *(() if i.dt_bias is None else i.dt_bias.shape)),
        write_k=empty(p.write in (FROM_TENSOR, RESCALED_KEY), *key, dtype=p.dtype),
        P_log_decay=like(i.P_log_decay),
        P_A_log=empty(preconditioner_is_raw, p.HV),
        P_dt_bias=empty(preconditioner_is_raw, p.HV),
        P_beta=like(i.P_beta),
        mu=empty(preconditioned and not options.inverse, p.HV),
        S=empty(i.S is not None, p.N, p.HV, p.K, p.V),
        A=empty(preconditioned, p.N, p.HV, p.K),
    )
