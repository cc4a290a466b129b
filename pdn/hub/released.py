"""A released configuration as a configuration of ours.

It is read as flash-linear-attention, flame and the paper's release write it. Every key of the file
is either read, known not to matter, or refused by name: a key that changes the computation and that
we have not would otherwise give another model in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pdn.errors import ConfigError
from pdn.models.config import ModelConfig

# keys of training, generation, kernels and files, not of the model
IGNORED = {
    "model_type", "architectures", "attn_mode", "auto_map", "bos_token_id", "eos_token_id",
    "pad_token_id", "chunk_size", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp",
    "max_position_embeddings", "log_gain_init", "time_step_rank",
    "a_log_init_lower",  # an initialisation that is the same for all our decays
}  # fmt: skip
RECIPE = {
    "seq_len": 2048,
    "global_batch_size": 256,
    "micro_batch_size": 8,
    "steps": 30000,
    "warmup_steps": 1024,
    "lr": 4e-4,
    "weight_decay": 0.01,
}


class Released:
    """Reads the keys of a released configuration, and remembers which of them have been read."""

    def __init__(self, content: dict[str, Any]):
        self.content, self.read = content, set()

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or what the class assumes where the file does not have it."""
        self.read.add(key)
        return self.content.get(key, default)

    def only(self, key: str, *values: Any, default: Any = None) -> Any:
        """Refuse any other value of a key; the first one is what the class assumes."""
        found = self.get(key, values[0] if default is None else default)
        if found not in values:
            raise _refused(self.content, f"{key} = {found!r}", f"{key} = {values[0]!r}")
        return found

    def finish(self) -> None:
        """Refuse the keys that nothing has read."""
        unknown = sorted(set(self.content) - self.read - IGNORED)
        if unknown:
            named = ", ".join(f"{key} = {self.content[key]!r}" for key in unknown)
            raise _refused(self.content, named, "a configuration without")


def _refused(content: dict, found: str, expected: str) -> ConfigError:
    return ConfigError(
        "HUB-RELEASED",
        f"{content.get('model_type')} with {found}: no model of ours computes that; expected "
        f"{expected}",
    )


def model_config_of(content: dict, name: str = "released"):
    """Translate a released config.json.

    Args:
        content: what the file holds.
        name: of our model.

    Returns:
        the ModelConfig that counts the same parameters and computes the same.

    Raises:
        ConfigError: an unknown model_type, or a key, or a value of one, that no model of ours has.
    """
    released = Released(content)
    model_type = released.get("model_type")
    translate = FAMILIES.get(model_type)
    if translate is None:
        raise ConfigError(
            "HUB-RELEASED",
            f"model_type = {model_type!r}: expected one of {', '.join(FAMILIES)}",
        )
    shape = translate(released)
    released.finish()
    mixer = shape.pop("mixer")
    whole = {
        "name": name,
        "vocab_size": content.get("vocab_size", 32000),
        "num_heads": mixer["num_heads"],
        "head_dim": mixer["head_dim"],
        "mixers": {model_type: mixer},
        "pattern": [model_type],
        "recipe": RECIPE,
        "residual_dtype": "auto",
        "init": "plain",
    }
    return ModelConfig.model_validate(whole | shape)


def intermediate_size(content: dict) -> int:
    """Return the width of the SwiGLU.

    As given, else 2/3 of hidden_ratio times the model's width, up to a multiple of 256.
    """
    given = content.get("intermediate_size")
    if given is not None:
        return given
    ratio = content.get("hidden_ratio")
    width = int(content.get("hidden_size", 2048) * (4 if ratio is None else ratio) * 2 / 3)
    return 256 * -(-width // 256)


def _shape(r: Released, *, layers: int, mixer: dict) -> dict:
    """Return what all models with an MLP have."""
    r.only("hidden_act", "swish", "silu")
    r.only("attn", None)
    r.only("attnres_block_size", None)
    r.only("initializer_range", 0.02)
    for key in ("vocab_size", "hidden_ratio", "intermediate_size"):
        r.get(key)
    return {
        "d_model": r.get("hidden_size", 2048),
        "num_layers": r.get("num_hidden_layers", layers),
        "intermediate_size": intermediate_size(r.content),
        "norm_eps": r.get("norm_eps", 1e-6),
        "tie_embeddings": r.get("tie_word_embeddings", False),
        "mixer": mixer,
    }


def _recurrence(r: Released, **axes) -> dict:
    """Return a mixer of the class LinearRecurrence.

    ``axes`` are what differs from Gated DeltaNet.
    """
    negative = r.get("allow_neg_eigval", False) if axes.get("gain") is None else False
    mixer = {
        "kind": "linear_recurrence",
        "solve": "online",
        "num_value_heads": None,
        "expand_v": 1.0,
        "conv_size": _conv_size(r) if "conv_size" not in axes else 0,
        "activation": "silu",
        "feature_map": "none",
        "norm_eps": r.get("norm_eps", 1e-6),
        "qk_l2norm": True,
        "gain": {"kind": "beta", "range": 2.0 if negative else 1.0},
        "preconditioner": {"kind": "none"},
    }
    return mixer | axes


def _conv_size(r: Released, used: bool = True) -> int:
    size = r.get("conv_size", 4)
    return size if r.get("use_short_conv", used) else 0


def _heads(r: Released, num_heads: int, head_dim: int, expand_v: float) -> dict:
    """Return head sizes that are given, with groups of value heads."""
    heads = r.get("num_heads", num_heads)
    values = r.get("num_v_heads")
    return {
        "num_heads": heads,
        "num_value_heads": None if values == heads else values,
        "head_dim": r.get("head_dim", head_dim),
        "expand_v": float(r.get("expand_v", expand_v)),
    }


def _heads_of_width(r: Released, num_heads: int, expand_k: float, expand_v: float) -> dict:
    """Return head sizes that follow from the width of the model."""
    width, heads = r.get("hidden_size", 2048), r.get("num_heads", num_heads)
    keys, values = r.get("expand_k", expand_k) * width, r.get("expand_v", expand_v) * width
    if keys % heads or values % heads:
        raise _refused(r.content, f"{keys} key and {values} value channels", f"{heads} equal heads")
    return {"num_heads": heads, "head_dim": int(keys) // heads, "expand_v": values / keys}


def _gate(used: bool, kind: str, rank: str = "full") -> dict:
    return {"kind": kind, "rank": rank} if used else {"kind": "none"}


def _delta_net(r: Released) -> dict:
    for key, value in {"use_beta": True, "use_output_norm": True, "qk_norm": "l2",
                       "qk_activation": "silu"}.items():  # fmt: skip
        r.only(key, value)
    mixer = _recurrence(
        r,
        **_heads_of_width(r, 16, 1.0, 1.0),
        decay={"kind": "none"},
        output_gate=_gate(r.get("use_gate", False), "swish"),
    )
    return _shape(r, layers=24, mixer=mixer)


def _gated_deltanet(r: Released) -> dict:
    activation = r.only("output_gate_activation", "swish", "silu", "sigmoid")
    gate = _gate(r.get("use_gate", True), "sigmoid" if activation == "sigmoid" else "swish")
    mixer = _recurrence(r, **_heads(r, 6, 256, 2.0), decay={"kind": "scalar"}, output_gate=gate)
    return _shape(r, layers=21, mixer=mixer)


def _kda(r: Released) -> dict:
    r.only("safe_gate", False)
    r.only("lower_bound", None)
    gate = _gate(True, "sigmoid", "low")
    mixer = _recurrence(r, **_heads(r, 16, 128, 1.0), decay={"kind": "diagonal"}, output_gate=gate)
    return _shape(r, layers=24, mixer=mixer)


def _precond_gated_deltanet(r: Released) -> dict:
    gate = _gate(r.get("use_gate", True), "swish")
    mixer = _recurrence(
        r,
        **_heads(r, 6, 256, 2.0),
        decay={"kind": "scalar"},
        preconditioner=_preconditioner(r, "keys"),
        output_gate=gate,
    )
    return _shape(r, layers=21, mixer=mixer)


def _precond_deltanet(r: Released) -> dict:
    """Read a type of the paper's experiments alone.

    Its code is not released; its keys are PGDN's.
    """
    shape = _precond_gated_deltanet(r)
    return shape | {"mixer": shape["mixer"] | {"decay": {"kind": "none"}}}


def _precond_kda(r: Released) -> dict:
    r.only("safe_gate", False)
    r.only("lower_bound", None)
    r.only("use_gate", True)
    heads = _heads(r, 16, 128, 1.0)
    if heads["num_value_heads"] is not None:
        raise _refused(r.content, f"num_v_heads = {heads['num_value_heads']}", "num_v_heads = None")
    mixer = _recurrence(
        r,
        **heads,
        decay={"kind": "diagonal"},
        preconditioner=_preconditioner(r, "values"),
        output_gate=_gate(True, "sigmoid", "low"),
    )
    return _shape(r, layers=24, mixer=mixer)


def _preconditioner(r: Released, per_head_of: str) -> dict:
    """Read the switches of the paper's experiments, of which the release has kept three numbers."""
    for key, value in {
        "squash_eps": 1e-6,
        "qk_norm": True,
        "untie_beta": True,
        "precond_mode": "symmetric",
        "squash_type": "fast",
        "learn_scale": True,
        "learn_gain": False,
        "use_m_norm": False,
        "curvature_aware_m_norm": False,
        "k_precond_norm": False,
        "dt_bias_offset": 0.0,
        "dt_bias_offset_kda": 0.0,
    }.items():
        r.only(key, value)
    older = r.get("log_A_scale_init", -0.2)
    return {
        "kind": "diagonal",
        "form": "squash",
        "bound": float(r.get("squash_x", 1.5)),
        "mu_init": float(r.get("log_atk_scale_init", older)),
        "per_head_of": per_head_of,
    }


def _comba(r: Released) -> dict:
    r.only("use_output_correction", True)
    r.only("use_inner_decay", True)
    r.only("correction_factor", 1.0)
    gate = _gate(r.get("use_output_gate", True), "sigmoid")
    mixer = _recurrence(
        r,
        **_heads(r, 6, 256, 2.0),
        kind="comba",
        form="published",
        decay={"kind": "scalar"},
        gain={"kind": "beta", "range": 1.0},
        output_gate=gate,
    )
    return _shape(r, layers=21, mixer=mixer)


def _gated_deltaproduct(r: Released) -> dict:
    mixer = _recurrence(
        r,
        **_heads(r, 6, 256, 2.0),
        kind="delta_product",
        num_householder=r.get("num_householder", 1),
        decay={"kind": "scalar" if r.get("use_forget_gate", False) else "none"},
        output_gate=_gate(r.get("use_output_gate", True), "swish"),
    )
    return _shape(r, layers=21, mixer=mixer)


def _offline(r: Released) -> dict:
    """Return what the classes of the offline solve share."""
    r.only("elementwise_affine", True)
    heads = r.content.get("num_heads", 4)
    r.only("num_kv_heads", None, heads)
    offline = {"solve": "offline", "qk_l2norm": False, "activation": "none"}
    return offline | {"gain": {"kind": "none"}}


def _linear_attn(r: Released) -> dict:
    for key in ("tie_feature_map_qk", "norm_q", "norm_k", "norm_feature_map"):
        r.only(key, False)
    maps = {"elementwise_product": "product", "identity": "none", "relu": "relu", "elu": "elu"}
    mixer = _recurrence(
        r,
        **_heads_of_width(r, 4, 1.0, 1.0),
        **_offline(r),
        conv_size=0,
        feature_map=maps[r.only("feature_map", *maps)],
        decay={"kind": "none"},
        output_gate={"kind": "none"},
    )
    return _shape(r, layers=24, mixer=mixer)


def _gla(r: Released) -> dict:
    for key, value in {"use_gk": True, "use_gv": False, "clamp_min": None}.items():
        r.only(key, value)
    axes = _offline(r)
    conv_size = _conv_size(r, used=False)
    mixer = _recurrence(
        r,
        **_heads_of_width(r, 4, 0.5, 1.0),
        **axes,
        feature_map=r.only("feature_map", None, "relu") or "none",
        decay={"kind": "logsigmoid", "rank": 16, "normaliser": 16.0},
        output_gate=_gate(r.get("use_output_gate", True), "swish"),
    ) | {"conv_size": conv_size, "activation": "silu" if conv_size else "none"}
    return _shape(r, layers=24, mixer=mixer)


def _mesa_net(r: Released) -> dict:
    r.get("expand_v")  # in the release's files, but the class has no such key
    r.only("use_short_conv", True)
    iterations = r.get("max_cg_step_training", 30)
    r.only("max_cg_step_decoding", iterations)
    mixer = {
        "kind": "mesa_net",
        "num_heads": r.get("num_heads", 16),
        "head_dim": r.get("head_dim", 128),
        "conv_size": r.get("conv_size", 4),
        "norm_eps": r.get("norm_eps", 1e-6),
        "lambda_min": r.get("lambda_lower_bound", 0.25),
        "iterations": iterations,
        "output_gate": _gate(r.get("use_output_gate", False), "swish"),
    }
    return _shape(r, layers=24, mixer=mixer)


def _transformer(r: Released) -> dict:
    r.only("qkv_bias", False)
    r.only("attention_bias", False)
    r.only("elementwise_affine", True)
    d_model, heads = r.get("hidden_size", 2048), r.get("num_heads", 32)
    kv_heads = r.get("num_kv_heads")
    mixer = {
        "kind": "attention",
        "num_heads": heads,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "head_dim": d_model // heads,
        "positions": "rope",
        "rope_base": float(r.get("rope_theta", 10000.0)),
        "window": r.get("window_size"),
        "qk_norm": r.get("qk_norm", False),
    }
    return _shape(r, layers=24, mixer=mixer)


def _mamba2(r: Released) -> dict:
    for key, value in {
        "n_groups": 1, "use_bias": False, "use_conv_bias": True, "rmsnorm": True, "rms_norm": True,
        "norm_before_gate": False, "D_has_hdim": False, "conv_init": None, "hidden_act": "silu",
        "initializer_range": 0.02, "time_step_min": 1e-3, "time_step_max": 0.1,
        "time_step_floor": 1e-4, "dt_min": 1e-3, "dt_max": 0.1, "dt_init_floor": 1e-4,
    }.items():  # fmt: skip
        r.only(key, value)
    r.only("A_init_range", [1, 16], (1, 16))
    d_model, head_dim = r.get("hidden_size", 2048), r.get("head_dim", 64)
    eps, heads = r.get("norm_eps", 1e-5), r.get("expand", 2) * d_model // head_dim
    r.only("num_heads", heads)
    r.only("dt_limit", [0.0, float("inf")], (0.0, float("inf")))
    r.get("vocab_size")
    return {
        "d_model": d_model,
        "num_layers": r.get("num_hidden_layers", 48),
        "intermediate_size": 0,
        "norm_eps": eps,
        "tie_embeddings": r.get("tie_word_embeddings", False),
        "residual_dtype": "fp32" if r.get("residual_in_fp32", True) else "auto",
        "init": "released" if r.get("rescale_prenorm_residual", True) else "plain",
        "mixer": {
            "kind": "mamba2",
            "num_heads": heads,
            "head_dim": head_dim,
            "state_size": r.get("state_size", 128),
            "num_groups": 1,
            "conv_size": r.get("conv_kernel", 4),
            "norm_eps": eps,
            "preconditioner": {"kind": "none"},
        },
    }


FAMILIES: dict[str, Callable[[Released], dict]] = {
    "delta_net": _delta_net,
    "gated_deltanet": _gated_deltanet,
    "kda": _kda,
    "precond_gated_deltanet": _precond_gated_deltanet,
    "precond_deltanet": _precond_deltanet,
    "precond_kda": _precond_kda,
    "comba": _comba,
    "gated_deltaproduct": _gated_deltaproduct,
    "linear_attn": _linear_attn,
    "gla": _gla,
    "mesa_net": _mesa_net,
    "transformer": _transformer,
    "mamba2": _mamba2,
}
