"""A hub on loopback, with the faults that a hub can have.

It speaks the HTTP of huggingface.co as far as `datasets` and `huggingface_hub` use it. The clients
read `HF_ENDPOINT` when they are imported: give it to a child process, with `LocalHub.environment`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class LocalHub:
    """Serve ``<root>/datasets/<owner>/<name>`` and ``<root>/models/<owner>/<name>``.

    Attributes:
        gated, gone: ids that ask for an accepted agreement, or do not exist.
        statuses: id to the HTTP status of its refusal. The hub says 401 without an account, as
            by default for what does not exist, and 403, for what is gated, or 404 with one.
        revisions: what there is beside ``main``.
        failing: id to an HTTP status that its files answer with, and how many times.
        cut: ids whose next file ends in the middle of a body, and how many times.
        redirect: send files from another path, as the hub's storage does.
        requests: (method, path) of all that was asked.
    """

    def __init__(self, root: Path):
        self.root, self.redirect = root, True
        self.gated: set[str] = set()
        self.gone: set[str] = set()
        self.statuses: dict[str, int] = {}
        self.revisions = {COMMIT}
        self.failing: dict[str, list[int]] = {}
        self.cut: dict[str, int] = {}
        self.slow: float = 0.0
        self.closed = False
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a child whose hub is this one, and whose cache is in `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        more = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return kept | more | {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

    def add(self, kind: str, name: str, file: str, content: bytes) -> None:
        path = self.root / kind / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def close(self) -> None:
        """Answer nothing any more, also where a client has kept its connection."""
        self.closed = True
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: LocalHub
    commit = COMMIT  # of the revision that was asked for

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        if hub.closed:
            self.close_connection = True
            return
        hub.requests.append((self.command, path))
        time.sleep(hub.slow)
        if path.startswith("/storage/"):
            _, _, self.commit, rest = path.split("/", 3)
            return self._send_file(hub.root / rest)
        api = re.fullmatch(
            r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?",
            path,
        )
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        if api:
            kind, name, action, revision, rest = api.groups()
        elif file:
            kind = "datasets" if file[1] else "models"
            name, revision, rest = file[2], file[3], file[4]
            action = "resolve"
        else:
            return self._send(404, {"error": "Not Found"})
        folder = hub.root / kind / name
        if name in hub.gone or not folder.is_dir():
            status = hub.statuses.get(name, 401)
            return self._send(status, {"error": "Repository not found"}, code="RepoNotFound")
        if revision not in (None, "main", *hub.revisions):
            return self._send(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        self.commit = revision if revision in hub.revisions else COMMIT
        if action == "resolve":
            return self._resolve(kind, name, folder / rest)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if action == "paths-info":
            body = self._body.decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else _form(body)
            entries = [_entry(folder, p) for p in sorted(folder.rglob("*"))]
            return self._send(200, [e for e in entries if e["path"] in wanted])
        if action == "tree":
            here = folder / (rest or "")
            if not here.is_dir():
                return self._send(404, {"error": "Entry not found"}, code="EntryNotFound")
            whole = "recursive=true" in urlsplit(self.path).query.lower()
            below = here.rglob("*") if whole else here.iterdir()
            return self._send(200, [_entry(folder, p) for p in sorted(below)])
        self._send(
            200,
            {
                "id": name,
                "sha": self.commit,
                "private": False,
                "gated": "auto" if name in hub.gated else False,
                "siblings": [{"rfilename": p.relative_to(folder).as_posix()} for p in files],
                "tags": [],
                "downloads": 0,
                "lastModified": "2024-01-01T00:00:00.000Z",
            },
        )

    def _resolve(self, kind: str, name: str, path: Path) -> None:
        hub = self.server_hub
        if name in hub.gated:
            return self._send(hub.statuses.get(name, 403), {"error": "gated"}, code="GatedRepo")
        if hub.failing.get(name):
            return self._send(hub.failing[name].pop(), {"error": "busy"})
        if not path.is_file():
            return self._send(404, {"error": "Entry not found"}, code="EntryNotFound")
        if not hub.redirect:
            return self._send_file(path, name)
        self.send_response(302)
        place = path.relative_to(hub.root).as_posix()
        self.send_header("Location", f"/storage/{self.commit}/{place}")
        self._file_headers(path)
        self.send_header("X-Linked-Size", str(path.stat().st_size))
        self.send_header("X-Linked-Etag", f'"{_digest(path)}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file_headers(self, path: Path) -> None:
        self.send_header("ETag", f'"{_digest(path)}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Accept-Ranges", "bytes")

    def _send_file(self, path: Path, name: str = "") -> None:
        hub = self.server_hub
        name = name or "/".join(path.relative_to(hub.root).parts[1:3])
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (
            (int(asked[1]), int(asked[2] or len(content) - 1)) if asked else (0, len(content) - 1)
        )
        part = content[first : last + 1]
        self.send_response(206 if asked else 200)
        self._file_headers(path)
        if asked:
            self.send_header(
                "Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            )
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.cut.get(name, 0) > 0 and len(part) > 1:
            hub.cut[name] -= 1
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return
        self.wfile.write(part)

    def _send(self, status: int, content, code: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _form(body: str) -> list[str]:
    from urllib.parse import parse_qs

    return parse_qs(body).get("paths", [])


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _entry(folder: Path, path: Path) -> dict:
    if path.is_dir():
        name = path.relative_to(folder).as_posix()
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    return {
        "type": "file",
        "path": path.relative_to(folder).as_posix(),
        "size": path.stat().st_size,
        "oid": _digest(path)[:40],
    }
