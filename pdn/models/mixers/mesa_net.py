"""MesaNet (arXiv 2506.05233): linear attention whose query solves a least-squares problem.

The problem is regularised, is over all earlier keys, and is solved by conjugate gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pdn.models.layers import Linear, RMSNorm, ShortConv, assign
from pdn.models.mixers.axes import Heads, OutputGateConfig, evaluate
from pdn.models.mixers.base import MixerConfig, TokenMixer
from pdn.models.mixers.linear_recurrence import init_recurrent_state
from pdn.ops import RecurrentState, accumulation_dtype, linear_attention
from pdn.ops.checks import check_first_derivative
from pdn.ops.reference import l2norm
from pdn.ops.types import uncompiled, without_autocast

LAMBDA_INIT = 1.0
Product = Callable[[Tensor], Tensor]


class MesaNetConfig(MixerConfig):
    kind: Literal["mesa_net"]
    num_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)  # of queries, keys and values
    conv_size: int = Field(ge=1)  # taps of the convolutions on q and k; v has none
    norm_eps: float = Field(gt=0)
    lambda_min: float = Field(ge=0, lt=LAMBDA_INIT)  # least regularisation of a channel
    iterations: int = Field(ge=1)  # of conjugate gradients, for every token
    output_gate: OutputGateConfig

    @property
    def heads(self) -> Heads:
        """Return numbers and sizes of the heads."""
        return Heads(self.num_heads, self.num_heads, self.head_dim, self.head_dim)

    def num_params(self, d_model: int) -> int:
        width = self.num_heads * self.head_dim
        return (
            4 * d_model * width
            + 2 * width * self.conv_size
            + 2 * (d_model + 1) * self.num_heads
            + width
            + self.head_dim
            + self.output_gate.num_params(d_model, self.heads)
        )

    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        products = 3 + self.iterations  # k (x) k, k (x) v, S^T x, and S_kk p of each iteration
        state = self.num_heads * self.head_dim**2
        return 2 * self.num_params(d_model) + 2 * products * state

    def build(self, d_model: int) -> MesaNet:
        return MesaNet(self, d_model)


class MesaState(NamedTuple):
    """Holds the state of the convolutions and of the two sums.

    conv: the last inputs of the convolutions on q and k.  keys, values: what has been summed of k
    k^T and of k v^T.
    """

    conv: tuple[Tensor, ...]
    keys: RecurrentState
    values: RecurrentState


class Regularisation(nn.Module):
    """Learns lambda [H, K] = softplus(raw) + lambda_min, 1 at first: without weight decay."""

    weight_decay = False

    def __init__(self, config: MesaNetConfig):
        super().__init__()
        self.least = config.lambda_min
        self.raw = nn.Parameter(torch.empty(config.num_heads * config.head_dim))

    def forward(self, heads: int) -> Tensor:
        return (F.softplus(self.raw) + self.least).unflatten(0, (heads, -1))

    def reset_parameters(self, generator: torch.Generator) -> None:
        value = math.log(math.expm1(LAMBDA_INIT - self.least))
        assign(self.raw, torch.full(self.raw.shape, value, device=generator.device))


class MesaNet(TokenMixer):
    def __init__(self, config: MesaNetConfig, d_model: int):
        super().__init__()
        self.config = config
        width = config.num_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Linear(d_model, width) for _ in range(3))
        self.q_conv, self.k_conv = (ShortConv(width, config.conv_size) for _ in range(2))
        self.a_proj, self.b_proj = (Linear(d_model, config.num_heads, bias=True) for _ in range(2))
        self.regularisation = Regularisation(config)
        self.o_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.output_gate = config.output_gate.build(d_model, config.heads)
        self.o_proj = Linear(width, d_model)

    def forward(self, x, *, cu_seqlens=None, state: MesaState | None = None):
        size, tails, found = self.config.head_dim, [], []
        for i, (proj, conv) in enumerate(((self.q_proj, self.q_conv), (self.k_proj, self.k_conv))):
            y, tail = conv(
                proj(x), cu_seqlens=cu_seqlens, state=None if state is None else state.conv[i]
            )
            found.append(y.unflatten(-1, (-1, size)))
            tails.append(tail)
        v = self.v_proj(x).unflatten(-1, (-1, size))
        dtype = accumulation_dtype(x)
        log_decay = F.logsigmoid(self.a_proj(x).to(dtype))
        beta = self.b_proj(x).to(dtype).sigmoid()
        q, k = found
        o, keys, values = mesa(
            q,
            k,
            v,
            log_decay=log_decay,
            beta=beta,
            regularisation=self.regularisation(self.config.num_heads).to(dtype),
            iterations=self.config.iterations,
            cu_seqlens=cu_seqlens,
            state=None if state is None else (state.keys, state.values),
        )
        o = self.o_norm(o)
        [gate] = evaluate(x, self.output_gate)
        if gate is not None:
            o = o * gate
        new = None
        if keys is not None and values is not None:
            new = MesaState(tuple(tails), keys, values)
        return self.o_proj(o.flatten(-2)), new

    def init_state(self, batch_size, device, dtype):
        conv = tuple(c.init_state(batch_size, device, dtype) for c in (self.q_conv, self.k_conv))
        keys, values = (
            init_recurrent_state(batch_size, self.config.heads, 0, device, dtype) for _ in range(2)
        )
        return MesaState(conv, keys, values)

    def reset_parameters(self, generator):
        pass  # every parameter belongs to a submodule


@uncompiled  # its gradient calls back into Python
@without_autocast
def mesa(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay, beta, regularisation, iterations, cu_seqlens,
    state
) -> tuple[Tensor, RecurrentState | None, RecurrentState | None]:  # fmt: skip
    """Compute ``o_t = V_t^T x_t`` with ``(K_t + diag(lambda)) x_t = q_t``.

    ``K_t = a_t K_{t-1} + beta_t k_t k_t^T`` and ``V_t = a_t V_{t-1} + beta_t k_t v_t^T``. A product
    with K_t of every token is the op itself, with keys in the place of values, so any backend,
    documents and states serve it.

    Args:
        q, k: [B, T, H, K], normalised here.
        v: [B, T, H, V].
        log_decay, beta: [B, T, H].
        regularisation: lambda [H, K].
        iterations: of conjugate gradients.
        state: K and V so far, or None.

    Returns:
        o [B, T, H, V] in the dtype of v; K and V after the last token, if there was a state.
    """
    dtype = accumulation_dtype(v)
    q, k = l2norm(q.to(dtype)), l2norm(k.to(dtype))
    options: dict[str, Any] = dict(beta=beta, log_decay=log_decay, scale=1.0, cu_seqlens=cu_seqlens)
    sums = (None, None) if state is None else state

    def product(x: Tensor) -> Tensor:
        return linear_attention(x, k, k, state=sums[0], **options)[0] + regularisation * x

    with torch.no_grad():
        solution = conjugate_gradients(product, q, iterations)
    residual = q - product(solution)
    x = solution + _Inverse.apply(residual, product, iterations)
    o, values = linear_attention(
        x, k, v.to(dtype), state=sums[1], return_state=state is not None, **options
    )
    if state is None:
        return o.to(v.dtype), None, None
    _, keys = linear_attention(x, k, k, state=sums[0], return_state=True, **options)
    return o.to(v.dtype), keys, values


class _Inverse(torch.autograd.Function):
    """Does nothing in the forward pass; in the backward pass solves for the gradient.

    The gradient that a solution's residual passes on is solved with the same symmetric matrix. That
    gives the gradient of the exact solution by the query, the keys and their gates, without the
    iterations in memory.
    """

    @staticmethod
    def forward(ctx, residual: Tensor, product: Product, iterations: int) -> Tensor:
        ctx.product, ctx.iterations = product, iterations
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        check_first_derivative("mesa_net", "use another mixer")
        (d_solution,) = grad_outputs
        with torch.no_grad():
            return conjugate_gradients(ctx.product, d_solution, ctx.iterations), None, None


def conjugate_gradients(product: Product, target: Tensor, iterations: int) -> Tensor:
    """Solve ``product(x) = target`` for symmetric positive matrices, one for each [..., K].

    A system that has converged stays as it is while others go on.

    Args:
        product: of all matrices with a vector each.
        target: [..., K].
        iterations: of every system.
    """
    x, residual = torch.zeros_like(target), target
    direction, size = residual, residual.square().sum(-1, keepdim=True)
    smallest = torch.finfo(target.dtype).eps ** 2 * size
    for _ in range(iterations):
        going = size > smallest
        image = product(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where(going, size / torch.where(going, curvature, 1.0), 0.0)
        x = x + step * direction
        residual = residual - step * image
        new = residual.square().sum(-1, keepdim=True)
        turn = torch.where(going, new / torch.where(going, size, 1.0), 0.0)
        direction = residual + turn * direction
        size = torch.where(going, new, size)
    return x
