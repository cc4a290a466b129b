"""A language model as a list of layers that advance fixed buffers by one token: what a CUDA graph
of a decoding step is made of.

Every layer has ``step(x)``, which adds its block's output to the residual stream x [B, D] in place
and moves its state on by one token, and ``load(rows, state)``, which puts the states of sequences
that were read by the model itself into rows of its buffers. Matrices that read the same input are
joined into one, and all are kept in the dtype of the decoding.

Letters: B sequences, D model, L tokens that a cache holds.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pdn import ops
from pdn.models.language_model import Block, LanguageModel
from pdn.models.layers import Embedding, Linear, RMSNorm, ShortConv, SwiGLU, rotary_table
from pdn.models.mixers.attention import Attention
from pdn.models.mixers.linear_recurrence import LinearRecurrence
from pdn.ops.decoding import attend, project, split_and_convolve


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with the weights of its products in ``dtype``, and gates' parameters as they are.

    Itself, not a copy, if nothing is to be converted.
    """
    kinds = (Linear, RMSNorm, ShortConv, Embedding)
    if all(
        p.dtype == dtype for m in module.modules() if isinstance(m, kinds) for p in m.parameters()
    ):
        return module
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, kinds):
            part.to(dtype)
    return module


class Norm:
    """The weight of an RMSNorm, for ``project``."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype):
        self.options = {"norm": norm.weight.detach().to(dtype), "eps": norm.eps}


class Feedforward:
    """``x += mlp(norm(x))`` of a block."""

    def __init__(self, norm: RMSNorm, mlp: SwiGLU, dtype: torch.dtype):
        self.norm = Norm(norm, dtype)
        self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach().to(dtype)
        self.down = mlp.down_proj.weight.detach().to(dtype)

    def step(self, x: Tensor) -> None:
        hidden = project(x, self.gate_up, **self.norm.options)
        project(hidden, self.down, swiglu=True, into=x)


class RecurrentLayer:
    """A linear recurrence: convolution, gates and state in fixed buffers."""

    def __init__(self, block: Block, batch: int, dtype: torch.dtype, length: int):
        mixer = block.mixer
        self.config = mixer.config
        self.norm = Norm(block.mixer_norm, dtype)
        axes = mixer.decay, mixer.gain, mixer.preconditioner, mixer.output_gate
        self.axes = [None if axis is None else converted(axis, dtype) for axis in axes]
        linears = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
        self.projections = [() if axis is None else axis.projections() for axis in self.axes]
        linears += [linear for own in self.projections for linear in own]
        self.inputs = torch.cat([linear.weight.to(dtype) for linear in linears]).detach()
        self.sizes = [linear.weight.shape[0] for linear in linears]
        convolutions = mixer.q_conv, mixer.k_conv, mixer.v_conv
        self.taps = torch.cat([conv.weight for conv in convolutions]).detach()
        self.o_norm, self.output = Norm(mixer.o_norm, dtype), mixer.o_proj.weight.detach().to(dtype)
        device = self.output.device
        self.conv = torch.cat([conv.init_state(batch, device, dtype) for conv in convolutions], -1)
        self.recurrent = mixer.init_state(batch, device, dtype).recurrent
        self.step_options = dict(
            qk_l2norm=self.config.qk_l2norm, state=self.recurrent, in_place=True
        )

    def step(self, x: Tensor) -> None:
        parts = split_and_convolve(
            project(x, self.inputs, **self.norm.options), self.taps, self.conv, self.sizes
        )
        q, k, v = (y[:, None].unflatten(-1, (-1, self.config.head_dim)) for y in parts[:3])
        decay, gain, preconditioner, gate = self._evaluate([part[:, None] for part in parts[3:]])
        options = dict(beta=gain, log_decay=decay, **self.step_options)
        if self.config.solve == "online":
            o, _ = ops.delta_rule(q, k, v, write_k=preconditioner, **options)
        else:
            o, _ = ops.linear_attention(q, k, v, preconditioner=preconditioner, **options)
        gate = None if gate is None else gate.flatten(1)
        project(o.flatten(1), self.output, gate=gate, into=x, **self.o_norm.options)

    def _evaluate(self, parts: list[Tensor]) -> list[Any]:
        """The axes from their projections [B, 1, size], as ``pdn.models.mixers.axes.evaluate``."""
        results = []
        for axis, own in zip(self.axes, self.projections, strict=True):
            results.append(None if axis is None else axis(*parts[: len(own)]))
            parts = parts[len(own) :]
        return results

    def load(self, rows: Tensor, state: Any) -> None:
        self.conv[rows] = torch.cat(state.conv, -1).to(self.conv.dtype)
        for buffer, new in zip(self.recurrent, state.recurrent, strict=True):
            if buffer is not None:
                buffer[rows] = new

    def clear(self, rows: Tensor) -> None:
        for buffer in (self.conv, *self.recurrent):
            if buffer is not None:
                buffer[rows] = 0


class AttentionLayer:
    """Attention over a preallocated cache of ``length`` tokens a sequence."""

    def __init__(self, block: Block, batch: int, dtype: torch.dtype, length: int):
        mixer = block.mixer
        self.config = mixer.config
        self.norm = Norm(block.mixer_norm, dtype)
        linears = mixer.q_proj, mixer.k_proj, mixer.v_proj
        self.inputs = torch.cat([linear.weight for linear in linears]).detach().to(dtype)
        self.output = mixer.o_proj.weight.detach().to(dtype)
        heads, size = self.config.num_heads, self.config.head_dim
        self.keys, self.values = (
            self.output.new_zeros(batch, heads, length, size) for _ in range(2)
        )
        self.table = self._angles(length)

    def _angles(self, length: int) -> Tensor:
        wide = torch.promote_types(self.output.dtype, torch.float32)
        half, device = self.config.head_dim // 2, self.output.device
        return rotary_table(length, half, self.config.rope_base, device, wide)

    def step(self, x: Tensor, position: Tensor) -> None:
        qkv = project(x, self.inputs, **self.norm.options)
        o = attend(qkv, self.keys, self.values, position, self.table, self.config.num_heads)
        project(o, self.output, into=x)

    def load(self, rows: Tensor, state: Any) -> None:
        for buffer, new in ((self.keys, state.k), (self.values, state.v)):
            buffer[rows, :, : new.shape[1]] = new.transpose(1, 2).to(buffer.dtype)

    def clear(self, rows: Tensor) -> None:
        pass  # what lies beyond a sequence's position is never read

    def grow(self, length: int) -> None:
        """Hold ``length`` tokens in place of fewer."""
        self.keys, self.values = (
            nn.functional.pad(cache, (0, 0, 0, length - cache.shape[2]))
            for cache in (self.keys, self.values)
        )
        self.table = self._angles(length)


class OtherLayer:
    """Any mixer with a state of constant size, by its own forward pass; new states are copied over
    the old ones.
    """

    def __init__(self, block: Block, batch: int, dtype: torch.dtype, length: int):
        self.norm, self.mixer = converted(block.mixer_norm, dtype), converted(block.mixer, dtype)
        device = next(block.parameters()).device
        self.state = self.mixer.init_state(batch, device, dtype)

    def step(self, x: Tensor) -> None:
        y, new = self.mixer(self.norm(x)[:, None], state=self.state)
        x += y[:, 0]
        for buffer, after in zip(tree_leaves(self.state), tree_leaves(new), strict=True):
            if buffer is not None:
                buffer.copy_(after)

    def load(self, rows: Tensor, state: Any) -> None:
        for buffer, new in zip(tree_leaves(self.state), tree_leaves(state), strict=True):
            if buffer is not None:
                buffer[rows] = new.to(buffer.dtype)

    def clear(self, rows: Tensor) -> None:
        for buffer in tree_leaves(self.state):
            if buffer is not None:
                buffer[rows] = 0


def layer_of(block: Block, batch: int, dtype: torch.dtype, length: int):
    """The layer for a block's mixer."""
    kinds = {LinearRecurrence: RecurrentLayer, Attention: AttentionLayer}
    return kinds.get(type(block.mixer), OtherLayer)(block, batch, dtype, length)


class DecodingModel:
    """All layers of a model, with buffers for ``batch`` sequences.

    length: tokens that the caches of its attention layers hold; without attention it bounds nothing.
    """

    def __init__(self, model: LanguageModel, batch: int, dtype: torch.dtype, length: int):
        self.embedding = model.embedding.weight.detach().to(dtype)
        self.norm = Norm(model.norm, dtype)
        self.mixers = [layer_of(block, batch, dtype, length) for block in model.blocks]
        self.feedforwards = [
            None if block.mlp is None else Feedforward(block.mlp_norm, block.mlp, dtype)
            for block in model.blocks
        ]
        self.length = length

    @property
    def bounded(self) -> bool:
        """Whether a sequence may not be longer than ``length``."""
        return any(isinstance(layer, AttentionLayer) for layer in self.mixers)

    def grow(self, length: int) -> None:
        """Hold sequences of ``length`` tokens in place of shorter ones."""
        self.length = length
        for layer in self.mixers:
            if isinstance(layer, AttentionLayer):
                layer.grow(length)

    def step(self, token: Tensor, position: Tensor) -> Tensor:
        """Read one token of every sequence; the logits [B, vocab] of the next.

        token: [B] int64. position: [B] int64, tokens read before.
        """
        x = nn.functional.embedding(token, self.embedding)
        for mixer, feedforward in zip(self.mixers, self.feedforwards, strict=True):
            if isinstance(mixer, AttentionLayer):
                mixer.step(x, position)
            else:
                mixer.step(x)
            if feedforward is not None:
                feedforward.step(x)
        return project(x, self.embedding, **self.norm.options)

    def load(self, rows: Tensor, states: list[Any]) -> None:
        """Put states of the model into rows of the buffers; rows: [n] int64."""
        for layer, state in zip(self.mixers, states, strict=True):
            layer.load(rows, state)

    def clear(self, rows: Tensor) -> None:
        """Make rows begin anew."""
        for layer in self.mixers:
            layer.clear(rows)
