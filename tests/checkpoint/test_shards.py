"""Shards: raw bytes in several files, the archives of format 1, and memory made in advance."""

import io
import json
from pathlib import Path

import pytest
import torch

from pdn.checkpoint import shards
from pdn.checkpoint.format import file_record, read_manifest, step_directory, verify
from pdn.checkpoint.memory import HostMemory
from pdn.checkpoint.read import read_checkpoint
from pdn.errors import PdnError, StorageError
from tests.checkpoint.small import (
    all_tensors,
    assert_same,
    build,
    checkpointer,
    resign,
    saved,
    train,
)
from tests.checkpoint.test_damage import FORGERIES

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def as_format_1(path: Path) -> None:
    """Rewrite a checkpoint as it was before shards were raw: a torch.save archive for a chunk."""
    manifest, index = read_manifest(path), json.loads((path / "index.json").read_bytes())
    tensors = {name: read_checkpoint_tensor(path, name) for name in index}
    shard = io.BytesIO()
    for name, [chunk] in index.items():
        start = shard.tell()
        torch.save(tensors[name], shard)
        chunk[3:] = [start, shard.tell() - start]
    (path / "__0_0.distcp").write_bytes(shard.getvalue())
    (path / "index.json").write_text(json.dumps(index))
    files = {name: file_record(path / name) for name in manifest.files}
    resign(path, {"format": 1, "files": files})


def read_checkpoint_tensor(path: Path, full: str) -> torch.Tensor:
    reader = read_checkpoint(path)
    kind, _, name = full.partition(".")
    if kind == "model":
        return reader[name]
    parameter, _, key = name.rpartition(".")
    return reader.moments(parameter)[key]


def test_a_checkpoint_of_format_1_is_restored_bit_by_bit_and_the_next_save_is_raw(tmp_path):
    *_, states = saved(tmp_path, (3,))
    as_format_1(step_directory(tmp_path, 3))
    model, optimizer = build(seed=1)
    saver = checkpointer(tmp_path)
    assert saver.restore(model, optimizer)[0] == 3
    assert_same(all_tensors(model, optimizer), states[3])
    saver.save(4, model, optimizer, {})
    assert verify(step_directory(tmp_path, 4)).format == 2
    fresh, fresh_optimizer = build(seed=2)
    checkpointer(tmp_path).restore(fresh, fresh_optimizer)
    assert_same(all_tensors(fresh, fresh_optimizer), states[3])


@pytest.mark.parametrize("name", [name for name in FORGERIES if name.startswith("shard")])
def test_no_payload_in_an_archive_of_format_1_runs(tmp_path, name):
    saved(tmp_path / "run", (1,))
    path, sentinel = step_directory(tmp_path / "run", 1), tmp_path / "sentinel"
    as_format_1(path)
    FORGERIES[name](path, sentinel)
    with pytest.raises(PdnError, match="E-CKPT-READ"):
        checkpointer(tmp_path / "run").restore(*build())
    assert not sentinel.exists()


def test_what_a_rank_writes_is_cut_into_files_and_their_hashes_are_those_of_what_they_hold(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "MIN_FILE_BYTES", 1000)
    monkeypatch.setattr(shards, "default_threads", lambda: 3)
    *_, states = saved(tmp_path, (2,))
    path = step_directory(tmp_path, 2)
    names = [f"__0_{number}.distcp" for number in range(3)]
    assert sorted(file.name for file in path.glob("*.distcp")) == names
    sizes = [(path / name).stat().st_size for name in names]
    assert max(sizes) < 1.5 * min(sizes)
    manifest = verify(path)  # every hash, of bytes read again
    assert [manifest.files[name]["bytes"] for name in names] == sizes
    model, optimizer = build(seed=1)
    checkpointer(tmp_path).restore(model, optimizer)
    assert_same(all_tensors(model, optimizer), states[2])


def test_a_chunk_whose_length_is_not_that_of_its_shape_is_refused(tmp_path):
    saved(tmp_path, (1,))
    path = step_directory(tmp_path, 1)
    index = json.loads((path / "index.json").read_bytes())
    index["model.embed.weight"][0][4] -= 4
    (path / "index.json").write_text(json.dumps(index))
    files = read_manifest(path).files | {"index.json": file_record(path / "index.json")}
    resign(path, {"files": files})
    with pytest.raises(StorageError, match="E-CKPT-INDEX"):
        verify(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(value):
    tensors = {f"t{number}": torch.randn(7, 11) for number in range(4)}
    tensors |= {"count": torch.arange(3), "empty": torch.empty(0), "half": torch.ones(5).bfloat16()}
    assert shards.nonfinite(tensors, 2) is None
    for name in ("t2", "half"):
        damaged = tensors | {name: tensors[name].clone()}
        damaged[name].view(-1)[3] = value
        assert shards.nonfinite(damaged, 2) == name


def test_memory_reserved_before_the_first_step_is_what_the_first_save_copies_into(tmp_path):
    model, optimizer = build()
    saver = checkpointer(tmp_path, asynchronous=True)
    moments = [4 * p.numel() for p in model.parameters() for _ in range(2)]
    saver.reserve(model, moments + [4] * len(list(model.parameters())))
    [slab] = saver._memory._slabs
    train(model, optimizer, range(1))
    for step in (1, 2):
        saver.save(step, model, optimizer, {})
        assert saver.busy
        assert saver.wait() == [step] and not saver.busy
        assert [one.data_ptr() for one in saver._memory._slabs] == [slab.data_ptr()]


def test_copies_never_overlap_and_a_tensor_larger_than_a_slab_gets_its_own(monkeypatch):
    monkeypatch.setattr("pdn.checkpoint.memory.SLAB_BYTES", 512)
    memory = HostMemory()
    shapes = {"a": (3, 5), "b": (), "c": (40, 10), "d": (0,), "e": (7,), "f": (60,)}
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    copies = memory.copies(tensors)
    for number, (name, copy) in enumerate(copies.items()):
        assert copy.shape == shapes[name] and copy.dtype == torch.float32
        copy.fill_(number)
    assert all((copy == number).all() for number, copy in enumerate(copies.values()))
    assert max(len(slab) for slab in memory._slabs) == 1600
