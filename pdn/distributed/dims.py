"""How the ranks of a run are laid out: copies of the model, their shards, pieces of a sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelDims:
    """Lays out the ranks, outermost first: rank = (replica * shard + part) * context + piece.

    Attributes:
        replicate: copies of the model, whose gradients are summed.
        shard: ranks that share one copy's parameters, gradients and optimiser state.
        context: ranks that share one sequence; they share the parameters too, unless ``whole``.
        whole: each rank has all parameters of a copy; ``shard`` is 1.
    """

    replicate: int
    shard: int
    context: int
    whole: bool = False

    @property
    def world_size(self) -> int:
        """Count all ranks."""
        return self.replicate * self.shard * self.context

    @property
    def parameter_ranks(self) -> int:
        """Count the ranks that one copy's parameters lie on."""
        return 1 if self.whole else self.shard * self.context

    @property
    def copies(self) -> int:
        """Count the copies of the parameters."""
        return self.world_size // self.parameter_ranks

    @property
    def batch_ranks(self) -> int:
        """Count the ranks that see different samples."""
        return self.replicate * self.shard

    def batch_rank(self, world_rank: int) -> int:
        """Return which share of the samples the rank sees, in 0 … ``batch_ranks`` - 1."""
        return world_rank // self.context

    def replicas_of(self, part: int) -> list[int]:
        """Return the world ranks that hold the same part of each copy, with equal parameters.

        part: its number, 0 … parameter_ranks - 1.
        """
        return list(range(part, self.world_size, self.parameter_ranks))
