"""A comparison of a model's replicas, which must stay equal bit by bit.

A rank that computed wrongly, or missed an update, shows here.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pdn.distributed.collectives import is_distributed
from pdn.distributed.dims import ParallelDims
from pdn.errors import NumericError

_PIECE = 1 << 22  # elements
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(model: nn.Module, step: int, dims: ParallelDims) -> None:
    """Compare the parameters of all replicas of each shard. Collective, one small all-gather.

    Args:
        model: as ``parallelise`` returned it.
        step: optimiser steps completed, for the message.
        dims: how the ranks are laid out.

    Raises:
        NumericError: some replica differs; names its rank (or both, if there are only two), and the
            first parameter.
    """
    if not is_distributed() or dims.copies == 1:
        return
    names = [name for name, _ in model.named_parameters()]
    digests = torch.stack([_digest(parameter) for parameter in model.parameters()])
    everyone = [torch.empty_like(digests) for _ in range(dims.world_size)]
    dist.all_gather(everyone, digests)
    for part in range(dims.parameter_ranks):
        ranks = dims.replicas_of(part)
        peers = torch.stack([everyone[rank] for rank in ranks])
        usual = peers.mode(dim=0).values
        wrong = [
            rank
            for rank, of_rank in zip(ranks, peers, strict=True)
            if not torch.equal(of_rank, usual)
        ]
        if wrong:
            # Of two replicas neither has the majority.
            suspects = ranks if len(ranks) == 2 else wrong
            parameter = names[int((everyone[wrong[0]] != usual).nonzero()[0])]
            raise NumericError(
                "DIVERGED",
                f"step {step}: rank {' or '.join(map(str, suspects))} holds other parameters than "
                f"its replicas, first {parameter}; expected equal bits. Suspect that device; "
                "resume from a checkpoint before: resume=step:N",
            )


@torch.no_grad()
def _digest(parameter: Tensor) -> Tensor:
    """Sum a parameter's bits exactly, on its device, as int64.

    The sum is weighted by position, so that swaps show too.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    bits = local.detach().contiguous().flatten().view(_INTEGERS[local.element_size()])
    digest = torch.zeros((), dtype=torch.int64, device=bits.device)
    weights = torch.arange(1, min(_PIECE, bits.numel()) + 1, device=bits.device)
    for piece in bits.split(_PIECE):  # bounds the memory of the int64 products
        digest = digest * 31 + (piece * weights[: piece.numel()]).sum()
    return digest
