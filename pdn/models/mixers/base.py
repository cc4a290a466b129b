"""The contract of a token mixer: what a block needs from it, and nothing about parallelism."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from pdn.config import Strict


class MixerConfig(Strict):
    """Configures a mixer, and tells its size and cost without building anything."""

    def num_params(self, d_model: int) -> int:
        """Count the trainable parameters of one layer's mixer."""
        raise NotImplementedError

    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        """Count forward FLOPs of one layer's mixer for one token, two per multiply-add.

        Training costs three times as much.
        """
        raise NotImplementedError

    def activation_bytes(self, width: int) -> float | None:
        """Return what one layer's mixer keeps of one token for its backward pass, in bytes.

        Of a compiled layer on a GPU, without the mixer's input and the output's projection.

        Args:
            width: bytes of a number in the precision of compute.

        Returns:
            None where it was not counted.
        """
        return None

    def build(self, d_model: int) -> TokenMixer:
        raise NotImplementedError


class TokenMixer(nn.Module, ABC):
    """Mixes information across time; everything else in a block acts on single tokens."""

    @abstractmethod
    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: Any = None
    ) -> tuple[Tensor, Any]:
        """Mix tokens: return y of the shape of x, and the state after the last token.

        The state is None if none was given.

        Args:
            x: [B, T, D].
            cu_seqlens: [N + 1] int32 document boundaries on the flattened B * T axis, with every
                multiple of T among them.
            state: what ``init_state`` or an earlier call returned; tokens then continue the
                sequences it holds; with ``cu_seqlens`` the first document of each row.
        """

    @abstractmethod
    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the state before any token.

        Args:
            batch_size: sequences (B).
            device: of the state.
            dtype: of the activations.
        """

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialise the mixer's own parameters.

        Those of submodules with a ``reset_parameters`` are excluded.
        """

    def reset_as_released(self, generator: torch.Generator, num_layers: int) -> None:
        """Change what the mixer's released code initialises otherwise; by default nothing.

        Called after ``reset_parameters``.
        """
