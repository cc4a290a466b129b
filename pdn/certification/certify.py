"""Certification of the Triton kernels on the device at hand, before they may train.

Triton releases have miscompiled kernels of this kind silently, on some GPUs only. So the first use
of a configuration (GPU, Triton version, kernel sources, sizes, axes, dtype) compares its outputs
and gradients on small problems with the float64 chunkwise form. Only what will be launched is
certified: inference asks for no gradients, decoding for its step alone. It takes seconds, most of
them compilation, by many threads; the verdict is kept in a JSON file under ``$PDN_CACHE`` or
``~/.cache/pdn``. A configuration that fails is refused, with a warning that lists every error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pdn.certification.decoding import BATCH
from pdn.certification.problems import (
    Problem,
    relative_error,
)
from pdn.certification.trials import (
    CUT,
    AnyConfiguration,
    Configuration,
    ConvolutionConfiguration,
    DecodingConfiguration,
    OwnConfiguration,
    expected_of,
    problems_of,
)
from pdn.ops import chunkwise
from pdn.ops.kernels import KERNELS
from pdn.ops.recurrences import Decay, Solve, Write

_asked: dict[tuple, None] | None = None  # questions within ``certify_together``, in order
_only_compiling = False  # set by it: compile problems, judge nothing


def _ask(verdict: Callable[..., bool], device: torch.device, *fields) -> bool:
    """Return the verdict.

    Within ``certify_together`` return whether there may be one, to be found at its end.
    """
    if _asked is None:
        return verdict(device, *fields)
    if _unsupported(device) is None:
        _asked[verdict, device, *fields] = None
        return True
    return False


def certify_together(call: Callable[[], object], device: torch.device) -> None:
    """Certify every kernel that ``call`` launches, and compile all of them at once.

    ``call`` is called, but its kernels are compiled instead of launched, so its results are
    garbage. Then the certificates that are missing are made. On a CPU nothing happens.
    """
    global _asked, _only_compiling
    if device.type != "cuda" or _unsupported(device) is not None:
        return
    from pdn.ops.triton.compiled import compiling_ahead

    with compiling_ahead():
        _asked = {}
        try:
            call()
        finally:
            asked, _asked = _asked, None
        _only_compiling = True
        try:
            for verdict, *fields in asked:
                verdict.__wrapped__(*fields)  # past the cache: this answer means nothing
        finally:
            _only_compiling = False
    for verdict, *fields in asked:
        verdict(*fields)


@torch.compiler.assume_constant_result  # traced calls run this once, for real, and keep the verdict
def triton_is_usable(
    device: torch.device,
    key: int,
    value: int,
    decay: Decay,
    write: Write,
    solve: Solve,
    dtype: torch.dtype,
    step: bool,
    gradient: bool = True,
) -> bool:
    """Return whether a call on this CUDA device may use the Triton kernels.

    It warns, once a process, where it may not. The other arguments are fields of ``Configuration``.
    """
    return _ask(_usable, device, key, value, decay, write, solve, dtype, step, gradient)


# asking for the names of device and compiler takes longer than all launches of a call
@functools.cache
def _usable(device, key, value, decay, write, solve, dtype, step, gradient) -> bool:
    fields = key, value, decay, write, solve, dtype, step, gradient
    found = _on_this_machine(device, Configuration, *fields)
    if found is None:
        return False

    def run(problem: Problem) -> dict[str, Tensor]:
        from pdn.ops import triton as kernels

        if step:
            from pdn.ops.triton import step as kernels

            with torch.no_grad():
                return problem.forward(kernels) | problem.advanced(kernels.advance)
        if gradient:
            return problem.run(kernels)
        with torch.no_grad():
            return problem.forward(kernels)

    return certified(found, run, device)


@torch.compiler.assume_constant_result
def convolution_is_usable(
    device: torch.device,
    channels: int,
    width: int,
    dtype: torch.dtype,
    parameters: torch.dtype,
    bias: bool,
    continued: bool = False,
) -> bool:
    """Return whether a short convolution on this CUDA device may use the Triton kernel.

    It warns, once a process, where it may not. The other arguments are fields of
    ``ConvolutionConfiguration``.
    """
    return _ask(_convolution_usable, device, channels, width, dtype, parameters, bias, continued)


@functools.cache
def _convolution_usable(device, *fields) -> bool:
    found = _on_this_machine(device, ConvolutionConfiguration, *fields)
    if found is None:
        return False
    convolve = _in_two if found.continued else _beside_others
    return certified(found, lambda problem: problem.run(convolve), device)


def _beside_others(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, cu_seqlens: Tensor | None
) -> Tensor:
    """Convolve x where it lies beside other channels, as it does in a layer."""
    from pdn.ops.triton.convolution import convolve_parts

    wide = torch.cat([x, x[..., :8]], -1)
    biases = [] if bias is None else [bias]
    return convolve_parts(wide, [weight], biases, cu_seqlens=cu_seqlens)[0]


def _in_two(x: Tensor, weight: Tensor, bias: Tensor | None, *, cu_seqlens: Tensor | None) -> Tensor:
    """Convolve x likewise, its later tokens from the state that the earlier ones leave.

    Where there are documents, x is one row and none begins at the cut.
    """
    from pdn.ops.triton.continued import convolve_parts

    wide = torch.cat([x, x[..., :8]], -1)
    biases = [] if bias is None else [bias]
    states = [x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])]
    found = []
    for first, part in ((0, wide[:, :CUT]), (CUT, wide[:, CUT:])):
        own = None if cu_seqlens is None else (cu_seqlens - first).clamp(0, part.shape[1])
        (y, _), states = convolve_parts(part, [weight], biases, states, cu_seqlens=own)
        found.append(y)
    return torch.cat(found, 1)


def decoding_is_usable(
    device: torch.device, name: str, dtype: torch.dtype, batch: int, sizes: tuple[int, ...]
) -> bool:
    """Return whether a kernel of ``pdn.ops.decoding`` may run on this CUDA device.

    It warns, once a process, where it may not. The other arguments are fields of
    ``DecodingConfiguration``.
    """
    return _ask(_decoding_usable, device, name, dtype, min(batch, BATCH), sizes)


@functools.cache
def _decoding_usable(device, name, dtype, batch, sizes) -> bool:
    found = _on_this_machine(device, DecodingConfiguration, name, dtype, batch, sizes)
    if found is None:
        return False
    from pdn.ops.triton import decoding as kernels

    return certified(found, lambda problem: problem.run(kernels), device)


def kernel_is_usable(
    device: torch.device, name: str, dtype: torch.dtype, sizes: tuple[int, ...]
) -> bool:
    """Return whether a kernel of ``pdn.ops.kernels`` may run on this CUDA device.

    It warns, once a process, where it may not. The other arguments are fields of
    ``OwnConfiguration``.
    """
    return _ask(_kernel_usable, device, name, dtype, sizes)


@functools.cache
def _kernel_usable(device, name, dtype, sizes) -> bool:
    found = _on_this_machine(device, OwnConfiguration, name, dtype, sizes)
    if found is None:
        return False
    own = KERNELS[name]
    found = dataclasses.replace(found, kernels=f"{found.kernels}-{own.digest()}")
    return certified(found, lambda problem: problem.run(own.run), device)


def _on_this_machine(device: torch.device, kind: type, *fields):
    """Return a configuration on this device; None, with a warning, if no kernel can run there."""
    reason = _unsupported(device)
    if reason is not None:
        _warn_once(f"pdn.ops: using the PyTorch forms on this GPU, which are slow: {reason}")
        return None
    return kind(
        torch.cuda.get_device_name(device),
        importlib.metadata.version("triton"),
        sources_hash(),
        *fields,
    )


@functools.cache
def _unsupported(device: torch.device) -> str | None:
    """Return why the kernels cannot run here, or None."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed"
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < (3, 7, 1):
        return f"Triton {version} miscompiles such kernels on Hopper; 3.7.1 or later is needed"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"its compute capability {capability} is below (8, 0)"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@functools.cache
def sources_hash() -> str:
    """Hash the kernels' Python sources: an edited kernel is another configuration."""
    folder = Path(chunkwise.__file__).parent / "triton"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cache_folder() -> Path:
    return Path(os.environ.get("PDN_CACHE") or Path.home() / ".cache" / "pdn") / "certified"


_verdicts: dict[AnyConfiguration, bool] = {}


def certified(key: AnyConfiguration, run: Callable, device: torch.device | str) -> bool:
    """Return whether a configuration computes the right numbers.

    The answer comes from this process, from the cache on disk, or by trying. A failure warns, once
    a process. An exception of ``run`` is a failure too, but is not kept on disk: a full device or
    an interrupted compilation must not refuse the kernels for ever.

    Args:
        key: the configuration.
        run: outputs and gradients of a problem by the kernels, as ``Problem.run`` names them;
            outputs only for the step.
        device: to try it on.

    Raises:
        RuntimeError: during CUDA graph capture for a configuration not yet tried; call it once
            before capturing.
    """
    if key not in _verdicts:
        path = key.path(cache_folder())
        record = _read(path)
        if record is None:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{key} is not certified yet and cannot be during graph capture: call the op "
                    "once before"
                )
            _compile(key, run, device)
            if _only_compiling:
                return True
            record = _try(key, run, device)
            if "exception" not in record:
                _write(path, record)
        _verdicts[key] = record["certified"]
        if not record["certified"]:
            warnings.warn(
                f"REFUSED: the Triton kernels give wrong results for {key}; the PyTorch form, "
                "which is slow, runs in their place. Errors against float64 (limit): "
                f"{record.get('exception') or record['errors']}. To try again, delete {path}.",
                stacklevel=3,
            )
    return _verdicts[key]


def _compile(key: AnyConfiguration, run: Callable, device: torch.device | str) -> None:
    """Compile what the problems of a configuration launch, all kernels at once."""
    if torch.device(device).type != "cuda":
        return
    from pdn.ops.triton.compiled import compiling_ahead

    with compiling_ahead(), _neutral(device), contextlib.suppress(Exception):
        for p in problems_of(key, device):
            run(p)


@contextlib.contextmanager
def _neutral(device: torch.device | str) -> Iterator[None]:
    """Leave the caller's autocast, no_grad or inference mode."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(torch.device(device).type, enabled=False),
    ):
        yield


def _try(key: AnyConfiguration, run, device) -> dict:
    record: dict = {"certified": True, "errors": []}
    with _neutral(device):
        for p in problems_of(key, device):
            try:
                results = run(p)
            except Exception as error:
                return {"certified": False, "exception": f"{type(error).__name__}: {error}"}
            errors = {}
            for name, (x, limit) in expected_of(key, p, results).items():
                error = relative_error(results[name], x) if name in results else float("nan")
                errors[name] = f"{error:.1e} ({limit:.0e})"
                record["certified"] &= error <= limit  # False for NaN
            record["errors"].append(errors)
    return record


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):  # absent, unreadable or torn
        return None


def _write(path: Path, record: dict) -> None:
    """Write atomically: other processes see the whole file or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".json")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(record, file, indent=1)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(
            f"the verdict on the Triton kernels is not kept ({error}): every process will repeat "
            "it",
            stacklevel=4,
        )
