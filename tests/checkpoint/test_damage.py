"""Damage and forgery.

A checkpoint is believed only when every byte is as it was written.
"""

import ast
import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from pdn.checkpoint.format import file_record, step_directory, verify
from pdn.checkpoint.read import load_weights
from pdn.errors import ConfigError, PdnError, StorageError
from tests.checkpoint.small import (
    all_tensors,
    assert_same,
    build,
    checkpointer,
    resign,
    saved,
    sharded,
    train,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SEED = 20260


# ------------------------------------------------------------------ damage


def flip_bit(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    place = rng.randrange(len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)
    return f"bit {place} of {file.name} flipped"


def truncate(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(path.iterdir()))
    size = rng.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f"{file.name} truncated to {size}"


def zero_page(path: Path, rng: random.Random) -> str:
    file = path / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    start = rng.randrange(0, len(data), 512)
    if not any(data[start : start + 512]):
        start = 0
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    file.write_bytes(data)
    return f"512 bytes at {start} zeroed"


def delete(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(entry for entry in path.iterdir() if entry.name != "COMMITTED"))
    file.unlink()
    return f"{file.name} deleted"


def stale(path: Path, rng: random.Random) -> str:
    file = rng.choice(
        sorted(
            entry
            for entry in path.iterdir()
            if not entry.name.startswith("rng") and entry.name != "index.json"
        )
    )
    shutil.copy(path.parent / "step-00000002" / file.name, file)
    return f"{file.name} of an older step"


def swap(path: Path, rng: random.Random) -> str:
    files = sorted(
        entry
        for entry in path.iterdir()
        if entry.name != "COMMITTED" and not entry.name.startswith("rng")
    )
    # two ranks may have equal random states, and then nothing is damaged
    one, other = rng.sample(files, 2)
    one.rename(path / "aside")
    other.rename(one)
    (path / "aside").rename(other)
    return f"{one.name} and {other.name} swapped"


def append(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(entry for entry in path.iterdir() if entry.name != "COMMITTED"))
    with open(file, "ab") as stream:
        stream.write(rng.randbytes(rng.randint(1, 64)))
    return f"{file.name} has bytes appended"


def another_step(path: Path, rng: random.Random) -> str:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step-00000002", path)
    return "the whole directory of another step"


DAMAGES = [flip_bit, truncate, zero_page, delete, stale, swap, append, another_step]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_detected_and_the_checkpoint_before_is_taken(tmp_path, damage, caplog):
    *_, states = saved(tmp_path / "whole", (2, 3))
    rng = random.Random(f"{SEED} {damage.__name__}")
    model, optimizer = build(seed=1)
    for trial in range(80):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
        what = damage(step_directory(tmp_path / "damaged", 3), rng)
        with pytest.raises(StorageError):
            verify(step_directory(tmp_path / "damaged", 3))
        # A marker cut to nothing still exists, so it counts as committed and must be reported.
        if trial % 8 == 0:
            caplog.clear()
            assert checkpointer(tmp_path / "damaged").restore(model, optimizer)[0] == 2, what
            assert_same(all_tensors(model, optimizer), states[2])
            [message] = [
                record.getMessage()
                for record in caplog.records
                if record.name == "pdn.checkpoint.find"
            ]
            assert message.startswith("pdn[E-CKPT-") and "step-00000003/" in message, what
            assert message.endswith("; resuming step-2. To pin: resume=step:2")


def test_the_message_of_a_flipped_bit_names_file_found_and_expected(tmp_path):
    saved(tmp_path, (3,))
    file = step_directory(tmp_path, 3) / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError) as caught:
        checkpointer(tmp_path).restore(*build(), "step:3")
    assert caught.value.exit_code == 74
    pattern = (
        r"pdn\[E-CKPT-HASH\] step-00000003/__0_0\.distcp: sha256 [0-9a-f]{12}… expected "
        r"[0-9a-f]{12}…; resume=auto takes .*"
    )
    assert re.fullmatch(pattern, str(caught.value))


def test_if_no_checkpoint_verifies_the_run_does_not_start_afresh(tmp_path):
    saved(tmp_path, (2, 3))
    for step in (2, 3):
        os.truncate(step_directory(tmp_path, step) / "side.json", 3)
    with pytest.raises(StorageError, match="none of 2 checkpoints"):
        checkpointer(tmp_path).restore(*build())
    with pytest.raises(StorageError, match="none of 2 checkpoints"):
        load_weights(tmp_path, build()[0])


def test_damage_to_a_shard_of_another_rank_is_seen_by_all_ranks(tmp_path):
    def on_two(rank: int):
        model, optimizer = sharded("fsdp", 2, seed=0)
        saver = checkpointer(tmp_path)
        for step in (1, 2):
            train(model, optimizer, range(step - 1, step), rank, 2)
            saver.save(step, model, optimizer, {})
        torch.distributed.barrier()
        if rank == 0:
            shutil.copy(
                step_directory(tmp_path, 1) / "__1_0.distcp",
                step_directory(tmp_path, 2) / "__1_0.distcp",
            )
        torch.distributed.barrier()
        return saver.restore(model, optimizer)

    assert run_ranks(2, on_two, tmp_path) == [[1, {}], [1, {}]]


# ------------------------------------------------------------------ forgery


class Payload:
    """Unpickling it creates the file ``sentinel``."""

    def __init__(self, sentinel: Path, how):
        self.how, self.sentinel = how, str(sentinel)

    def __reduce__(self):
        if self.how == "open":
            return open, (self.sentinel, "w")
        if self.how == "exec":
            return exec, (f"open({self.sentinel!r}, 'w')",)
        if self.how == "eval":
            return eval, (f"open({self.sentinel!r}, 'w')",)
        if self.how == "popen":
            return subprocess.check_output, (["touch", self.sentinel],)
        return os.system, (f"touch {self.sentinel}",)


def in_archive(path: Path, pickled: bytes) -> bytes:
    """Return a file of torch.save whose pickle is replaced."""
    buffer, original = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(2), original)
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(buffer, "w") as target:
        for entry in source.infolist():
            target.writestr(
                entry.filename,
                pickled if entry.filename.endswith("data.pkl") else source.read(entry),
            )
    return buffer.getvalue()


def forge_file(name: str, archived: bool, how: str):
    def forge(path: Path, sentinel: Path) -> None:
        pickled = pickle.dumps(Payload(sentinel, how), protocol=2)
        data = in_archive(path, pickled) if archived else pickled
        (path / name).write_bytes(data)
        rehash(path)
        if name.endswith(".distcp"):  # every chunk now is the payload
            index = json.loads((path / "index.json").read_bytes())
            index = {
                key: [[o, s, f, 0, len(data)] for o, s, f, *_ in chunks]
                for key, chunks in index.items()
            }
            (path / "index.json").write_text(json.dumps(index))
            rehash(path)

    return forge


def forge_torch_metadata(how: str):
    def forge(path: Path, sentinel: Path) -> None:
        (path / ".metadata").write_bytes(pickle.dumps(Payload(sentinel, how)))
        (path / "index.json").unlink()
        manifest = json.loads((path / "manifest.json").read_bytes())
        del manifest["files"]["index.json"]
        resign(path, manifest)

    return forge


def forge_manifest(change):
    def forge(path: Path, sentinel: Path) -> None:
        (path.parent / "outside.distcp").write_bytes(b"x")
        manifest = json.loads((path / "manifest.json").read_bytes())
        change(path, manifest)
        resign(path, manifest)

    return forge


def rename_shard(name: str):
    def change(path: Path, manifest: dict) -> None:
        manifest["files"][name] = manifest["files"].pop("__0_0.distcp")
        index = json.loads((path / "index.json").read_bytes())
        (path / "index.json").write_text(
            json.dumps({k: [[o, s, name, *r] for o, s, _, *r in c] for k, c in index.items()})
        )

    return change


def link_out(path: Path, manifest: dict) -> None:
    shutil.move(path / "__0_0.distcp", path.parent / "elsewhere")
    (path / "__0_0.distcp").symlink_to(path.parent / "elsewhere")


def link_index(path: Path, manifest: dict) -> None:
    shutil.move(path / "index.json", path.parent / "elsewhere")
    (path / "index.json").symlink_to(path.parent / "elsewhere")


def index_entry(value):
    def change(path: Path, manifest: dict) -> None:
        index = json.loads((path / "index.json").read_bytes())
        index["model.embed.weight"] = value
        (path / "index.json").write_text(json.dumps(index))
        manifest["files"]["index.json"] = file_record(path / "index.json")

    return change


def shorten_chunk(path: Path, manifest: dict) -> None:
    """Shorten a chunk: its last row would silently keep what the model was initialised with."""
    index = json.loads((path / "index.json").read_bytes())
    index_entry([[[0, 0], [60, 17], *index["model.embed.weight"][0][2:]]])(path, manifest)


def rehash(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"] = {name: file_record(path / name) for name in manifest["files"]}
    resign(path, manifest)


FORGERIES = {
    **{f"torch metadata, {how}": forge_torch_metadata(how) for how in ("open", "exec", "system")},
    **{
        f"shard, {how}": forge_file("__0_0.distcp", False, how)
        for how in ("open", "exec", "eval", "popen", "system")
    },
    **{
        f"shard archive, {how}": forge_file("__0_0.distcp", True, how)
        for how in ("open", "exec", "system")
    },
    **{f"random states, {how}": forge_file("rng-0.pt", False, how) for how in ("open", "system")},
    "random states archive": forge_file("rng-0.pt", True, "exec"),
    "side.json": forge_file("side.json", False, "open"),
    "index.json": forge_file("index.json", False, "open"),
    "parent path": forge_manifest(rename_shard("../outside.distcp")),
    "absolute path": forge_manifest(rename_shard("/etc/hostname")),
    "hidden path": forge_manifest(rename_shard("__0_0.distcp/../../x")),
    "linked shard": forge_manifest(link_out),
    "linked index": forge_manifest(link_index),
    "byte entry": forge_manifest(index_entry("bytes")),
    "chunk beyond its file": forge_manifest(
        index_entry([[[0, 0], [61, 17], "__0_0.distcp", 0, 1 << 40]])
    ),
    "chunk that covers a part": forge_manifest(shorten_chunk),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_checkpoint_with_valid_hashes_is_refused_and_nothing_in_it_runs(tmp_path, name):
    saved(tmp_path / "run", (1,))
    path, sentinel = step_directory(tmp_path / "run", 1), tmp_path / "sentinel"
    FORGERIES[name](path, sentinel)
    only_resume = name.startswith("random states")
    code = "PATH]" if "path" in name or "linked" in name else "INDEX]" if "chunk" in name else ""
    for refuse in (
        lambda: checkpointer(tmp_path / "run").restore(*build()),
        lambda: checkpointer(tmp_path / "run").restore(*build(), "step:1"),
        *(
            []
            if only_resume
            else [
                lambda: load_weights(path, build()[0]),
                lambda: load_weights(tmp_path / "run", build()[0]),
            ]
        ),
    ):
        with pytest.raises(PdnError) as caught:
            refuse()
        assert f"pdn[E-CKPT-{code}" in str(caught.value)
    assert not sentinel.exists()


def test_every_payload_would_run_if_it_were_unpickled(tmp_path):
    for how in ("open", "exec", "eval", "popen", "system"):
        sentinel = tmp_path / how
        pickle.loads(pickle.dumps(Payload(sentinel, how)))  # noqa: S301
        assert sentinel.exists(), how


def test_nothing_in_the_project_unpickles_without_restriction():
    root, loads = Path(__file__).parents[2], 0
    for file in (
        file for part in ("pdn", "data", "scripts") for file in (root / part).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(
                    word.arg == "weights_only" and word.value.value is True
                    for word in node.keywords
                ), f"{file}:{node.lineno}"
                loads += 1
            if isinstance(node, ast.Import):
                assert not {"pickle", "dill", "cloudpickle", "marshal"} & {
                    name.name for name in node.names
                }, file
    assert loads


def test_five_hundred_mutated_manifests_are_refused_or_mean_the_same(tmp_path):
    _, _, states = saved(tmp_path, (1,))
    path, rng = step_directory(tmp_path, 1), random.Random(SEED)
    original = (path / "manifest.json").read_bytes()
    accepted = 0
    for _ in range(500):
        data = mutate(original, rng)
        (path / "manifest.json").write_bytes(data)
        (path / "COMMITTED").write_text(sha256(data).hexdigest() + "\n")
        try:
            verify(path)
        except (ConfigError, StorageError):
            continue
        # What passes may differ in what nothing reads (torch's version), or in JSON spelling, or
        # describe another model.
        accepted += 1
        model, optimizer = build(seed=1)
        with contextlib.suppress(ConfigError):
            checkpointer(tmp_path).restore(model, optimizer)
            assert_same(all_tensors(model, optimizer), states[1])
    assert accepted < 60


def mutate(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    place = rng.randrange(len(data))
    if kind == 0:
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + data[place + rng.randint(1, 30) :]
    manifest = json.loads(data)
    junk = rng.choice(
        [None, -1, 1e308, "", "../x", [], {}, [[]], True, "9" * 400, 2**80, {"a": {"a": {}}}]
    )
    if kind == 2:
        manifest[rng.choice(sorted(manifest))] = junk
    else:
        table = manifest[rng.choice(["files", "tensors"])]
        table[rng.choice(sorted(table))] = junk
    return json.dumps(manifest).encode()
