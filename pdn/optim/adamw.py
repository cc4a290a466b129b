"""AdamW on the local parts of sharded parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdn.distributed.fsdp import local_part
from pdn.optim.guarded import GuardedOptimizer


class LocalAdamW(torch.optim.AdamW, GuardedOptimizer):
    """Runs AdamW on the local parts of sharded parameters, whose state stays sharded as they are.

    The update is elementwise, and through DTensor's dispatch it takes the host longer than the GPU.
    """

    moments = ("exp_avg", "exp_avg_sq")  # state of a parameter's size

    # torch passes its lists by position, whatever names it gives them
    def _init_group(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, group: dict[str, Any], *lists: list[Tensor]
    ) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local_part, tensors)
        return has_complex

    @torch.no_grad()
    def guarded_step(self, found_inf: Tensor, clip: Tensor) -> None:
        """Take a step with gradients scaled by ``clip``, or none if ``found_inf``.

        See ``OptimizerContainer.step``. Fused kernels decide it on the device.
        """
        if self.defaults["fused"]:
            self.found_inf, self.grad_scale = found_inf.float(), clip.reciprocal()
            try:
                self.step()
            finally:
                del self.found_inf, self.grad_scale
        else:
            super().guarded_step(found_inf, clip)
