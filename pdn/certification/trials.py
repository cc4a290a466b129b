"""What a configuration of the Triton kernels is tried on, and what must come out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdn.certification.decoding import DecodingProblem, sample_decoding
from pdn.certification.own import GRADIENT, OwnProblem
from pdn.certification.problems import (
    KINDS,
    SUMS,
    ConvolutionProblem,
    Problem,
    sample,
    sample_convolution,
)
from pdn.ops import chunkwise, convolution, decoding, reference
from pdn.ops.kernels import KERNELS
from pdn.ops.recurrences import Decay, Recurrence, Solve, Write

# relative L2 against float64, by column of problem.KINDS: twice what the kernels are tested to, far
# below a miscompilation
TOLERANCES = {
    torch.float32: (2e-5, 1e-4, 2e-4, 2e-4),
    torch.float16: (1e-2, 2e-2, 3e-2, 4e-2),
    torch.bfloat16: (1e-2, 2e-2, 3e-2, 4e-2),
}
SUM_FACTOR = 4  # parameters' gradients are sums over tokens that largely cancel
# of the convolution's results by their own dtype: one rounding, after sums in float32
CONVOLUTION_TOLERANCES = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ATTENTION_FACTOR = 3  # its scores are of a rounded query and rounded keys
TIME = 130  # three chunks, the last one ragged
BOUNDARIES = [0, 1, 65, 65, 130]
CUT = 66  # where a second part goes on from the first; its last inputs are of two documents
WHOLE_TIME = 320  # full chunks alone, for which there is a kernel of their own
LONG_TIME = 4093  # long enough for the kernels to cut the sequence into segments


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Names what a verdict on a recurrence's kernels holds for; a file of that name keeps it.

    gpu, triton, kernels: names and hash of device, compiler and sources.
    """

    gpu: str
    triton: str
    kernels: str
    key: int
    value: int
    decay: Decay
    write: Write
    solve: Solve
    dtype: torch.dtype
    step: bool = False  # the decoding step, not the chunk kernels
    gradient: bool = True  # of the chunk kernels, also those of the backward pass

    def path(self, cache: Path) -> Path:
        """Return a file of its own, so that no two processes write it differently."""
        kernel = "step" if self.step else "chunk" if self.gradient else "forward"
        size, dtype = f"{self.key}x{self.value}", str(self.dtype)[6:]
        name = f"{kernel}-{self.solve}-{self.decay}-{self.write}-{size}-{dtype}"
        return cache / _machine(self) / f"{name}.json"


@dataclasses.dataclass(frozen=True)
class ConvolutionConfiguration:
    """Names what a verdict on the short convolution's kernels holds for."""

    gpu: str
    triton: str
    kernels: str
    channels: int
    width: int
    dtype: torch.dtype
    parameters: torch.dtype
    bias: bool
    continued: bool = False  # rows that go on from states

    def path(self, cache: Path) -> Path:
        options = f"{str(self.dtype)[6:]}-{str(self.parameters)[6:]}{'-bias' if self.bias else ''}"
        kernel = "continued-convolution" if self.continued else "convolution"
        return cache / _machine(self) / f"{kernel}-{self.channels}x{self.width}-{options}.json"


@dataclasses.dataclass(frozen=True)
class DecodingConfiguration:
    """Names what a verdict on a kernel of ``pdn.ops.decoding`` holds for; sizes: see there."""

    gpu: str
    triton: str
    kernels: str
    name: str
    dtype: torch.dtype
    batch: int
    sizes: tuple[int, ...]

    def path(self, cache: Path) -> Path:
        sizes = "x".join(map(str, (self.batch, *self.sizes)))
        return cache / _machine(self) / f"{self.name}-{sizes}-{str(self.dtype)[6:]}.json"


@dataclasses.dataclass(frozen=True)
class OwnConfiguration:
    """Names what a verdict on a kernel of ``pdn.ops.kernels`` holds for; sizes: those of a call."""

    gpu: str
    triton: str
    kernels: str
    name: str
    dtype: torch.dtype
    sizes: tuple[int, ...]

    def path(self, cache: Path) -> Path:
        sizes = "x".join(map(str, self.sizes))
        return cache / _machine(self) / f"own-{self.name}-{sizes}-{str(self.dtype)[6:]}.json"


AnyConfiguration = (
    Configuration | ConvolutionConfiguration | DecodingConfiguration | OwnConfiguration
)


def _machine(key: AnyConfiguration) -> str:
    return "".join(
        c if c.isalnum() or c in ".-" else "_"
        for c in f"{key.gpu}-triton{key.triton}-{key.kernels}"
    )


def problems(key: Configuration, device: torch.device | str) -> list[Problem]:
    """Return what the kernels of a recurrence are tried on.

    Raw gates and a ragged last chunk; activated gates with documents, an empty one among them: with
    states, and on a GPU also without, which is how models train and other compiled code, for a long
    sequence, and for full chunks alone if they have kernels. Of the step: raw and activated gates,
    for few and for many sequences.
    """
    recurrence = Recurrence(key.decay, key.write, key.solve)
    size: dict[str, Any] = dict(
        heads=2,
        key=key.key,
        value=key.value,
        dtype=key.dtype,
        device=device,
        initial=True,
        final=True,
    )
    shapes: list[dict[str, Any]] = []
    if key.step:
        shapes: list[dict[str, Any]] = [
            dict(batch=1, time=1),
            dict(batch=64, time=1, raw_gates=False, seed=1),
        ]
    else:
        shapes += [
            dict(batch=1, time=TIME),
            dict(batch=1, time=TIME, raw_gates=False, cu_seqlens=BOUNDARIES, seed=1),
        ]
        if torch.device(device).type == "cuda":
            from pdn.ops.triton import compiled  # Triton is not everywhere

            if key.write != "tensor":  # whose random write keys need not be stable for so long
                shapes.append(dict(batch=1, time=LONG_TIME, heads=1, seed=2))
            without = dict(initial=False, final=False)
            if key.write == "inverse":  # which needs a state to stay away from the pole of 1 / A
                without = {}
            if key.write != "tensor" and compiled.persistent_programs(compiled.current_device()):
                shapes.append(dict(batch=1, time=WHOLE_TIME, seed=4) | without)
            if without:
                stateless = dict(batch=1, time=TIME, seed=3) | without
                shapes += [stateless, stateless | dict(cu_seqlens=BOUNDARIES)]
    chosen = [sample(recurrence, **size | shape) for shape in shapes]
    for p in chosen:
        if key.write == "inverse":
            p.form = "inverse"
            p.tensors["A"] += 1  # away from the pole of 1 / A
            del p.tensors["mu"]
        if key.write == "tensor":
            p.tensors["write_k"] = torch.nn.functional.normalize(p.tensors["k"].flip(1), dim=-1)
    return chosen


def convolution_problems(
    key: ConvolutionConfiguration, device: torch.device | str
) -> list[ConvolutionProblem]:
    """Return what the convolution is tried on, without and with documents."""
    size: dict[str, Any] = dict(
        width=key.width, dtype=key.dtype, parameters=key.parameters, bias=key.bias, device=device
    )
    layouts: list[dict[str, Any]] = [dict(batch=2), dict(batch=1, cu_seqlens=BOUNDARIES, seed=1)]
    return [
        sample_convolution(time=TIME, channels=key.channels, **size, **layout) for layout in layouts
    ]


def problems_of(key: AnyConfiguration, device: torch.device | str) -> list:
    """Return what the kernels of a configuration are tried on."""
    if isinstance(key, DecodingConfiguration):
        return [sample_decoding(key.name, key.dtype, key.batch, key.sizes, device)]
    if isinstance(key, ConvolutionConfiguration):
        return convolution_problems(key, device)
    if isinstance(key, OwnConfiguration):
        calls = KERNELS[key.name].problems(*key.sizes)
        return [OwnProblem(tensors).to(key.dtype, device) for tensors in calls]
    return problems(key, device)


def expected_of(
    key,
    p: Problem | ConvolutionProblem | DecodingProblem | OwnProblem,
    results: dict[str, Tensor],
) -> dict[str, tuple[Tensor, float]]:
    """Return what the results should be, and how far they may be from it."""
    exact = p.to(torch.float64)
    if isinstance(exact, DecodingProblem):
        factor = ATTENTION_FACTOR if key.name == "attend" else 1
        limit = factor * CONVOLUTION_TOLERANCES[key.dtype]
        return {name: (x, limit) for name, x in exact.run(decoding).items()}
    if isinstance(exact, ConvolutionProblem):
        right = exact.run(
            lambda *inputs, **options: convolution.short_convolution(
                *inputs, state=None, **options
            )[0]
        )
        factors = {"dweight": SUM_FACTOR, "dbias": SUM_FACTOR}
        return {
            name: (x, factors.get(name, 1) * CONVOLUTION_TOLERANCES[results[name].dtype])
            for name, x in right.items()
        }
    if isinstance(exact, OwnProblem):
        own = KERNELS[key.name]
        of_output, of_gradient = own.tolerances[key.dtype]
        return {
            name: (x, of_gradient if name.startswith(GRADIENT) else of_output)
            for name, x in exact.run(own.definition).items()
        }
    expected = {}
    form = reference if key.step else chunkwise
    right = exact.run(form) if key.gradient and not key.step else exact.forward(form)
    if key.step:
        right |= exact.advanced(decoding.advance)
    for name, x in right.items():
        if exact.tensors["q"].shape[1] == LONG_TIME and KINDS[name] > 1:
            continue  # sums over so many tokens cancel too far; they follow from the rest
        expected[name] = x, TOLERANCES[key.dtype][KINDS[name]] * (SUM_FACTOR if name in SUMS else 1)
    return expected
