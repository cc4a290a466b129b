"""Token shards: the manifest, the writer, and the reader.

A directory holds one split::

    manifest.json      what the shards are; ends with a checksum of itself; rewritten,
                       atomically, for each whole shard
    tokenizer.json     the tokenizer, byte for byte
    shard-00000.bin    tokens, little-endian uint16 or uint32, every document ended by EOS,
                       no header
    shard-00000.idx    48-byte header, then the documents' ends (uint64) and the hashes of
                       their texts (uint64)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import struct
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from pdn.config import Strict
from pdn.data.files import data_storage_error, publish_bytes
from pdn.errors import DataError
from pdn.store.local import read_bytes, sync_directory
from pdn.wording import counted

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
VERSION = 1
# magic, version, bytes a token, tokens, documents, reserved 0, reserved 0, CRC-32 of the rest
HEADER = struct.Struct("<8sIIQQQII")
MAGIC = b"PDNIDX\r\n"
SHARD_NAME = re.compile(r"shard-[0-9]{5,9}\Z")

AGAIN = "prepare the directory again with data/prepare.py, or restore it from a copy"

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TokenizerIdentity(Strict):
    name: str
    sha256: Hex


class ShardEntry(Strict):
    name: str
    tokens: Annotated[int, Field(ge=1)]
    documents: Annotated[int, Field(ge=1)]
    sha256: Hex
    idx_sha256: Hex
    part: Annotated[int, Field(ge=0)]
    """Number of the commit that published it; the splits of one source share their commits."""


class Manifest(Strict):
    format: Literal["pdn-shards"]
    version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(ge=2)]
    eos_id: Annotated[int, Field(ge=0)]
    tokenizer: TokenizerIdentity
    source: dict[str, Any]
    complete: bool
    cursors: list[dict[str, Any]]
    """Where the source stood after each commit, so that work goes on, or is repeated, from there.
    """
    shards: list[ShardEntry]
    left_out: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """How many rows of the source are in no shard, by reason. Absent from the file if there are
    none.
    """

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.shards)

    @property
    def documents(self) -> int:
        return sum(s.documents for s in self.shards)

    @property
    def content(self) -> str:
        """Return the SHA-256 over the shards' hashes: equal if and only if the tokens are."""
        return hashlib.sha256("".join(s.sha256 for s in self.shards).encode()).hexdigest()

    def dump(self) -> bytes:
        body = self.model_dump()
        if not self.left_out:
            del body["left_out"]
        return sealed(body)

    def write(self, directory: Path) -> None:
        publish_bytes(directory / MANIFEST, self.dump())


def _canonical(value: dict) -> bytes:
    return (json.dumps(value, sort_keys=True, allow_nan=False) + "\n").encode()


def sealed(body: dict) -> bytes:
    """Return the bytes of a manifest, with its checksum."""
    return _canonical({**body, "checksum": hashlib.sha256(_canonical(body)).hexdigest()})


def dtype_for(vocab_size: int) -> Literal["uint16", "uint32"]:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_manifest(directory: Path) -> Manifest:
    """Read and check `<directory>/manifest.json`.

    Raises:
        DataError: it is missing, damaged (any byte changed), of another version, or contradicts
            itself.
    """
    path = directory / MANIFEST
    try:
        raw = read_bytes(path)
    except FileNotFoundError:
        found = (
            "the directory is missing"
            if not directory.is_dir()
            else "the directory has no manifest.json"
        )
        raise DataError(
            "SHARD-MANIFEST",
            f"{path}: {found}; expected shards. Give the split's own directory (…/train), or "
            f"{AGAIN}",
        ) from None
    except OSError as error:
        raise DataError(
            "SHARD-UNREADABLE",
            f"{path}: {error.strerror}; expected a readable file. Fix its permissions, or "
            "restore it from a copy",
        ) from error
    return parse_manifest(raw, path)


def parse_manifest(raw: bytes, path: Path | str) -> Manifest:
    """Return the manifest that ``raw`` holds, checked.

    Args:
        raw: the bytes of a manifest.json.
        path: where they were read, for messages.

    Raises:
        DataError: as `read_manifest`.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError("SHARD-MANIFEST", f"{path}: not JSON ({error}); {AGAIN}") from None
    if not isinstance(body, dict) or body.get("format") != "pdn-shards":
        raise DataError("SHARD-MANIFEST", f"{path}: expected format pdn-shards; {AGAIN}")
    if body.get("version") != VERSION:
        raise DataError(
            "SHARD-VERSION",
            f"{path}: format version {body.get('version')!r}, this program reads {VERSION}; "
            f"{AGAIN}",
        )
    checksum = body.pop("checksum", None)
    computed = hashlib.sha256(_canonical(body)).hexdigest()
    if checksum != computed or raw != _canonical({**body, "checksum": checksum}):
        raise DataError(
            "SHARD-MANIFEST",
            f"{path}: its checksum is {checksum!r}, its content gives {computed}: the file was "
            f"changed; {AGAIN}",
        )
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError("SHARD-MANIFEST", f"{path}: {where}: {first['msg']}; {AGAIN}") from None
    _check_manifest(path, manifest)
    return manifest


def _check_manifest(path: Path | str, manifest: Manifest) -> None:
    if manifest.dtype == "uint16" and manifest.vocab_size > 1 << 16:
        raise DataError(
            "SHARD-DTYPE",
            f"{path}: dtype uint16 holds ids below 65,536, but vocab_size is "
            f"{manifest.vocab_size:,}; expected uint32; {AGAIN}",
        )
    if manifest.eos_id >= manifest.vocab_size:
        raise DataError(
            "SHARD-MANIFEST",
            f"{path}: eos_id {manifest.eos_id} is not below vocab_size {manifest.vocab_size}; "
            f"{AGAIN}",
        )
    names = set()
    for shard in manifest.shards:
        if not SHARD_NAME.match(shard.name):
            raise DataError(
                "SHARD-PATH",
                f"{path}: shard name {shard.name!r} is not of the form shard-00000: refused, as it "
                f"may leave the directory; {AGAIN}",
            )
        if shard.name in names:
            raise DataError("SHARD-MANIFEST", f"{path}: {shard.name} is listed twice; {AGAIN}")
        names.add(shard.name)


def require_complete(manifest: Manifest, where: Path | str) -> None:
    """Refuse shards whose preparation was not finished; ``where`` they are is for the message."""
    if not manifest.complete:
        raise DataError(
            "SHARD-INCOMPLETE",
            f"{where}: its preparation was not finished ({manifest.tokens:,} tokens so far);"
            " run the same data/prepare.py command again: it continues",
        )


class ShardWriter:
    """Writes one shard to a temporary name, hashing on the way.

    `seal` returns its entry, `publish` then gives it its name.

    Args:
        directory: of the split; made if missing.
        name: ``shard-00000``.
        dtype: ``uint16`` or ``uint32``.
    """

    def __init__(self, directory: Path, name: str, dtype: str):
        self.directory, self.name, self.dtype = directory, name, np.dtype(dtype).newbyteorder("<")
        self.tokens = 0
        self._ends: list[int] = []
        self._hashes: list[int] = []
        self._sha = hashlib.sha256()
        self._temporary = directory / f".{name}.bin.tmp"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by close and abort)
        except OSError as error:
            raise data_storage_error(error, self._temporary, "opening") from error

    @property
    def documents(self) -> int:
        return len(self._ends)

    def append(self, tokens: np.ndarray, text_hash: int) -> None:
        """Append one whole document: its tokens [N], EOS included, and the hash of its text."""
        content = tokens.astype(self.dtype).tobytes()
        try:
            self._file.write(content)
        except OSError as error:
            self.abort()
            raise data_storage_error(error, self._temporary, "writing") from error
        self._sha.update(content)
        self.tokens += len(tokens)
        self._ends.append(self.tokens)
        self._hashes.append(text_hash)

    def seal(self, part: int) -> ShardEntry:
        """Make the tokens durable under the temporary name; return the entry of the shard."""
        ends, hashes = np.array(self._ends, dtype="<u8"), np.array(self._hashes, dtype="<u8")
        head = index_header(self.dtype.itemsize, self.tokens, len(ends))
        self._index = head + ends.tobytes() + hashes.tobytes()
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            self.abort()
            raise data_storage_error(error, self._temporary, "writing") from error
        return ShardEntry(
            name=self.name,
            tokens=self.tokens,
            documents=len(ends),
            sha256=self._sha.hexdigest(),
            idx_sha256=hashlib.sha256(self._index).hexdigest(),
            part=part,
        )

    def publish(self) -> None:
        """Give the sealed shard its name; from here on it is read."""
        try:
            publish_bytes(self.directory / f"{self.name}.idx", self._index)
            os.replace(self._temporary, self.directory / f"{self.name}.bin")
            sync_directory(self.directory)
        except OSError as error:
            self.abort()
            raise data_storage_error(error, self._temporary, "writing") from error

    def abort(self) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered, too
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def index_header(itemsize: int, tokens: int, documents: int) -> bytes:
    head = HEADER.pack(MAGIC, VERSION, itemsize, tokens, documents, 0, 0, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def read_index(directory: Path, entry: ShardEntry, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Read document ends [D] and text hashes [D] (uint64) of one shard.

    Args:
        directory: of the split.
        entry: of the shard in the manifest, whose counts the index must have.
        dtype: of the tokens.
    """
    path = directory / f"{entry.name}.idx"
    check_header(path, entry, np.dtype(dtype).itemsize)
    body = np.fromfile(path, dtype="<u8", offset=HEADER.size)
    ends, hashes = body[: entry.documents], body[entry.documents :]
    if int(ends[-1]) != entry.tokens or (np.diff(ends.astype(np.int64), prepend=0) <= 0).any():
        raise DataError(
            "SHARD-INDEX",
            f"{path}: document ends do not rise to {entry.tokens}; restore the file or prepare the "
            "data again",
        )
    return ends, hashes


def check_header(path: Path | str, entry: ShardEntry, itemsize: int) -> None:
    """Refuse an index whose size or header is not exactly what the manifest implies.

    Args:
        path: of the index.
        entry: of the shard in the manifest.
        itemsize: bytes of a token.
    """
    expected_size = HEADER.size + 16 * entry.documents
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise DataError(
                "SHARD-PATH",
                f"{path}: not a regular file (a link could leave the directory): refused; copy the "
                "index itself there",
            )
        with open(path, "rb") as f:
            head = f.read(HEADER.size)
            size = os.fstat(f.fileno()).st_size
    except FileNotFoundError:
        raise DataError(
            "SHARD-MISSING",
            f"{path}: missing; the manifest lists it. Restore it or prepare the data again",
        ) from None
    except OSError as error:
        raise DataError(
            "SHARD-UNREADABLE",
            f"{path}: {error.strerror}; expected a readable file. Fix its permissions",
        ) from error
    if size != expected_size:
        raise DataError(
            "SHARD-SIZE",
            f"{path}: {size} bytes, expected {expected_size} for "
            f"{counted(entry.documents, 'document')} (first difference at byte "
            f"{min(size, expected_size)}); restore it or prepare the data again",
        )
    expected = index_header(itemsize, entry.tokens, entry.documents)
    if head != expected:
        at = next(i for i, (a, b) in enumerate(zip(head, expected)) if a != b)
        raise DataError(
            "SHARD-INDEX",
            f"{path}: header byte {at} is 0x{head[at]:02x}, expected 0x{expected[at]:02x} (for "
            f"{entry.tokens} tokens, {counted(entry.documents, 'document')}); restore it or "
            "prepare the data again",
        )
