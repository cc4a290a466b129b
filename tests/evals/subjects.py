"""Small models as the evaluation takes them."""

from pathlib import Path

import torch

from pdn.distributed.fsdp import World
from pdn.evals.probes.base import Subject
from pdn.evals.scoring import Scorer
from pdn.models.language_model import LanguageModel
from tests.presets import model_config, small_overrides

FIXTURES = Path(__file__).parent.parent / "fixtures" / "eval"


VOCABULARY = 600


LENGTH = 256


def model_of(name: str, vocabulary: int = VOCABULARY) -> LanguageModel:
    # what the released class has
    shape = ("model.intermediate_size=0", "model.num_heads=8") if name == "mamba2_tiny" else ()
    model = LanguageModel(
        model_config(name, *small_overrides(name)[1:], *shape, f"model.vocab_size={vocabulary}")
    )
    model.init_weights(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            )
    return model.eval()


def subject(model: LanguageModel, tokenizer: Path, **changes) -> Subject:
    scorer = Scorer(
        **dict(
            model=model,
            world=World(0, 1, torch.device("cpu")),
            max_length=LENGTH,
            batch_size=8,
            bf16=False,
        )
        | changes
    )
    return Subject(
        scorer=scorer, config=model.config, tokenizer=tokenizer, eos_id=0, seq_len=LENGTH
    )
