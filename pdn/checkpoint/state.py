"""What a checkpoint holds: parameters, buffers, optimizer and random states, hyperparameters."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pdn.checkpoint.format import Manifest
from pdn.distributed.fsdp import reshard
from pdn.errors import ConfigError, StorageError
from pdn.optim.average import UPDATES
from pdn.optim.container import OptimizerContainer, hyperparameters
from pdn.store.local import storage_error
from pdn.wording import first_line

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return ``model.<name>`` → parameter or persistent buffer, live; tied ones once.

    Prefixes of wrappers are removed from the names.
    """
    found = {
        f"model.{_plain_name(name)}": parameter.detach()
        for name, parameter in _bare(model).named_parameters()
    }
    for prefix, module in _bare(model).named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[f"model.{_plain_name(name)}"] = buffer
    return found


def optimizer_tensors(model: nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    """Return ``optim.<parameter>.<state>`` → live state tensor; empty before the first step.

    With the moving average of the weights, ``ema.<parameter>``, where the run keeps one.

    Read from ``Optimizer.state`` itself: torch's ``get_optimizer_state_dict`` takes an optimizer
    step to create missing state, which leaves a checkpoint of step 0 with a step count of 1, and
    skips all state if any gradient exists.
    """
    names = _names(model)
    found: dict[str, Tensor] = {}
    for single in _as_list(optimizer):
        for parameter, state in single.state.items():
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"optimizer state {key!r} of {names[parameter]} is a "
                        f"{type(value).__name__}, expected a tensor"
                    )
                found[f"optim.{names[parameter]}.{key}"] = value.detach()
    if isinstance(optimizer, OptimizerContainer) and optimizer.average is not None:
        found |= _named(optimizer.average.tensors())
    return found


def _named(average: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"ema.{_plain_name(name)}": tensor for name, tensor in average.items()}


def _bare(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, with FSDP's parameters in their sharded form.

    An evaluation leaves some of them gathered.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    reshard(bare)
    return bare


def _names(model: nn.Module) -> dict[Tensor, str]:
    """Return the plain name of every parameter."""
    return {parameter: _plain_name(name) for name, parameter in _bare(model).named_parameters()}


def _plain_name(name: str) -> str:
    """Remove the prefixes of torch.compile and activation checkpointing from a name."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _as_list(optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    return [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)


def allocate_optimizer_state(
    model: nn.Module, optimizer: Optimizers, manifest: Manifest, path: Path
) -> dict[str, Tensor]:
    """Replace the optimizers' state by tensors to be read into, of the saved shapes.

    Args:
        model: whose parameters the optimizers update.
        optimizer: loses the state that it has.
        manifest: of the checkpoint that will be read.
        path: of that checkpoint, for the message.

    Returns:
        The new tensors by name, placed as their parameters.

    Raises:
        ConfigError: the checkpoint has some that fits no parameter.
    """
    owners = {}
    for single in _as_list(optimizer):
        single.state.clear()
        owners |= {
            parameter: (single, group)
            for group in single.param_groups
            for parameter in group["params"]
        }
    parameters = {
        _plain_name(name): parameter for name, parameter in _bare(model).named_parameters()
    }
    found: dict[str, Tensor] = {}
    for full_name, (dtype, shape) in manifest.tensors.items():
        if not full_name.startswith("optim."):
            continue
        name, _, key = full_name.removeprefix("optim.").rpartition(".")
        parameter = parameters.get(name)
        if (
            parameter is None
            or parameter not in owners
            or (shape and list(parameter.shape) != shape)
        ):
            raise ConfigError(
                "CKPT-OPTIM",
                f"{path}: optimizer state {full_name} {shape} fits no parameter; expected the "
                "model it was saved with",
            )
        single, group = owners[parameter]
        kind = getattr(torch, dtype)
        if shape:
            state = torch.zeros_like(
                parameter, dtype=kind, memory_format=torch.preserve_format
            ).detach()
        else:
            # As torch.optim places step counts: with the parameter only where the update needs it
            # there.
            on_device = group.get("fused") or group.get("capturable")
            state = torch.zeros((), dtype=kind, device=parameter.device if on_device else "cpu")
        single.state[parameter][key] = state
        found[full_name] = state
    return found | _allocate_average(optimizer, manifest, path)


def _allocate_average(optimizer: Optimizers, manifest: Manifest, path: Path) -> dict[str, Tensor]:
    """Replace the average of the weights, if there is one, by tensors to be read into.

    It begins anew where the checkpoint has none: that of a run which kept none.
    """
    if not isinstance(optimizer, OptimizerContainer) or optimizer.average is None:
        return {}
    saved = {
        name: shape for name, (_, shape) in manifest.tensors.items() if name.startswith("ema.")
    }
    if not saved:
        optimizer.average.clear()
        return {}
    found = _named(optimizer.average.allocate())
    if saved != {name: list(tensor.shape) for name, tensor in found.items()}:
        raise ConfigError(
            "CKPT-EMA",
            f"{path}: its average of the weights is not one of this model's parameters; expected "
            "the model it was saved with",
        )
    return found


def averaged_tensors(model: nn.Module, manifest: Manifest, path: Path) -> dict[str, Tensor]:
    """Return what ``model_tensors`` does, with parameters by the names of their average.

    Args:
        manifest: of the checkpoint that will be read.
        path: of that checkpoint, for the message.

    Raises:
        ConfigError: its run kept no average.
    """
    if f"ema.{UPDATES}" not in manifest.tensors:
        raise ConfigError(
            "CKPT-EMA",
            f"{path}: holds no average of the weights; expected a checkpoint of a run with "
            "optim.ema, or weights=last",
        )
    averages = {name: f"ema.{name.removeprefix('model.')}" for name in model_tensors(model)}
    return {
        averages[name] if averages[name] in manifest.tensors else name: tensor
        for name, tensor in model_tensors(model).items()
    }


def require_same(tensors: dict[str, Tensor], manifest: Manifest, path: Path) -> None:
    """Compare the names, shapes and dtypes of the model's tensors with a checkpoint's.

    Args:
        tensors: of the model, as ``model_tensors`` names them.
        manifest: of the checkpoint.
        path: of the checkpoint, for the message.

    Raises:
        ConfigError: some differ; the first five are named.
    """
    wanted = {
        name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()
    }
    saved = {name: entry for name, entry in manifest.tensors.items() if name.startswith("model.")}
    differing = [
        f"{name.removeprefix('model.')}: checkpoint {_describe(saved.get(name))}, model "
        f"{_describe(wanted.get(name))}"
        for name in sorted(wanted.keys() | saved.keys())
        if wanted.get(name) != saved.get(name)
    ]
    if not differing:
        return
    shapes_agree = (
        all(name in saved and saved[name][1] == wanted[name][1] for name in wanted)
        and wanted.keys() == saved.keys()
    )
    more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise ConfigError(
        "CKPT-DTYPE" if shapes_agree else "CKPT-SHAPE",
        f"{path}: {'; '.join(differing[:5])}{more}. Use the configuration it was saved with "
        "(config.yaml of its run)",
    )


def _describe(entry: list | None) -> str:
    return "absent" if entry is None else f"{entry[0]}{entry[1]}"


def named_hyperparameters(model: nn.Module, optimizer: Optimizers) -> dict[str, dict]:
    """Return for each parameter the numbers that its update uses (lr, betas, ...).

    A record for the reader. A launch takes its own from the configuration, so that groups may be
    cut anew.
    """
    names = _names(model)
    return {
        names[parameter]: hyperparameters(group)
        for single in _as_list(optimizer)
        for group in single.param_groups
        for parameter in group["params"]
    }


def generator_states() -> dict[str, Tensor]:
    """Return the states of torch's default generators, ``cpu`` and, on a GPU, ``cuda``."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(file: Path) -> None:
    """Set the generators to the states in ``file``.

    Raises:
        StorageError: it holds anything else than such states.
    """
    try:
        states = torch.load(file, map_location="cpu", weights_only=True)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except OSError as error:
        raise storage_error(error, file) from error
    except Exception as error:
        # torch.load has no error class of its own for what it refuses; verified bytes that fail
        # here were forged.
        reason = first_line(error)
        raise StorageError("CKPT-READ", f"{file.parent.name}/{file.name}: {reason}") from error
