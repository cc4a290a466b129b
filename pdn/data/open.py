"""From a config to open training data."""

from __future__ import annotations

from pathlib import Path

from pdn.data import holdout
from pdn.data.config import (
    NO_VALIDATION,
    DataConfig,
    MixtureConfig,
    MqarConfig,
    NamedValidation,
    ShardsSource,
    TextSource,
)
from pdn.data.documents import discover
from pdn.data.loader import TrainingData
from pdn.data.mqar import MqarData
from pdn.data.order import Schedule
from pdn.data.phases import part_of
from pdn.data.remote import brought, copied, is_remote
from pdn.data.shards import MANIFEST, TOKENIZER
from pdn.data.sources import ResidentSource, ValidationSet, WindowSource
from pdn.data.stream import StreamingSource
from pdn.data.text import BY_HASH, prepare_text, prepare_validation, tokenizer_of
from pdn.data.verify import Verification, check_tokenizer
from pdn.errors import DataError
from pdn.wording import Tell, counted, silent


def build(
    config: DataConfig,
    *,
    global_batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    progress: Tell | None,
    recorded: dict[str, object] | None = None,
) -> TrainingData | MqarData:
    """Open the data of a run; see `pdn.data.open_data` for the arguments."""
    if isinstance(config, MqarConfig):
        return MqarData(
            config, global_batch_size=global_batch_size, seed=seed, rank=rank, world_size=world_size
        )
    cache, tell = Path(config.cache_dir).expanduser(), progress or silent
    mixture = config if isinstance(config, MixtureConfig) else None
    parts = {"data": config} if mixture is None else mixture.sources
    sources: list[WindowSource] = []
    validations: dict[str, Path] = {}
    try:
        for name, part in parts.items():
            source, validation = _open_source(name, part, config, cache, seed, tell, recorded)
            sources.append(source)
            if validation is not None:
                validations[name] = validation
        _check_sources(sources, config.seq_len, world_size)
        weights = {name: part.weight for name, part in mixture.sources.items()} if mixture else {}
        schedule = Schedule(weights or {"data": 1.0})
        held_out = ValidationSet(list(validations.values())) if validations else None
        own = {name: ValidationSet([path]) for name, path in validations.items()}
        more = _named_sets(config.validation_sets or {}, sources[0], cache, tell)
        for sets in (own, more):
            _check_size(sets, config.seq_len, recorded is not None, tell)
        named = (own if len(own) > 1 else {}) | more
        every = [*([held_out] if held_out else []), *named.values()]
        _check_validation(sources[0], every)
        checks = Verification(sources, every, cache, tell)
        return TrainingData(
            sources,
            schedule,
            held_out,
            named,
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


def _open_source(
    name: str,
    part,
    config,
    cache: Path,
    seed: int,
    tell: Tell,
    recorded: dict[str, object] | None,
) -> tuple[WindowSource, Path | None]:
    if not part_of(recorded or {}, name):
        recorded = None  # a source that is new in a branch
    part = brought(part, cache, tell)
    if isinstance(part, TextSource):
        text = prepare_text(
            part,
            cache,
            tell,
            seq_len=config.seq_len,
            rule=None if recorded is None else str(recorded.get(f"{name}.split", BY_HASH)),
        )
        return ResidentSource(name, text.train, seed, text.split, text.files), text.validation
    if isinstance(part, ShardsSource):
        held = None if part.validation == NO_VALIDATION else part.validation
        validation = None if held is None else Path(held).expanduser()
        return ResidentSource(name, Path(part.path).expanduser(), seed), validation
    before = None
    if recorded is not None:
        split = recorded.get(f"{name}.split")
        source, revision = (str(recorded.get(f"{name}.{key}")) for key in ("source", "revision"))
        before = (source, revision, None if split is None else str(split))
    stream = StreamingSource(
        name,
        part,
        cache,
        seed,
        config.timeout_seconds,
        tell,
        config.seq_len,
        before,
    )
    return stream, stream.validation


def _check_size(sets: dict[str, ValidationSet], seq_len: int, begun: bool, tell: Tell) -> None:
    """Refuse to train blindly with an empty validation set, and say when one is small.

    begun: the run has trained with these sets already; it may go on.
    """
    for name, held in sets.items():
        windows = len(held.places(seq_len, None, spread=False))
        if windows == 0 and not begun:
            raise DataError(
                "VALIDATION-EMPTY",
                f"{name}: {held.directories[0]}: the validation set holds no tokens; expected "
                "some, or the run would go on blindly: give data.validation, or say that there is "
                "to be none with data.validation=none",
            )
        if windows < holdout.WINDOWS:
            tell(
                f"{name}: the validation set has only {counted(windows, 'sample')} of {seq_len} "
                f"tokens, fewer than {holdout.WINDOWS}: its loss will be noisy"
            )


def _named_sets(
    config: dict[str, NamedValidation], first: WindowSource, cache: Path, tell: Tell
) -> dict[str, ValidationSet]:
    """Open `validation_sets`; what is not yet shards is tokenised as `first` was."""
    found = {}
    for name, part in config.items():
        if is_remote(part.path):
            path = copied(part.path, cache, tell)
        else:
            path = Path(part.path).expanduser()
        splits = [split for split in ("validation", "train") if (path / split / MANIFEST).exists()]
        if not path.exists() or (splits and not (path / MANIFEST).exists()):
            seen = f"holds {' and '.join(splits)}" if splits else "no such file or directory"
            raise DataError(
                "VALIDATION-SET",
                f"data.validation_sets.{name}: {path}: {seen}; expected shards of one split (with "
                f"{MANIFEST}), or text; give {path / splits[0] if splits else 'another path'}",
            )
        if not (path / MANIFEST).exists():
            check_tokenizer(first.directory, first.manifest)
            path = prepare_validation(
                discover(str(path), part.text_field), tokenizer_of(first.directory), cache, tell
            )
        found[name] = ValidationSet([path])
        if not found[name].manifests[0].tokens:
            raise DataError(
                "DATA-EMPTY",
                f"data.validation_sets.{name}: {part.path}: holds no tokens; expected text; check "
                "the path",
            )
    return found


def _check_validation(first: WindowSource, validation: list[ValidationSet]) -> None:
    for directory, manifest in (
        (d, m) for v in validation for d, m in zip(v.directories, v.manifests)
    ):
        if (
            manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256
            or manifest.eos_id != first.manifest.eos_id
        ):
            raise DataError(
                "TOKENIZER-DATA",
                f"{directory}: the validation set was tokenised with {manifest.tokenizer.name} "
                f"({manifest.tokenizer.sha256[:12]}…, EOS {manifest.eos_id}), the training data "
                f"with {first.manifest.tokenizer.name} ({first.manifest.tokenizer.sha256[:12]}…, "
                f"EOS {first.manifest.eos_id}); expected one tokenizer: prepare it with "
                f"--tokenizer {first.directory / TOKENIZER}, or give its text as "
                "data.validation_sets.<name>.path",
            )


def _check_sources(sources: list[WindowSource], seq_len: int, world_size: int) -> None:
    first = sources[0]
    for source in sources:
        if source.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
            raise DataError(
                "TOKENIZER-DATA",
                f"{source.name} was tokenised with {source.manifest.tokenizer.name} "
                f"({source.manifest.tokenizer.sha256[:12]}…), {first.name} with "
                f"{first.manifest.tokenizer.name} ({first.manifest.tokenizer.sha256[:12]}…); "
                "expected one tokenizer: prepare both with the same tokenizer.json",
            )
        samples = source.count(seq_len)
        if samples == 0 and not source.manifest.tokens:
            raise DataError(
                "DATA-EMPTY",
                f"{source.directory}: no tokens are left to train on; expected documents that are "
                "not in the validation set as well: give another data.validation, or another path",
            )
        if samples == 0:
            raise DataError(
                "DATA-SHORT",
                f"{source.directory}: {source.manifest.tokens} tokens, shorter than one sample of "
                f"{seq_len} + 1; reduce data.seq_len or give more text",
            )
        if samples is not None and samples < world_size:
            raise DataError(
                "DATA-SHORT",
                f"{source.directory}: {counted(samples, 'sample')} of {seq_len} tokens, fewer "
                f"than the {counted(world_size, 'rank')}; use fewer ranks, reduce data.seq_len, "
                "or give more text",
            )
