"""A map of layers and heads as an image, for loggers that show images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CELL = 16  # pixels
GREY = (200, 200, 200)  # of a layer, or a head, without a value


def image(rows: Sequence[Sequence[float | None] | None]) -> np.ndarray:
    """Draw a map: a row a layer, a column a head, from blue (the least) by white to red (the most).

    Args:
        rows: the heads' values of each layer; None where there is none.

    Returns:
        [CELL * layers, CELL * heads, 3] of uint8.
    """
    heads = max((len(row) for row in rows if row), default=1)
    values = np.full((len(rows), heads), np.nan)
    for layer, row in enumerate(rows):
        for head, value in enumerate(row or ()):
            values[layer, head] = np.nan if value is None else value
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    share = np.full_like(values, 0.5) if high == low else (values - low) / (high - low)
    away = np.abs(share - 0.5) * 2
    other, most = 245 - 175 * away, np.full_like(away, 245)
    below = (share < 0.5)[..., None]
    colours = np.where(
        below, np.stack([other, other, most], -1), np.stack([most, other, other], -1)
    )
    colours[~np.isfinite(values)] = GREY
    return colours.astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)
