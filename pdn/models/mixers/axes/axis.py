"""What a mixer asks of the module of an axis."""

from __future__ import annotations

from torch import nn

from pdn.models.layers import Linear


class Axis(nn.Module):
    """Turns the block's input into what ``pdn.ops`` takes of an axis.

    ``forward`` is called with what the ``projections`` of the input give; of a ``wide`` axis, whose
    projection is as wide as the input, with the input x [B, T, D] itself.
    """

    wide = False

    def projections(self) -> tuple[Linear, ...]:
        """Return the narrow projections of the input; a wide axis has none."""
        return ()
