"""The losses of single validation sequences, by which two runs are compared in pairs of them."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from pdn.distributed.collectives import gather_or_raise

MOST = 1 << 16  # sequences of a set; of a larger one nothing is kept


class SequenceLosses:
    """Collects this rank's sequences. Their names are digests of their labels.

    So the same sequences have the same names in other runs, whatever the number of ranks and
    whatever the batches.
    """

    def __init__(self):
        self._weights = torch.zeros(0, dtype=torch.int64)
        self._rows: list[Tensor] = []  # int64 [B, 2], digest and tokens
        self._losses: list[Tensor] = []  # float64 [B]

    def digests(self, labels: Tensor) -> Tensor:
        """Return the names of sequences, [B], from their whole labels [B, T]."""
        time = labels.shape[1]
        if len(self._weights) != time:
            draw = torch.Generator().manual_seed(time)
            weights = torch.randint(-(1 << 62), 1 << 62, (time,), generator=draw)
            self._weights = weights.to(labels.device)
        return ((labels + 1) * self._weights).sum(-1)  # modulo 2^64

    def add(self, digests: Tensor, losses: Tensor, counted: Tensor) -> None:
        """Add sequences, or pieces of them.

        Args:
            digests: [B].
            losses: [B, T], 0 where a token is not counted.
            counted: [B, T].
        """
        self._rows.append(torch.stack([digests, counted.sum(-1)], -1))
        self._losses.append(losses.sum(-1))

    def result(self) -> dict[str, list] | None:
        """Return what all ranks collected, in the order of the names. Collective.

        Returns:
            ``id``, the names, ``loss``, the sums of nats, and ``tokens``; None if there are more
                than ``MOST``.
        """
        rows = torch.cat(self._rows).tolist() if self._rows else []
        losses = torch.cat(self._losses).tolist() if self._losses else []
        mine = list(zip(rows, losses, strict=True))
        sums: dict[str, list] = defaultdict(lambda: [0.0, 0])
        for of_rank in gather_or_raise(lambda: mine[: MOST + 1]):
            for (digest, tokens), loss in of_rank:
                if tokens:  # not what a batch was filled up with
                    found = sums[f"{digest % (1 << 64):016x}"]
                    found[0] += loss
                    found[1] += tokens
        if len(sums) > MOST:
            return None
        names = sorted(sums)
        return {
            "id": names,
            "loss": [round(sums[name][0], 4) for name in names],
            "tokens": [sums[name][1] for name in names],
        }
