"""From a config to open training data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data.config import DataConfig, MixtureConfig, ShardsSource, TextSource
from data.errors import DataError
from data.loader import TrainingData
from data.order import Schedule
from data.sources import ResidentSource, ValidationSet, WindowSource
from data.text import prepare_text

Tell = Callable[[str], None] | None


def build(config: DataConfig, *, global_batch_size: int, seed: int, rank: int, world_size: int, progress: Tell) -> TrainingData:
    """See `data.open_data`."""
    cache = Path(config.cache_dir).expanduser()
    mixture = isinstance(config, MixtureConfig)
    parts = config.sources if mixture else {"data": config}
    sources: list[WindowSource] = []
    validations: list[Path] = []
    for name, part in parts.items():
        source, validation = _open_source(name, part, cache, seed, progress)
        sources.append(source)
        if validation is not None:
            validations.append(validation)
    _same_tokenizer(sources)
    for source in sources:
        if source.count(config.seq_len) == 0:
            raise DataError(
                "DATA-SHORT",
                f"{source.directory}: {source.manifest.tokens} tokens, shorter than one sample of {config.seq_len} + 1;"
                " reduce data.seq_len or give more text",
            )
    schedule = Schedule({name: part.weight if mixture else 1.0 for name, part in parts.items()})
    return TrainingData(
        sources,
        schedule,
        ValidationSet(validations[0]) if validations else None,
        config,
        global_batch_size=global_batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def _open_source(name: str, part, cache: Path, seed: int, progress: Tell) -> tuple[WindowSource, Path | None]:
    if isinstance(part, TextSource):
        train, validation = prepare_text(part, cache, progress)
        return ResidentSource(name, train, seed), validation
    if isinstance(part, ShardsSource):
        validation = Path(part.validation).expanduser() if part.validation else None
        return ResidentSource(name, Path(part.path).expanduser(), seed), validation
    raise NotImplementedError(part.kind)


def _same_tokenizer(sources: list[WindowSource]) -> None:
    first = sources[0]
    for other in sources[1:]:
        if other.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
            raise DataError(
                "TOKENIZER-DATA",
                f"{other.name} was tokenised with {other.manifest.tokenizer.name} ({other.manifest.tokenizer.sha256[:12]}…),"
                f" {first.name} with {first.manifest.tokenizer.name} ({first.manifest.tokenizer.sha256[:12]}…);"
                " expected one tokenizer: prepare both with the same tokenizer.json",
            )
