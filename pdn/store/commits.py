"""What a place in object storage holds: a chain of commits, each the whole content at its time.

Commit *n* is the object ``commits/<n>.json``, put with If-None-Match after all objects that it
names: nothing is renamed, and what no commit names does not exist. A writer may put commit n + 1
only if it has read commit n, so that numbers have no gaps, and the newest is found without a
listing. A writer begins with a commit of its own, under its fencing number: whoever held the lease
before and still writes then finds its number taken, and stops.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field

from pdn.errors import LockedError, StorageError
from pdn.store.s3 import Bucket

FORMAT = 1
Entry = dict  # {"object": name below the prefix, "bytes": …, "sha256": …}
_OBJECT = re.compile(r"objects/[0-9a-f-]{1,80}/[0-9A-Za-z._-]{1,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Commit:
    """Holds one commit.

    Attributes:
        number: from 1.
        fence: fencing number of the lease that it was made under.
        owner: token of the local directory that it is of.
        files: name → where its content is.
        lines: name of an append-only file → its segments, in order.
        trees: name of a directory of files that never change → file → where its content is.
    """

    number: int
    fence: int
    owner: str
    files: dict[str, Entry] = field(default_factory=dict)
    lines: dict[str, list[Entry]] = field(default_factory=dict)
    trees: dict[str, dict[str, Entry]] = field(default_factory=dict)
    format: int = FORMAT

    def entries(self) -> list[Entry]:
        """Return all that it refers to."""
        entries = [*self.files.values()]
        entries += [entry for segments in self.lines.values() for entry in segments]
        entries += [entry for tree in self.trees.values() for entry in tree.values()]
        return entries

    def objects(self) -> set[str]:
        """Return the names of all objects that it refers to."""
        return {entry["object"] for entry in self.entries()}


def newest(bucket: Bucket) -> Commit | None:
    """Return the newest commit, found by doubling and bisection; None if there is none.

    Raises:
        StorageError: it is damaged.
        ConfigError: it is of a newer version of this format.
    """
    there, missing = 0, 1
    while bucket.head(_name(missing)) is not None:
        there, missing = missing, 2 * missing
    while missing - there > 1:
        middle = (there + missing) // 2
        if bucket.head(_name(middle)) is not None:
            there = middle
        else:
            missing = middle
    return read(bucket, there) if there else None


def read(bucket: Bucket, number: int) -> Commit | None:
    """Return one commit, checked; None if there is none of that number."""
    data = bucket.get(_name(number))
    return None if data is None else _decode(f"{bucket.url}/{_name(number)}", data, number)


def publish(bucket: Bucket, commit: Commit) -> None:
    """Put a commit whose number must be free.

    Raises:
        LockedError: another writer has put this number; nothing of ours is published.
        StorageError: the store failed.
    """
    data = _encode(commit)
    if bucket.put(_name(commit.number), data, absent=True) is not None:
        return
    if bucket.get(_name(commit.number)) == data:  # ours: the answer to the first try was lost
        return
    found = read(bucket, commit.number)
    raise LockedError(
        "REPLICA-FENCED",
        f"{bucket.url}: commit {commit.number} was made by the holder of lease "
        f"{found.fence if found else '?'}, this launch has lease {commit.fence}; expected to be "
        "the only writer: another launch took over, stop this one",
    )


def _name(number: int) -> str:
    return f"commits/{number:08d}.json"


def _encode(commit: Commit) -> bytes:
    body = json.dumps(asdict(commit), sort_keys=True).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _decode(where: str, data: bytes, number: int) -> Commit:
    digest, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise StorageError(
            "REPLICA-HASH", f"{where}: does not have the sha256 that its first line tells"
        )
    try:
        found = Commit(**json.loads(body))
        sound = all(map(_is_sound, found.entries()))
        if found.format == FORMAT and found.number == number and sound:
            return found
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise StorageError(
        "REPLICA-COMMIT", f"{where}: is no commit of this version; expected format {FORMAT}"
    )


def _is_sound(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"object", "bytes", "sha256"}
        and isinstance(entry["object"], str)
        and _OBJECT.fullmatch(entry["object"]) is not None
        and isinstance(entry["bytes"], int)
        and entry["bytes"] >= 0
        and isinstance(entry["sha256"], str)
        and _SHA256.fullmatch(entry["sha256"]) is not None
    )
