"""Validation loss on held-out text, in lockstep on all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pdn.metrics import perplexity
from pdn.parallel import World, compute_in


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[dict[str, Tensor]], world: World, *, bf16: bool) -> dict[str, float]:
    """Mean loss over all counted tokens of all ranks.

    batches: dicts of tokens and labels [B, T] (and cu_seqlens); every rank must get the same number of them, since a
        sharded model communicates in each forward pass. Labels of -100 are not counted.

    Returns:
        ``loss`` in nats a token, ``perplexity``, and ``tokens``, the number counted.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in batches:
        batch = {key: value.to(world.device, non_blocking=True) for key, value in batch.items()}
        with compute_in(model, world.device, bf16):
            output = model(batch["tokens"], labels=batch["labels"], cu_seqlens=batch.get("cu_seqlens"))
        totals += torch.stack([output.losses.double().sum(), (batch["labels"] >= 0).sum().double()])
    model.train(was_training)
    loss_sum, tokens = world.sum(totals).tolist()
    loss = loss_sum / max(1.0, tokens)
    return {"loss": loss, "perplexity": perplexity(loss), "tokens": int(tokens)}
