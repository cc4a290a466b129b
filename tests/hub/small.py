"""Small models and what they are exported with."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pdn.hub import export
from pdn.inference.load import LoadedRun
from pdn.models.language_model import LanguageModel
from tests.presets import released_model


def tokenizer_file(directory: Path) -> Path:
    vocab = {"</s>": 0, "<s>": 1, "<unk>": 2, **{chr(97 + i): i + 3 for i in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["</s>", "<s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


def run_of(model: LanguageModel, directory: Path) -> LoadedRun:
    directory.mkdir(exist_ok=True)
    return LoadedRun(directory, model, tokenizer_file(directory), eos_id=0, step=7, seq_len=64)


def exported(
    name: str, directory: Path, *more: str, dtype: str = "float32"
) -> tuple[LanguageModel, Path]:
    model = released_model(name, *more)
    export(run_of(model, directory / "run"), directory / name, dtype=dtype)
    return model, directory / name


def tokens() -> torch.Tensor:
    return torch.randint(3, 29, (2, 80), generator=torch.Generator().manual_seed(0))
