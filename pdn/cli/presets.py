"""Models by the name of their preset, from Python."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from pdn.cli.compose import CONFIGS, compose
from pdn.cli.messages import did_you_mean, one_of
from pdn.cli.parse import parse
from pdn.errors import ConfigError
from pdn.models.language_model import LanguageModel, init_weights
from pdn.models.mixers import AnyMixer, TokenMixer


def build_model(
    name: str,
    *,
    vocab_size: int | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """Build a freshly initialised model from a preset of ``configs/model``.

    Hydra reads the preset and keeps nothing of it: a program may use Hydra itself.

    Args:
        name: of the preset, such as ``pgdn_340m``.
        vocab_size: tokens; a preset leaves them to the data's tokenizer, so they must be given
            here or as ``model.vocab_size=...``.
        overrides: as on the command line, such as ``model.num_layers=12``.
        seed: of the initialisation, as ``seed`` of a run.
        device, dtype: of the parameters, without values on ``meta``.

    Raises:
        ConfigError: no such preset or key, or no vocabulary; the message names the nearest.
    """
    given = [] if vocab_size is None else [f"model.vocab_size={vocab_size}"]
    config = parse(compose([f"model={name}", *given, *overrides])).model
    if config.vocab_size is None:
        text = f"vocab_size of {name}: found none; expected the number of tokens; give vocab_size="
        raise ConfigError("CONFIG-VALUE", text)
    with torch.device("meta"):
        model = LanguageModel(config)
    model = model.to_empty(device=device)
    if torch.device(device).type != "meta":
        model.init_weights(seed)
    return model.to(dtype)


def build_mixer(
    name: str,
    *,
    d_model: int,
    num_heads: int,
    head_dim: int,
    norm_eps: float = 1e-6,
    overrides: Sequence[str] = (),
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TokenMixer:
    """Build a freshly initialised token mixer from a preset of ``configs/mixer``.

    For a network of one's own: ``y, _ = mixer(x)`` with x and y [B, T, d_model].

    Args:
        name: of the preset, such as ``pgdn``.
        overrides: of the preset's keys, such as ``conv_size=3`` or ``preconditioner.bound=1.2``.
        seed, device, dtype: as for ``build_model``.

    Raises:
        ConfigError: no such preset.
        ValueError: an override that the mixer does not know or cannot take.
    """
    known = sorted(path.stem for path in (CONFIGS / "mixer").glob("*.yaml"))
    if name not in known:
        fix = did_you_mean(name, known) or "see configs/mixer"
        text = f"mixer: found {name}; expected {one_of(known, 'configs/mixer')}; {fix}"
        raise ConfigError("CONFIG-GROUP", text)
    shape = dict(d_model=d_model, num_heads=num_heads, head_dim=head_dim, norm_eps=norm_eps)
    preset = OmegaConf.load(CONFIGS / "mixer" / f"{name}.yaml")
    preset = OmegaConf.merge(preset, OmegaConf.from_dotlist(list(overrides)))
    values = OmegaConf.to_container(OmegaConf.create({"model": shape, "it": preset}), resolve=True)
    assert isinstance(values, dict)
    config = TypeAdapter(AnyMixer).validate_python(values["it"])
    with torch.device("meta"):
        mixer = config.build(d_model)
    mixer = mixer.to_empty(device=device)
    if torch.device(device).type != "meta":
        init_weights(mixer, seed)
    return mixer.to(dtype)
