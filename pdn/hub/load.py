"""Load a model into this process from a run of ours or an exported folder."""

from __future__ import annotations

from pathlib import Path

import torch

from pdn.checkpoint.read import Weights
from pdn.errors import ConfigError
from pdn.hub.released import model_config_of
from pdn.hub.weights import import_weights, local_folder, read_json
from pdn.inference.load import LoadedRun, in_one_line, load_trained, tokenizer_in
from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel

EXPORTED = "pdn_config.json"  # in an exported folder: the model's configuration and its origin


def load_run(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: Weights = "last",
) -> LoadedRun:
    """Load the newest verified checkpoint of a run, the one ``path`` names, or an exported folder.

    Args:
        path: ``runs/<name>``, ``runs/<name>/checkpoints/step-…`` or a folder by
            ``scripts/export.py``.
        device, dtype: of the model's parameters.
        weights: those of the last update, or their moving average (``optim.ema``), which an
            exported folder does not hold beside them.

    Raises:
        ConfigError: no run, no checkpoint, no average that was asked for, a configuration that this
            version does not know, or a tokenizer of other ids.
        StorageError: the checkpoint is damaged.
    """
    path = Path(path).expanduser()
    if (path / EXPORTED).is_file():
        if weights != "last":
            raise ConfigError(
                "CKPT-EMA",
                f"{path}: weights = {weights}: an exported folder holds the weights that were "
                "chosen for it; expected weights=last, or the run",
            )
        return _load_exported(path, device, dtype)
    return load_trained(path, device=device, dtype=dtype, weights=weights)


def load_released(source: str | Path) -> LanguageModel:
    """Load a released model of flash-linear-attention, or of the paper; float32, on the CPU.

    Its own config.json says what it is.

    Args:
        source: a folder with config.json and safetensors, or a hub id.

    Raises:
        ConfigError: not there, of a family that we have not, or with a switch that we have not.
        StorageError: the hub cannot be reached, or a file is damaged.
    """
    folder = local_folder(str(source))
    model = LanguageModel(model_config_of(read_json(folder / "config.json"), folder.name))
    import_weights(str(folder), model)
    return model.eval()


def _load_exported(folder: Path, device: str | torch.device, dtype: torch.dtype) -> LoadedRun:
    try:
        recorded = read_json(folder / EXPORTED)
        model = LanguageModel(ModelConfig.model_validate(recorded["model"]))
        origin = {key: recorded[key] for key in ("eos_id", "step", "seq_len")}
    except (ValueError, KeyError) as error:
        raise ConfigError(
            "RUN-CONFIG", f"{folder / EXPORTED}: {in_one_line(error)}; export the model again"
        ) from None
    import_weights(str(folder), model)
    return LoadedRun(
        directory=folder,
        model=model.to(device=device, dtype=dtype).eval(),
        tokenizer=tokenizer_in(folder, model.config),
        **origin,
    )
