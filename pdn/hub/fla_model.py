"""Models that flash-linear-attention's own class computes, as a control of ours.

The parameters are those of a ``LanguageModel``, under our names and in our shapes; their class
computes with them and has none of its own. So what a run does with parameters, from the groups of
the optimiser to checkpoints and reports, is the same, and the computation alone is theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pdn.hub.architectures import exported_shape, fla_target
from pdn.hub.target import Target
from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel, Output


def language_model(config: ModelConfig) -> LanguageModel:
    """Build the model that ``config.implementation`` names, on torch's default device."""
    return FlaModel(config) if config.implementation == "fla" else LanguageModel(config)


class FlaModel(LanguageModel):
    """Computes logits with flash-linear-attention's class, losses from them.

    Each document begins where its row does, and nothing is carried from call to call. The losses
    are torch's cross entropies of the logits in float32, which that class computes too where
    ``fuse_cross_entropy`` is false; its own drop a row's last label, which ours has. Under
    autocast it keeps the residual stream in float32. Its kernels need a GPU.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        target = fla_target(config)
        assert isinstance(target, Target), target  # of a run's configuration: ``control_problem``
        self._target = target
        with torch.device("meta"):
            theirs = _their_model(config, self._target)
        fix_tuning()
        # In a tuple, which hides it: a submodule's parameters would be trained and saved.
        self._theirs = (theirs,)

    def train(self, mode: bool = True) -> FlaModel:
        """Set the mode here and in their class, which chooses its kernels by it."""
        self._theirs[0].train(mode)
        super().train(mode)
        return self

    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: list[Any] | None = None,
        z_loss: float = 0.0,
    ) -> Output:
        """Compute logits, or with labels the losses, as ``LanguageModel.forward``.

        Raises:
            ValueError: documents, a state or a z-loss, which there are none of here.
        """
        if cu_seqlens is not None or state is not None or z_loss:
            raise ValueError(
                "model.implementation = fla: found cu_seqlens, a state or a z-loss; expected none"
            )
        logits = self._logits(tokens)
        if labels is None:
            return Output(logits, None, None, None)
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="none"
        ).view(labels.shape)
        return Output(None, losses.sum(), losses.detach(), None)

    def _logits(self, tokens: Tensor) -> Tensor:
        constants = self._target.constants
        theirs = {name: value.to(tokens.device) for name, value in constants.items()}
        for ours, parameter in self.named_parameters():
            name = self._target.names[ours]
            shape = exported_shape(name, parameter)
            theirs[name] = parameter if parameter.shape == shape else parameter.view(shape)
        call = {"input_ids": tokens, "use_cache": False}
        return torch.func.functional_call(self._theirs[0], theirs, (), call).logits

    def hidden(self, tokens: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Refuse: ours would compute it."""
        raise ValueError("model.implementation = fla: has logits and losses; expected no more")

    def init_weights(self, seed: int) -> None:
        """Initialise every parameter: ``init: plain`` as ours, ``released`` as their class does.

        That draws with torch's own generator, seeded by ``seed``, on the CPU. The centres of the
        preconditioner start at ``mu_init``, as they do where their constructor's values are kept.
        """
        if self.config.init == "plain":
            super().init_weights(seed)
            return
        with torch.random.fork_rng([]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # and not those of GPUs, as torch.manual_seed
            drawn = dict(_their_model(self.config, self._target).named_parameters())
        with torch.no_grad():
            for ours, parameter in self.named_parameters():
                parameter.copy_(drawn[self._target.names[ours]].view(parameter.shape))


def fix_tuning() -> None:
    """Have every kernel of flash-linear-attention that is loaded take one constant configuration.

    By itself each process times all of them at its first step, which takes minutes of compilation
    and may choose others in the next launch: a run that goes on would not have the bits of one
    that was left alone. The one taken is the first of those with the fewest stages, which need the
    least shared memory, and four warps or nearly so.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "fla":
            continue
        for kernel in list(vars(module).values()):
            while kernel is not None and not hasattr(type(kernel), "prune_configs"):
                kernel = getattr(kernel, "fn", None) if hasattr(type(kernel), "run") else None
            if kernel is not None:
                kernel.prune_configs = _Constant(type(kernel).prune_configs.__get__(kernel))


class _Constant:
    """Chooses one of the configurations that a tuner would try."""

    def __init__(self, candidates: Callable):
        self.candidates = candidates

    def __call__(self, *args: Any, **kwargs: Any) -> list:
        found = self.candidates(*args, **kwargs)
        return [min(found, key=lambda config: (config.num_stages, abs(config.num_warps - 4)))]


def _their_model(config: ModelConfig, target: Target) -> nn.Module:
    """Build their class, which draws its weights."""
    import fla.models as zoo

    kind = getattr(zoo, target.architecture)
    content = dict(target.config)
    preconditioner: Any = getattr(next(iter(config.mixers.values())), "preconditioner", None)
    if getattr(preconditioner, "kind", "none") == "diagonal":
        content["log_atk_scale_init"] = preconditioner.mu_init
    return kind(kind.config_class(**content))
