"""Small models as the evaluation takes them."""

import json
from pathlib import Path

import torch

from pdn.distributed.fsdp import World
from pdn.evals.probes.base import Subject
from pdn.evals.scoring import Scorer
from pdn.models.language_model import LanguageModel
from tests.presets import released_model

FIXTURES = Path(__file__).parent.parent / "fixtures" / "eval"
VOCABULARY, LENGTH = 600, 256


def model_of(name: str, vocabulary: int = VOCABULARY) -> LanguageModel:
    return released_model(name, f"model.vocab_size={vocabulary}")


def multiple_choice(folder: Path, documents: list[dict], **keys) -> str:
    """Write a task of multiple choice over ``documents``; return its path."""
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, documents)))
    task = {
        "task": "choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "docs.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    } | keys
    (folder / "choices.yaml").write_text(json.dumps(task))
    return str(folder / "choices.yaml")


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
