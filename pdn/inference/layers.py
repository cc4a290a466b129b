"""A language model as a list of layers that advance fixed buffers by one token.

A CUDA graph of a decoding step is made of them. Every layer has ``step(x)``, which adds its
block's output to the residual stream x [B, D] in place and moves its state on by one token, and
``load(rows, state)``, which puts the states of sequences that were read by the model itself into
rows of its buffers. Matrices that read the same input are joined into one, and all are kept in the
dtype of the decoding.

Letters: B sequences, D model, L tokens that a cache holds.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pdn.models.language_model import Block, LanguageModel
from pdn.models.layers import (
    Embedding,
    Linear,
    RMSNorm,
    ShortConv,
    SwiGLU,
    rotary,
    rotary_table,
)
from pdn.models.mixers.attention import Attention, AttentionConfig
from pdn.models.mixers.axes.output_gate import FullRankGate
from pdn.models.mixers.base import TokenMixer
from pdn.models.mixers.linear_recurrence import LinearRecurrence, RecurrenceConfig
from pdn.ops.decoding import advance, attend, project, split_and_convolve


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a module with the weights of its products in ``dtype``, its gates' as they are.

    The module itself, not a copy, if nothing is to be converted.
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


def weight_of(module: nn.Module) -> Tensor:
    """Return what a step reads of a module in place of a call.

    Raises:
        ValueError: it is none of ours, such as an adapter around one.
    """
    if not isinstance(module, (Linear, RMSNorm, ShortConv, Embedding)):
        raise ValueError(
            f"{type(module).__module__}.{type(module).__name__}: decoding reads the weights of "
            "pdn's own layers; expected adapters to be merged into them (merge_and_unload)"
        )
    return module.weight


class Norm:
    """Holds the weight of an RMSNorm, for ``project``."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype):
        self.options = {"norm": weight_of(norm).detach().to(dtype), "eps": norm.eps}


class Feedforward:
    """Adds ``mlp(norm(x))`` of a block to x."""

    def __init__(self, norm: RMSNorm, mlp: SwiGLU, dtype: torch.dtype):
        self.norm = Norm(norm, dtype)
        self.gate_up = (
            torch.cat([weight_of(mlp.gate_proj), weight_of(mlp.up_proj)]).detach().to(dtype)
        )
        self.down = weight_of(mlp.down_proj).detach().to(dtype)

    def step(self, x: Tensor) -> None:
        hidden = project(x, self.gate_up, **self.norm.options)
        project(hidden, self.down, swiglu=True, into=x)


class RecurrentLayer:
    """Runs a linear recurrence: convolution, gates and state in fixed buffers."""

    @staticmethod
    def takes(mixer: nn.Module) -> bool:
        """Say whether this is the layer for a mixer."""
        if type(mixer) is not LinearRecurrence:
            return False
        config = mixer.config
        # gates that the op takes as the axes give them
        known = config.decay.kind != "fixed" and config.gain.kind in ("none", "beta")
        own = config.preconditioner.kind == "none" or (
            config.preconditioner.kind == "diagonal" and not config.preconditioner.tied
        )
        return known and own and config.conv_size > 1 and config.feature_map == "none"

    def __init__(self, block: Block, batch: int, dtype: torch.dtype, length: int):
        mixer = block.mixer
        assert isinstance(mixer, LinearRecurrence)
        self.config: RecurrenceConfig = mixer.config
        self.norm = Norm(block.mixer_norm, dtype)
        axes = mixer.decay, mixer.gain, mixer.preconditioner, mixer.output_gate
        self.axes = [None if axis is None else converted(axis, dtype) for axis in axes]
        self.projections = [self._projections(axis) for axis in self.axes]
        linears = [getattr(mixer, f"{name}_proj") for name in self.config.inputs]
        linears += [linear for own in self.projections for linear in own]
        self.inputs = torch.cat([weight_of(linear).to(dtype) for linear in linears]).detach()
        self.sizes = [weight_of(linear).shape[0] for linear in linears]
        convolutions = [getattr(mixer, f"{name}_conv") for name in self.config.inputs]
        # The channels of a tap lie together, as the kernel reads them.
        self.taps = torch.cat([weight_of(conv).mT for conv in convolutions], 1).detach().mT
        self.o_norm = Norm(mixer.o_norm, dtype)
        self.output = weight_of(mixer.o_proj).detach().to(dtype)
        state = mixer.init_state(batch, self.output.device, dtype)
        self.conv, self.S = torch.cat(state.conv, -1), state.recurrent.S
        A = state.recurrent.A
        self.A = None if A is None else torch.stack([A, A])

    @staticmethod
    def _projections(axis: Any) -> tuple[Linear, ...]:
        """Return what an axis, or None, projects from the block's input."""
        if axis is None:
            return ()
        return (axis.g_proj,) if isinstance(axis, FullRankGate) else axis.projections()

    def step(self, x: Tensor, clock: Tensor) -> None:
        """See above. clock: [1] int64, the steps before: A is read and written in turns."""
        parts = split_and_convolve(
            project(x, self.inputs, **self.norm.options), self.taps, self.conv, self.sizes
        )
        heads = self.config.heads
        sizes = heads.key_dim, heads.key_dim, heads.value_dim
        q, k, v = (y[:, None].unflatten(-1, (-1, n)) for y, n in zip(parts[:3], sizes, strict=True))
        decay, gain, preconditioner, gate = self._evaluate([part[:, None] for part in parts[3:]])
        o = advance(
            q, k, v, solve=self.config.solve, beta=gain, log_decay=decay, write=preconditioner,
            qk_l2norm=self.config.qk_l2norm, S=self.S, A=self.A, clock=clock,
        )  # fmt: skip
        gate = None if gate is None else gate.flatten(1)
        project(o, self.output, gate=gate, into=x, **self.o_norm.options)

    def _evaluate(self, parts: list[Tensor]) -> list[Any]:
        """Evaluate the axes from their projections [B, 1, size], as ``axes.evaluate``."""
        results = []
        for axis, own in zip(self.axes, self.projections, strict=True):
            mine, parts = parts[: len(own)], parts[len(own) :]
            if axis is None:
                results.append(None)
            else:
                results.append((axis.activation if isinstance(axis, FullRankGate) else axis)(*mine))
        return results

    def load(self, rows: Tensor, state: Any, read: int) -> None:
        self.conv[rows] = torch.cat(state.conv, -1).to(self.conv.dtype)
        self.S[rows] = state.recurrent.S
        if self.A is not None:
            self.A[:, rows] = state.recurrent.A

    def clear(self, rows: Tensor) -> None:
        self.conv[rows] = 0
        self.S[rows] = 0
        if self.A is not None:
            self.A[:, rows] = 0


class AttentionLayer:
    """Attends over a preallocated cache of ``length`` tokens a sequence."""

    @staticmethod
    def takes(mixer: nn.Module) -> bool:
        """Say whether this is the layer for a mixer."""
        return type(mixer) is Attention

    def __init__(self, block: Block, batch: int, dtype: torch.dtype, length: int):
        mixer = block.mixer
        assert isinstance(mixer, Attention)
        self.config: AttentionConfig = mixer.config
        config = self.config
        self.norm = Norm(block.mixer_norm, dtype)
        linears = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
        self.gate = None
        if config.output_gate != "none":
            linears.append(mixer.output_gate.g_proj)
            self.gate = mixer.output_gate.activation
        self.inputs = torch.cat([weight_of(linear) for linear in linears]).detach().to(dtype)
        self.width = (config.num_heads + 2 * config.kv_heads) * config.head_dim
        self.qk_norms = None
        if config.qk_norm:
            heads = config.num_heads, config.kv_heads
            norms = mixer.q_norm, mixer.k_norm
            self.qk_norms = torch.cat(
                [weight_of(norm).repeat(n, 1) for norm, n in zip(norms, heads, strict=True)]
            ).detach()
        self.output = weight_of(mixer.o_proj).detach().to(dtype)
        self.keys, self.values = (
            self.output.new_zeros(batch, config.kv_heads, length, config.head_dim) for _ in range(2)
        )
        self.table = self._angles(length)

    def _angles(self, length: int) -> Tensor:
        """Return cos and sin at every position; without positions those of no rotation."""
        wide = torch.promote_types(self.output.dtype, torch.float32)
        half, device = self.config.head_dim // 2, self.output.device
        if self.config.positions == "nope":
            one = torch.ones(length, half, dtype=wide, device=device)
            return torch.stack([one, torch.zeros_like(one)], 1)
        return rotary_table(length, half, self.config.rope_base, device, wide)

    def step(self, x: Tensor, position: Tensor) -> None:
        parts = project(x, self.inputs, **self.norm.options)
        qkv, gate = parts, None
        if self.gate is not None:
            qkv = parts[:, : self.width].contiguous()
            gate = self.gate(parts[:, self.width :])
        if self.qk_norms is not None:
            qkv = self._normalised(qkv)
        options = dict(heads=self.config.num_heads, window=self.config.window or 0)
        o = attend(qkv, self.keys, self.values, position, self.table, **options)
        project(o, self.output, gate=gate, into=x)

    def _normalised(self, qkv: Tensor) -> Tensor:
        assert self.qk_norms is not None
        heads = qkv.unflatten(1, (-1, self.config.head_dim))
        count, dtype = len(self.qk_norms), self.qk_norms.dtype
        qk = nn.functional.rms_norm(
            heads[:, :count].to(dtype), heads.shape[-1:], None, self.config.qk_norm_eps
        )
        qk = (qk * self.qk_norms).to(qkv.dtype)
        return torch.cat([qk, heads[:, count:]], 1).flatten(1)

    def load(self, rows: Tensor, state: Any, read: int) -> None:
        """Put states into rows of the cache.

        Args:
            rows: [n] int64.
            state: the last tokens of ``read``; with a window its keys are not yet rotated.
            read: tokens so far.
        """
        k = state.k
        begin = read - k.shape[1]
        if self.config.window is not None:
            k = rotary(k, self.table[None, begin:read])
        for buffer, new in ((self.keys, k), (self.values, state.v)):
            buffer[rows, :, begin:read] = new.transpose(1, 2).to(buffer.dtype)

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
    """Runs any mixer with a state of constant size, by its own forward pass.

    New states are copied over the old ones.
    """

    def __init__(self, block: Block, batch: int, dtype: torch.dtype, length: int):
        self.norm, mixer = converted(block.mixer_norm, dtype), converted(block.mixer, dtype)
        assert isinstance(mixer, TokenMixer)
        self.mixer = mixer
        device = next(block.parameters()).device
        self.state = self.mixer.init_state(batch, device, dtype)

    def step(self, x: Tensor) -> None:
        y, new = self.mixer(self.norm(x)[:, None], state=self.state)
        x += y[:, 0]
        for buffer, after in zip(tree_leaves(self.state), tree_leaves(new), strict=True):
            if buffer is not None:
                buffer.copy_(after)

    def load(self, rows: Tensor, state: Any, read: int) -> None:
        for buffer, new in zip(tree_leaves(self.state), tree_leaves(state), strict=True):
            if buffer is not None:
                buffer[rows] = new.to(buffer.dtype)

    def clear(self, rows: Tensor) -> None:
        for buffer in tree_leaves(self.state):
            if buffer is not None:
                buffer[rows] = 0


def layer_of(
    block: Block, batch: int, dtype: torch.dtype, length: int
) -> RecurrentLayer | AttentionLayer | OtherLayer:
    """Return the layer for a block's mixer.

    Args:
        block: of the model.
        batch: sequences.
        dtype: of weights and activations.
        length: tokens that a cache holds.
    """
    for kind in (RecurrentLayer, AttentionLayer):
        if kind.takes(block.mixer):
            return kind(block, batch, dtype, length)
    return OtherLayer(block, batch, dtype, length)


class DecodingModel:
    """Runs all layers of a model, with buffers for ``batch`` sequences.

    Args:
        model: whole, not sharded.
        batch: sequences.
        dtype: of weights and activations.
        length: tokens that the caches of its attention layers hold; without attention it bounds
            nothing.
    """

    def __init__(self, model: LanguageModel, batch: int, dtype: torch.dtype, length: int):
        self.embedding = weight_of(model.embedding).detach().to(dtype)
        self.norm, self.head = Norm(model.norm, dtype), model.head_weight.detach().to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self.residual_dtype = wide if model.config.residual_dtype == "fp32" else dtype
        self.mixers = [layer_of(block, batch, dtype, length) for block in model.blocks]
        self.feedforwards = [
            None if block.mlp is None else Feedforward(block.mlp_norm, block.mlp, dtype)
            for block in model.blocks
        ]
        self.length = length
        self.clock = torch.zeros(1, dtype=torch.int64, device=self.embedding.device)

    @property
    def bounded(self) -> bool:
        """Say whether a sequence may not be longer than ``length``."""
        return any(isinstance(layer, AttentionLayer) for layer in self.mixers)

    def grow(self, length: int) -> None:
        """Hold sequences of ``length`` tokens in place of shorter ones."""
        self.length = length
        for layer in self.mixers:
            if isinstance(layer, AttentionLayer):
                layer.grow(length)

    def step(self, token: Tensor, position: Tensor) -> Tensor:
        """Read one token of every sequence; return the logits [B, vocab] of the next.

        token: [B] int64. position: [B] int64, tokens read before.
        """
        x = nn.functional.embedding(token, self.embedding).to(self.residual_dtype)
        for mixer, feedforward in zip(self.mixers, self.feedforwards, strict=True):
            if isinstance(mixer, AttentionLayer):
                mixer.step(x, position)
            elif isinstance(mixer, RecurrentLayer):
                mixer.step(x, self.clock)
            else:
                mixer.step(x)
            if feedforward is not None:
                feedforward.step(x)
        self.clock.add_(1)
        return project(x, self.head, **self.norm.options)

    def load(self, rows: Tensor, states: list[Any], read: int) -> None:
        """Put states of the model into rows of the buffers.

        Args:
            rows: [n] int64.
            states: of ``LanguageModel``, one a block.
            read: tokens behind them.
        """
        for layer, state in zip(self.mixers, states, strict=True):
            layer.load(rows, state, read)

    def clear(self, rows: Tensor) -> None:
        """Make rows begin anew."""
        for layer in self.mixers:
            layer.clear(rows)
