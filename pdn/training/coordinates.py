"""The coordinate check of muP: do a model's numbers keep their size as it gets wider?

A few steps from many widths: what each part gives, and how far the logits have moved, must have the
same root mean square at all of them (arXiv 2203.03466, appendix D.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pdn.models.language_model import LanguageModel
from pdn.optim.config import OptimConfig
from pdn.optim.optimizers import build_optimizer

Sizes = dict[str, float]  # root mean square, by what it is of
BATCH, LENGTH = 4, 64


def sizes_after(model: LanguageModel, optim: OptimConfig, *, steps: int, seed: int) -> Sizes:
    """Train a model on random tokens, the same at every width; return the sizes after that.

    Args:
        model: just initialised.
        optim: at its peak rate throughout.
        steps: on one batch [4, 64], which a model of any width can learn.
        seed: of the batch.
    """
    tokens = _tokens(model.config.vocab_size or 0, seed)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    optimizer = build_optimizer(model, optim)
    before = _logits(model, inputs)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(inputs, labels=labels).loss_sum
        (loss / labels.numel()).backward()
        optimizer.step()
    sizes: Sizes = {}
    watched = {name: module for name, module in model.named_modules() if _is_part(name)}
    handles = [
        module.register_forward_hook(
            lambda _, __, out, name=name: sizes.__setitem__(name, _rms(_first(out)))
        )
        for name, module in watched.items()
    ]
    after = _logits(model, inputs)
    for handle in handles:
        handle.remove()
    return sizes | {"logits, moved by": _rms(after - before)}


def slopes(
    build: Callable[[int, int], tuple[LanguageModel, OptimConfig]],
    *,
    widths: tuple[int, ...],
    seeds: int,
    steps: int,
    named: Callable[[Sizes], Sizes] = dict,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the slope of log size against log width of each part, and its sizes by width.

    Depths may take the place of widths.

    Args:
        build: from a width and a seed to a fresh model and its optimiser's configuration.
        widths: at least two.
        seeds: of initialisations and batches; sizes are their geometric means.
        steps: of each.
        named: names sizes so that all widths have the same.
    """
    by_width = []
    for width in widths:
        found = [
            named(sizes_after(*build(width, seed), steps=steps, seed=seed)) for seed in range(seeds)
        ]
        by_width.append(
            {name: math.exp(np.mean([math.log(one[name]) for one in found])) for name in found[0]}
        )
    sizes = {name: [one[name] for one in by_width] for name in by_width[0]}
    logs = np.log(widths)
    fitted = {name: np.polyfit(logs, np.log(values), 1) for name, values in sizes.items()}
    return {name: float(line[0]) for name, line in fitted.items()}, sizes


def first_and_last(sizes: Sizes) -> Sizes:
    """Name the parts of the first block and of the last one, which models of all depths have."""
    last = max(int(name.split(".")[1]) for name in sizes if name.startswith("blocks."))
    found = {name.replace("blocks.0", "first", 1): s for name, s in sizes.items() if ".0" in name}
    end = f"blocks.{last}"
    found |= {
        name.replace(end, "last", 1): size
        for name, size in sizes.items()
        if f"{name}.".startswith(f"{end}.")
    }
    return found | {name: size for name, size in sizes.items() if not name.startswith("blocks.")}


def _tokens(vocabulary: int, seed: int) -> Tensor:
    """Draw a batch [B, T + 1] of which there is something to learn, as of text.

    Each token has a usual successor, few of them are frequent.
    """
    rng = np.random.default_rng(seed)
    successor = rng.integers(vocabulary, size=vocabulary)
    frequency = 1 / np.arange(1, vocabulary + 1)
    drawn = rng.choice(vocabulary, size=(BATCH, LENGTH + 1), p=frequency / frequency.sum())
    usual = rng.random((BATCH, LENGTH + 1)) < 0.7
    for t in range(1, LENGTH + 1):
        drawn[:, t] = np.where(usual[:, t], successor[drawn[:, t - 1]], drawn[:, t])
    return torch.from_numpy(drawn)


@torch.no_grad()
def _logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    logits = model(tokens).logits
    assert logits is not None
    return logits


def _is_part(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "blocks" and parts[2:] in (["mixer"], ["mlp"], [])


def _first(out: Tensor | tuple) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
