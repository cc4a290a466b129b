"""From a config to open training data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data.config import DataConfig, MixtureConfig, MqarConfig, ShardsSource, TextSource
from data.errors import DataError
from data.loader import TrainingData
from data.mqar import MqarData
from data.order import Schedule
from data.sources import ResidentSource, ValidationSet, WindowSource
from data.stream import StreamingSource
from data.text import prepare_text
from data.verify import Verification

Tell = Callable[[str], None] | None


def build(
    config: DataConfig, *, global_batch_size: int, seed: int, rank: int, world_size: int, progress: Tell
) -> TrainingData | MqarData:
    """See `data.open_data`."""
    if isinstance(config, MqarConfig):
        return MqarData(config, global_batch_size=global_batch_size, seed=seed, rank=rank, world_size=world_size)
    cache = Path(config.cache_dir).expanduser()
    mixture = isinstance(config, MixtureConfig)
    parts = config.sources if mixture else {"data": config}
    sources: list[WindowSource] = []
    validations: list[Path] = []
    try:
        for name, part in parts.items():
            source, validation = _open_source(name, part, cache, seed, config.timeout_seconds, progress)
            sources.append(source)
            if validation is not None:
                validations.append(validation)
        _check_sources(sources, config.seq_len, world_size)
        schedule = Schedule({name: part.weight if mixture else 1.0 for name, part in parts.items()})
        held_out = ValidationSet(validations) if validations else None
        checks = Verification(sources, held_out, cache, progress)
        return TrainingData(
            sources,
            schedule,
            held_out,
            config,
            global_batch_size=global_batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            checks=checks,
        )
    except BaseException:
        for source in sources:
            source.close()
        raise


def _open_source(name: str, part, cache: Path, seed: int, timeout: float, progress: Tell) -> tuple[WindowSource, Path | None]:
    if isinstance(part, TextSource):
        train, validation = prepare_text(part, cache, progress)
        return ResidentSource(name, train, seed), validation
    if isinstance(part, ShardsSource):
        validation = Path(part.validation).expanduser() if part.validation else None
        return ResidentSource(name, Path(part.path).expanduser(), seed), validation
    stream = StreamingSource(name, part, cache, seed, timeout, progress or (lambda line: None))
    return stream, stream.validation


def _check_sources(sources: list[WindowSource], seq_len: int, world_size: int) -> None:
    first = sources[0]
    for source in sources:
        if source.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
            raise DataError(
                "TOKENIZER-DATA",
                f"{source.name} was tokenised with {source.manifest.tokenizer.name} ({source.manifest.tokenizer.sha256[:12]}…),"
                f" {first.name} with {first.manifest.tokenizer.name} ({first.manifest.tokenizer.sha256[:12]}…);"
                " expected one tokenizer: prepare both with the same tokenizer.json",
            )
        samples = source.count(seq_len)
        if samples == 0:
            raise DataError(
                "DATA-SHORT",
                f"{source.directory}: {source.manifest.tokens} tokens, shorter than one sample of {seq_len} + 1;"
                " reduce data.seq_len or give more text",
            )
        if samples is not None and samples < world_size:
            raise DataError(
                "DATA-SHORT",
                f"{source.directory}: {samples} samples of {seq_len} tokens, fewer than the {world_size} ranks;"
                " use fewer ranks, reduce data.seq_len, or give more text",
            )
