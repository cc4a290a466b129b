"""Random calls of the kernels of ``pdn.ops.decoding``, for certification and tests."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

CACHED = 130  # tokens of an attended cache: several blocks, the last one ragged
BATCH = 64  # sequences, at most: more of them change no kernel


@dataclass
class DecodingProblem:
    """Holds the arguments of one call: tensors by name, and the rest."""

    name: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> DecodingProblem:
        """Cast every floating-point tensor."""
        cast = {
            name: x.to(dtype) if x.is_floating_point() else x for name, x in self.tensors.items()
        }
        return replace(self, tensors=cast)

    def run(self, module: Any) -> dict[str, Tensor]:
        """Return results by name, the states that the call advanced among them.

        module: ``pdn.ops.decoding`` or ``pdn.ops.triton.decoding``.
        """
        tensors = {name: x.clone() for name, x in self.tensors.items()}
        devices = {x.device for x in tensors.values() if x.is_cuda}
        for device in devices:  # weights and states may be read before launches are waited for
            torch.cuda.synchronize(device)
        function = getattr(module, self.name)
        known = inspect.signature(function).parameters
        arguments = tensors | {name: x for name, x in self.options.items() if name in known}
        with torch.no_grad():
            result = function(**arguments)
        parts = result if isinstance(result, list) else [result]
        states = {name: tensors[name] for name in ("state", "keys", "values") if name in tensors}
        return {f"part {i}": part for i, part in enumerate(parts)} | states


def sample_decoding(
    name: str, dtype: torch.dtype, batch: int, sizes: tuple[int, ...], device: torch.device | str
) -> DecodingProblem:
    """Return a call of a kernel with normal numbers, drawn on the CPU.

    Args:
        name: of the kernel in ``pdn.ops.decoding``.
        dtype: of the activations.
        batch: sequences.
        sizes: as ``pdn.ops.decoding`` names them to the certifier.
        device: of the tensors.
    """
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype=dtype) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(device, dtype)

    tensors, options = KERNELS[name](normal, min(batch, BATCH), *sizes)
    return DecodingProblem(name, {key: x for key, x in tensors.items() if x is not None}, options)


def _project(normal, batch, N, D, group, gated, swiglu, add):
    tensors = dict(
        x=normal(batch, 2 * D if swiglu else D),
        weight=normal(N, D),
        norm=normal(group) if group else None,
        gate=normal(batch, D) if gated else None,
        into=normal(batch, N) if add else None,
    )
    absent = {name: None for name, x in tensors.items() if x is None}
    return tensors, absent | {"eps": 1e-6, "swiglu": bool(swiglu)}


def _prepare(normal, batch, D, group, gated, swiglu):
    tensors, options = _project(normal, batch, 1, D, group, gated, swiglu, False)
    for name in ("weight", "into"):
        tensors.pop(name)
        options.pop(name, None)
    return tensors, options


def _split_and_convolve(normal, batch, channels, width, itemsize, *sizes):
    x, state = normal(batch, sum(sizes)), normal(batch, width - 1, channels)
    weight = normal(channels, width, dtype=torch.float32 if itemsize == 4 else x.dtype)
    weight = weight.mT.contiguous().mT  # as the decoder has it
    return {"x": x, "weight": weight, "state": state}, {"sizes": list(sizes)}


def _draw(normal, batch, vocabulary, top_k):
    uniform = torch.rand(batch, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = normal(batch, vocabulary)
    options = dict(temperature=0.5, top_k=top_k or None)
    return dict(logits=logits, uniform=uniform.to(logits.device)), options


def _attend(normal, batch, heads, kv_heads, size, window):
    x = normal(batch, (heads + 2 * kv_heads) * size)
    caches = [normal(batch, kv_heads, CACHED, size) for _ in range(2)]
    table = normal(CACHED, 2, size // 2, dtype=torch.float32)
    position = (torch.arange(batch, device=x.device) * 37 + CACHED - 1) % CACHED
    tensors = dict(qkv=x, keys=caches[0], values=caches[1], position=position, table=table)
    return tensors, {"heads": heads, "window": min(window, CACHED // 2)}


KERNELS: dict[str, Callable] = {
    "project": _project,
    "prepare": _prepare,
    "split_and_convolve": _split_and_convolve,
    "attend": _attend,
    "draw": _draw,
}
