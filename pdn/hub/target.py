"""A class of another library that keeps the weights of a model of ours."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pdn.models.config import ModelConfig


class Target(NamedTuple):
    """Describes the class of another library that loads the model.

    config: content of config.json that the weights and the computation depend on.
    names: our parameter's name to theirs. head: their name of the head, which is not in the file
        where it is tied to the embedding.
    constants: tensors of theirs that we have not.
    """

    model_type: str
    architecture: str
    library: str
    config: dict
    names: dict[str, str]
    head: str
    constants: dict[str, Tensor]


MLP = {f"mlp.{name}_proj.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


def parameter_names(
    config: ModelConfig, embedding: str, norm: str, layers: str, block: dict[str, str]
) -> dict[str, str]:
    """Map our name of every parameter to theirs.

    Args:
        embedding, norm: their names of the embedding and of the last norm.
        layers: what the names of their blocks begin with, before the number.
        block: our names inside a block to theirs.
    """
    names = {"embedding.weight": embedding, "norm.weight": norm}
    if not config.tie_embeddings:
        names["head.weight"] = "lm_head.weight"
    for i in range(config.num_layers):
        names |= {f"blocks.{i}.{ours}": f"{layers}.{i}.{theirs}" for ours, theirs in block.items()}
    return names
