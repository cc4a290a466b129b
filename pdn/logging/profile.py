"""The profiler of some steps: a Chrome trace, the table by part, and a snapshot of the memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pdn.logging import trace

TRACE, MEMORY = "trace.json.gz", "memory.pickle"
ALLOCATIONS = 200_000  # of the memory's history that are kept


class Profiler:
    """Profiles steps of this process: ``warm_up``, a step, ``begin``, the steps, ``end``.

    The step of the warm-up is the one whose allocations are recorded, as that costs the host time
    which the table should not show.

    Args:
        device: that the steps run on.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        kinds = torch.profiler.ProfilerActivity
        self._profile = torch.profiler.profile(
            activities=[kinds.CPU, *([kinds.CUDA] if self.on_gpu else [])],
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=1),
            record_shapes=True,
        )
        self._range = torch.profiler.record_function(trace.STEPS)
        self._update = torch.profiler.record_function(trace.UPDATE)
        self.recording = False

    def warm_up(self) -> None:
        """Start the profiler without keeping anything, and record what is allocated."""
        self._profile.start()
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)

    def begin(self, directory: Path) -> None:
        """Write the memory's snapshot, and record from now on."""
        directory.mkdir(parents=True, exist_ok=True)
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(str(directory / MEMORY))
            torch.cuda.memory._record_memory_history(enabled=None)
            torch.cuda.synchronize()
        self._profile.step()
        self._range.__enter__()
        self.recording = True

    def before_update(self) -> None:
        """Tell that the optimiser's work begins."""
        if self.recording:
            self._update.__enter__()

    def after_update(self) -> None:
        """Tell that it ended."""
        if self.recording:
            self._update.__exit__(None, None, None)

    def cancel(self) -> None:
        """Stop without a result."""
        if self.recording:
            self._range.__exit__(None, None, None)
        elif self.on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
        self.recording = False
        self._profile.stop()

    def end(
        self, directory: Path, model: nn.Module, *, steps: int, tokens: set[int]
    ) -> trace.Table:
        """Stop, write the trace and the table below ``directory``, and return the table.

        Args:
            directory: that ``begin`` was given.
            model: that was trained; the sizes of its weights tell its parts.
            steps: since ``begin``.
            tokens: of a forward pass on this rank, one for each size that occurred.
        """
        if self.on_gpu:
            torch.cuda.synchronize()
        self.cancel()
        self._profile.export_chrome_trace(str(directory / TRACE))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        table = trace.by_part(
            trace.read_trace(directory / TRACE), trace.Products.of(shapes, tokens), steps
        )
        trace.write(table, directory)
        return table
