"""Which released class computes what a model computes, and under which names it keeps the weights.

Class names and configuration keys are those of transformers 5 and flash-linear-attention 0.6.0. The
maps are complete in both directions: every tensor of the class has either one of ours, of the same
content, or a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdn.hub import fla
from pdn.hub.target import MLP, Target, parameter_names
from pdn.models.config import ModelConfig
from pdn.models.mixers.attention import AttentionConfig
from pdn.models.mixers.linear_recurrence import RecurrenceConfig
from pdn.models.mixers.mamba2 import Mamba2Config
from pdn.models.mixers.mesa_net import MesaNetConfig


def target_of(config: ModelConfig) -> tuple[Target, str | None]:
    """Return the released class, or our own with the reason why no released one fits."""
    reasons = []
    for one in _released(config):
        if isinstance(one, Target):
            return one, None
        reasons.append(one)
    return own_class(config), reasons[0]


def target_for(config: ModelConfig, model_type: str | None) -> Target:
    """Return the class of this type if it computes what the model does, else the first choice."""
    if model_type == "pdn":
        return own_class(config)
    targets = [one for one in _released(config) if isinstance(one, Target)]
    same = [one for one in targets if one.model_type == model_type]
    return (same or targets or [own_class(config)])[0]


def fla_target(config: ModelConfig) -> Target | str:
    """Return flash-linear-attention's class of a model of one recurrence, or why there is none."""
    mixers = list(config.mixers.values())
    if len(mixers) > 1 or not isinstance(mixers[0], RecurrenceConfig):
        return f"layers of {', '.join(config.mixers)}"
    return fla.recurrence(config, mixers[0])


def own_class(config: ModelConfig) -> Target:
    names = {name: f"model.{name}" for name in _parameter_names(config)}
    content = {
        "pdn": config.model_dump(mode="json"),
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
    }
    return Target("pdn", "PdnForCausalLM", "pdn", content, names, "lm_head.weight", {})


def exported_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """Return the shape under their name.

    Depthwise convolutions have an axis of one input channel, biases are flat.
    """
    if name.endswith("conv1d.weight"):
        return tensor.shape[0], 1, tensor.shape[1]
    return (tensor.numel(),) if name.endswith("dt_bias") else tuple(tensor.shape)


def _parameter_names(config: ModelConfig) -> list[str]:
    from pdn.models.language_model import LanguageModel

    with torch.device("meta"):
        return [name for name, _ in LanguageModel(config).named_parameters()]


def _released(config: ModelConfig) -> list[Target | str]:
    """Return the classes that compute the same, the first choice first.

    A class that does not compute the same is replaced by the reason.
    """
    mixers = list(config.mixers.values())
    if len(mixers) > 1:
        return [f"layers of {len(mixers)} kinds ({', '.join(config.mixers)})"]
    (mixer,) = mixers
    if isinstance(mixer, AttentionConfig):
        return [_llama(config, mixer), fla.attention(config, mixer)]
    if isinstance(mixer, Mamba2Config):
        return [_mamba2(config, mixer)]
    if isinstance(mixer, MesaNetConfig):
        return [fla.mesa_net(config, mixer)]
    if isinstance(mixer, RecurrenceConfig):
        return [fla.recurrence(config, mixer)]
    return [f"mixers of kind {mixer.kind}"]


def _llama(config: ModelConfig, mixer: AttentionConfig) -> Target | str:
    if not config.intermediate_size:
        return "blocks without MLP"
    if config.d_model % mixer.num_heads:
        return f"d_model = {config.d_model} is not a multiple of num_heads = {mixer.num_heads}"
    for key, plain in {"positions": "rope", "window": None, "qk_norm": False,
                       "output_gate": "none"}.items():  # fmt: skip
        if getattr(mixer, key) != plain:
            return f"{key} = {getattr(mixer, key)}"
    content = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer.rope_base},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
    }
    block = {
        "mixer_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
    } | MLP
    block |= {f"mixer.{name}_proj.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"}
    names = parameter_names(
        config, "model.embed_tokens.weight", "model.norm.weight", "model.layers", block
    )
    return Target("llama", "LlamaForCausalLM", "transformers", content, names, "lm_head.weight", {})


def _mamba2(config: ModelConfig, mixer: Mamba2Config) -> Target | str:
    if config.intermediate_size:
        return "Mamba-2 blocks with an MLP"
    if mixer.preconditioner.kind != "none":
        return "Mamba-2 with a preconditioner"
    if mixer.num_groups != 1:
        return f"num_groups = {mixer.num_groups}: the released norm is over each group"
    if mixer.norm_eps != config.norm_eps:
        return (
            f"norm_eps = {config.norm_eps} of blocks and {mixer.norm_eps} of mixers: the released "
            "class has one for both"
        )
    if mixer.d_inner % config.d_model:
        return (
            f"num_heads x head_dim = {mixer.d_inner} is not a multiple of d_model = "
            f"{config.d_model}"
        )
    content = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "state_size": mixer.state_size,
        "expand": mixer.d_inner // config.d_model,
        "n_groups": 1,
        "conv_kernel": mixer.conv_size,
        "use_conv_bias": True,
        "use_bias": False,
        "hidden_act": "silu",
        "layer_norm_epsilon": mixer.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }
    block = {"mixer_norm.weight": "norm.weight"}
    block |= {f"mixer.ssm.{name}": f"mixer.{name}" for name in ("A_log", "dt_bias", "D")}
    block |= {
        f"mixer.{name}.weight": f"mixer.{name}.weight" for name in ("in_proj", "norm", "out_proj")
    }
    block |= {f"mixer.conv.{part}": f"mixer.conv1d.{part}" for part in ("weight", "bias")}
    names = parameter_names(
        config, "backbone.embeddings.weight", "backbone.norm_f.weight", "backbone.layers", block
    )
    return Target(
        "mamba2", "Mamba2ForCausalLM", "transformers", content, names, "lm_head.weight", {}
    )
