"""The classes of flash-linear-attention 0.6.0.

Which one computes what a model computes, with which configuration, and under which names it keeps
the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdn.hub.target import MLP, Target, parameter_names
from pdn.models.config import ModelConfig
from pdn.models.mixers.attention import AttentionConfig
from pdn.models.mixers.comba import CombaConfig
from pdn.models.mixers.delta_product import DeltaProductConfig
from pdn.models.mixers.linear_recurrence import RecurrenceConfig
from pdn.models.mixers.mesa_net import MesaNetConfig

NO_DECAY_A_LOG = -1e4  # exp of it is exactly 0, hence the log-decay too

ARCHITECTURES = {
    "delta_net": "DeltaNetForCausalLM",
    "gated_deltanet": "GatedDeltaNetForCausalLM",
    "kda": "KDAForCausalLM",
    "precond_gated_deltanet": "PrecondGatedDeltaNetForCausalLM",
    "precond_kda": "PrecondKDAForCausalLM",
    "comba": "CombaForCausalLM",
    "gated_deltaproduct": "GatedDeltaProductForCausalLM",
    "gla": "GLAForCausalLM",
    "linear_attn": "LinearAttentionForCausalLM",
    "mesa_net": "MesaNetForCausalLM",
    "transformer": "TransformerForCausalLM",
}

ONLINE = {  # (decay, preconditioned) of the online solve to the class
    ("none", False): "delta_net",
    ("scalar", False): "gated_deltanet",
    ("diagonal", False): "kda",
    ("none", True): "precond_gated_deltanet",
    ("scalar", True): "precond_gated_deltanet",
    ("diagonal", True): "precond_kda",
}
OFFLINE = {"none": "linear_attn", "logsigmoid": "gla"}  # decay of the offline solve
GATES = {  # (kind, rank) of the output gates that a class has, beside none
    "gated_deltanet": {("swish", "full"), ("sigmoid", "full")},
    "kda": {("sigmoid", "low")},
    "precond_kda": {("sigmoid", "low")},
    "comba": {("sigmoid", "full")},
    "linear_attn": set(),
}
ALWAYS_GATED = ("kda", "precond_kda")
FEATURE_MAPS = {"product": "elementwise_product", "none": "identity", "relu": "relu", "elu": "elu"}


def recurrence(config: ModelConfig, mixer: RecurrenceConfig) -> Target | str:
    """Return the class of a recurrence, or why there is none."""
    model_type = _model_type(mixer)
    if model_type is None:
        return f"solve = {mixer.solve} with decay.kind = {mixer.decay.kind}"
    why_not = _unlike(config, mixer, model_type)
    if why_not is not None:
        return why_not
    content = _shared_config(config) | _config(config, mixer, model_type)
    block = _block(mixer, model_type)
    return _target(config, model_type, content, block, _constants(config, mixer, model_type))


def attention(config: ModelConfig, mixer: AttentionConfig) -> Target | str:
    """Return the transformer of flash-linear-attention, or why it does not fit."""
    if mixer.positions != "rope" or mixer.output_gate != "none":
        return f"positions = {mixer.positions} with output_gate = {mixer.output_gate}"
    if mixer.num_heads * mixer.head_dim != config.d_model:
        return f"num_heads x head_dim is not d_model = {config.d_model}"
    if not config.intermediate_size:
        return "blocks without MLP"
    if mixer.qk_norm and mixer.qk_norm_eps != 1e-5:
        return f"qk_norm_eps = {mixer.qk_norm_eps}"
    content = _shared_config(config) | {
        "num_heads": mixer.num_heads,
        "num_kv_heads": mixer.num_kv_heads,
        "window_size": mixer.window,
        "rope_theta": mixer.rope_base,
        "qk_norm": mixer.qk_norm,
        "qkv_bias": False,
    }
    block = {f"mixer.{name}_proj.weight": f"attn.{name}_proj.weight" for name in "qkvo"}
    if mixer.qk_norm:
        block |= {f"mixer.{name}_norm.weight": f"attn.{name}_norm.weight" for name in "qk"}
    return _target(config, "transformer", content, block, {})


def mesa_net(config: ModelConfig, mixer: MesaNetConfig) -> Target | str:
    """Return the class of MesaNet, or why it does not fit."""
    gate = mixer.output_gate
    if gate.kind != "none" and (gate.kind, gate.rank) != ("swish", "full"):
        return f"MesaNet with a {gate.kind} gate of {gate.rank} rank"
    if not config.intermediate_size:
        return "blocks without MLP"
    if mixer.norm_eps != config.norm_eps:
        return f"norm_eps = {config.norm_eps} of blocks and {mixer.norm_eps} of mixers"
    content = _shared_config(config) | {
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "conv_size": mixer.conv_size,
        "use_short_conv": True,
        "use_output_gate": gate.kind != "none",
        "lambda_lower_bound": mixer.lambda_min,
        "max_cg_step_training": mixer.iterations,
        "max_cg_step_decoding": mixer.iterations,
        "attn": None,
    }
    block = {f"mixer.{name}_proj.weight": f"attn.{name}_proj.weight" for name in "qkvo"}
    block |= {f"mixer.{name}_conv.weight": f"attn.{name}_conv1d.weight" for name in "qk"}
    for name in "ab":
        for part in ("weight", "bias"):
            block[f"mixer.{name}_proj.{part}"] = f"attn.{name}_proj.{part}"
    block["mixer.regularisation.raw"] = "attn.lambda_params"
    block["mixer.o_norm.weight"] = "attn.o_norm.weight"
    if gate.kind != "none":
        block["mixer.output_gate.g_proj.weight"] = "attn.g_proj.weight"
    return _target(config, "mesa_net", content, block, {})


def _model_type(mixer: RecurrenceConfig) -> str | None:
    if isinstance(mixer, CombaConfig):
        return "comba"
    if isinstance(mixer, DeltaProductConfig):
        return "gated_deltaproduct"
    if mixer.solve == "offline":
        return OFFLINE.get(mixer.decay.kind)
    return ONLINE.get((mixer.decay.kind, mixer.preconditioner.kind == "diagonal"))


def _unlike(config: ModelConfig, mixer: RecurrenceConfig, model_type: str) -> str | None:
    """Return what the class of this type has not, if anything."""
    offline = mixer.solve == "offline"
    if mixer.norm_eps != config.norm_eps:
        return (
            f"norm_eps = {config.norm_eps} of blocks and {mixer.norm_eps} of mixers: the released "
            "classes have one for both"
        )
    if not config.intermediate_size:
        return "blocks without MLP"
    if offline == mixer.qk_l2norm:
        return f"{model_type} with qk_l2norm = {mixer.qk_l2norm}"
    if offline and (mixer.gain.kind != "none" or mixer.preconditioner.kind != "none"):
        return (
            f"the offline solve with a {'gain' if mixer.gain.kind != 'none' else 'preconditioner'}"
        )
    if not offline and (mixer.gain.kind != "beta" or mixer.gain.range not in (1, 2)):
        return f"gain.kind = {mixer.gain.kind} with range {getattr(mixer.gain, 'range', None)}"
    if mixer.gain.kind == "beta" and mixer.gain.range == 2 and model_type == "comba":
        return "Comba with gain.range = 2"
    return (
        _unlike_gate(mixer, model_type)
        or _unlike_inputs(mixer, model_type)
        or _unlike_heads(mixer, model_type)
        or _unlike_form(mixer, model_type)
    )


def _unlike_gate(mixer: RecurrenceConfig, model_type: str) -> str | None:
    gate = mixer.output_gate
    known = GATES.get(model_type, {("swish", "full")})
    if gate.kind == "none":
        return f"{model_type} without output gate" if model_type in ALWAYS_GATED else None
    if (gate.kind, gate.rank) not in known:
        return f"decay.kind = {mixer.decay.kind} with a {gate.kind} gate of {gate.rank} rank"
    return None


def _unlike_inputs(mixer: RecurrenceConfig, model_type: str) -> str | None:
    if model_type == "linear_attn":
        if mixer.conv_size or mixer.activation != "none":
            return "linear attention with convolutions or an activation"
    elif model_type == "gla":
        if not mixer.conv_size and mixer.activation != "none":
            return "gated linear attention with an activation and without convolutions"
        if mixer.feature_map not in ("none", "relu"):
            return f"gated linear attention with feature_map = {mixer.feature_map}"
    elif mixer.feature_map != "none" or mixer.activation != "silu":
        return f"feature_map = {mixer.feature_map} and activation = {mixer.activation}"
    return None


def _unlike_heads(mixer: RecurrenceConfig, model_type: str) -> str | None:
    heads, preconditioner = mixer.heads, mixer.preconditioner
    grouped = heads.values != heads.keys
    if grouped and model_type in (
        "delta_net", "precond_kda", "gla", "linear_attn", "gated_deltaproduct"
    ):  # fmt: skip
        return f"{model_type} with num_value_heads = {heads.values}"
    if (
        grouped
        and model_type == "precond_gated_deltanet"
        and preconditioner.kind == "diagonal"
        and preconditioner.per_head_of != "keys"
    ):
        return "a preconditioner for each value head"
    return None


def _unlike_form(mixer: RecurrenceConfig, model_type: str) -> str | None:
    decay = mixer.decay
    if isinstance(mixer, CombaConfig) and mixer.form != "published":
        return "Comba of the decayed form"
    if (
        model_type == "gla"
        and decay.kind == "logsigmoid"
        and (decay.rank, decay.normaliser) != (16, 16.0)
    ):
        return f"decay.rank = {decay.rank} and normaliser = {decay.normaliser}"
    if mixer.preconditioner.kind == "learned":
        return "a learned write key"
    if mixer.preconditioner.kind == "diagonal":
        if model_type == "gated_deltaproduct":
            return "Gated DeltaProduct with a preconditioner"
        if mixer.preconditioner.form != "squash":
            return f"a preconditioner of form {mixer.preconditioner.form}"
        for key in ("squash", "interval", "factor", "tied"):
            field = type(mixer.preconditioner).model_fields[key]
            if getattr(mixer.preconditioner, key) != field.default:
                return f"preconditioner.{key} = {getattr(mixer.preconditioner, key)}"
    return None


def _shared_config(config: ModelConfig) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "swish",
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _config(config: ModelConfig, mixer: RecurrenceConfig, model_type: str) -> dict:
    heads, gate = mixer.heads, mixer.output_gate.kind
    content = {"num_heads": heads.keys, "attn": None}
    if model_type != "linear_attn":
        content |= {"use_short_conv": mixer.conv_size > 0, "conv_size": mixer.conv_size or 4}
    if model_type in ("delta_net", "gla", "linear_attn"):  # head sizes follow from the width
        content["expand_k"] = heads.key_width / config.d_model
        content["expand_v"] = heads.value_width / config.d_model
    else:
        content |= {"head_dim": heads.key_dim, "expand_v": mixer.expand_v}
    if model_type in ("gated_deltanet", "kda", "precond_gated_deltanet", "comba"):
        content["num_v_heads"] = mixer.num_value_heads
    if model_type in ("comba", "gla", "gated_deltaproduct"):
        content["use_output_gate"] = gate != "none"
    elif model_type in ("delta_net", "gated_deltanet", "precond_gated_deltanet"):
        content["use_gate"] = gate != "none"
    if mixer.gain.kind == "beta" and model_type != "comba":
        content["allow_neg_eigval"] = mixer.gain.range == 2
    return content | _own_keys(mixer, model_type)


def _own_keys(mixer: RecurrenceConfig, model_type: str) -> dict:
    """Return the keys that one class, or two, alone have."""
    if model_type == "delta_net":
        content = {"use_beta": True, "use_output_norm": True}
        return content | {"qk_norm": "l2", "qk_activation": "silu"}
    if model_type == "gated_deltanet" and mixer.output_gate.kind == "sigmoid":
        return {"output_gate_activation": "sigmoid"}
    if model_type.startswith("precond") and mixer.preconditioner.kind == "diagonal":
        return {"squash_x": mixer.preconditioner.bound, "squash_eps": 1e-6}
    if model_type == "comba":
        return {"use_output_correction": True, "use_inner_decay": True}
    if isinstance(mixer, DeltaProductConfig):
        forgets = mixer.decay.kind == "scalar"
        return {"num_householder": mixer.num_householder, "use_forget_gate": forgets}
    if model_type == "gla":
        feature_map = None if mixer.feature_map == "none" else mixer.feature_map
        own = {"feature_map": feature_map, "use_gk": True, "use_gv": False, "clamp_min": None}
        return own | {"elementwise_affine": True}
    if model_type == "linear_attn":
        return {
            "feature_map": FEATURE_MAPS[mixer.feature_map],
            "tie_feature_map_qk": False,
            "norm_q": False,
            "norm_k": False,
            "norm_feature_map": False,
            "elementwise_affine": True,
        }
    return {}


def _block(mixer: RecurrenceConfig, model_type: str) -> dict[str, str]:
    block = {f"mixer.{name}_proj.weight": f"attn.{name}_proj.weight" for name in "qkvo"}
    if mixer.conv_size:
        block |= {f"mixer.{name}_conv.weight": f"attn.{name}_conv1d.weight" for name in "qkv"}
    if mixer.feature_map == "product":
        for name in "qk":
            for ours, theirs in (("a", "layer1"), ("b", "layer2")):
                for part in ("weight", "bias"):
                    theirs_whole = f"attn.feature_map_{name}.{theirs}.{part}"
                    block[f"mixer.{name}_map.{ours}.{part}"] = theirs_whole
    if mixer.gain.kind == "beta":
        block["mixer.gain.b_proj.weight"] = "attn.b_proj.weight"
    block["mixer.o_norm.weight"] = f"attn.{_norm_name(mixer, model_type)}.weight"
    if model_type == "comba":
        block |= {f"mixer.feedback.{name}": f"attn.{name}" for name in ("decay", "D")}
    return block | _decay_block(mixer) | _gate_block(mixer) | _preconditioner_block(
        mixer, model_type
    )  # fmt: skip


def _norm_name(mixer: RecurrenceConfig, model_type: str) -> str:
    if model_type == "gla":
        return "g_norm_swish_gate" if mixer.output_gate.kind != "none" else "g_norm"
    return "norm" if model_type == "linear_attn" else "o_norm"


def _decay_block(mixer: RecurrenceConfig) -> dict[str, str]:
    kind, block = mixer.decay.kind, {}
    if kind == "scalar":
        block["mixer.decay.a_proj.weight"] = "attn.a_proj.weight"
    if kind == "diagonal":
        block["mixer.decay.f_down.weight"] = "attn.f_proj.0.weight"
        block["mixer.decay.f_up.weight"] = "attn.f_proj.1.weight"
    if kind in ("scalar", "diagonal"):
        block |= {f"mixer.decay.rates.{name}": f"attn.{name}" for name in ("A_log", "dt_bias")}
    if kind == "logsigmoid":
        block["mixer.decay.f_down.weight"] = "attn.gk_proj.0.weight"
        block |= {
            f"mixer.decay.f_up.{part}": f"attn.gk_proj.1.{part}" for part in ("weight", "bias")
        }
    return block


def _gate_block(mixer: RecurrenceConfig) -> dict[str, str]:
    if mixer.output_gate.kind == "none":
        return {}
    if mixer.output_gate.rank == "full":
        return {"mixer.output_gate.g_proj.weight": "attn.g_proj.weight"}
    block = {"mixer.output_gate.g_down.weight": "attn.g_proj.0.weight"}
    parts = ("weight", "bias")
    return block | {f"mixer.output_gate.g_up.{part}": f"attn.g_proj.1.{part}" for part in parts}


def _preconditioner_block(mixer: RecurrenceConfig, model_type: str) -> dict[str, str]:
    if mixer.preconditioner.kind == "none":
        return {}
    a_proj = "a_proj" if model_type == "precond_kda" else "a_atk_proj"
    block = {"mixer.preconditioner.decay.a_proj.weight": f"attn.{a_proj}.weight"}
    block["mixer.preconditioner.gain.b_proj.weight"] = "attn.b_atk_proj.weight"
    for name in ("A_log", "dt_bias"):
        block[f"mixer.preconditioner.decay.rates.{name}"] = f"attn.{name}_atk"
    return block | {"mixer.preconditioner.center.mu": "attn.log_atk_scale"}


def _constants(config: ModelConfig, mixer: RecurrenceConfig, model_type: str) -> dict[str, Tensor]:
    """Return a decay of nothing, for a class that always decays."""
    if model_type != "precond_gated_deltanet" or mixer.decay.kind != "none":
        return {}
    heads, constants = mixer.heads.values, {}
    for i in range(config.num_layers):
        attn = f"model.layers.{i}.attn"
        constants[f"{attn}.a_proj.weight"] = torch.zeros(heads, config.d_model)
        constants[f"{attn}.A_log"] = torch.full((heads,), NO_DECAY_A_LOG)
        constants[f"{attn}.dt_bias"] = torch.zeros(heads)
    return constants


def _target(config: ModelConfig, model_type: str, content: dict, block: dict, constants) -> Target:
    block = {
        "mixer_norm.weight": "attn_norm.weight",
        "mlp_norm.weight": "mlp_norm.weight",
    } | MLP | block  # fmt: skip
    names = parameter_names(
        config, "model.embeddings.weight", "model.norm.weight", "model.layers", block
    )
    return Target(
        model_type,
        ARCHITECTURES[model_type],
        "flash-linear-attention",
        content,
        names,
        "lm_head.weight",
        constants,
    )
