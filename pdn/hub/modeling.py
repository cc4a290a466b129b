"""A Hugging Face class around LanguageModel, for models that no released library can load.

``import pdn.hub.modeling`` registers it, after which ``AutoModelForCausalLM.from_pretrained`` loads
the folder. It runs no code from the folder.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel


class PdnConfig(PreTrainedConfig):
    """pdn: the dump of a ModelConfig."""

    model_type = "pdn"

    def __init__(self, pdn: dict | None = None, **kwargs):
        self.pdn = pdn or {}
        self.num_hidden_layers = self.pdn.get("num_layers", 0)
        super().__init__(**kwargs)


class PdnCache:
    """The states of all layers, and how many tokens they have seen."""

    is_compileable = False

    def __init__(self, state: list, seen: int):
        self.state, self.seen = state, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = tree_map(lambda x: None if x is None else x[beam_idx], self.state)


class PdnForCausalLM(PreTrainedModel, GenerationMixin):
    """Causal, without padding: sequences of one length, or padded on the right with the padding's
    logits ignored.
    """

    config_class = PdnConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: PdnConfig):
        super().__init__(config)
        self.model = LanguageModel(ModelConfig.model_validate(config.pdn))
        if self.model.config.tie_embeddings:
            self.lm_head = nn.Linear(config.pdn["d_model"], config.pdn["vocab_size"], bias=False)
        else:
            self._tied_weights_keys = {}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights come from the folder; ``model.init_weights(seed)`` initialises a fresh
        one.
        """

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head if self.model.head is None else self.model.head

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, **kwargs
    ):
        fresh = (
            input_ids
            if past_key_values is None
            else input_ids[:, past_key_values.get_seq_length() :]
        )
        return {
            "input_ids": fresh,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": True,
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: PdnCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """logits [B, T, vocab]; labels are shifted by one here, as transformers has it.

        Raises:
            ValueError: padding on the left, which would enter the recurrent states.
        """
        if attention_mask is not None and bool(
            (attention_mask.diff(dim=1) > 0).any() | (attention_mask[:, 0] == 0).any()
        ):
            raise ValueError(
                "attention_mask has padding on the left; expected it on the right, or prompts of "
                "one length"
            )
        state = None
        if use_cache or past_key_values is not None:
            state = (
                self.model.init_state(len(input_ids))
                if past_key_values is None
                else past_key_values.state
            )
        output = self.model(input_ids, state=state)
        seen = input_ids.shape[1] + (
            0 if past_key_values is None else past_key_values.get_seq_length()
        )
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                output.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            )
        cache = None if state is None else PdnCache(output.state, seen)
        return CausalLMOutputWithPast(loss=loss, logits=output.logits, past_key_values=cache)


AutoConfig.register("pdn", PdnConfig)
AutoModelForCausalLM.register(PdnConfig, PdnForCausalLM)
