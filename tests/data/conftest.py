from pathlib import Path

import pytest

from tests.data.corpus import documents, make_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Return the train directory of 120 documents in several shards."""
    return make_shards(tmp_path_factory.mktemp("shards"), documents(120))


@pytest.fixture(scope="session")
def more_shards(tmp_path_factory) -> Path:
    """Return 60 other documents in shards of another size."""
    return make_shards(tmp_path_factory.mktemp("more"), documents(60, seed=1), shard_tokens=900)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")
