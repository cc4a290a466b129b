"""Which released class computes what a model computes, and under which names it keeps the weights.

Class names and configuration keys are those of transformers 5 and flash-linear-attention 0.6.0. The
maps are complete in both directions: every tensor of the class has either one of ours, of the same
content, or a
    constant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pdn.models.config import ModelConfig
from pdn.models.mixers.attention import AttentionConfig
from pdn.models.mixers.linear_recurrence import LinearRecurrenceConfig
from pdn.models.mixers.mamba2 import Mamba2Config

NO_DECAY_A_LOG = -1e4  # exp of it is exactly 0, hence the log-decay too


class Target(NamedTuple):
    """A class that loads the model.

    config: content of config.json that the weights and the computation depend on.
    names: our parameter's name to theirs. head: their name of the head, tied to the embedding and
        not in the file.
    constants: tensors of theirs that we have not.
    """

    model_type: str
    architecture: str
    library: str
    config: dict
    names: dict[str, str]
    head: str
    constants: dict[str, Tensor]


def target_of(config: ModelConfig) -> tuple[Target, str | None]:
    """The released class, or our own with the reason why no released one fits."""
    found = _released(config)
    return (found, None) if isinstance(found, Target) else (own_class(config), found)


def own_class(config: ModelConfig) -> Target:
    names = {name: f"model.{name}" for name in _parameter_names(config)}
    content = {
        "pdn": config.model_dump(mode="json"),
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
    }
    return Target("pdn", "PdnForCausalLM", "pdn", content, names, "lm_head.weight", {})


def exported_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """Shape under their name: depthwise convolutions have an axis of one input channel, biases are
    flat.
    """
    if name.endswith("conv1d.weight"):
        return tensor.shape[0], 1, tensor.shape[1]
    return (tensor.numel(),) if name.endswith("dt_bias") else tuple(tensor.shape)


def _parameter_names(config: ModelConfig) -> list[str]:
    from pdn.models.language_model import LanguageModel

    with torch.device("meta"):
        return [name for name, _ in LanguageModel(config).named_parameters()]


def _released(config: ModelConfig) -> Target | str:
    mixers = list(config.mixers.values())
    if len(mixers) > 1:
        return f"layers of {len(mixers)} kinds ({', '.join(config.mixers)})"
    (mixer,) = mixers
    for part in (config, mixer):
        for key, field in type(part).model_fields.items():
            if not field.is_required() and getattr(part, key) != field.default:
                return f"{key} = {getattr(part, key)}"
    if mixer.kind == "linear_recurrence" and mixer.output_gate.kind == "swish":
        return "output_gate.kind = swish"
    if isinstance(mixer, AttentionConfig):
        return _llama(config, mixer)
    if isinstance(mixer, Mamba2Config):
        return _mamba2(config, mixer)
    if type(mixer) is LinearRecurrenceConfig:
        return _fla(config, mixer)
    return f"kind: {mixer.kind} has no class with the same parameters"


def _names(
    config: ModelConfig, embedding: str, norm: str, layers: str, block: dict[str, str]
) -> dict[str, str]:
    names = {"embedding.weight": embedding, "norm.weight": norm}
    for i in range(config.num_layers):
        names |= {f"blocks.{i}.{ours}": f"{layers}.{i}.{theirs}" for ours, theirs in block.items()}
    return names


MLP = {f"mlp.{name}_proj.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


def _llama(config: ModelConfig, mixer: AttentionConfig) -> Target | str:
    if not config.intermediate_size:
        return "blocks without MLP"
    if config.d_model % mixer.num_heads:
        return f"d_model = {config.d_model} is not a multiple of num_heads = {mixer.num_heads}"
    content = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer.rope_base},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }
    block = {
        "mixer_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
    } | MLP
    block |= {f"mixer.{name}_proj.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"}
    names = _names(config, "model.embed_tokens.weight", "model.norm.weight", "model.layers", block)
    return Target("llama", "LlamaForCausalLM", "transformers", content, names, "lm_head.weight", {})


def _mamba2(config: ModelConfig, mixer: Mamba2Config) -> Target | str:
    if config.intermediate_size:
        return "Mamba-2 blocks with an MLP"
    if mixer.preconditioner.kind != "none":
        return "Mamba-2 with a preconditioner"
    if mixer.num_groups != 1:
        return f"num_groups = {mixer.num_groups}: the released norm is over each group"
    if mixer.norm_eps != config.norm_eps:
        return f"norm_eps = {config.norm_eps} of blocks and {mixer.norm_eps} of mixers: the released class has one for both"
    if mixer.d_inner % config.d_model:
        return f"num_heads x head_dim = {mixer.d_inner} is not a multiple of d_model = {config.d_model}"
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
        "tie_word_embeddings": True,
    }
    block = {"mixer_norm.weight": "norm.weight"}
    block |= {f"mixer.ssm.{name}": f"mixer.{name}" for name in ("A_log", "dt_bias", "D")}
    block |= {
        f"mixer.{name}.weight": f"mixer.{name}.weight" for name in ("in_proj", "norm", "out_proj")
    }
    block |= {f"mixer.conv.{part}": f"mixer.conv1d.{part}" for part in ("weight", "bias")}
    names = _names(
        config, "backbone.embeddings.weight", "backbone.norm_f.weight", "backbone.layers", block
    )
    return Target(
        "mamba2", "Mamba2ForCausalLM", "transformers", content, names, "lm_head.weight", {}
    )


# ---------------------------------------------------------------- flash-linear-attention

CLASSES = {  # (decay, preconditioned, gated) to the class
    ("none", False, False): ("delta_net", "DeltaNetForCausalLM"),
    ("scalar", False, False): ("gated_deltanet", "GatedDeltaNetForCausalLM"),
    ("diagonal", False, True): ("kda", "KDAForCausalLM"),
    ("none", True, False): ("precond_gated_deltanet", "PrecondGatedDeltaNetForCausalLM"),
    ("scalar", True, False): ("precond_gated_deltanet", "PrecondGatedDeltaNetForCausalLM"),
    ("diagonal", True, True): ("precond_kda", "PrecondKDAForCausalLM"),
}


def _fla(config: ModelConfig, mixer: LinearRecurrenceConfig) -> Target | str:
    preconditioned = mixer.preconditioner.kind == "diagonal"
    found = CLASSES.get((mixer.decay.kind, preconditioned, mixer.output_gate.kind == "sigmoid"))
    if mixer.solve != "online":
        return "the offline solve"
    if not mixer.qk_l2norm:
        return "q and k without L2 norm"
    if mixer.gain.range not in (1, 2):
        return f"gain.range = {mixer.gain.range}, neither 1 nor 2"
    if preconditioned and mixer.preconditioner.form != "squash":
        return "a preconditioner of form inverse"
    if mixer.norm_eps != config.norm_eps:
        return f"norm_eps = {config.norm_eps} of blocks and {mixer.norm_eps} of mixers: the released classes have one for both"
    if not config.intermediate_size:
        return "blocks without MLP"
    if found is None:
        return f"decay.kind = {mixer.decay.kind} with output_gate.kind = {mixer.output_gate.kind}"
    model_type, architecture = found
    content = _fla_config(config, mixer, model_type)
    names = _names(
        config,
        "model.embeddings.weight",
        "model.norm.weight",
        "model.layers",
        _fla_block(mixer, model_type),
    )
    constants = {}
    if preconditioned and mixer.decay.kind == "none":  # the class always decays: this much
        for i in range(config.num_layers):
            attn = f"model.layers.{i}.attn"
            constants[f"{attn}.a_proj.weight"] = torch.zeros(mixer.num_heads, config.d_model)
            constants[f"{attn}.A_log"] = torch.full((mixer.num_heads,), NO_DECAY_A_LOG)
            constants[f"{attn}.dt_bias"] = torch.zeros(mixer.num_heads)
    return Target(
        model_type,
        architecture,
        "flash-linear-attention",
        content,
        names,
        "lm_head.weight",
        constants,
    )


def _fla_config(config: ModelConfig, mixer: LinearRecurrenceConfig, model_type: str) -> dict:
    content = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_heads": mixer.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "swish",
        "norm_eps": config.norm_eps,
        "conv_size": mixer.conv_size,
        "use_short_conv": True,
        "allow_neg_eigval": mixer.gain.range == 2,
        "attn": None,
        "tie_word_embeddings": True,
    }
    if model_type == "delta_net":  # its head sizes follow from the width
        expand = mixer.num_heads * mixer.head_dim / config.d_model
        content |= {
            "expand_k": expand,
            "expand_v": expand,
            "use_beta": True,
            "use_output_norm": True,
        }
        content |= {"qk_norm": "l2", "qk_activation": "silu"}
    else:
        content |= {"head_dim": mixer.head_dim, "expand_v": 1.0}
    if "kda" not in model_type:
        content["use_gate"] = False
    if model_type.startswith("precond"):
        content |= {"squash_x": mixer.preconditioner.bound, "squash_eps": 1e-6}
    return content


def _fla_block(mixer: LinearRecurrenceConfig, model_type: str) -> dict[str, str]:
    block = {"mixer_norm.weight": "attn_norm.weight", "mlp_norm.weight": "mlp_norm.weight"} | MLP
    block |= {f"mixer.{name}_proj.weight": f"attn.{name}_proj.weight" for name in "qkvo"}
    block |= {f"mixer.{name}_conv.weight": f"attn.{name}_conv1d.weight" for name in "qkv"}
    block |= {
        "mixer.gain.b_proj.weight": "attn.b_proj.weight",
        "mixer.o_norm.weight": "attn.o_norm.weight",
    }
    if mixer.decay.kind == "scalar":
        block["mixer.decay.a_proj.weight"] = "attn.a_proj.weight"
    if mixer.decay.kind == "diagonal":
        block |= {
            "mixer.decay.f_down.weight": "attn.f_proj.0.weight",
            "mixer.decay.f_up.weight": "attn.f_proj.1.weight",
        }
    if mixer.decay.kind != "none":
        block |= {f"mixer.decay.rates.{name}": f"attn.{name}" for name in ("A_log", "dt_bias")}
    if mixer.output_gate.kind == "sigmoid":
        block |= {"mixer.output_gate.g_down.weight": "attn.g_proj.0.weight"}
        block |= {
            f"mixer.output_gate.g_up.{part}": f"attn.g_proj.1.{part}" for part in ("weight", "bias")
        }
    if model_type.startswith("precond"):
        a_proj = "a_proj" if model_type == "precond_kda" else "a_atk_proj"
        block |= {"mixer.preconditioner.decay.a_proj.weight": f"attn.{a_proj}.weight"}
        block |= {"mixer.preconditioner.gain.b_proj.weight": "attn.b_atk_proj.weight"}
        block |= {
            f"mixer.preconditioner.decay.rates.{name}": f"attn.{name}_atk"
            for name in ("A_log", "dt_bias")
        }
        block |= {"mixer.preconditioner.center.mu": "attn.log_atk_scale"}
    return block
