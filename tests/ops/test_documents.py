"""The tables of chunks and segments that the kernels read, against plain Python."""

from itertools import pairwise

import pytest
import torch

from pdn.ops.triton.documents import document_tables

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")


def expected_tables(bounds, NT, segment, wholes):
    chunks, offsets, whole, last = [], [0], [], []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        starts = range(begin, end, 64)
        chunks += [[start, min(start + 64, end)] for start in starts]
        first, count, before = offsets[-1], len(starts), -1
        while count > segment:
            whole.append([n, first, segment, before])
            first, count, before = first + segment, count - segment, len(whole) - 1
        last.append([n, first, count, before])
        offsets.append(len(chunks))
    chunks += [[0, 0]] * (NT - len(chunks))
    whole += [[0, 0, 0, -1]] * (wholes - len(whole))
    return chunks, offsets, whole + last


@pytest.mark.parametrize("segment", [1, 2, 16])
@pytest.mark.parametrize(
    "lengths",
    [[0, 1, 63, 64, 65, 128, 129, 0], [5000], [7] * 300, [0] * 200 + [1024, 3000] + [0] * 200],
    ids=["around a chunk", "one", "many short ones", "padded with empty ones"],
)
def test_every_chunk_and_segment_of_a_document_is_where_it_lies(lengths, segment):
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens, N = int(bounds[-1]), len(lengths)
    NT, wholes = tokens // 64 + N, tokens // (64 * segment)
    found = document_tables(bounds, NT, segment, wholes)
    expected = expected_tables(bounds.tolist(), NT, segment, wholes)
    for table, x in zip(found, expected):
        assert table.tolist() == x


def test_documents_that_are_not_cut_have_no_table_of_segments():
    chunks, offsets, segments = document_tables(torch.tensor([0, 70], dtype=torch.int32), 3, 0, 0)
    assert chunks.tolist() == [[0, 64], [64, 70], [0, 0]] and offsets.tolist() == [0, 2]
    assert segments.numel() == 0
