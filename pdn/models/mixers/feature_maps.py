"""Feature maps of queries and keys, between their activation and the recurrence."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pdn.models.layers import Linear

FeatureMapKind = Literal["none", "relu", "elu", "product"]

FEATURE_MAPS = {"none": lambda x: x, "relu": F.relu, "elu": lambda x: F.elu(x) + 1}


class ProductFeatureMap(nn.Module):
    """Computes ``a(x) * b(x)`` of two affine maps that all heads share; [B, T, H, K] in and out."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.a, self.b = (Linear(head_dim, head_dim, bias=True, grows=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


def feature_map_params(kind: FeatureMapKind, head_dim: int) -> int:
    """Count the trainable parameters of the map of queries, or of that of keys."""
    return 2 * (head_dim + 1) * head_dim if kind == "product" else 0
