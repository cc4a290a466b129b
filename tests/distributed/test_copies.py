"""Copies from the device that are read late."""

from itertools import pairwise

import pytest
import torch

from pdn.distributed import copies


def test_values_arrive_when_they_are_there_however_late_they_are_read(monkeypatch):
    clock = iter([1.0, 3.0])
    monkeypatch.setattr(copies.time, "perf_counter", lambda: next(clock))
    first, second = (copies.HostCopy(torch.full((2,), x)) for x in (1.0, 2.0))
    assert second.read() == [2.0, 2.0] and first.read() == [1.0, 1.0]
    assert second.arrived.seconds_since(first.arrived) == 2.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_is_the_gpu_that_says_when():
    device = torch.device("cuda")
    torch.cuda._sleep(1)  # the first launch takes as long as ten million cycles
    torch.ones(1, device=device)
    moments, found = [copies.Moment(device)], []
    for cycles in (10**7, 10**8):
        torch.cuda._sleep(cycles)
        found.append(copies.HostCopy(torch.ones(1, device=device)))
        moments.append(found[-1].arrived)
    assert [copy.read() for copy in found] == [[1.0], [1.0]]
    short, long = (after.seconds_since(before) for before, after in pairwise(moments))
    assert long > 3 * short > 0
