"""A trained model as a Hugging Face folder that ``AutoModelForCausalLM.from_pretrained`` loads."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pdn.errors import ConfigError, PdnError, StorageError
from pdn.hub.architectures import Target, exported_shape, target_of
from pdn.hub.card import write_card
from pdn.hub.load import EXPORTED
from pdn.hub.tokenizer import save_tokenizer
from pdn.inference.load import LoadedRun
from pdn.runs.directory import TOKENIZER

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_SHARD = "5GB"


Curves = Callable[[Path, Path], bool]  # draws a run directory's metrics into a file, if it has any


def export(
    run: LoadedRun, out: Path, *, dtype: str = "float32", curves: Curves | None = None
) -> tuple[Target, str | None]:
    """Write config, weights, tokenizer, generation settings and model card.

    Args:
        run: what to export; the card takes its curves and evaluations from the run's directory.
        out: the folder, which must not exist yet; it appears only when it is complete.
        curves: draws a run directory's metrics into a file and returns whether it had any, e.g.
            ``pdn.reports.plots.save_curves``; None: the card has no figure.
        dtype: float32 or bfloat16. Decays, norms and the preconditioner's parameters stay float32.

    Returns:
        the class that loads it, and why it is our own, if it is.

    Raises:
        ConfigError: ``out`` exists, its dtype is unknown, or the run has lost its tokenizer.
        StorageError: it cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError("EXPORT", f"dtype={dtype}: expected one of {', '.join(DTYPES)}")
    if out.exists():
        raise ConfigError(
            "EXPORT", f"{out}: exists already; expected a new folder: remove it or name another one"
        )
    if run.tokenizer is None and "tokenizer" in (run.fingerprint or {}):
        raise ConfigError(
            "EXPORT",
            f"{run.directory / TOKENIZER}: gone; expected the tokenizer of the model's text: copy "
            "it there from the cache of its data, or from another run on them",
        )
    target, why_own = target_of(run.model.config)
    draft: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: whatever else lies there is not ours to delete.
        draft = Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent))
        _write_json(draft / "config.json", _config_json(target, run, dtype))
        _write_json(draft / "generation_config.json", _generation_json(run))
        origin = {
            "model": run.model.config.model_dump(mode="json"),
            "step": run.step,
            "seq_len": run.seq_len,
        }
        _write_json(draft / EXPORTED, origin | {"eos_id": run.eos_id})
        _write_weights(draft, tensors(run.model, target, DTYPES[dtype]))
        if run.tokenizer is not None:
            assert run.eos_id is not None  # data with a tokenizer have one
            save_tokenizer(draft, run.tokenizer, run.eos_id)
        has_curves = curves is not None and _drawn(curves, run.directory, draft / "curves.png")
        write_card(draft, run, target, why_own, has_curves)
        draft.chmod(0o777 & ~_umask())  # it was made for its owner alone
        draft.rename(out)
    except BaseException as error:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, PdnError) or not isinstance(error, Exception):
            raise
        raise _failure(out, error) from error
    return target, why_own


def _failure(out: Path, error: Exception) -> Exception:
    """Return what to raise: the libraries wrap what the operating system says in text of theirs."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
    elif "os error" in str(error) or "No space left" in str(error):
        reason = " ".join(str(error).split())
    else:
        return error
    return StorageError("EXPORT", f"{out}: {reason}; free space or name another folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _drawn(curves: Curves, directory: Path, file: Path) -> bool:
    """Return whether the figure was drawn; a card without one is no reason to keep the model."""
    try:
        return curves(directory, file)
    except PdnError as error:
        log.warning("the model card has no curves: %s", error)
        file.unlink(missing_ok=True)  # the part of it that a full disk took
        return False


def tensors(model: torch.nn.Module, target: Target, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors in their shapes, by their names.

    Args:
        model: whole, on any device.
        target: the class to export to.
        dtype: of the tensors that need not stay float32.
    """
    delicate = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if not getattr(module, "weight_decay", True)
        for name, _ in module.named_parameters()
    }
    found = {}
    for ours, parameter in model.named_parameters():
        theirs = target.names[ours]
        value = parameter.detach().cpu().to(torch.float32 if ours in delicate else dtype)
        found[theirs] = value.reshape(exported_shape(theirs, value)).contiguous()
    return found | target.constants


def _config_json(target: Target, run: LoadedRun, dtype: str) -> dict:
    content = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        **target.config,
    }
    content |= {"max_position_embeddings": run.seq_len} if target.model_type != "mamba2" else {}
    content |= {"bos_token_id": None, "eos_token_id": run.eos_id, "pad_token_id": None}
    tied = run.model.config.tie_embeddings
    return content | {"dtype": dtype, "tie_word_embeddings": tied, "use_cache": True}


def _generation_json(run: LoadedRun) -> dict:
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 50}
    return sampling | {"eos_token_id": run.eos_id, "pad_token_id": run.eos_id}


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(weights, folder, max_shard_size=MAX_SHARD)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # the library writes them for their owner alone
