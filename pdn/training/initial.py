"""The weights that a run starts from (``init_from``), judged before they are believed.

Names and shapes that fit say little: weights of another tokenizer mean other words, and a file may
hold what no training ever left behind.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from pdn.checkpoint.find import VerifiedCheckpoint, newest_verified
from pdn.checkpoint.read import load_weights
from pdn.data.codec import parse, read_tokenizer_file
from pdn.distributed.collectives import gather_or_raise
from pdn.distributed.fsdp import local_part
from pdn.errors import ConfigError, DataError
from pdn.hub.weights import import_weights, is_exported, local_folder
from pdn.inference.load import run_directory_of
from pdn.models.language_model import LanguageModel
from pdn.runs.directory import TOKENIZER

# Trained weights lie far within these. Beyond them products overflow in bf16 and fp16, or vanish.
LARGEST_WEIGHT = 1e4
SMALLEST_RMS = 1e-12  # of a matrix that is not all zero


class InitialWeights:
    """Holds what ``init_from`` names: a run, a checkpoint, an exported folder, or a hub id.

    Args:
        source: as configured.
        tokenizer: the tokenizer.json of the data; None for data without text.
        any_tokenizer: do not compare the tokenizers (``init_tokenizer=any``).

    Raises:
        ConfigError: there is nothing, or it was trained with another tokenizer.
        StorageError: it is damaged.
    """

    def __init__(self, source: str, tokenizer: Path | None, *, any_tokenizer: bool):
        self.source = source
        self._found: VerifiedCheckpoint | None = None
        if is_exported(source):
            self._folder = local_folder(source)
        else:
            self._found = newest_verified(Path(source).expanduser())
            self._folder = _run_of(self._found.path)
        if not any_tokenizer and self._folder is not None:
            _require_same_tokenizer(source, self._folder / TOKENIZER, tokenizer)

    def require_fit(self, model: nn.Module) -> None:
        """Raise ``ConfigError`` if a checkpoint is not of ``model``, maybe on the meta device.

        Exported folders are compared while they are loaded.
        """
        if self._found is not None:
            self._found.require_fit(model, resuming=False)

    def load(self, model: LanguageModel) -> None:
        """Fill ``model``, sharded or not. Collective.

        Raises:
            ConfigError: it is of another model, or its values cannot be those of a trained one.
        """
        if self._found is not None:
            load_weights(self._found, model)
        else:
            import_weights(str(self._folder), model)
        gather_or_raise(lambda: require_plausible(model, self.source))


def require_plausible(model: nn.Module, source: str) -> None:
    """Raise ``ConfigError`` naming the first parameter whose values cannot be trained weights.

    They are not finite, too large, or vanish; on this rank's own part of each.
    """
    for name, parameter in model.named_parameters():
        values = local_part(parameter.detach()).float()
        if values.numel() == 0:
            continue
        largest = values.abs().max().item()
        problem = None
        if not torch.isfinite(values).all():
            problem = "holds values that are not finite"
        elif largest > LARGEST_WEIGHT:
            problem = f"holds values up to {largest:.3g}; expected at most {LARGEST_WEIGHT:g}"
        elif parameter.ndim > 1 and 0 < largest < SMALLEST_RMS:
            problem = f"holds values up to {largest:.3g}, which is as good as zero"
        if problem is not None:
            raise ConfigError(
                "INIT-VALUES",
                f"init_from = {source}: {name} {problem}; expected weights that were trained: "
                "export or download them again",
            )


def _run_of(checkpoint: Path) -> Path | None:
    try:
        return run_directory_of(checkpoint)
    except ConfigError:
        return None  # a checkpoint on its own


def _require_same_tokenizer(source: str, theirs: Path, ours: Path | None) -> None:
    has = theirs.is_file()
    if not has and ours is None:
        return
    fix = "train on data of that tokenizer, or say init_tokenizer=any if the ids mean the same"
    if not has or ours is None:
        found = "no tokenizer.json" if not has else "a tokenizer, and data without one"
        raise ConfigError(
            "INIT-TOKENIZER",
            f"init_from = {source}: found {found}; expected the tokenizer of the data: {fix}",
        )
    if theirs.read_bytes() != ours.read_bytes() and meaning(theirs) != meaning(ours):
        raise ConfigError(
            "INIT-TOKENIZER",
            f"init_from = {source}: its tokenizer {theirs} is not that of the data, {ours}; "
            f"expected one and the same: {fix}",
        )


def meaning(file: Path) -> str:
    """Digest what a tokenizer.json does to text: its ids and how text is cut.

    What is added around the text, and how the file is written, do not count.

    Raises:
        ConfigError: it is no tokenizer.
    """
    try:
        tokenizer = parse(read_tokenizer_file(file), str(file))
    except DataError as error:
        raise ConfigError(
            "INIT-TOKENIZER", f"{error.args[0]}; expected the tokenizer.json of the weights"
        ) from None
    content = json.loads(tokenizer.to_str())
    parts = [
        sorted(tokenizer.get_vocab(with_added_tokens=True).items()),
        content["model"].get("merges"),
        content.get("normalizer"),
        content.get("pre_tokenizer"),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
