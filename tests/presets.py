"""Every launchable model, by globbing, shrunk so that each property takes seconds."""

from functools import cache
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = sorted(path.stem for path in (CONFIGS / "model").glob("*_tiny.yaml"))
SMALL = [
    "model.vocab_size=256",
    "model.d_model=64",
    "model.num_heads=2",
    "model.head_dim=16",
    "model.intermediate_size=96",
]


def small_overrides(name: str) -> list[str]:
    """Return overrides that shrink a preset to d = 64 and vocabulary 256.

    It has two layers, or one round of its pattern.
    """
    layers = max(2, len(model_config(name).pattern))
    return [f"model={name}", f"model.num_layers={layers}", *SMALL]


@cache
def model_config(name: str, *overrides: str) -> ModelConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("train", [f"model={name}", *overrides])
    return ModelConfig.model_validate(OmegaConf.to_container(composed.model, resolve=True))


def small_config(name: str) -> ModelConfig:
    return model_config(name, *small_overrides(name)[1:])


def released_config(name: str, *more: str) -> ModelConfig:
    """Return a small preset of a shape that its released class has, with ``more`` overrides."""
    # d_inner = 2 d_model, no MLP
    shape = ("model.intermediate_size=0", "model.num_heads=8") if "mamba2" in name else ()
    return model_config(name, *small_overrides(name)[1:], *shape, *more)


def released_model(name: str, *more: str) -> LanguageModel:
    """Build ``released_config`` in float32, for evaluation."""
    model = LanguageModel(released_config(name, *more))
    model.init_weights(seed=1)
    return perturb(model).eval()


def small_model(name: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    model = LanguageModel(small_config(name)).to(dtype)
    model.init_weights(seed=1)
    return perturb(model)


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Move every parameter away from the symmetric points of the initialisation."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(2), dtype=parameter.dtype
            )
            parameter.add_(0.05 * noise)
    return model


def built(config: ModelConfig) -> torch.nn.Module:
    """Build the first mixer of a model alone, in float64, each parameter with values of its own."""
    mixer = config.mixers[config.pattern[0]].build(config.d_model).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        parameter.data.copy_(
            0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        )
    return mixer
