"""No kernel reads or writes outside the tensors of its launch.

No two programs of a launch write to one place. Every address under the interpreter is looked up.
"""

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from pdn import ops
from pdn.certification.problems import sample, sample_convolution
from pdn.ops import context, exchange
from pdn.ops import triton as kernels
from pdn.ops.recurrences import RECURRENCES
from pdn.ops.triton import convolution, sizes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")

# with empty documents, and so with chunks that nothing uses
BOUNDARIES = [0, 0, 1, 64, 64, 129, 130, 130]


@pytest.fixture
def outside(monkeypatch):
    """Record what the kernels touch outside their tensors, and what two programs store.

    Entries are (kernel, "load" or "store", bytes from the nearest tensor), and (kernel, "store of
    two programs", how many places) where what stays depends on the order in which a device runs
    them.
    """
    found, current = [], {}
    init, builder = interpreter.GridExecutor._init_args_hst, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def remember(self, arguments, constants):
        hosted, hosted_constants = init(self, arguments, constants)
        tensors = [
            x for x in map(interpreter._unwrap_tensor, hosted) if isinstance(x, torch.Tensor)
        ]
        spans = sorted(
            (x.data_ptr(), x.data_ptr() + x.nbytes)
            for x in tensors
            if x.numel() and x.is_contiguous()
        )
        spans += [
            (
                x.untyped_storage().data_ptr(),
                x.untyped_storage().data_ptr() + x.untyped_storage().nbytes(),
            )
            for x in tensors
            if not x.is_contiguous()
        ]
        current.update(name=self.fn.__name__, spans=np.array(sorted(spans), dtype=np.int64))
        current["writers"] = {}
        return hosted, hosted_constants

    def look_up(kind, pointers, mask):
        size = interpreter._get_np_dtype(pointers.get_element_ty())
        addresses = (
            pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
            .astype(np.int64)
            .ravel()
        )
        starts, ends = current["spans"].T
        distance = np.maximum(
            np.maximum(
                starts - addresses[:, None], addresses[:, None] + np.dtype(size).itemsize - ends
            ),
            0,
        )
        nearest = distance.min(1) if addresses.size else np.zeros(1)
        if nearest.any():
            found.append((current["name"], kind, int(nearest.max())))
        return addresses

    def checked_load(self, pointers, mask, *rest):
        look_up("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        addresses, program = look_up("store", pointers, mask), tuple(self.grid_idx)
        writers = current["writers"]
        shared = sum(writers.setdefault(x, program) != program for x in addresses.tolist())
        if shared:
            found.append((current["name"], "store of two programs", shared))
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", remember)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    return found


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow, id="dense"),
        pytest.param({"cu_seqlens": BOUNDARIES}, id="documents"),
    ],
)
@pytest.mark.parametrize(
    "raw_gates", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["raw", "activated"]
)
@pytest.mark.parametrize(
    "model",
    [m if m in ("gdn", "pkda") else pytest.param(m, marks=pytest.mark.slow) for m in RECURRENCES],
)
def test_every_address_is_in_a_tensor(model, raw_gates, options, outside):
    size = dict(
        batch=2,
        time=65,
        heads=1,
        value_heads=2,
        key=40,
        value=24,
        dtype=torch.float32,
        initial=True,
        final=True,
    )
    sample(RECURRENCES[model], raw_gates=raw_gates, **size, **options).run(kernels)
    assert not outside


@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 70, 260]], ids=["dense", "documents"])
def test_in_segments(outside, cu_seqlens, monkeypatch):
    monkeypatch.setattr(sizes, "MIN_SEGMENT", 1)
    monkeypatch.setattr(sizes, "PROGRAMS", 1 << 30)
    monkeypatch.setattr(sizes, "known", sizes.Problem)
    sample(
        RECURRENCES["pgdn"],
        batch=1,
        time=260,
        heads=1,
        key=16,
        dtype=torch.float32,
        initial=True,
        final=True,
        cu_seqlens=cu_seqlens,
    ).run(kernels)
    assert not outside


@pytest.mark.parametrize("cu_seqlens", [None, BOUNDARIES], ids=["dense", "documents"])
@pytest.mark.parametrize("margin", [0, 8], ids=["rows in a row", "rows of a wider tensor"])
def test_the_short_convolution(outside, margin, cu_seqlens):
    for width in (1, 4):
        options = dict(dtype=torch.float32, margin=margin, cu_seqlens=cu_seqlens)
        sample_convolution(2, 65, 24, width, **options).run(convolution.convolve)
    assert not outside


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True], ids=["dense", "documents"])
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "in segments"])
def test_on_a_piece_of_longer_sequences(outside, documents, segments, monkeypatch):
    """On the second of three pieces of 130 tokens, of two rows."""
    monkeypatch.setattr(exchange, "all_gather", lambda x, group, count: torch.stack([x] * count))
    if segments:
        monkeypatch.setattr(sizes, "MIN_SEGMENT", 1)
        monkeypatch.setattr(sizes, "PROGRAMS", 1 << 30)
        monkeypatch.setattr(sizes, "known", sizes.Problem)
    bounds = torch.tensor([0, 100, 390, 610, 780, 780], dtype=torch.int32)
    piece = context.Piece(None, 1, 3, 2, 130, bounds if documents else None)
    p = sample(RECURRENCES["pgdn"], batch=2, time=130, heads=1, key=16, dtype=torch.float32)
    p.cu_seqlens = piece.documents
    c = sample_convolution(2, 130, 24, dtype=torch.float32)
    c.cu_seqlens = piece.documents
    with context.split(piece):
        p.run("triton")
        c.run(lambda *x, **options: ops.short_convolution(*x, **options, backend="triton")[0])
    assert not outside
