"""Load weights of a Hugging Face folder into a model, sharded or not (``init_from``).

It is for continued pretraining.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdn.data.failures import is_passing
from pdn.errors import ConfigError, StorageError
from pdn.hub.architectures import Target, exported_shape, target_for
from pdn.hub.released import intermediate_size
from pdn.models.config import ModelConfig
from pdn.models.layers import assign
from pdn.store.local import read_bytes

if TYPE_CHECKING:
    from pdn.models.language_model import LanguageModel

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
# what the classes assume where config.json, which may leave out defaults, says nothing
DEFAULTS = {
    "norm_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "layer_norm_epsilon": 1e-5,
    "squash_x": 1.5,
    "squash_eps": 1e-6,
    "allow_neg_eigval": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def is_exported(source: str) -> bool:
    """Return whether ``source`` is a Hugging Face folder, or names one on the hub.

    Otherwise it is a run or a checkpoint of ours.
    """
    path = Path(source).expanduser()
    return (path / "config.json").is_file() or (
        not path.exists() and HUB_ID.fullmatch(source) is not None
    )


def import_weights(source: str, model: LanguageModel) -> None:
    """Fill ``model`` with the weights of an exported or released model of the same architecture.

    Args:
        source: a folder with config.json and safetensors, or a hub id, with ``@revision`` to pin
            it.
        model: if it is sharded, every rank calls this and keeps its own part.

    Raises:
        ConfigError: not there, of another architecture, or not in safetensors.
        StorageError: the hub cannot be reached, or a file is damaged.
    """
    folder = local_folder(source)
    found = read_json(folder / "config.json")
    target = _matching_target(folder, found, model.config)
    parameters = dict(model.named_parameters())
    theirs = {name: key for key, name in target.names.items()}
    files = _files(folder)
    _check_names(folder, target, {name for names in files.values() for name in names})
    embedding_name = target.names["embedding.weight"]
    head: Tensor | None = None
    embedding: Tensor | None = None
    for name, value in _tensors(files):
        if name == target.head and model.config.tie_embeddings:
            head = value
        elif name in target.constants:
            if not _decays_like(value, target.constants[name]):
                raise ConfigError(
                    "HUB-MISMATCH",
                    f"{folder}: {name} is not what it is in a model without decay; expected "
                    f"weights exported from {model.config.name}, or another model=",
                )
        else:
            if not value.is_floating_point():
                raise ConfigError(
                    "HUB-DTYPE",
                    f"{folder}: {name} is {str(value.dtype).removeprefix('torch.')}; expected "
                    "floating point: export the weights again",
                )
            parameter = parameters[theirs[name]]
            if tuple(value.shape) != exported_shape(name, parameter):
                raise _mismatch(
                    folder, name, tuple(value.shape), exported_shape(name, parameter), model.config
                )
            assign(parameter, value.view(parameter.shape).to(parameter.device))
            if name == embedding_name:
                embedding = value
    assert embedding is not None  # ``_check_names``
    if head is not None and not torch.equal(head, embedding):
        raise ConfigError(
            "HUB-MISMATCH",
            f"{folder}: {target.head} is not tied to {embedding_name}; here they are one tensor",
        )


def _decays_like(value: Tensor, constant: Tensor) -> bool:
    return value.shape == constant.shape and torch.equal(
        value.float(), constant.to(value.dtype).float()
    )


def local_folder(source: str) -> Path:
    """Return the folder of ``source``, downloaded if it is a hub id.

    Raises:
        ConfigError: it is neither here nor on the hub, or gated there.
        StorageError: the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.exists() or HUB_ID.fullmatch(source) is None:
        raise ConfigError(
            "HUB-ABSENT",
            f"{source}: no config.json here; expected an exported folder or a hub id owner/name",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = source.partition("@")
    patterns = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError:  # a kind of RepositoryNotFoundError
        raise ConfigError(
            "HUB-GATED",
            f"{source}: gated; expected an account that may read it: accept its terms at "
            f"https://huggingface.co/{name} and set HF_TOKEN, or give a local folder",
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(
            "HUB-ABSENT",
            f"{source}: found neither a local folder nor one on the hub ({type(error).__name__}); "
            "expected owner/name or owner/name@revision: check both, set HF_TOKEN if it is private",
        ) from None
    except Exception as error:
        # What the hub's client raises for a broken connection is of its HTTP library, no OSError.
        if not isinstance(error, LocalEntryNotFoundError | OSError) and not is_passing(error):
            raise
        raise StorageError(
            "HUB-UNREACHABLE",
            f"{source}: no such local path, and the hub cannot be reached "
            f"({type(error).__name__}); expected its answer: check the network, or give a local "
            "folder",
        ) from None


def read_json(file: Path) -> dict:
    """Read the object that a file holds.

    Raises:
        StorageError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(read_bytes(file))
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError("HUB-JSON", f"{file}: {error}; export or download it again") from None
    if not isinstance(found, dict):
        raise StorageError(
            "HUB-JSON",
            f"{file}: holds a {type(found).__name__}, expected an object; export it again",
        )
    return found


def _matching_target(folder: Path, found: dict, config: ModelConfig) -> Target:
    target = target_for(config, found.get("model_type"))
    if found.get("model_type") != target.model_type:
        raise ConfigError(
            "HUB-MISMATCH",
            f"{folder}: its model_type is {found.get('model_type')!r}, {config.name} is a "
            f"{target.model_type!r}; expected weights of the same architecture, or another model=",
        )
    found = _in_target_keys(found, target)
    for key, expected in target.config.items():
        given = found.get(key, DEFAULTS.get(key, expected))
        if key == "pdn":
            given, expected = _computation(folder, given), config.computation()
        elif key == "tie_word_embeddings":
            continue  # decided by the tensors themselves
        if given != expected:
            raise _mismatch(folder, f"config.json: {key}", given, expected, config)
    return target


def _in_target_keys(found: dict, target: Target) -> dict:
    """Translate the keys of another library, or an older version, to those of the target."""
    if target.model_type == "llama" and "rope_theta" in found:  # as by transformers before 5
        rope = {"rope_type": "default", "rope_theta": found["rope_theta"]}
        return found | {"rope_parameters": rope}
    if target.model_type == "mamba2" and "norm_eps" in found:  # as by flash-linear-attention
        return found | {"layer_norm_epsilon": found["norm_eps"]}
    if found.get("intermediate_size", 0) is None or "hidden_ratio" in found:
        return found | {"intermediate_size": intermediate_size(found)}
    return found


def _computation(folder: Path, dump: dict) -> dict:
    try:
        return ModelConfig.model_validate(dump).computation()
    except ValueError as error:
        raise ConfigError(
            "HUB-MISMATCH", f"{folder}: config.json: pdn: {error}; export the model again"
        ) from None


def _mismatch(
    folder: Path, what: str, found: object, expected: object, config: ModelConfig
) -> ConfigError:
    return ConfigError(
        "HUB-MISMATCH",
        f"{folder}: {what}: found {found!r}, {config.name} has {expected!r}; expected the same, or "
        "another model=",
    )


def _files(folder: Path) -> dict[Path, list[str]]:
    """Return the names of the tensors in each file."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        why = f"only {others[0]}, whose loading can run code" if others else "no weights"
        raise ConfigError("HUB-WEIGHTS", f"{folder}: {why}; expected *.safetensors")
    found, owners = {}, {}
    for file in files:
        if not file.is_file():  # a pipe would be waited for
            raise ConfigError("HUB-WEIGHTS", f"{file}: is not a regular file; expected one")
        try:
            with safe_open(file, "pt") as opened:
                found[file] = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise StorageError(
                "HUB-WEIGHTS", f"{file}: {error}; export or download it again"
            ) from None
        for name in found[file]:
            if (other := owners.setdefault(name, file)) != file:
                raise ConfigError(
                    "HUB-WEIGHTS",
                    f"{folder}: {name} is in {other.name} and in {file.name}; expected it once: "
                    "remove the file that does not belong to the model",
                )
    return found


def _check_names(folder: Path, target: Target, present: set[str]) -> None:
    expected = {*target.names.values(), *target.constants}
    missing, unknown = sorted(expected - present), sorted(present - expected - {target.head})
    if missing or unknown:
        differing = (("tensors are missing", missing), ("have no counterpart", unknown))
        parts = [
            f"{len(names)} {what}, e.g. {', '.join(names[:5])}"
            for what, names in differing
            if names
        ]
        raise ConfigError(
            "HUB-MISMATCH",
            f"{folder}: {'; '.join(parts)}; expected exactly those of {target.architecture}",
        )


def _tensors(files: dict[Path, list[str]]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file, names in files.items():
        with safe_open(file, "pt") as opened:
            for name in names:
                yield name, opened.get_tensor(name)
