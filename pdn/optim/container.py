"""One face for all optimisers of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pdn.distributed.fsdp import local_part
from pdn.optim.average import WeightAverage
from pdn.optim.guarded import GuardedOptimizer


class OptimizerContainer:
    """Holds the optimisers that share a model's parameters, each parameter by name.

    The groups of ``optimizers`` have ``name`` and ``peak_lr`` beside the usual keys.

    Args:
        model: whose parameters they update; gives them their names.
        optimizers: of disjoint sets of its parameters.
        ema: decay of a moving average of the weights; None: there is none.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[GuardedOptimizer], *, ema: float | None = None
    ):
        self.optimizers = optimizers
        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters()
        }
        self.average: WeightAverage | None = None
        if ema is not None:
            self.average = WeightAverage(dict(model.named_parameters()), ema)
        self._before_change: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[GuardedOptimizer]:
        return iter(self.optimizers)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of all optimisers, live."""
        return [group for single in self.optimizers for group in single.param_groups]

    def call_before_change(self, callback: Callable[[], None]) -> None:
        """Have ``callback``, and no earlier one, called before weights, state or average change."""
        self._before_change = callback
        if self.average is not None:
            self.average.before_change = callback

    def step(self, found_inf: Tensor | None = None, clip: Tensor | None = None) -> None:
        """Update the parameters once, and then their average.

        Args:
            found_inf: scalar tensor beside the parameters; where it is true (not 0), parameters,
                state and step counts stay as they are, whatever the gradients hold. Never read by
                the host unless it lives there. None: update.
            clip: scalar float32 tensor beside the parameters, the factor of the gradients; None: 1.
        """
        self._before_change()
        self._step(found_inf, clip)
        if self.average is not None:
            self.average.update()

    def _step(self, found_inf: Tensor | None, clip: Tensor | None) -> None:
        if found_inf is None and clip is None:
            for single in self.optimizers:
                single.step()
            return
        device = next(iter(self.names)).device
        if found_inf is None:
            found_inf = torch.zeros((), device=device)
        if clip is None:
            clip = torch.ones((), device=device)
        for single in self.optimizers:
            single.guarded_step(found_inf, clip)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for single in self.optimizers:
            single.zero_grad(set_to_none=True)

    def set_lr_fraction(self, fraction: float) -> None:
        """Set every group's learning rate to a fraction of its own peak, as the schedule gives."""
        for group in self.groups:
            group["lr"] = group["peak_lr"] * fraction

    def keep_eps(self, saved: dict[str, dict[str, Any]]) -> bool:
        """Use the ``eps`` that a run has had so far, where it is another; return whether it was.

        Args:
            saved: numbers of a checkpoint by parameter name, as ``hyperparameters`` gives them.
        """
        kept = False
        for group in self.groups:
            found = {saved.get(self.names[p], {}).get("eps") for p in group["params"]}
            if len(found) == 1 and (eps := found.pop()) not in (None, group.get("eps")):
                group["eps"], kept = eps, True
        return kept

    def state_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return ``{"state": ..., "hyperparameters": ...}``, each by parameter name; live tensors.

        State is empty for parameters that were never updated. The average of the weights is not
        among it: see ``WeightAverage.tensors``.
        """
        state = {
            self.names[parameter]: dict(values)
            for single in self.optimizers
            for parameter, values in single.state.items()
        }
        numbers = {
            self.names[parameter]: hyperparameters(group)
            for group in self.groups
            for parameter in group["params"]
        }
        return {"state": state, "hyperparameters": numbers}

    def load_state_dict(self, saved: dict[str, dict[str, dict[str, Any]]]) -> None:
        """Continue from what ``state_dict`` returned, whatever the groups were then.

        Tensors are copied. The saved hyperparameters are a record: those in force come from the
        configuration.

        Raises:
            ValueError: state of an unknown parameter, or of another shape.
        """
        owners = {
            self.names[parameter]: (single, parameter)
            for single in self.optimizers
            for group in single.param_groups
            for parameter in group["params"]
        }
        for single in self.optimizers:
            single.state.clear()
        for name, values in saved["state"].items():
            if name not in owners:
                raise ValueError(
                    f"optimizer state of {name!r}: found no such parameter; expected the model it "
                    "was saved with"
                )
            single, parameter = owners[name]
            for key, value in values.items():
                if value.dim() and value.shape != parameter.shape:
                    raise ValueError(
                        f"optimizer state {key} of {name}: found {list(value.shape)}, expected "
                        f"{list(parameter.shape)}"
                    )
                single.state[parameter][key] = value.detach().clone()

    def state_bytes(self) -> int:
        """Return the bytes that the whole state takes on all ranks together, once it exists.

        The average of the weights is part of it. Works for a model on the meta device.
        """
        average = 0
        if self.average is not None:
            average = sum(p.numel() * p.element_size() for p in self.names)
        return average + sum(
            parameter.numel() * parameter.element_size() * len(single.moments)
            for single in self.optimizers
            for group in single.param_groups
            for parameter in group["params"]
        )

    def local_state_sizes(self) -> list[int]:
        """Return the bytes of each tensor of the state that this rank will keep.

        Step counts, of four bytes each, are among them.
        """
        sizes = []
        for single in self.optimizers:
            for group in single.param_groups:
                for parameter in group["params"]:
                    part = local_part(parameter)
                    sizes += [part.numel() * part.element_size()] * len(single.moments) + [4]
        return sizes + (self.average.local_sizes() if self.average is not None else [])


def hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a parameter group (lr, betas, ...).

    Its implementation flags are left out: they follow the machine.
    """
    return {key: value for key, value in group.items() if key != "peak_lr" and _is_number(value)}


def _is_number(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_number(item) for item in value)
    return isinstance(value, int | float) and not isinstance(value, bool)
