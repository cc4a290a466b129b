"""Choose the place on the hub where a corpus is had: the same one for a run's whole life."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from pdn.data.config import StreamSource
from pdn.data.corpora import Corpus, Place, corpus
from pdn.data.documents import sample
from pdn.data.failures import SILENCE, WAYS_OUT, is_passing
from pdn.data.files import making, publish_bytes
from pdn.data.hub import explained, hub
from pdn.errors import DataError, DataStorageError
from pdn.store.local import read_bytes
from pdn.wording import Tell

PAUSES = (1,)  # seconds between the tries of one place


def places_of(config: StreamSource) -> list[Place]:
    """Return where the dataset of `config` can be had: its own place, and its corpus's mirrors."""
    assert config.dataset is not None
    own = Place(dataset=config.dataset, revision=config.revision)
    if config.corpus is None or config.dataset != corpus(config.corpus).dataset:
        return [own]
    return [own, *corpus(config.corpus).mirrors]


def located(
    config: StreamSource,
    cache_dir: Path,
    tell: Tell,
    recorded: tuple[str, str] | None = None,
) -> StreamSource:
    """Return `config` with the dataset and the commit that are read.

    Args:
        config: of a hub dataset or a local directory; the latter comes back as it is.
        cache_dir: remembers what was chosen at the first use.
        tell: called with lines for the user.
        recorded: source and revision in the fingerprint of a run that is continued.

    Raises:
        DataError: the dataset is gated, gone, or lacks the column, at every place.
        DataStorageError: the hub cannot be reached.
    """
    if config.path is not None:
        return config
    places = places_of(config)
    if recorded is not None:
        for place in places:
            if _label(place, config) == recorded[0]:
                return _at(config, place.dataset, recorded[1])
    assert config.dataset is not None  # as the config demands without a path
    key = [p.model_dump() for p in places] + [config.dataset_config, config.split]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    memory = cache_dir / f"located-{digest}.json"
    noted = _noted(memory, {place.dataset for place in places})
    if noted is not None:
        return _at(config, *noted)
    if Path(config.dataset).exists():  # a directory that `datasets` reads: there is no hub to ask
        return config.model_copy(update={"corpus": None})
    place = first_available(config, tell)
    with making(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
    assert place.revision is not None  # of the first use, now
    publish_bytes(memory, json.dumps([place.dataset, place.revision]).encode())
    return _at(config, place.dataset, place.revision)


def _noted(memory: Path, datasets: set[str]) -> tuple[str, str] | None:
    """Return dataset and revision that were chosen at the first use.

    None before it, or if the note is damaged: a place is chosen then.
    """
    try:
        dataset, revision = json.loads(read_bytes(memory))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    known = isinstance(dataset, str) and dataset in datasets and isinstance(revision, str)
    return (dataset, revision) if known else None


def first_available(config: StreamSource, tell: Tell) -> Place:
    """Return the first place of which a little can be read, with its commit."""
    failures, places = [], places_of(config)
    for place in places:
        try:
            found = check(place, config)
        except DataError as error:
            failures.append(error)
            if len(failures) < len(places):
                reason = error.args[0].removesuffix(WAYS_OUT).rstrip(", ")
                tell(f"{reason}; now {places[len(failures)].dataset}")
            continue
        tell(f"{found.dataset} at {found.revision}: reachable")
        return found
    if len(failures) == 1:
        raise failures[0]
    kind = DataStorageError if isinstance(failures[0], DataStorageError) else DataError
    said = "; ".join(e.args[0].removesuffix(WAYS_OUT).rstrip(", ") for e in failures)
    raise kind(failures[0].code, f"none of {len(failures)} places can be read: {said}; {WAYS_OUT}")


def check(place: Place, config: StreamSource | Corpus) -> Place:
    """Read a little of a place; returns it with its commit.

    Raises:
        DataError: it is gated, gone or lacks the column (65), or cannot be reached (74).
    """
    revision = place.revision
    for pause in (*PAUSES, None):
        began = time.monotonic()
        try:
            # Ask this first: it fails at once where the clients' own retries take half a minute.
            revision = _commit(place.dataset, revision)
            source = hub(
                place.dataset, config.dataset_config, revision, config.split, config.text_field
            )
            sample(source)
            return Place(dataset=place.dataset, revision=revision)
        except Exception as error:
            waited = time.monotonic() - began >= SILENCE  # long enough for a second try
            if pause is None or waited or not is_passing(error):
                raise explained(error, place.dataset, revision, config.split) from error
            time.sleep(pause)
    raise AssertionError


def _commit(dataset: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(dataset, revision=revision, timeout=SILENCE).sha)


def _label(place: Place, config: StreamSource) -> str:
    return f"{place.dataset}/{config.dataset_config}" if config.dataset_config else place.dataset


def _at(config: StreamSource, dataset: str, revision: str) -> StreamSource:
    return config.model_copy(update={"dataset": dataset, "revision": revision, "corpus": None})
