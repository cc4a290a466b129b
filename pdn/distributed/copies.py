"""Copies between host and device for which neither waits."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Moment:
    """Marks a point in a device's work: what was asked of it before is done, nothing after."""

    def __init__(self, device: torch.device):
        self._event, self._at = None, time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Return when the device is there."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Return the seconds between two moments of one device, which is past both."""
        if self._event is None or earlier._event is None:
            return self._at - earlier._at
        return earlier._event.elapsed_time(self._event) / 1e3


class HostCopy:
    """Holds a small tensor on its way from the device, to be read when later work is under way.

    Attributes:
        arrived: when the values were there, however much later they are read.
    """

    def __init__(self, values: Tensor):
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
        self.arrived = Moment(values.device)

    def read(self) -> list:
        """Return the values, once they have arrived."""
        self.arrived.wait()
        return self._host.tolist()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on its way to the device, in order with the device's work."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
