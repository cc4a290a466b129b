"""Objects under one prefix of an S3 bucket: conditional puts, uploads in parts, checked downloads.

Needs the optional packages of ``pip install 'pdn[s3]'``. Credentials, region and endpoint come from
where every AWS client looks for them: ``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``,
``~/.aws/config``, the machine's role. Nothing here writes them anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pdn.errors import ConfigError, StorageError

SCHEME = "s3://"
PART_BYTES = 32 << 20  # of an upload; files up to two parts go in one request
MAX_PARTS = 9_000  # S3 takes 10,000
THREADS = 4  # requests at the same time, for one file
_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([^/].*)")
_DELETE_AT_ONCE = 1000  # keys in one request, by S3
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')

T = TypeVar("T")


def problem_of_url(url: str) -> str | None:
    """Return what is wrong with the address of a place in a bucket; None if nothing is."""
    scheme = url.partition("://")[0] if "://" in url else None
    if scheme is not None and scheme != "s3":
        return f"found the scheme {scheme}, which is not supported; expected s3://bucket/prefix"
    parts = _URL.fullmatch(url)
    if parts is None or {"", ".", ".."} & set(parts[2].rstrip("/").split("/")):
        return "expected s3://bucket/prefix"
    return None


@dataclass(frozen=True)
class Entry:
    """Holds what a listing tells of an object.

    Attributes:
        name: below the prefix; empty if the prefix is the object's own key.
        size: in bytes.
        etag: names its version.
        modified: when it was put, in seconds since 1970.
    """

    name: str
    size: int
    etag: str
    modified: float


class Bucket:
    """Puts, reads and deletes objects below one prefix. May be used by several threads.

    Args:
        url: ``s3://bucket/prefix``.

    Raises:
        ConfigError: the address is none, or s3fs is not installed.
    """

    def __init__(self, url: str):
        problem = problem_of_url(url)
        if problem is not None:
            raise ConfigError("S3-URL", f"{url}: {problem}")
        self.url = url.rstrip("/")
        self.bucket, _, self.prefix = self.url.removeprefix(SCHEME).partition("/")
        self._made: Any = None

    def key(self, name: str) -> str:
        """Return the key of an object in the bucket; without a name, the prefix itself."""
        return f"{self.prefix}/{name}" if name else self.prefix

    # ---------------------------------------------------------------- small objects

    def put(
        self, name: str, data: bytes, *, absent: bool = False, replacing: str | None = None
    ) -> str | None:
        """Put an object in one request.

        Args:
            name: below the prefix.
            data: its content.
            absent: only if there is none of this name.
            replacing: only if the one there has this ETag.

        Returns:
            The new ETag; None if the condition did not hold. After a lost answer a client repeats
            the request, and then it does not hold either: read what is there.
        """
        condition = {"IfNoneMatch": "*"} if absent else {}
        if replacing is not None:
            condition = {"IfMatch": replacing}
        try:
            with self._errors(name):
                return self._call("put_object", name, Body=data, **condition)["ETag"]
        except _ConditionError:
            return None

    def get(self, name: str) -> bytes | None:
        """Return the content of a small object; None if there is none."""
        try:
            with self._errors(name):
                return self._fs.cat_file(f"{self.bucket}/{self.key(name)}")
        except _AbsentError:
            return None

    def head(self, name: str) -> tuple[int, str] | None:
        """Return length and ETag of an object; None if there is none."""
        try:
            with self._errors(name):
                found = self._call("head_object", name)
        except _AbsentError:
            return None
        return found["ContentLength"], found["ETag"]

    def names(self, below: str) -> list[str]:
        """List objects, for cleaning up; what is believed is told by a commit, never by this."""
        keys = [entry["Key"] for entry in self._listed(self.key(below))]
        return [key.removeprefix(f"{self.prefix}/") for key in keys]

    def entries(self) -> list[Entry]:
        """List the objects below the prefix, or the one that has it as its key, sorted by name.

        What ends in a slash marks a directory, and is left out.
        """
        found = []
        for entry in self._listed(self.prefix):
            key = entry["Key"]
            if key == self.prefix or (key.startswith(f"{self.prefix}/") and key[-1] != "/"):
                name = key[len(self.prefix) + 1 :]
                when = entry["LastModified"].timestamp()
                found.append(Entry(name, entry["Size"], entry["ETag"], when))
        return sorted(found, key=lambda entry: entry.name)

    def _listed(self, key: str) -> list[dict[str, Any]]:
        found, more = [], {}
        with self._errors(key.removeprefix(self.prefix).lstrip("/")):
            while True:
                page = self._fs.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=key, **more)
                found += page.get("Contents", [])
                if not page.get("IsTruncated"):
                    return found
                more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, names: list[str]) -> None:
        """Delete objects; those that are not there count as deleted."""
        for start in range(0, len(names), _DELETE_AT_ONCE):
            keys = [{"Key": self.key(name)} for name in names[start : start + _DELETE_AT_ONCE]]
            with self._errors(names[start]):
                self._fs.call_s3(
                    "delete_objects", Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True}
                )

    # ---------------------------------------------------------------- files

    def upload(self, name: str, fd: int, size: int) -> str:
        """Put the first ``size`` bytes of an open file; return their SHA-256.

        A file of more than two parts is a multipart upload, which is aborted if it fails.

        Raises:
            StorageError: the file is shorter, or the store failed.
        """
        digest = hashlib.sha256()
        if size <= 2 * PART_BYTES:
            data = _read(fd, 0, size, name)
            digest.update(data)
            self.put(name, data)
        else:
            self._upload_parts(name, fd, size, digest)
        found = self.head(name)
        if found is None or found[0] != size:
            raise StorageError(
                "S3-SIZE",
                f"{self.url}/{name}: {found[0] if found else 'nothing'} stored, expected {size} "
                "bytes; it is put again with the next checkpoint",
            )
        return digest.hexdigest()

    def _upload_parts(self, name: str, fd: int, size: int, digest) -> None:
        length = max(PART_BYTES, -(-size // MAX_PARTS))
        with self._errors(name):
            upload = self._call("create_multipart_upload", name)["UploadId"]

        def send(number: int, data: bytes) -> dict:
            with self._errors(name):
                part = self._call(
                    "upload_part", name, UploadId=upload, PartNumber=number, Body=data
                )
            return {"PartNumber": number, "ETag": part["ETag"]}

        def pieces() -> Iterator[Callable[[], dict]]:
            for number, start in enumerate(range(0, size, length), start=1):
                data = _read(fd, start, min(length, size - start), name)
                digest.update(data)
                yield lambda number=number, data=data: send(number, data)

        try:
            with ThreadPoolExecutor(THREADS) as pool:
                parts = {"Parts": list(_in_order(pool, pieces()))}
            with self._errors(name):
                self._call(
                    "complete_multipart_upload", name, UploadId=upload, MultipartUpload=parts
                )
        except BaseException:
            with contextlib.suppress(StorageError), self._errors(name):
                self._call("abort_multipart_upload", name, UploadId=upload)
            raise

    def download(self, name: str, file: Path, size: int, sha256: str) -> None:
        """Write an object into a new file, synced; what was written is compared as it arrives.

        Raises:
            StorageError: absent, of another length, or other bytes than expected; ``file`` is then
                removed.
        """
        self._require(name, size)
        digest = hashlib.sha256()
        self._fetch(name, file, size, [digest])
        if digest.hexdigest() != sha256:
            file.unlink(missing_ok=True)
            raise StorageError(
                "S3-HASH",
                f"{self.url}/{name}: sha256 {digest.hexdigest()[:12]}…, expected {sha256[:12]}…",
            )

    def download_listed(self, entry: Entry, file: Path) -> str:
        """Write the version of an object that was listed into a new file, synced; its SHA-256.

        The ETag is compared before and after; where it is the MD5 of the content, as for what was
        put in one request and not encrypted by a key of the user's, the bytes are compared too.

        Raises:
            StorageError: absent, another version by now, or other bytes; ``file`` is then removed.
        """
        digest, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        head = self._require(entry.name, entry.size, entry.etag)
        self._fetch(entry.name, file, entry.size, [digest, md5])
        try:
            self._require(entry.name, entry.size, entry.etag)
            told = _md5_of(head)
            if told is not None and md5.hexdigest() != told:
                raise StorageError(
                    "S3-HASH",
                    f"{self.url}/{entry.name}: md5 {md5.hexdigest()[:12]}…, expected {told[:12]}…",
                )
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        return digest.hexdigest()

    def _require(self, name: str, size: int, etag: str | None = None) -> dict[str, Any]:
        """Return what the store says of an object that must have this length, and this ETag."""
        where = f"{self.url}/{name}".rstrip("/")
        try:
            with self._errors(name):
                head = self._call("head_object", name)
        except _AbsentError:
            raise StorageError("S3-MISSING", f"{where}: missing, expected {size} bytes") from None
        found = head["ContentLength"]
        if etag is not None and head["ETag"] != etag:
            raise StorageError(
                "S3-CHANGED",
                f"{where}: replaced since it was listed, {found} bytes with ETag {head['ETag']}, "
                f"expected {size} with {etag}",
            )
        if found != size:
            raise StorageError("S3-SIZE", f"{where}: {found} bytes, expected {size}")
        return head

    def _fetch(self, name: str, file: Path, size: int, digests: list[Any]) -> None:
        """Write an object's first ``size`` bytes into a new file; removed if that fails."""
        path = f"{self.bucket}/{self.key(name)}"

        def fetch(start: int) -> bytes:
            end = min(start + PART_BYTES, size)
            with self._errors(name):
                data = self._fs.cat_file(path, start=start, end=end)
            if len(data) != end - start:
                raise StorageError(
                    "S3-SHORT",
                    f"{self.url}/{name}: {len(data)} bytes from byte {start} on, expected "
                    f"{end - start}",
                )
            return data

        starts = range(0, size, PART_BYTES)
        try:
            with open(file, "xb") as stream, ThreadPoolExecutor(THREADS) as pool:
                for data in _in_order(pool, (functools.partial(fetch, start) for start in starts)):
                    for digest in digests:
                        digest.update(data)
                    stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            file.unlink(missing_ok=True)
            raise

    def abort_uploads(self) -> int:
        """Abort the multipart uploads below the prefix, of writers that are gone; say how many."""
        with self._errors(""):
            found = self._fs.call_s3(
                "list_multipart_uploads", Bucket=self.bucket, Prefix=f"{self.prefix}/"
            ).get("Uploads", [])
            for upload in found:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.call_s3(
                        "abort_multipart_upload",
                        Bucket=self.bucket,
                        Key=upload["Key"],
                        UploadId=upload["UploadId"],
                    )
        return len(found)

    # ---------------------------------------------------------------- the client

    @property
    def _fs(self) -> Any:
        """Return the client, made anew after a refusal: it then reads the credentials again."""
        if self._made is None:
            try:
                import s3fs
            except ImportError as error:
                raise ConfigError(
                    "S3-PACKAGE",
                    f"{self.url}: {error}; expected the packages for object storage: pip install "
                    "'pdn[s3]'",
                ) from None
            self._made = s3fs.S3FileSystem(
                config_kwargs={"retries": {"mode": "standard", "max_attempts": 3}},
                skip_instance_cache=True,
                use_listings_cache=False,
                max_concurrency=1,
            )
        return self._made

    def _call(self, method: str, name: str, **arguments: Any) -> Any:
        return self._fs.call_s3(method, Bucket=self.bucket, Key=self.key(name), **arguments)

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn what the client raises into errors that name the object and the fix."""
        where = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except (StorageError, ConfigError):
            raise
        except FileExistsError as error:
            raise _ConditionError("S3-CONDITION", f"{where}: {error}") from error
        except FileNotFoundError as error:
            if "bucket" in str(error).lower():
                raise ConfigError(
                    "S3-BUCKET",
                    f"{where}: {error}; expected a bucket that exists: create it, or correct the "
                    "address",
                ) from error
            raise _AbsentError("S3-MISSING", f"{where}: {error}") from error
        except PermissionError as error:
            self._made = None
            raise StorageError(
                "S3-AUTH",
                f"{where}: {error}; expected credentials that may read and write there: renew "
                "them where AWS clients look (environment, ~/.aws/credentials, role)",
            ) from error
        except Exception as error:
            if _http_status(error) == 412:
                raise _ConditionError("S3-CONDITION", f"{where}: {error}") from error
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                raise ConfigError(
                    "S3-AUTH",
                    f"{where}: {error}; expected credentials where AWS clients look: "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials, or a role",
                ) from error
            raise StorageError(
                "S3-IO",
                f"{where}: {type(error).__name__}: {error}; expected the store to answer: check "
                "the connection and its limits, and launch again",
            ) from error


class _AbsentError(StorageError):
    """Tells that there is no object of that name."""


class _ConditionError(StorageError):
    """Tells that the condition of a put did not hold."""


def _md5_of(head: dict[str, Any]) -> str | None:
    """Return the MD5 that an ETag is; None for parts, and for keys of the user's."""
    encrypted = head.get("ServerSideEncryption", "AES256") != "AES256"
    told = _MD5.fullmatch(head["ETag"])
    if encrypted or "SSECustomerAlgorithm" in head or told is None:
        return None
    return told[1]


def _http_status(error: BaseException) -> int | None:
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        cause = cause.__cause__
    return None


def _read(fd: int, start: int, length: int, name: str) -> bytes:
    pieces, end = [], start + length
    while start < end:
        piece = os.pread(fd, end - start, start)
        if not piece:
            raise StorageError(
                "IO", f"{name}: ends at byte {start}, expected {end}; it was cut while it was read"
            )
        pieces.append(piece)
        start += len(piece)
    return b"".join(pieces)


def _in_order(pool: ThreadPoolExecutor, works: Iterator[Callable[[], T]]) -> Iterator[T]:
    """Yield the results in order, with at most ``THREADS`` + 1 works begun and not yielded."""
    begun: list[Future[T]] = []
    for work in works:
        begun.append(pool.submit(work))
        if len(begun) > THREADS:
            yield begun.pop(0).result()
    for future in begun:
        yield future.result()
