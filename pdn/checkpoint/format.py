"""What a checkpoint is on disk, and when it may be believed.

Nothing in it is ever unpickled without restriction.

::

    checkpoints/step-00000100/
        __0_0.distcp …   the values of tensors, as bytes: see pdn.checkpoint.shards
        index.json       for each tensor its chunks: [offsets, sizes, file, position, length]
        rng-0.pt …       generator states of each rank
        side.json        what else the trainer keeps: counters, schedule, hyperparameters
        manifest.json    format, step, world size, SHA-256 and size of each file above,
                         dtype and shape of each tensor
        COMMITTED        SHA-256 of manifest.json

It is written as ``step-00000100.<launch>.tmp``, synced to disk, and renamed. Torch's own
``.metadata`` is a pickle and executes code when a stranger's checkpoint is opened; ``index.json``
holds the same and replaces it.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from pdn.errors import ConfigError, PdnError, StorageError
from pdn.store.local import storage_error, storage_errors, sync_directory

FORMAT = 2  # 1: a torch.save archive for each chunk of a tensor
STEP_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,11})")
LEFTOVER_NAME = re.compile(r"(step-[0-9]{8,12})(\.old|\.[0-9a-f]{8})?\.tmp")
FILE_NAME = re.compile(r"__[0-9]{1,6}_[0-9]{1,6}\.distcp|rng-[0-9]{1,6}\.pt|index\.json|side\.json")
_SHARD_NAME = re.compile(r"__[0-9]{1,6}_[0-9]{1,6}\.distcp")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASHING_THREADS = 4
_MAX_JSON_BYTES = 256 << 20
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
    )
    + (torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
}


# Weights, the optimiser's state, the weights' average, and states of recurrences that are carried
KINDS = ("model.", "optim.", "ema.", "carried.")


@dataclass
class Manifest:
    """Holds the content of ``manifest.json``.

    Attributes:
        step: optimizer steps completed; also the directory's name.
        world_size: ranks that saved it.
        files: name → ``{"sha256": …, "bytes": …}``.
        tensors: name → ``[dtype, shape]``; names begin with one of ``KINDS``.
        torch: version that wrote it, for information.
        format: layout version; a newer one is refused.
    """

    step: int
    world_size: int
    files: dict[str, dict]
    tensors: dict[str, list]
    torch: str
    format: int = FORMAT

    @property
    def has_optimizer(self) -> bool:
        return any(name.startswith("optim.") for name in self.tensors)


def step_directory(directory: Path, step: int) -> Path:
    """Return the path of the checkpoint of ``step`` in ``directory``."""
    return directory / f"step-{step:08d}"


def committed_steps(directory: Path) -> list[int]:
    """Return the steps with a committed checkpoint in ``directory``, ascending.

    ``step-00000100-backup`` and ``….tmp`` are none.
    """
    with storage_errors(directory):
        if not directory.is_dir():
            return []
        found = (
            STEP_NAME.fullmatch(entry.name)
            for entry in directory.iterdir()
            if (entry / "COMMITTED").is_file()
        )
        return sorted(int(match[1]) for match in found if match)


def write_commit(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` and ``COMMITTED`` into a complete draft and sync its directory."""
    data = json.dumps(asdict(manifest), sort_keys=True).encode()
    write_synced(directory / "manifest.json", data)
    write_synced(directory / "COMMITTED", _marker(data))
    sync_directory(directory)


def lacks_only_its_name(draft: Path) -> bool:
    """Return whether a draft is complete: its marker, which is written last, is all there."""
    marker, manifest = draft / "COMMITTED", draft / "manifest.json"
    return (
        marker.is_file()
        and manifest.is_file()
        and marker.read_bytes() == _marker(manifest.read_bytes())
    )


def _marker(manifest: bytes) -> bytes:
    return hashlib.sha256(manifest).hexdigest().encode() + b"\n"


def write_synced(file: Path, data: bytes) -> None:
    """Write a new file and fsync it; atomicity comes from renaming the directory around it."""
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def file_record(file: Path) -> dict:
    """Return ``{"sha256": …, "bytes": …}`` of a file, read in pieces of 4 MiB."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(4 << 20))  # one a file: several threads read at a time
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return {"sha256": digest.hexdigest(), "bytes": size}


def read_manifest(path: Path) -> Manifest:
    """Read and check ``COMMITTED`` and ``manifest.json`` of one checkpoint.

    Raises:
        ConfigError: ``path`` is no checkpoint of this format: absent, uncommitted, misnamed,
            foreign, or newer.
        StorageError: it is one, and damaged.
    """
    label = path.name
    if not path.is_dir():
        found = "a file" if path.exists() else "no such directory"
        raise ConfigError(
            "CKPT-ABSENT",
            f"{path}: {found}; expected a run, or one of its checkpoints; check the path",
        )
    if not (path / "COMMITTED").exists():
        raise _not_a_checkpoint(path)
    marker = _read_regular(path, "COMMITTED").decode(errors="replace")
    data = _read_regular(path, "manifest.json")
    found = hashlib.sha256(data).hexdigest()
    if f"{found}\n" != marker:
        raise StorageError(
            "CKPT-HASH", f"{label}/manifest.json: sha256 {found[:12]}… expected {marker[:12]}…"
        )
    manifest = _parse_manifest(label, data)
    # A checkpoint may be a link to another directory: where both names tell a step, they agree.
    for name in dict.fromkeys((path.name, path.resolve().name)):
        match = STEP_NAME.fullmatch(name)
        if match and int(match[1]) != manifest.step:
            raise StorageError(
                "CKPT-MANIFEST",
                f"{label}/manifest.json: is of step {manifest.step}, expected {int(match[1])}",
            )
    return manifest


def _not_a_checkpoint(path: Path) -> PdnError:
    names = {entry.name for entry in path.iterdir()}
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        return ConfigError(
            "CKPT-FOREIGN",
            f"{path}: holds Hugging Face weights, expected a checkpoint of this project; with "
            "their config.json beside them init_from= reads them",
        )
    if "manifest.json" in names or any(_SHARD_NAME.fullmatch(name) for name in names):
        return ConfigError(
            "CKPT-UNCOMMITTED",
            f"{path}: has no COMMITTED marker, its save never finished; use another step",
        )
    if "checkpoints" in names:
        return ConfigError(
            "CKPT-ABSENT",
            f"{path}: found a run without a finished checkpoint; expected one: train it to its "
            "first save",
        )
    found = ", ".join(sorted(names)[:5]) or "nothing"
    return ConfigError(
        "CKPT-FOREIGN",
        f"{path}: found {found}; expected manifest.json and COMMITTED, or a run with checkpoints; "
        "check the path",
    )


def _read_regular(path: Path, name: str) -> bytes:
    """Return the content of a plain file of the checkpoint.

    Links are refused, since they may lead anywhere.
    """
    file = path / name
    try:
        info = os.lstat(file)
        if not stat.S_ISREG(info.st_mode):
            raise StorageError(
                "CKPT-PATH",
                f"{path.name}/{name}: is not a regular file; links out of a checkpoint are refused",
            )
        if info.st_size > _MAX_JSON_BYTES:
            raise StorageError(
                "CKPT-SIZE",
                f"{path.name}/{name}: {info.st_size} bytes, expected at most {_MAX_JSON_BYTES}",
            )
        return file.read_bytes()
    except FileNotFoundError:
        raise StorageError(
            "CKPT-MISSING", f"{path.name}/{name}: missing, expected in every checkpoint"
        ) from None
    except OSError as error:
        raise storage_error(error, file) from error


def _parse_manifest(label: str, data: bytes) -> Manifest:
    where = f"{label}/manifest.json"
    try:
        raw = json.loads(data)
        newer = raw["format"] > FORMAT
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(
            "CKPT-MANIFEST",
            f"{where}: {type(error).__name__}: {error}, expected JSON with a format",
        ) from None
    if newer:
        raise ConfigError(
            "CKPT-FORMAT",
            f"{where}: format {raw['format']}, expected at most {FORMAT}; update pdn to read it",
        )
    if not isinstance(raw, dict) or raw.keys() != Manifest.__dataclass_fields__.keys():
        raise StorageError(
            "CKPT-MANIFEST",
            f"{where}: keys {sorted(raw)[:8]}, expected {sorted(Manifest.__dataclass_fields__)}",
        )
    manifest = Manifest(**raw)
    for name, count in (
        ("format", manifest.format),
        ("step", manifest.step),
        ("world_size", manifest.world_size),
    ):
        if not _is_count(count) or (count == 0 and name != "step"):
            raise StorageError(
                "CKPT-MANIFEST", f"{where}: {name} is {count!r}, expected a positive integer"
            )
    for name, value in (("files", manifest.files), ("tensors", manifest.tensors)):
        if not isinstance(value, dict) or not value:
            raise StorageError(
                "CKPT-MANIFEST", f"{where}: {name} is {str(value)[:40]!r}, expected a table"
            )
    _check_files(where, manifest.files)
    _check_tensors(where, manifest.tensors)
    return manifest


def _check_files(where: str, files: dict[str, dict]) -> None:
    """Refuse names that lead elsewhere, and records without a hash and a size."""
    for name, record in files.items():
        if not FILE_NAME.fullmatch(name):
            raise StorageError(
                "CKPT-PATH", f"{where}: file {name[:80]!r}, expected a plain checkpoint file name"
            )
        if (
            not isinstance(record, dict)
            or record.keys() != {"sha256", "bytes"}
            or not isinstance(record["sha256"], str)
            or not _SHA256.fullmatch(record["sha256"])
            or not _is_count(record["bytes"])
        ):
            raise StorageError(
                "CKPT-MANIFEST", f"{where}: {name}: {str(record)[:80]!r}, expected sha256 and bytes"
            )
    for required in ("index.json", "side.json"):
        if required not in files:
            raise StorageError("CKPT-MANIFEST", f"{where}: does not list {required}")


def _check_tensors(where: str, tensors: dict[str, list]) -> None:
    """Refuse tensors without a known dtype and a shape, or of no known kind."""
    for name, entry in tensors.items():
        if (
            not isinstance(entry, list)
            or len(entry) != 2
            or not isinstance(entry[0], str)
            or entry[0] not in _DTYPES
            or not _is_shape(entry[1])
            or not name.startswith(KINDS)
        ):
            raise StorageError(
                "CKPT-MANIFEST",
                f"{where}: tensor {name[:80]!r}: {str(entry)[:80]}, expected [dtype, shape]",
            )


def _chunk_bytes(sizes: list[int], dtype: str) -> int:
    return math.prod(sizes) * _DTYPES[dtype].itemsize


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, list) and len(value) <= 16 and all(_is_count(length) for length in value)
    )


def check_files(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare the named files with the manifest: kind, size, then SHA-256.

    Args:
        path: of the checkpoint.
        manifest: read from it.
        names: of files in the manifest.

    Raises:
        StorageError: the first difference, as ``step-…/file: found … expected …``.
    """
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        for _ in pool.map(lambda name: _check_file(path, name, manifest.files[name]), names):
            pass


def _check_file(path: Path, name: str, expected: dict) -> None:
    where = f"{path.name}/{name}"
    try:
        info = os.lstat(path / name)
        if not stat.S_ISREG(info.st_mode):
            raise StorageError(
                "CKPT-PATH",
                f"{where}: is not a regular file; links out of a checkpoint are refused",
            )
        if info.st_size != expected["bytes"]:
            raise StorageError(
                "CKPT-SIZE", f"{where}: {info.st_size} bytes expected {expected['bytes']}"
            )
        found = file_record(path / name)["sha256"]
    except FileNotFoundError:
        raise StorageError(
            "CKPT-MISSING", f"{where}: missing, expected {expected['bytes']} bytes"
        ) from None
    except OSError as error:
        raise storage_error(error, path / name) from error
    if found != expected["sha256"]:
        raise StorageError(
            "CKPT-HASH", f"{where}: sha256 {found[:12]}… expected {expected['sha256'][:12]}…"
        )


def verify(path: Path, *, rank: int = 0, world_size: int = 1) -> Manifest:
    """Check a checkpoint against its manifest, byte by byte.

    Args:
        path: of the checkpoint.
        rank: of several that each hash a share of the files.
        world_size: how many those are.

    Returns:
        The manifest, once everything this rank looked at agrees with it.

    Raises:
        ConfigError: ``path`` is no committed checkpoint of this format.
        StorageError: it is damaged; the message names the file, what was found and what was
            expected.
    """
    manifest = read_manifest(path)
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name]["bytes"], name))
    check_files(path, manifest, by_size[rank::world_size])
    read_index(path, manifest)
    return manifest


def read_side(path: Path) -> dict:
    """Return the content of ``side.json`` of a verified checkpoint: side and hyperparameters."""
    try:
        content = json.loads(_read_regular(path, "side.json"))
    except (ValueError, RecursionError) as error:
        raise StorageError("CKPT-SIDE", f"{path.name}/side.json: {error}, expected JSON") from None
    if not isinstance(content, dict) or content.keys() != {"side", "hyperparameters"}:
        raise StorageError(
            "CKPT-SIDE", f"{path.name}/side.json: expected an object of side and hyperparameters"
        )
    return content


def _lies_within(manifest: Manifest, name: str, offsets, sizes, file, position, length) -> bool:
    """Return whether a chunk is a part of its tensor, and of its file as the manifest knows it."""
    dtype, shape = manifest.tensors[name]
    if not (_is_shape(offsets) and _is_shape(sizes)):
        return False
    if not (len(offsets) == len(sizes) == len(shape)):
        return False
    ends = (offset + size for offset, size in zip(offsets, sizes, strict=True))
    if any(end > full for end, full in zip(ends, shape, strict=True)):
        return False
    if not (_is_count(position) and _is_count(length) and _SHARD_NAME.fullmatch(file)):
        return False
    if file not in manifest.files or position + length > manifest.files[file]["bytes"]:
        return False
    return manifest.format == 1 or length == _chunk_bytes(sizes, dtype)


def read_index(path: Path, manifest: Manifest) -> Metadata:
    """Return torch's own description of where each tensor lies, rebuilt from ``index.json``.

    It has tensors only, in files of the manifest only.

    Raises:
        StorageError: an entry is malformed, unknown to the manifest, or points outside its file.
    """
    where = f"{path.name}/index.json"
    try:
        index = json.loads(_read_regular(path, "index.json"))
        if index.keys() != manifest.tensors.keys():
            raise StorageError("CKPT-INDEX", f"{where}: lists other tensors than manifest.json")
        tensors, places = {}, {}
        for name, chunks in index.items():
            dtype, shape = manifest.tensors[name]
            tensors[name] = TensorStorageMetadata(
                TensorProperties(dtype=_DTYPES[dtype]), torch.Size(shape), []
            )
            for offsets, sizes, file, position, length in chunks:
                if not _lies_within(manifest, name, offsets, sizes, file, position, length):
                    raise StorageError(
                        "CKPT-INDEX",
                        f"{where}: {name}: chunk in {file!r} is not of its size, or lies outside "
                        "the checkpoint's shards",
                    )
                tensors[name].chunks.append(
                    ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                )
                places[MetadataIndex(name, torch.Size(offsets))] = _StorageInfo(
                    file, position, length
                )
            # A gap would leave that part of the tensor as it was initialised, without a word.
            if sum(math.prod(chunk.sizes) for chunk in tensors[name].chunks) != math.prod(shape):
                raise StorageError(
                    "CKPT-INDEX", f"{where}: {name}: its chunks do not cover shape {shape}"
                )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError("CKPT-INDEX", f"{where}: {type(error).__name__}: {error}") from None
    return Metadata(state_dict_metadata=tensors, storage_data=places)
