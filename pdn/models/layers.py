"""The parts that blocks and mixers share.

Letters: B batch, T time, D model, C channels, W conv width.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdn.ops import short_convolution
from pdn.ops.checks import check_first_derivative
from pdn.ops.chunkwise import document_ids
from pdn.ops.types import autocast_dtype

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

INIT_STD = 0.02


def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter, sharded or not, from the full value, which every rank computes alike."""
    with torch.no_grad():
        # If the parameter is sharded this is loaded already; else it would take half a second.
        sharding = sys.modules.get("torch.distributed.tensor")
        if sharding is not None and isinstance(parameter, sharding.DTensor):
            sharded = cast("DTensor", parameter)  # whose class is not known before it is loaded
            value = sharding.distribute_tensor(
                value.to(sharded.dtype), sharded.device_mesh, sharded.placements, src_data_rank=None
            )
        parameter.copy_(value)


def assign_normal(parameter: Tensor, generator: torch.Generator, std: float = INIT_STD) -> None:
    """Draw the whole parameter from N(0, std^2), whatever way it is sharded.

    Args:
        parameter: to be set in place; each rank keeps its shard of the same values.
        generator: of the values.
        std: standard deviation.
    """
    assign(
        parameter,
        torch.empty(parameter.shape, device=generator.device).normal_(0, std, generator=generator),
    )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Say whether a module does what its class does with its parameters, and nothing else.

    Only then may these be read in place of a call: not of an adapter around it (LoRA), a
    parametrisation, a forward pass that somebody put in its place, or hooks.
    """
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def uniform(shape, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, device=generator.device).uniform_(low, high, generator=generator)


class Linear(nn.Linear):
    """Maps the last axis linearly, with weights N(0, 0.02^2) and zero bias at first.

    Args:
        in_features, out_features: sizes of the last axis before and after.
        bias: add one.
        grows: ``in_features`` is larger in a wider model; false behind a bottleneck of fixed size.
    """

    width_factor = depth_factor = 1.0  # see ``pdn.models.width``

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, grows: bool = True
    ):
        super().__init__(in_features, out_features, bias=bias)
        self.grows = grows

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if generator is None:
            # called by nn.Linear's constructor; LanguageModel.init_weights comes later
            return
        std = INIT_STD * self.width_factor**0.5 * self.depth_factor
        assign_normal(self.weight, generator, std)
        if self.bias is not None:
            assign(self.bias, torch.zeros(self.bias.shape, device=generator.device))


class Embedding(nn.Module):
    """Embeds tokens; weight [vocab, D], N(0, 0.02^2) at first, is the output head's too."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)

    def reset_parameters(self, generator: torch.Generator) -> None:
        assign_normal(self.weight, generator)


class RMSNorm(nn.Module):
    """Computes ``x / rms(x) * weight`` over the last axis in float32 (float64 in float64)."""

    weight_decay = False
    width_factor = 1.0  # see ``pdn.models.width``

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(
            x.dtype
        )

    def reset_parameters(self, generator: torch.Generator) -> None:
        value = torch.full(self.weight.shape, self.width_factor, device=generator.device)
        assign(self.weight, value)


class SwiGLU(nn.Module):
    """Computes ``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202)."""

    def __init__(self, d_model: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(d_model, intermediate_size)
        self.up_proj = Linear(d_model, intermediate_size)
        self.down_proj = Linear(intermediate_size, d_model)

    def forward(self, x: Tensor) -> Tensor:
        # Two products: of one, the compiler forms both halves of the gradient twice.
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def document_positions(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """Count the tokens of its own document before each token: [B, T].

    Args:
        cu_seqlens: [N + 1] int32, document boundaries on the flattened B * T axis.
        batch, time: B and T.
    """
    ids = document_ids(cu_seqlens, batch, time)
    positions = torch.arange(batch * time, device=cu_seqlens.device).view(batch, time)
    return positions - cu_seqlens[ids - 1]


class ShortConv(nn.Module):
    """Convolves each channel causally over time, then applies SiLU.

    weight: [C, W], the last tap on the current token.
    """

    def __init__(self, channels: int, width: int, bias: bool = False):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve x; see ``pdn.ops.short_convolution``."""
        return short_convolution(x, self.weight, self.bias, cu_seqlens=cu_seqlens, state=state)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(
            batch_size, self.width - 1, self.weight.shape[0], device=device, dtype=dtype
        )

    def reset_parameters(self, generator: torch.Generator) -> None:
        assign_normal(self.weight, generator)
        if self.bias is not None:
            assign(self.bias, torch.zeros(self.bias.shape, device=generator.device))


@torch.library.custom_op("pdn::rotary_table", mutates_args=())
def rotary_table(
    length: int, half: int, base: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Compute cos and sin of every angle, [length, 2, half].

    Opaque to the compiler, which would recompute them for every element.

    Args:
        length: positions, from 0 on.
        half: half of the head's size, one angle each.
        base: of the geometric series of frequencies.
        device, dtype: of the result.
    """
    frequencies = base ** (-torch.arange(half, device=device, dtype=dtype) / half)
    angles = torch.arange(length, device=device, dtype=dtype)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], 1)


@rotary_table.register_fake
def _(length, half, base, device, dtype):
    return torch.empty(length, 2, half, device=device, dtype=dtype)


def rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x by its positions (arXiv 2104.09864), halves convention.

    Args:
        x: [B, T, H, K].
        table: [B or 1, T, 2, K / 2], the rows of ``rotary_table`` at the tokens' positions.
    """
    cos, sin = table[..., None, 0, :], table[..., None, 1, :]
    a, b = x.to(table.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes head and cross entropy in slices of rows.

    The [tokens, vocab] logits never exist at once. The gradients are formed beside the losses in
    the forward pass: the logits are needed once only.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, z_loss: float):
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        row_losses = _compiled_row_losses() if hidden.is_cuda else _row_losses
        losses = torch.empty(labels.shape, device=hidden.device, dtype=_wide(hidden))
        z_losses = torch.empty_like(losses) if z_loss else None
        d_hidden = torch.empty_like(hidden) if needs_grad else None
        d_weight = (
            torch.zeros(weight.shape, device=weight.device, dtype=_wide(hidden))
            if needs_grad
            else None
        )
        for start in range(0, labels.shape[0], rows):
            part = slice(start, start + rows)
            losses[part], d_logits, of_z = row_losses(
                hidden[part] @ weight.mT, labels[part], needs_grad, z_loss
            )
            if z_losses is not None and of_z is not None:
                z_losses[part] = of_z
            if d_hidden is not None and d_weight is not None and d_logits is not None:
                d_hidden[part] = d_logits @ weight
                _add_product(d_weight, d_logits.mT, hidden[part])
        if d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        if z_losses is None:
            ctx.mark_non_differentiable(losses)
            return losses.sum(), losses, None
        ctx.mark_non_differentiable(losses, z_losses)
        return losses.sum() + z_losses.sum(), losses, z_losses

    @staticmethod
    def backward(ctx, *grad_outputs):
        check_first_derivative("loss_sum", "compute the loss from logits, without labels=")
        d_sum, (d_hidden, d_weight) = grad_outputs[0], ctx.saved_tensors
        d_hidden, d_weight = (
            d_hidden * d_sum.to(d_hidden.dtype),
            d_weight * d_sum.to(d_weight.dtype),
        )
        return d_hidden, d_weight, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total, whose type may be wider.

    On a GPU the product adds by itself and nothing is rounded before; PyTorch has no such product
    for a CPU.
    """
    if total.is_cuda and total.dtype != a.dtype:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total += a @ b


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _row_losses(
    logits: Tensor, labels: Tensor, needs_grad: bool, z_loss: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the losses of rows, all zero where the label is negative, such as -100.

    Args:
        logits: [rows, vocab].
        labels: [rows] int64.
        needs_grad: whether the gradient is asked for.
        z_loss: coefficient of the squared normaliser; 0 leaves it out.

    Returns:
        Negative log-likelihoods [rows], the gradient by the logits [rows, vocab] of them and of the
        z-losses, and the z-losses [rows]; None for what was not asked for.
    """
    wide = logits.to(_wide(logits))
    counted = labels >= 0
    index = labels.clamp(min=0)[:, None]
    normaliser = wide.logsumexp(-1, keepdim=True)
    losses = (normaliser - wide.gather(1, index))[:, 0] * counted
    z_losses = z_loss * normaliser[:, 0].square() * counted if z_loss else None
    if not needs_grad:
        return losses, None, z_losses
    hit = torch.arange(logits.shape[1], device=logits.device)[None] == index
    probabilities = (wide - normaliser).exp()
    if z_loss:
        probabilities = probabilities * (1 + 2 * z_loss * normaliser)
    d_logits = (probabilities - hit.to(wide.dtype)) * counted[:, None]
    return losses, d_logits.to(logits.dtype), z_losses


@cache
def _compiled_row_losses():
    """Fuse ``_row_losses`` on a GPU: its eager form moves the logits through memory ten times."""
    return torch.compile(_row_losses, dynamic=False)


LOGIT_ELEMENTS = 2**27  # of one slice: 512 MiB in float32


def slice_rows(tokens: int, vocab: int) -> int:
    """Return the rows of logits that are formed at once.

    Slices are as equal as multiples of 128 allow, so that a GPU compiles one size and fills its
    tiles.
    """
    slices = -(-tokens * vocab // LOGIT_ELEMENTS)
    return max(1, -(-tokens // (128 * max(1, slices))) * 128)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the sum of all losses, and the losses of each token [...].

    The sum is differentiable once, by a scalar. A negative label, such as -100, has losses of 0.

    Args:
        hidden: [..., D].
        weight: [vocab, D].
        labels: [...] int64.
        z_loss: coefficient of the square of each token's logsumexp of logits (arXiv 2204.02311,
            section 5), which keeps them from drifting; 0: no such loss.

    Returns:
        The sum, the cross entropies, and the z-losses, None without a coefficient; in float32
        (float64 in float64), in nats.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)}: expected {tuple(hidden.shape[:-1])}, one for each token"
        )
    if not z_loss >= 0:
        raise ValueError(f"z_loss = {z_loss}: expected 0 or more")
    dtype = autocast_dtype(hidden.device)
    if dtype is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows = slice_rows(labels.numel(), weight.shape[0])
    total, losses, z_losses = _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, labels.flatten(), rows, z_loss
    )
    shape = labels.shape
    return total, losses.view(shape), None if z_losses is None else z_losses.view(shape)
