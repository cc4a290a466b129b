"""Kernels of other projects that ``benchmark.py ops`` times beside ours.

Each is called as fast as its authors allow. A rival is called like a backend of ``pdn.ops``: an
object with ``delta_rule``. Where a rival's kernels take neither raw gates nor unnormalised keys,
these are computed before it by FLA's fused kernels, with their gradients, since a layer would have
to do the same; that time is part of the call.
"""

from __future__ import annotations

import contextlib
import importlib
import os

import torch
from torch import Tensor

from pdn.ops import fla
from pdn.ops.recurrences import RECURRENCES
from pdn.ops.types import SigmoidGain, SoftplusDecay

SWITCHES = ("FLA_FLASH_QLA", "FLA_TILELANG")  # of FLA's own backends, which it reads at every call


class Rival:
    """Names a rival, the models it computes, and the packages it needs besides FLA.

    tilelang: whether FLA may hand its operations to FlashQLA and TileLang, or keeps to Triton.
    """

    name: str
    models: tuple[str, ...]
    packages: tuple[str, ...] = ()
    tilelang = False

    @contextlib.contextmanager
    def chosen(self):
        """Set FLA's switches, which it reads forward and, on another thread, backward."""
        before = {name: os.environ.get(name) for name in SWITCHES}
        os.environ.update(dict.fromkeys(SWITCHES, str(int(self.tilelang))))
        try:
            yield
        finally:
            for name, x in before.items():
                if x is None:
                    os.environ.pop(name)
                else:
                    os.environ[name] = x

    def delta_rule(self, q, k, v, **options):
        """Compute ``pdn.ops.delta_rule`` from zero to no state, without documents.

        Raises:
            ValueError: an option that the rival lacks, or a package that is not installed.
        """
        for option in ("state", "cu_seqlens", "write_k"):
            if options.pop(option) is not None:
                raise ValueError(
                    f"{option}: the benchmark calls {self.name} without; leave it None"
                )
        if options.pop("return_state"):
            raise ValueError(
                f"return_state: the benchmark calls {self.name} without; leave it False"
            )
        for package in self.packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ValueError(f"{self.name} needs the package {package}: {error}") from error
        return self.compute(q, k, v, **options), None

    def compute(self, q, k, v, *, beta, log_decay, scale, qk_l2norm) -> Tensor:
        raise NotImplementedError


class FlaTriton(Rival):
    """Runs FLA's own Triton kernels, whatever else is installed."""

    name = "fla"
    models = tuple(RECURRENCES)

    def delta_rule(self, q, k, v, **options):
        return fla.delta_rule(q, k, v, **options)

    def linear_attention(self, q, k, v, **options):
        return fla.linear_attention(q, k, v, **options)


class FlaTileLang(Rival):
    """Runs FLA's KDA with the TileLang kernel in place of its largest backward kernel."""

    name = "fla_tilelang"
    models = ("kda",)
    packages = ("tilelang",)
    tilelang = True

    def compute(self, q, k, v, **options):
        absent = dict(write_k=None, state=None, return_state=False, cu_seqlens=None)
        return fla.delta_rule(q, k, v, **options, **absent)[0]


class FlashQLA(Rival):
    """Runs what FLA's FlashQLA backend calls once the package is there and gates come activated."""

    name = "flash_qla"
    models = ("gdn",)
    packages = ("flash_qla",)

    def compute(self, q, k, v, *, beta, log_decay, scale, qk_l2norm):
        from flash_qla import chunk_gated_delta_rule

        g = decay_of(log_decay, "fla.ops.gated_delta_rule.gate", "fused_gdn_gate")
        options = dict(scale=scale, use_qk_l2norm_in_kernel=qk_l2norm)
        return chunk_gated_delta_rule(q, k, v, g, gain_of(beta, v.dtype), **options)[0]


class CudnnKDA(Rival):
    """Runs KDA of cuDNN's frontend by its CUDA kernels for Hopper.

    They are the only ones there with a backward pass.
    """

    name = "cudnn"
    models = ("kda",)
    packages = ("cudnn",)

    def compute(self, q, k, v, *, beta, log_decay, scale, qk_l2norm):
        from cudnn.linear_attention.ops import kimi_delta_attention
        from fla.modules.norm.l2norm import l2norm

        if qk_l2norm:
            q, k = l2norm(q), l2norm(k)
        g = decay_of(log_decay, "fla.ops.kda.gate", "fused_kda_gate")
        batch, time = q.shape[:2]
        bounds = torch.arange(0, (batch + 1) * time, time, dtype=torch.int32, device=q.device)
        inputs = (x.flatten(0, 1).contiguous() for x in (q, k, v, g, gain_of(beta, torch.float32)))
        o = kimi_delta_attention(*inputs, bounds, scale=scale, plan_name="kda_hopper_cuda")[0]
        return o.unflatten(0, (batch, time))


def decay_of(decay: Tensor | SoftplusDecay, module: str, gate: str) -> Tensor:
    """Return the float32 log-decay, by FLA's fused gate where it is given raw.

    Args:
        decay: the log-decay, or what it is computed from.
        module, gate: where FLA's fused gate is, and its name.
    """
    if isinstance(decay, Tensor):
        return decay.float()
    function = getattr(importlib.import_module(module), gate)
    return function(decay.x, decay.A_log.float(), decay.dt_bias.float().reshape(-1))


def gain_of(gain: Tensor | SigmoidGain, dtype: torch.dtype) -> Tensor:
    """Return the gain in the dtype that the rival takes."""
    return (gain if isinstance(gain, Tensor) else gain.materialise()).to(dtype)


RIVALS = {rival.name: rival for rival in (FlaTriton(), FlaTileLang(), FlashQLA(), CudnnKDA())}
