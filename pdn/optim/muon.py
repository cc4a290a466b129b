"""Muon for matrices that may be sharded: momentum on the parts, Newton-Schulz on the whole."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr

from pdn.distributed.fsdp import local_part, scale_all
from pdn.optim.guarded import GuardedOptimizer


class ShardedMuon(torch.optim.Muon, GuardedOptimizer):
    """Runs ``torch.optim.Muon``, also where rows of a matrix lie on several ranks.

    The momentum is elementwise and stays sharded as its parameter. The orthogonalisation is not:
    that of a part is not the part of the whole's. So each matrix has an owner among the ranks that
    share it; the owner collects the rows, orthogonalises, and sends each rank its rows back: two
    all-to-all exchanges for as many matrices as there are such ranks.

    Args:
        groups: of matrices, as for ``torch.optim.Muon``; options not in a group come from
            ``options`` (momentum, nesterov, ns_steps, adjust_lr_fn).
        ns_dtype: of the Newton-Schulz iteration; torch's is bfloat16.
    """

    moments = ("momentum_buffer",)  # state of a parameter's size

    def __init__(self, groups: list[dict], *, ns_dtype: torch.dtype, **options):
        super().__init__(groups, **options)
        self.ns_dtype = ns_dtype

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Update all matrices that have a gradient."""
        if closure is not None:
            raise ValueError("closure: found one; expected none, gradients are computed before")
        self._update(None, None)

    @torch.no_grad()
    def guarded_step(self, found_inf: Tensor, clip: Tensor) -> None:
        """Take a step with gradients scaled by ``clip``, or none if ``found_inf``.

        See ``OptimizerContainer.step``. Masked on the device.
        """
        if found_inf.device.type == "cpu":
            if not found_inf:
                self._update(None, clip)
        else:
            self._update(found_inf != 0, clip)

    def _update(self, skip: Tensor | None, clip: Tensor | None) -> None:
        for group in self.param_groups:
            parameters, gradients, buffers = [], [], []
            self._init_group(group, parameters, gradients, buffers)
            local = [local_part(gradient) for gradient in gradients]
            if clip is not None and local:
                scale_all(local, clip)
            directions = [
                self._accumulate(group, gradient, local_part(buffer), skip)
                for gradient, buffer in zip(local, buffers, strict=True)
            ]
            for parameter, update in zip(
                parameters, self._orthogonalise(group, parameters, directions), strict=True
            ):
                self._apply(group, parameter, update, skip)

    def _accumulate(
        self, group: dict, gradient: Tensor, buffer: Tensor, skip: Tensor | None
    ) -> Tensor:
        """Move the momentum, unless ``skip``; return the direction, of the parameter's part."""
        momentum = group["momentum"]
        moved = buffer.lerp(gradient, 1 - momentum)
        buffer.copy_(moved if skip is None else torch.where(skip, buffer, moved))
        return gradient.lerp(moved, momentum) if group["nesterov"] else moved

    def _orthogonalise(
        self, group: dict, parameters: list[Tensor], directions: list[Tensor]
    ) -> list[Tensor]:
        """Return for each direction its part of the orthogonalised whole; collective if sharded."""
        matrix = parameters[0] if parameters else None  # all lie on one mesh
        shards = matrix.device_mesh["shard"] if isinstance(matrix, DTensor) else None
        if shards is None or shards.size() == 1:
            return [self._newton_schulz(group, direction) for direction in directions]
        found: list[Tensor] = []
        for first in range(0, len(directions), shards.size()):
            batch = slice(first, first + shards.size())
            shapes = [parameter.shape for parameter in parameters[batch]]
            found += self._by_owners(group, directions[batch], shapes, shards)
        return found

    def _by_owners(
        self, group: dict, parts: list[Tensor], shapes: list[torch.Size], shards: DeviceMesh
    ) -> list[Tensor]:
        """Exchange parts: the i-th of at most ``shards.size()`` matrices belongs to rank i."""
        ranks, mine = shards.size(), shards.get_local_rank()
        process_group = shards.get_group()
        sent = [part.numel() for part in parts] + [0] * (ranks - len(parts))
        received = [0] * ranks
        if mine < len(shapes):
            rows, columns = shapes[mine]
            received = [count * columns for count in shard_rows(rows, ranks)]
        flat = torch.cat([part.reshape(-1) for part in parts])
        whole = flat.new_empty(sum(received))
        dist.all_to_all_single(whole, flat, received, sent, group=process_group)
        if mine < len(shapes):
            update = self._newton_schulz(group, whole.view(shapes[mine]))
            whole = update.to(flat.dtype).reshape(-1).contiguous()
        dist.all_to_all_single(flat, whole, sent, received, group=process_group)
        pieces = flat.split(sent[: len(parts)])
        return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]

    def _newton_schulz(self, group: dict, matrix: Tensor) -> Tensor:
        return orthogonalise(
            matrix.to(self.ns_dtype), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )

    def _apply(self, group: dict, parameter: Tensor, update: Tensor, skip: Tensor | None) -> None:
        part = local_part(parameter)
        lr = group["lr"]
        new = part.mul(1 - lr * group["weight_decay"]) if skip is not None else part
        if skip is None:
            new.mul_(1 - lr * group["weight_decay"])
        new.add_(update, alpha=-_adjust_lr(lr, group["adjust_lr_fn"], parameter.shape))
        if skip is not None:
            part.copy_(torch.where(skip, part, new))


def shard_rows(rows: int, ranks: int) -> list[int]:
    """Return how many rows of a matrix FSDP gives to each rank.

    Chunks are of equal size, the last ones shorter or empty.
    """
    chunk = -(-rows // ranks)
    return [max(0, min(chunk, rows - rank * chunk)) for rank in range(ranks)]


def orthogonalise(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Return about ``U V^T`` of ``matrix = U S V^T`` by Newton-Schulz, in the matrix's dtype.

    Args:
        matrix: [m, n]; not changed.
        coefficients: a, b, c of the quintic ``a X + (b A + c A^2) X`` with ``A = X X^T``.
        steps: iterations. The singular values end near 1, between about 0.7 and 1.2.
        eps: least Frobenius norm that the matrix is divided by.
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
