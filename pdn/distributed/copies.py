"""Copies between host and device for which neither waits."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Holds a small tensor on its way from the device, to be read when later work is under way."""

    def __init__(self, values: Tensor):
        self._event = None
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list:
        """Return the values, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on its way to the device, in order with the device's work."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
