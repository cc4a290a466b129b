"""The tensors of a checkpoint as bytes in a few files, written by several threads.

A shard is the values of its chunks one after the other, in the machine's byte order (little-endian
everywhere this runs); ``index.json`` tells where each lies. Checkpoints of format 1 have a
``torch.save`` archive in place of each chunk, and are still read.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pdn.checkpoint.format import Manifest, read_index, write_synced
from pdn.distributed.peers import is_broken_exchange
from pdn.errors import PdnError, StorageError
from pdn.store.direct import HashedFile

# torch says so of every single process that saves or reads a checkpoint; that is what is meant
warnings.filterwarnings(
    "ignore", message=r".*assuming the intent is to (save|load) in a single process"
)

READ_BYTES = 4 << 20  # at a time
MIN_FILE_BYTES = 64 << 20  # what a rank writes is cut into files no smaller than this
MAX_THREADS = 8


def default_threads() -> int:
    """Return the threads that a rank writes with: its share of the cores, but 4 to 8.

    Four, since some hash while the others wait for the disk.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(share, 4), MAX_THREADS)


def as_bytes(tensor: Tensor) -> np.ndarray:
    """Return the values of a contiguous tensor of the CPU as bytes [N], without copying them."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def nonfinite(tensors: dict[str, Tensor], threads: int) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity; None if none does.

    Args:
        tensors: on the CPU, of any dtype.
        threads: that look at them.
    """
    named = [(name, t) for name, t in tensors.items() if t.is_floating_point() and t.numel()]
    with ThreadPoolExecutor(threads) as pool:
        finite = pool.map(lambda entry: _is_finite(entry[1]), named)
        return next((name for (name, _), fine in zip(named, finite, strict=True) if not fine), None)


def _is_finite(tensor: Tensor) -> bool:
    # One pass without a temporary: a NaN is the extreme of what holds one.
    lowest, highest = torch.aminmax(tensor)
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


class ShardWriter(FileSystemWriter):
    """Writes the chunks that torch planned for a rank, each file by a thread that hashes it too.

    Args:
        path: of the draft.
        threads: that write at the same time.

    Attributes:
        records: ``{"sha256": …, "bytes": …}`` of every file that was written, by its name.
    """

    def __init__(self, path: Path, threads: int):
        super().__init__(path)
        self.threads = threads
        self.records: dict[str, dict] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        shares = _share_out(plan.items, self.threads)
        names = [f"{plan.storage_data.prefix}{number}.distcp" for number in range(len(shares))]
        with ThreadPoolExecutor(self.threads) as pool:
            written = pool.map(lambda name, items: self._write(planner, name, items), names, shares)
            results = [result for of_file in written for result in of_file]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, planner: SavePlanner, name: str, items: list[WriteItem]) -> list[WriteResult]:
        results = []
        with HashedFile(Path(self.path) / name) as file:
            for item in items:
                values = planner.resolve_data(item)
                assert isinstance(values, Tensor)  # nothing else is saved
                data = as_bytes(values)
                place = _StorageInfo(name, file.position, len(data))
                results.append(WriteResult(item.index, len(data), place))
                file.write(data)
            self.records[name] = file.finish()
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for of_rank in results for result in of_rank}
        index = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)  # nothing else is saved
            index[name] = []
            for chunk in tensor.chunks:
                place = places[MetadataIndex(name, chunk.offsets)]
                index[name].append(
                    [
                        list(chunk.offsets),
                        list(chunk.sizes),
                        place.relative_path,
                        place.offset,
                        place.length,
                    ]
                )
        write_synced(Path(self.path) / "index.json", json.dumps(index).encode())


def _share_out(items: Iterable[WriteItem], most: int) -> list[list[WriteItem]]:
    """Cut chunks into files of about the same size, the same ones on every machine.

    Returns:
        At most ``most`` lists, each in the order of ``items``; none if there are no chunks.
    """
    items = list(items)
    sizes = [_chunk_bytes(item) for item in items]
    count = max(1, min(most, sum(sizes) // MIN_FILE_BYTES))
    loads, owners = [0] * count, [0] * len(items)
    for place in sorted(range(len(items)), key=lambda place: -sizes[place]):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += sizes[place]
    shares = [
        [item for item, owner in zip(items, owners, strict=True) if owner == number]
        for number in range(count)
    ]
    return [share for share in shares if share]


def _chunk_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None  # tensors only
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


class ShardReader(FileSystemReader):
    """Reads the chunks of a checkpoint, told by ``read_index`` where they lie.

    Byte entries, which torch would unpickle, cannot occur: the index knows tensors only, and the
    archives of format 1 are read with ``weights_only=True``.
    """

    def __init__(self, path: Path, manifest: Manifest):
        super().__init__(path)
        self._metadata = read_index(path, manifest)
        self._raw = manifest.format > 1

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if not self._raw:
            return super().read_data(plan, planner)
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with open(Path(self.path) / name, "rb", buffering=0) as stream:
                for item in items:
                    self._read(stream.fileno(), item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, fd: int, item: ReadItem, planner: LoadPlanner) -> None:
        index, place = item.storage_index, self.storage_data[item.storage_index]
        tensor = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(tensor, TensorStorageMetadata)
        [shape] = [chunk.sizes for chunk in tensor.chunks if chunk.offsets == index.offset]
        dtype, target = tensor.properties.dtype, planner.resolve_tensor(item).detach()
        plain = target.device.type == "cpu" and target.is_contiguous() and target.dtype == dtype
        if plain and target.shape == shape == item.lengths:
            _read_all(fd, as_bytes(target).data, place.offset)
        else:
            stored = torch.empty(shape, dtype=dtype)
            _read_all(fd, as_bytes(stored).data, place.offset)
            for dim, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                stored = stored.narrow(dim, start, length)
            target.copy_(stored)
        planner.commit_tensor(item, target)


def _read_all(fd: int, target: memoryview, position: int) -> None:
    while target:
        got = os.preadv(fd, [target[:READ_BYTES]], position)
        if not got:
            raise EOFError(f"ends at byte {position}, expected {len(target)} more")
        target, position = target[got:], position + got


class SnapshotPlanner(DefaultSavePlanner):
    """Plans from the live tensors' shapes and placements, writes the values of the snapshot."""

    def __init__(self, snapshot: dict[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._values = snapshot

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._values[index.fqn]


def read_tensors(
    tensors: dict[str, Tensor],
    path: Path,
    manifest: Manifest,
    group: dist.ProcessGroup | None,
) -> None:
    """Fill ``tensors`` in place, each rank its own part.

    Args:
        tensors: by their names in the checkpoint.
        path: of the checkpoint.
        manifest: read from it, and verified.
        group: that reads together; None: this process alone.
    """
    try:
        dcp.load(  # pyright: ignore[reportPrivateImportUsage]  (documented under this name)
            tensors,
            storage_reader=ShardReader(path, manifest),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )
    except PdnError:
        raise
    except (Exception, CheckpointException) as error:
        if is_broken_exchange(error):
            raise
        # Verified bytes that torch still refuses: a forged checkpoint, or one of an incompatible
        # torch.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise StorageError(
            "CKPT-READ", f"{path}: {reason}; resume from another step: resume=step:N"
        ) from error
