"""Small corpora, tokenizers, shards and configurations for the data tests.

They are made here; nothing is downloaded.
"""

import functools
import random
from pathlib import Path

from pydantic import TypeAdapter

from pdn.data import open_data
from pdn.data.config import DataConfig
from pdn.data.documents import Batch
from pdn.data.prepare import Plan, Tokenisation
from pdn.data.tokenizer import TokenizerFile, train

WORDS = [
    "tide",
    "lamp",
    "river",
    "stone",
    "quiet",
    "morning",
    "garden",
    "letter",
    "window",
    "shadow",
    "ember",
    "thread",
]

LOADING = {
    "seq_len": 16,
    "validation_sets": None,
    "document_isolation": True,
    "isolation_min_tokens": 4,
    "max_epochs": 1000.0,
    "workers": 0,
    "prefetch_steps": 2,
    "timeout_seconds": 60.0,
}
STREAM = {
    "kind": "stream",
    "path": None,
    "dataset": None,
    "dataset_config": None,
    "revision": None,
    "split": "train",
    "text_field": "text",
    "tokenizer_revision": None,
    "eos_token": None,
    "validation": None,
    "validation_split": None,
    "validation_documents": 4,
    "processes": 1,
    "shard_tokens": 512,
    "block_shards": 2,
    "max_cache_bytes": 1 << 30,
    "retry_seconds": 5.0,
    "stall_seconds": 5.0,
}
TEXT = {
    "kind": "text",
    "text_field": "text",
    "max_bytes": None,
    "tokenizer": None,
    "tokenizer_revision": None,
    "vocab_size": 300,
    "eos_token": None,
    "validation": None,
    "validation_fraction": 0.1,
    "processes": 1,
    "shard_tokens": 2048,
}


def documents(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Return different texts of 1 to `longest` words."""
    rng = random.Random(seed)
    return [
        f"{seed}-{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))
        for i in range(count)
    ]


@functools.cache
def tokenizer() -> TokenizerFile:
    return train(documents(50, seed=99), 300)


class Memory:
    """A source of given texts, three a batch."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def identity(self) -> dict:
        return {"kind": "memory", "name": "memory", "documents": len(self.texts)}

    def batches(self, cursor):
        start = cursor["at"] if cursor else 0
        for i in range(start, len(self.texts), 3):
            yield Batch({"at": i}, self.texts[i : i + 3], i / len(self.texts))


def make_shards(out: Path, texts: list[str], shard_tokens: int = 700, **plan) -> Path:
    """Tokenise `texts`; returns the train directory."""
    for _ in Tokenisation(Memory(texts), out, tokenizer(), Plan(shard_tokens, **plan), 1).run():
        pass
    return out / "train"


def parse(cache: Path, **keys):
    return TypeAdapter(DataConfig).validate_python({**LOADING, "cache_dir": str(cache), **keys})


def open_shards(
    train: Path,
    cache: Path,
    *,
    batch: int = 4,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    **keys,
):
    config = parse(cache, **{"kind": "shards", "path": str(train), "validation": None, **keys})
    return open_data(config, global_batch_size=batch, seed=seed, rank=rank, world_size=world)


def mixture(*directories: Path, weights: list[float]) -> dict:
    names = [f"s{i}" for i in range(len(directories))]
    return {
        "kind": "mixture",
        "sources": {
            n: {"kind": "shards", "path": str(d), "validation": None, "weight": w}
            for n, d, w in zip(names, directories, weights)
        },
    }


def open_mixture(
    cache: Path, sources: dict, *, batch: int, seed: int = 0, rank: int = 0, world: int = 1, **keys
):
    config = parse(cache, **sources, **keys)
    return open_data(config, global_batch_size=batch, seed=seed, rank=rank, world_size=world)
