"""From a run's directory or one of its checkpoints to a model in this process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from pdn.checkpoint.format import committed_steps
from pdn.checkpoint.read import Weights, load_weights
from pdn.data.codec import open_codec
from pdn.errors import ConfigError, DataError, StorageError
from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel
from pdn.runs.directory import TOKENIZER
from pdn.runs.schema import read_config
from pdn.store.local import read_bytes


@dataclass(frozen=True)
class LoadedRun:
    """Holds a trained model and what belongs to it.

    Attributes:
        directory: of the run.
        model: initialised from the checkpoint, in evaluation mode.
        tokenizer: path of its tokenizer.json, or None without text.
        eos_id: the token that ends a document.
        step: optimiser steps behind the weights.
        seq_len: tokens of a training sequence.
        fingerprint: of the data that it was trained on.
        weights: last, or ema: the moving average of the run's weights.
    """

    directory: Path
    model: LanguageModel
    tokenizer: Path | None
    eos_id: int | None
    step: int
    seq_len: int
    fingerprint: dict[str, object] | None = None
    weights: Weights = "last"


def in_one_line(error: Exception) -> str:
    """Say what was wrong with which keys."""
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    return "; ".join(
        f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()
    )


def run_directory_of(path: Path) -> Path:
    """Return the run's directory, from itself, its ``checkpoints`` or one of them.

    Raises:
        ConfigError: there is no run.
    """
    path = Path(path)
    for candidate in (path, path.parent, path.parent.parent):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(
        "RUN-ABSENT",
        f"{path}: no config.yaml here; expected the directory of a run, such as runs/<name>",
    )


def load_trained(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: Weights = "last",
) -> LoadedRun:
    """Load the newest verified checkpoint of a run, or the one that ``path`` names.

    Args:
        path: of the run's directory, its ``checkpoints`` or one of them.
        device: where the model goes.
        dtype: of its parameters.
        weights: those of the last update, or their moving average (``optim.ema``).

    Raises:
        ConfigError: no run, no checkpoint, no average that was asked for, a configuration that this
            version does not know, or a tokenizer of other ids.
        StorageError: the checkpoint is damaged.
    """
    path = Path(path)
    directory = run_directory_of(path)
    recorded = read_config(directory) or {}
    try:
        config = ModelConfig.model_validate(recorded["model"])
        seq_len = int(recorded["data"]["seq_len"])
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "RUN-CONFIG",
            f"{directory / 'config.yaml'}: not the configuration of a run of this version: "
            f"{in_one_line(error)}",
        ) from None
    if path.name == directory.name and not committed_steps(directory / "checkpoints"):
        raise ConfigError(
            "CKPT-ABSENT",
            f"{directory}: has no finished checkpoint; expected one: train it to its first save",
        )
    model = LanguageModel(config)
    step, side = load_weights(path, model, weights)
    fingerprint = _fingerprint(side, path)
    return LoadedRun(
        directory=directory,
        model=model.to(device=device, dtype=dtype).eval(),
        tokenizer=tokenizer_in(directory, config, fingerprint.get("tokenizer")),
        eos_id=fingerprint.get("eos_id"),
        step=step,
        seq_len=seq_len,
        fingerprint=fingerprint,
        weights=weights,
    )


def _fingerprint(side: dict, path: Path) -> dict:
    fingerprint = side.get("fingerprint")
    if not isinstance(fingerprint, dict):
        raise StorageError(
            "CKPT-SIDE", f"{path}: tells nothing of its data; use another checkpoint of the run"
        )
    return fingerprint


def tokenizer_in(directory: Path, config: ModelConfig, sha256: object | None = None) -> Path | None:
    """Return the tokenizer's file, if there is one.

    Args:
        directory: of the run, or an exported folder.
        config: of the model.
        sha256: of the file that the model was trained with; None where that is not known.

    Raises:
        ConfigError: some of its ids have no embedding.
        StorageError: it cannot be read, or is another file.
    """
    file = directory / TOKENIZER
    if not file.is_file():
        return None
    try:
        largest = open_codec(file, None).vocab_size - 1
    except DataError as error:
        raise StorageError(
            "TOKENIZER", f"{error.args[0]}; it is that of the training: copy it again"
        ) from None
    found = hashlib.sha256(read_bytes(file)).hexdigest()
    if sha256 is not None and found != sha256:
        raise StorageError(
            "TOKENIZER",
            f"{file}: SHA-256 {found[:12]}…, the model was trained with {str(sha256)[:12]}…; "
            "expected the same file: launching the run again copies it from the data",
        )
    assert config.vocab_size is not None  # a model has one
    if largest >= config.vocab_size:
        raise ConfigError(
            "TOKENIZER-MODEL",
            f"{file}: ids up to {largest}, but {config.name} has a vocabulary of "
            f"{config.vocab_size}; expected the tokenizer that it was trained with",
        )
    return file
