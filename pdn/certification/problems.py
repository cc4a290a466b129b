"""A random call of an op, with every tensor that it is differentiated by.

For certification, benchmarks and tests. Letters: B batch, T time, H key heads, HV value heads, K
key size, V value size, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pdn import ops
from pdn.ops.recurrences import Recurrence
from pdn.ops.types import DiagonalPreconditioner, RecurrentState, SigmoidGain, SoftplusDecay

# what kind of quantity each tensor is: the column of the tolerance table
KINDS = {"o": 0, "S": 0, "A": 0, "dq": 1, "dk": 1, "dv": 1, "dwrite_k": 1, "dS": 1}
GATES = ("beta", "beta_x", "log_decay", "log_decay_x", "A_log", "dt_bias")
PRECONDITIONER = (
    "P_beta",
    "P_beta_x",
    "P_log_decay",
    "P_log_decay_x",
    "P_A_log",
    "P_dt_bias",
    "mu",
    "A",
)
KINDS |= {"advanced o": 0, "advanced S": 0, "advanced A": 0}
KINDS |= {f"d{name}": 2 for name in GATES} | {f"d{name}": 3 for name in PRECONDITIONER}

# parameters and states, which are float32 beside any other dtype
PARAMETERS = frozenset({"A_log", "dt_bias", "P_A_log", "P_dt_bias", "mu", "S", "A"})
# per-head parameters: sums over all tokens
SUMS = frozenset({"dA_log", "ddt_bias", "dP_A_log", "dP_dt_bias", "dmu"})


@dataclass
class Problem:
    """Holds the tensors of one call.

    tensors: by name. ``q, k, v``; gates either activated (``beta``, ``log_decay``, ``P_beta``,
        ``P_log_decay``) or as raw projections with their parameters (``beta_x``; ``log_decay_x``,
        ``A_log``, ``dt_bias``; the same with ``P_``); ``mu``; a ``write_k`` in place of the
        preconditioner; initial states ``S`` and ``A``.
    cotangents: of the outputs ``o`` and, if the final state is wanted, ``S`` (and ``A``).
    """

    recurrence: Recurrence
    tensors: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    cu_seqlens: Tensor | None = None
    bound: float = 1.5
    form: Literal["squash", "inverse"] = "squash"

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Problem:
        """Cast every tensor.

        ``dtype=torch.float64`` gives the same, already rounded, inputs in double precision.
        """

        def cast(tensors):
            return {name: x.detach().to(device=device, dtype=dtype) for name, x in tensors.items()}

        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return replace(
            self,
            tensors=cast(self.tensors),
            cotangents=cast(self.cotangents),
            cu_seqlens=cu_seqlens,
        )

    def head(self, h: int) -> Problem:
        """Return the part of one head (H = HV).

        Heads do not interact, so its results are that slice of the whole's.
        """
        axis = {"A_log": 0, "dt_bias": 0, "P_A_log": 0, "P_dt_bias": 0, "mu": 0, "S": 1, "A": 1}

        def part(tensors, default):
            return {name: x.narrow(axis.get(name, default), h, 1) for name, x in tensors.items()}

        return replace(self, tensors=part(self.tensors, 2), cotangents=part(self.cotangents, 2))

    def arguments(self, tensors: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict]:
        """Return arguments of ``delta_rule`` or ``linear_attention`` with these tensors.

        They are the positional and the keyword ones.
        """
        preconditioner = None
        if self.recurrence.preconditioned:
            decay, beta = _decay(tensors, "P_"), _gain(tensors, "P_")
            assert decay is not None and beta is not None  # every such problem samples them
            preconditioner = DiagonalPreconditioner(
                decay, beta, tensors.get("mu"), bound=self.bound, form=self.form
            )
        state = RecurrentState(tensors["S"], tensors.get("A")) if "S" in tensors else None
        options: dict[str, Any] = dict(
            beta=_gain(tensors, ""), log_decay=_decay(tensors, ""), scale=self.recurrence.scale,
            qk_l2norm=self.recurrence.qk_l2norm,
            state=state, return_state="S" in self.cotangents, cu_seqlens=self.cu_seqlens,
        )  # fmt: skip
        if self.recurrence.online:
            options["write_k"] = tensors.get("write_k", preconditioner)
        else:
            options["preconditioner"] = preconditioner
        return (tensors["q"], tensors["k"], tensors["v"]), options

    def forward(self, backend, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return outputs by name. ``backend``: a name, or a module to call without dispatch."""
        arguments, options = self.arguments(self.tensors if tensors is None else tensors)
        module = ops if isinstance(backend, str) else backend
        if isinstance(backend, str):
            options["backend"] = backend
        o, state = getattr(module, self.recurrence.op)(*arguments, **options)
        outputs = {"o": o}
        if state is not None:
            outputs["S"] = state.S
            if state.A is not None:
                outputs["A"] = state.A
        return outputs

    def advanced(self, advance: Callable[..., Tensor], clock: int = 5) -> dict[str, Tensor]:
        """Return output and state of one token, the state overwritten.

        Args:
            advance: ``pdn.ops.decoding.advance``, or its kernel.
            clock: how many tokens the state is of.
        """
        qkv, options = self.arguments(self.tensors)
        S, A = self.tensors["S"].clone(), self.tensors.get("A")
        if A is not None:
            A = torch.stack([A, A + 1] if clock % 2 == 0 else [A + 1, A])
        count = torch.tensor([clock], device=S.device)
        if S.is_cuda:  # they may be read before launches are waited for
            torch.cuda.synchronize(S.device)
        o = advance(
            *qkv, solve="online" if self.recurrence.online else "offline", beta=options["beta"],
            log_decay=options["log_decay"],
            write=options.get("write_k", options.get("preconditioner")),
            qk_l2norm=self.recurrence.qk_l2norm, S=S, A=A, clock=count,
        )  # fmt: skip
        return {"advanced o": o, "advanced S": S} | ({} if A is None else {"advanced A": A})

    def leaves(self) -> dict[str, Tensor]:
        return {name: x.detach().requires_grad_() for name, x in self.tensors.items()}

    def run(self, backend) -> dict[str, Tensor]:
        """Return outputs, and ``d<name>``: the gradient by every tensor, for the cotangents."""
        leaves = self.leaves()
        outputs = self.forward(backend, leaves)
        return {name: x.detach() for name, x in outputs.items()} | self.gradients(outputs, leaves)

    def gradients(self, outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Differentiate ``sum(output * cotangent)`` by every leaf, named ``d<leaf>``.

        The gradient is zeros where nothing depends on the leaf.
        """
        cotangents = [self.cotangents[name].to(x.dtype) for name, x in outputs.items()]
        grads = torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), cotangents, allow_unused=True
        )
        return {
            f"d{name}": x.new_zeros(x.shape) if g is None else g
            for (name, x), g in zip(leaves.items(), grads, strict=True)
        }


def _gain(tensors, prefix):
    raw = tensors.get(f"{prefix}beta_x")
    return tensors.get(f"{prefix}beta") if raw is None else SigmoidGain(raw)


def _decay(tensors, prefix):
    raw = tensors.get(f"{prefix}log_decay_x")
    if raw is None:
        return tensors.get(f"{prefix}log_decay")
    return SoftplusDecay(raw, tensors[f"{prefix}A_log"], tensors[f"{prefix}dt_bias"])


def sample(
    recurrence: Recurrence,
    *,
    batch: int,
    time: int,
    heads: int,
    key: int,
    value: int | None = None,
    value_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cu_seqlens: list[int] | None = None,
    initial: bool = False,
    final: bool = False,
    raw_gates: bool = True,
    bound: float = 1.5,
    seed: int = 0,
) -> Problem:
    """Return inputs as a freshly initialised layer would give them.

    q, k, v are SiLU-shaped and the gates those of the initialisation. All are drawn on the CPU, so
    that every device sees the same numbers.

    Args:
        recurrence: the point of the design space.
        batch, time, heads, key: B, T, H and K.
        value, value_heads: V and HV; None: K and H.
        dtype: of the projections; parameters and states are float32 (float64 with float64).
        device: of the result.
        cu_seqlens: document boundaries on the flattened B * T axis, if there are documents.
        initial, final: with an initial state, and with gradients into the final one.
        raw_gates: give the gates before their activations.
        bound: of the preconditioner.
        seed: of the numbers.
    """
    value, value_heads = value or key, value_heads or heads
    random = _Random(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    gates = batch, time, value_heads

    tensors = {name: F.silu(random.normal(batch, time, heads, key)) for name in ("q", "k")}
    tensors["v"] = F.silu(random.normal(*gates, value))
    tensors["beta_x"] = random.normal(*gates)
    if recurrence.decay != "none":
        tensors |= random.decay("", *gates, *([key] if recurrence.decay == "diagonal" else []))
    if recurrence.preconditioned:
        tensors |= random.decay("P_", *gates)
        tensors["P_beta_x"] = random.normal(*gates)
        tensors["mu"] = -0.2 + 0.1 * random.normal(value_heads)
    if not raw_gates:
        _activate(tensors)
    if initial:
        tensors["S"] = 0.2 * random.normal(sequences, value_heads, key, value)
        if recurrence.preconditioned:
            tensors["A"] = random.uniform(0, 0.2, sequences, value_heads, key)
    cotangents = {"o": random.normal(*gates, value)}
    if final:
        cotangents["S"] = random.normal(sequences, value_heads, key, value)
        if recurrence.preconditioned:
            cotangents["A"] = random.normal(sequences, value_heads, key)

    def place(tensors):
        return {
            name: x.to(device=device, dtype=wide if name in PARAMETERS else dtype)
            for name, x in tensors.items()
        }

    bounds = (
        None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    )
    return Problem(recurrence, place(tensors), place(cotangents), bounds, bound)


class _Random:
    """Draws on the CPU, so that every device sees the same numbers."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device="cpu")

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self._generator, device="cpu")

    def decay(
        self, prefix: str, batch: int, time: int, heads: int, *width: int
    ) -> dict[str, Tensor]:
        """Return a raw decay and its parameters as of the initialisation."""
        dt = torch.exp(self.uniform(-6.9, -2.3, heads, *width))
        return {
            f"{prefix}log_decay_x": self.normal(batch, time, heads, *width),
            f"{prefix}A_log": self.uniform(0.05, 16, heads).log(),
            f"{prefix}dt_bias": dt + torch.log(-torch.expm1(-dt)),  # the inverse of softplus
        }


def _activate(tensors: dict[str, Tensor]) -> None:
    """Replace raw gates by their activated values."""
    for prefix in ("", "P_"):
        if f"{prefix}beta_x" in tensors:
            tensors[f"{prefix}beta"] = SigmoidGain(tensors.pop(f"{prefix}beta_x")).materialise()
        if f"{prefix}log_decay_x" in tensors:
            raw = [tensors.pop(prefix + name) for name in ("log_decay_x", "A_log", "dt_bias")]
            tensors[f"{prefix}log_decay"] = SoftplusDecay(*raw).materialise()


@dataclass
class ConvolutionProblem:
    """Holds a call of the short convolution.

    x: [B, T, C]; weight: [C, W]; bias: [C] or None; dy: the gradient of its output.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dy: Tensor
    cu_seqlens: Tensor | None = None

    def to(self, dtype: torch.dtype) -> ConvolutionProblem:
        x, weight, dy = self.x.to(dtype), self.weight.to(dtype), self.dy.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return ConvolutionProblem(x, weight, bias, dy, self.cu_seqlens)

    def run(self, convolve: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Return y, dx, dweight and, with a bias, dbias.

        They are computed by ``convolve(x, weight, bias, cu_seqlens=...)``.
        """
        inputs = {
            name: x for name in ("x", "weight", "bias") if (x := getattr(self, name)) is not None
        }
        inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        y = convolve(inputs["x"], inputs["weight"], inputs.get("bias"), cu_seqlens=self.cu_seqlens)
        gradients = torch.autograd.grad(y, list(inputs.values()), self.dy)
        return {"y": y.detach()} | {
            f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)
        }


def sample_convolution(
    batch: int, time: int, channels: int, width: int = 4, *, dtype: torch.dtype, bias: bool = True,
    parameters: torch.dtype | None = None, cu_seqlens: list[int] | None = None, margin: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ConvolutionProblem:  # fmt: skip
    """Draw a call of the short convolution with normal numbers.

    Args:
        batch, time, channels, width: B, T, C and W.
        dtype: of x.
        bias: with a bias.
        parameters: their dtype, that of x by default.
        cu_seqlens: document boundaries on the flattened B * T axis, if there are documents.
        margin: x is a slice of rows so much longer.
        seed: of the numbers.
        device: of the result.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    parameters = parameters or dtype
    weight, offsets = normal(channels, width, dtype=parameters), normal(channels, dtype=parameters)
    x = normal(batch, time, channels + margin)[..., margin // 2 : margin // 2 + channels]
    bounds = (
        None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    )
    return ConvolutionProblem(
        x, weight, offsets if bias else None, normal(batch, time, channels), bounds
    )


def relative_error(x: Tensor, reference: Tensor) -> float:
    """Return |x - reference| / |reference| in the L2 norm, in float64.

    |x| where the reference is zero; NaN stays NaN.
    """
    x, reference = x.double(), reference.double()
    norm = reference.norm().item()
    return (x - reference).norm().item() / (norm or 1.0)
