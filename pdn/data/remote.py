"""Text and shards in object storage: a local copy of what lies there, compared as it arrives.

All processes of a node share one copy. Its directory is named by the content, which is what the
shards' manifest tells, or else the listing: names, lengths and ETags. So other content has another
copy, and what was copied stays when a launch ends in the middle.

The whole of it is copied before training begins. The order is random over all of a source, so that
the first batches need nearly every shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pdn.data.config import ShardsSource, StreamSource, TextSource
from pdn.data.files import lock, making, publish_bytes
from pdn.data.reader import file_identity
from pdn.data.records import SUFFIXES
from pdn.data.shards import (
    HEADER,
    MANIFEST,
    TOKENIZER,
    Manifest,
    parse_manifest,
    require_complete,
)
from pdn.errors import DataError, DataStorageError, StorageError
from pdn.store.local import read_bytes, remove_tree
from pdn.store.s3 import SCHEME, Bucket, Entry
from pdn.wording import Tell

PAUSES = (1.0, 4.0, 15.0)  # seconds between the tries of one request, after the client's own
FILES_AT_ONCE = 4
COPIES, INDEX, INCOMING = "s3", "copy.json", "incoming"
LASTING = {"S3-MISSING", "S3-SIZE", "S3-CHANGED"}  # what the next try finds again
DAMAGED = LASTING | {"S3-HASH"}

T = TypeVar("T")
Part = TypeVar("Part", TextSource, ShardsSource, StreamSource)


@dataclass(frozen=True)
class Wanted:
    """Holds what is known of an object before it is copied.

    Attributes:
        name: below the place; empty if the place is the object.
        size: in bytes.
        sha256: of its content; None if only the store knows it.
        listed: as the store lists it; None for what a manifest tells.
    """

    name: str
    size: int
    sha256: str | None = None
    listed: Entry | None = None


def is_remote(path: str | None) -> bool:
    """Return whether a path is an address in object storage."""
    return path is not None and path.startswith(SCHEME)


def brought(part: Part, cache: Path, tell: Tell) -> Part:
    """Return a source's configuration with local copies in place of addresses.

    Args:
        part: of one source.
        cache: below which copies are kept.
        tell: called with lines for the user.

    Raises:
        DataError: nothing is there, or it is damaged (65); the disk is full, or the store failed
            (74).
        StorageError: credentials are refused, or the store does not answer.
        ConfigError: there is no such bucket, no credentials, or no client for it.
    """
    copy = shards_copy if isinstance(part, ShardsSource) else text_copy
    local = {
        key: str(copy(getattr(part, key), cache, tell))
        for key in ("path", "validation")
        if is_remote(getattr(part, key))
    }
    return part.model_copy(update=local) if local else part


def copied(url: str, cache: Path, tell: Tell) -> Path:
    """Return the copy of shards of one split, or of text if there is no manifest."""
    raw = _patiently(lambda: Bucket(url).get(MANIFEST), tell)
    return text_copy(url, cache, tell) if raw is None else shards_copy(url, cache, tell, raw)


def shards_copy(url: str, cache: Path, tell: Tell, raw: bytes | None = None) -> Path:
    """Return a directory with the shards of one split, as their manifest tells them.

    Args:
        url: ``s3://bucket/prefix`` of a directory that data/prepare.py wrote.
        cache: below which copies are kept.
        tell: called with lines for the user.
        raw: their manifest, where it has been read.
    """
    bucket = Bucket(url)
    raw = raw or _patiently(lambda: bucket.get(MANIFEST), tell)
    if raw is None:
        raise DataError(
            "SHARD-MANIFEST",
            f"{bucket.url}/{MANIFEST}: missing; {_what_is_there(bucket, tell)}; expected shards: "
            "give the address of one split (…/train), as data/prepare.py wrote it",
        )
    where = f"{bucket.url}/{MANIFEST}"
    manifest = parse_manifest(raw, where)
    require_complete(manifest, where)
    size = _patiently(lambda: bucket.head(TOKENIZER), tell)
    if size is None:
        raise DataError(
            "TOKENIZER-MISSING",
            f"{bucket.url}/{TOKENIZER}: missing; expected the tokenizer of the shards; copy it "
            "there, too",
        )
    wanted = [Wanted(TOKENIZER, size[0], manifest.tokenizer.sha256), *_shards(manifest)]
    copy = _Copy(bucket, wanted, hashlib.sha256(raw).hexdigest(), cache, tell)
    directory = copy.make()
    if not (directory / MANIFEST).is_file():
        publish_bytes(directory / MANIFEST, raw)  # last: without it they are no shards
    return directory


def _shards(manifest: Manifest) -> list[Wanted]:
    width = 2 if manifest.dtype == "uint16" else 4
    found = []
    for entry in manifest.shards:
        found.append(Wanted(f"{entry.name}.bin", width * entry.tokens, entry.sha256))
        index = HEADER.size + 16 * entry.documents
        found.append(Wanted(f"{entry.name}.idx", index, entry.idx_sha256))
    return found


def text_copy(url: str, cache: Path, tell: Tell) -> Path:
    """Return a file or directory with the text that lies at an address.

    Files keep the time at which their object was put, so that every node and every launch finds the
    same corpus. What has a name that begins with a dot is left out, as of a local directory.

    Args:
        url: ``s3://bucket/prefix`` of text files, or the address of one.
        cache: below which copies are kept.
        tell: called with lines for the user.
    """
    bucket = Bucket(url)
    listed = _patiently(bucket.entries, tell)
    wanted = [Wanted(e.name, e.size, listed=e) for e in listed if _is_text(bucket, e.name)]
    if not wanted:
        raise DataError(
            "DATA-MISSING",
            f"{bucket.url}: {_what_is_there(bucket, tell)}; expected text (one of "
            f"{', '.join(SUFFIXES)}); check the address",
        )
    for entry in wanted:
        if "" in entry.name.split("/")[1:] or ".." in entry.name.split("/"):
            raise DataError(
                "DATA-PATH",
                f"{bucket.url}/{entry.name}: its name is no path below a directory: refused; "
                "expected parts that are neither empty nor ..: rename it",
            )
    listing = json.dumps([[e.name, e.size, e.listed and e.listed.etag] for e in wanted])
    content = hashlib.sha256(listing.encode()).hexdigest()
    return _Copy(bucket, wanted, content, cache, tell).make()


def _is_text(bucket: Bucket, name: str) -> bool:
    parts = (name or bucket.url).split("/")
    hidden = name and any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].endswith(SUFFIXES)


def _what_is_there(bucket: Bucket, tell: Tell) -> str:
    names = [entry.name for entry in _patiently(bucket.entries, tell)]
    if not names:
        return "found no object below it"
    first = sorted({name.split("/")[0] + ("/" if "/" in name else "") for name in names})
    return f"found {', '.join(first[:5])}{', …' if len(first) > 5 else ''}"


class _Copy:
    """Copies objects into a directory of their own, and knows which are there already."""

    def __init__(self, bucket: Bucket, wanted: list[Wanted], content: str, cache: Path, tell: Tell):
        digest = hashlib.sha256(f"{bucket.url}\n{content}".encode()).hexdigest()[:16]
        self._bucket, self._wanted, self._tell = bucket, wanted, tell
        self._root = cache / COPIES / digest
        self._target = self._root / bucket.url.rpartition("/")[2]

    def make(self) -> Path:
        """Copy what is missing, and return where it is."""
        if self._missing(self._index()):  # no lock: the cache may be one that cannot be written
            with making(self._root):
                self._root.mkdir(parents=True, exist_ok=True)
            with lock(self._root / "lock", self._tell):
                self._fill()
        return self._target

    def _file(self, wanted: Wanted) -> Path:
        return self._target / wanted.name if wanted.name else self._target

    def _index(self) -> dict[str, list]:
        """Return file identity and SHA-256 of what was copied, by name."""
        try:
            found = json.loads(read_bytes(self._root / INDEX))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _missing(self, index: dict[str, list]) -> list[Wanted]:
        return [wanted for wanted in self._wanted if not self._is_copied(wanted, index)]

    def _is_copied(self, wanted: Wanted, index: dict[str, list]) -> bool:
        try:
            found = file_identity(os.stat(self._file(wanted)))
        except OSError:
            return False
        known = index.get(wanted.name)
        return isinstance(known, list) and known[:1] == [list(found)] and found[0] == wanted.size

    def _fill(self) -> None:
        index, incoming = self._index(), self._root / INCOMING
        missing = self._missing(index)  # another process may have copied them by now
        if not missing:
            return
        with making(incoming):
            remove_tree(incoming)
            incoming.mkdir()
        size = sum(wanted.size for wanted in missing)
        free = shutil.disk_usage(self._root).free
        if size > free:
            raise DataStorageError(
                "DATA-SPACE",
                f"{self._root}: the copy of {self._bucket.url} needs {size / 1e9:.2f} GB more, "
                f"{free / 1e9:.2f} GB are free; free some, or set data.cache_dir to a larger disk",
            )
        self._tell(f"copying {len(missing):,} objects, {size / 1e9:.2f} GB, of {self._bucket.url}")
        done, told = 0, time.monotonic()
        pool = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="copy")
        try:
            works = {
                pool.submit(self._bring, wanted, incoming / str(number)): wanted
                for number, wanted in enumerate(missing)
            }
            for work in as_completed(works):
                index[works[work].name] = work.result()
                done += works[work].size
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    self._tell(f"copying: {done / 1e9:.2f} of {size / 1e9:.2f} GB")
                    self._remember(index)
        finally:
            pool.shutdown(cancel_futures=True)
            self._remember(index)

    def _remember(self, index: dict[str, list]) -> None:
        publish_bytes(self._root / INDEX, json.dumps(index).encode())

    def _bring(self, wanted: Wanted, draft: Path) -> list:
        """Copy one object; return the identity of its file and its SHA-256."""

        def download() -> str:
            if wanted.listed is not None:
                return self._bucket.download_listed(wanted.listed, draft)
            assert wanted.sha256 is not None
            self._bucket.download(wanted.name, draft, wanted.size, wanted.sha256)
            return wanted.sha256

        try:
            digest = _patiently(download, self._tell)
        except StorageError as error:
            if error.code not in DAMAGED:
                raise
            raise DataError(
                error.code,
                f"{error.args[0]}; restore the object, or prepare the data again, and launch again",
            ) from error
        file = self._file(wanted)
        with making(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            if wanted.listed is not None:
                os.utime(draft, (wanted.listed.modified, wanted.listed.modified))
            os.replace(draft, file)
        return [list(file_identity(os.stat(file))), digest]


def _patiently(work: Callable[[], T], tell: Tell) -> T:
    """Do ``work``, again after a pause if the store failed; credentials are read anew then."""
    for pause in PAUSES:
        try:
            return work()
        except StorageError as error:
            if error.code in LASTING:
                raise
            tell(f"{error.args[0]}; trying again in {pause:g} s")
            time.sleep(pause)
    return work()
