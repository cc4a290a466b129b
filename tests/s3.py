"""An S3 server on loopback: moto over HTTP, with failures on demand in front of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from wsgiref.types import StartResponse, WSGIEnvironment

os.environ["S3_UPLOAD_PART_MIN_SIZE"] = "256"  # bytes; read when moto is imported

import boto3
import s3fs  # noqa: F401 (ranks are forked beside the server's threads: they must not import)
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "pdn-tests"


@dataclass
class Rule:
    """Fails or holds the requests that it matches.

    Attributes:
        matches: takes the method and the path with its query.
        status, code: of the answer, e.g. ``503 Slow Down``; None: the request is served.
        times: how many are failed before they are served again.
        lands: whether what is failed is done all the same: the answer alone is lost.
        seen: set at the first match.
        go_on: what a held request waits for.
    """

    matches: Callable[[str, str], bool]
    status: str | None = None
    code: str = ""
    times: float = float("inf")
    lands: bool = False
    count: int = 0
    seen: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


class Quiet(WSGIRequestHandler):
    def log(self, *args: object) -> None:
        """Print nothing."""


class S3Server:
    """Serves one bucket; ``environment`` leads every AWS client there."""

    def __init__(self):
        self.rules: list[Rule] = []
        self._lock = threading.Lock()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet
        )
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "canary-of-the-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )

    def empty(self) -> None:
        """Make the bucket anew, and drop all rules."""
        self.rules.clear()
        self._request("POST", "/moto-api/reset")
        self.client.create_bucket(Bucket=BUCKET)

    def _request(self, method: str, path: str) -> None:
        import urllib.request

        url = self.environment["AWS_ENDPOINT_URL"] + path
        with urllib.request.urlopen(urllib.request.Request(url, method=method)):
            pass

    def close(self) -> None:
        for rule in self.rules:
            rule.go_on.set()
        self._server.shutdown()

    def _answer(self, environ: WSGIEnvironment, start: StartResponse):
        method = environ["REQUEST_METHOD"]
        path = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        for rule in list(self.rules):
            with self._lock:
                hit = rule.count < rule.times and rule.matches(method, path)
                rule.count += hit
            if not hit:
                continue
            rule.seen.set()
            if rule.status is None:
                rule.go_on.wait(60)
                continue
            if rule.lands:
                list(self._app(environ, lambda *_: lambda data: None))
            else:  # The connection must not be left with a body that nobody reads.
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = f"<Error><Code>{rule.code}</Code><Message>on demand</Message></Error>".encode()
            start(rule.status, [("Content-Type", "application/xml"), ("Connection", "close")])
            return [b"" if method == "HEAD" else body]
        return self._app(environ, start)

    @contextmanager
    def rule(self, matches: Callable[[str, str], bool], **options) -> Iterator[Rule]:
        """Have a rule hold inside."""
        rule = Rule(matches, **options)
        self.rules.append(rule)
        try:
            yield rule
        finally:
            rule.go_on.set()
            if rule in self.rules:
                self.rules.remove(rule)

    # ---------------------------------------------------------------- what lies there

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def uploads(self) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return [upload["Key"] for upload in found]
