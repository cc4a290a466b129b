"""Fixtures of the evaluations: no network, a tokenizer, copies of the hub's data."""

import gzip
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.evals.hub_data import write_hub_data
from tests.evals.subjects import FIXTURES, VOCABULARY


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Allow local files only, and no cache outside of the test's directory."""
    changed = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    before = {key: os.environ.get(key) for key in changed}
    os.environ |= changed
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.config.HF_DATASETS_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    yield
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    pages = gzip.decompress(
        (FIXTURES / "wikitext2_raw_test_pages.jsonl.gz").read_bytes()
    ).splitlines()
    text = [json.loads(line)["page"] for line in pages]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<eos>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(file))
    return file


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_hub_data(folder)
    return folder
