"""The values that a checkpoint will hold, copied while the model goes on computing with them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pdn.checkpoint.memory import HostMemory
from pdn.checkpoint.shards import as_bytes
from pdn.errors import PdnError


class Snapshot:
    """Copies tensors into host memory beside the next forward and backward pass.

    Weights and moments are only read between two updates, so that nobody has to wait for the copy
    but the next update: ``release`` is called before it. Tensors of a GPU are copied by a stream of
    their own, for which that of the update waits, and not the host.

    Args:
        tensors: this rank's part of each, detached, on any device.
        memory: that is copied into. What was copied there before is lost.
        threads: that copy what lies in host memory.

    Attributes:
        values: the copies, by the same names; there when ``complete`` returns.
    """

    def __init__(self, tensors: dict[str, Tensor], memory: HostMemory, threads: int):
        self._threads = threads
        self._sources = [(name, tensor, tensor._version) for name, tensor in tensors.items()]
        self.values = memory.copies(tensors)
        self._host_copied = threading.Event()
        self._released, self._changed = False, ""
        self._host_wait_s = 0.0
        self._device_wait: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        on_gpu = {name: tensor for name, tensor in tensors.items() if tensor.is_cuda}
        self._arrived = self._send(on_gpu) if on_gpu else None
        if len(on_gpu) == len(tensors):  # nothing that the writer's thread has to copy first
            self._host_copied.set()

    def _send(self, tensors: dict[str, Tensor]) -> torch.cuda.Event:
        """Have a stream of its own copy tensors of the GPU; return what tells that they arrived."""
        stream, arrived = torch.cuda.Stream(), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                self.values[name].copy_(tensor, non_blocking=True)
        arrived.record(stream)
        return arrived

    def complete(self) -> None:
        """Copy what lies in host memory, and wait for the rest. Once, by the thread that writes.

        Raises:
            PdnError: a tensor was changed without ``release`` having been called before.
        """
        here = {name: tensor for name, tensor, _ in self._sources if not tensor.is_cuda}
        try:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(self._copy, here.keys(), here.values()))
            self._notice_changes()
        finally:
            self._host_copied.set()
        if self._arrived is not None:
            self._arrived.synchronize()
            self._notice_changes()
        self._sources = []  # a model may be dropped while its checkpoint is still being written
        if self._changed:
            raise PdnError(
                "CKPT-CHANGED",
                f"{self._changed}: changed while it was being copied for a checkpoint; expected a "
                "call of Checkpointer.before_change before weights or the optimiser's state change",
            )

    def release(self) -> None:
        """Return when the tensors may be changed by what this thread does next."""
        if self._released:
            return
        began = time.perf_counter()
        self._host_copied.wait()
        self._host_wait_s = time.perf_counter() - began
        self._notice_changes()
        if self._arrived is not None:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            torch.cuda.current_stream().wait_event(self._arrived)
            after.record()
            self._device_wait = before, after
        self._released = True

    @property
    def waited_s(self) -> float:
        """Return the seconds for which the next update had to wait, as far as it has begun."""
        waited = self._host_wait_s
        # An update that has not got there finds everything copied.
        if self._device_wait is not None and self._device_wait[1].query():
            waited += self._device_wait[0].elapsed_time(self._device_wait[1]) / 1000
        return waited

    def _copy(self, name: str, tensor: Tensor) -> None:
        # By numpy, which copies with this thread alone: torch's threads serve the model.
        np.copyto(as_bytes(self.values[name]), as_bytes(tensor))

    def _notice_changes(self) -> None:
        """Compare torch's counters of changes in place with those of the beginning."""
        for name, tensor, version in self._sources:
            # In this order: whoever changes something rightly has released it before.
            if tensor._version != version and not self._released:
                self._changed = self._changed or name
