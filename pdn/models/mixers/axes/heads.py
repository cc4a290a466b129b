"""How many heads of keys and of values a mixer has, and their sizes."""

from __future__ import annotations

from typing import NamedTuple


class Heads(NamedTuple):
    """Counts H key heads of size K, and HV value heads, a multiple of H, of size V.

    A gate has a number for each value head, for these own the states.
    """

    keys: int
    values: int
    key_dim: int
    value_dim: int

    @property
    def key_width(self) -> int:
        return self.keys * self.key_dim

    @property
    def value_width(self) -> int:
        return self.values * self.value_dim
