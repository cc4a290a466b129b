"""The shape of a language model and the recipe of its size."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pdn.config import Positive, Steps, Strict
from pdn.models.mixers import AnyMixer


class RecipeConfig(Strict):
    """Says what a model of this size is usually trained with.

    ``train.yaml`` and ``data/`` refer to it by interpolation.
    """

    seq_len: int = Field(ge=1)  # tokens
    global_batch_size: int = Field(ge=1)  # sequences per optimiser step
    micro_batch_size: int = Field(ge=1)  # sequences per device and forward pass
    steps: Steps
    warmup_steps: int = Field(ge=0)
    lr: Positive
    weight_decay: float = Field(ge=0)
    # times lr for the embedding, which is the readout where they are tied; narrow models need more
    embedding_lr_scale: Positive = 1.0


# keys that name a model, or that its mixers have already taken over
DESCRIPTION = ("name", "recipe", "num_heads", "head_dim")


class ModelConfig(Strict):
    """Describes a model: a size and a repeating pattern of mixers.

    A key with a default, here and in the mixers, came later than the others: the default is what
    runs and exports from before it computed, and ``computation`` leaves it out at that value.
    """

    name: str
    vocab_size: int | None = Field(ge=2)  # null: that of the data's tokenizer
    d_model: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)  # the mixer presets refer to these two
    head_dim: int = Field(ge=1)
    intermediate_size: int = Field(ge=0)  # of the SwiGLU; 0: blocks without MLP
    norm_eps: Positive
    tie_embeddings: bool = True  # the head's weight is that of the embedding
    residual_dtype: Literal["auto", "fp32"] = "auto"  # between blocks; auto: that of compute
    # plain: every matrix N(0, 0.02^2); released: as the released code of the mixers has it
    init: Literal["plain", "released"] = "plain"
    # whose code computes; fla: flash-linear-attention's class of the same model, as a control
    implementation: Literal["own", "fla"] = "own"
    # null: none; else the d_model of the model whose learning rate and initialisation are taken
    # over by muP
    base_width: int | None = Field(ge=1, default=None)
    # null: none; else the layers of the model whose learning rate is taken over
    base_depth: int | None = Field(ge=1, default=None)
    mixers: dict[str, AnyMixer] = Field(min_length=1)
    pattern: list[str] = Field(min_length=1)  # names from ``mixers``, repeated over the layers
    recipe: RecipeConfig

    @model_validator(mode="after")
    def _known_mixers(self):
        for name in self.pattern:
            if name not in self.mixers:
                raise ValueError(
                    f"pattern = {self.pattern} names {name!r}; expected one of model.mixers: "
                    f"{', '.join(self.mixers)}"
                )
        for name in self.mixers:
            if name not in self.pattern:
                raise ValueError(
                    f"model.mixers.{name} is not used by pattern = {self.pattern}; remove it or "
                    "name it there"
                )
        return self

    @model_validator(mode="after")
    def _one_initialisation(self):
        for key in ("base_width", "base_depth"):
            if getattr(self, key) is not None and self.init != "plain":
                raise ValueError(
                    f"{key} = {getattr(self, key)} with init = {self.init}; expected init = plain, "
                    f"the only one with rules for other sizes, or {key} = null"
                )
        return self

    @property
    def layers(self) -> list[str]:
        """Return the mixer's name of each layer."""
        return [self.pattern[i % len(self.pattern)] for i in range(self.num_layers)]

    @property
    def vocabulary(self) -> int:
        """Return ``vocab_size``; ValueError as long as the data has not settled it."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is null: expected the size of the data's vocabulary")
        return self.vocab_size

    def num_params(self) -> int:
        """Count trainable parameters; an embedding tied to the head counts once."""
        per_block = self.d_model + (
            self.d_model + 3 * self.d_model * self.intermediate_size
            if self.intermediate_size
            else 0
        )
        mixers = sum(self.mixers[name].num_params(self.d_model) for name in self.layers)
        tables = 1 if self.tie_embeddings else 2
        whole = tables * self.vocabulary * self.d_model + self.d_model
        return whole + self.num_layers * per_block + mixers

    def computation(self) -> dict:
        """Return what decides the weights and the result, as plain values.

        Names and recipe are left out, and so are the keys that came later where they have their
        defaults. So it is the same for a model whatever version of the configuration described it.
        """
        dump = self.model_dump(mode="json", exclude_defaults=True)
        return {key: value for key, value in dump.items() if key not in DESCRIPTION}

    def layer_activation_bytes(self, width: int) -> float | None:
        """Return what the layers keep of one token for their backward pass, in bytes, on average.

        Of one layer, compiled: beside the mixer's own, its input, what both norms and the mixer's
        output make, and the two factors of the SwiGLU and their product.

        Args:
            width: bytes of a number in the precision of compute.

        Returns:
            None if a mixer's were not counted.
        """
        mixers = [self.mixers[name].activation_bytes(width) for name in self.layers]
        if None in mixers:
            return None
        others = (4 if self.intermediate_size else 3) * self.d_model + 3 * self.intermediate_size
        return width * others + sum(each or 0 for each in mixers) / self.num_layers

    def flops_per_token(self, seq_len: int) -> int:
        """Count forward and backward FLOPs for one token of training, without recomputation."""
        mlp = 6 * self.d_model * self.intermediate_size
        mixers = sum(
            self.mixers[name].flops_per_token(self.d_model, seq_len) for name in self.layers
        )
        return 3 * (2 * self.vocabulary * self.d_model + self.num_layers * mlp + mixers)
