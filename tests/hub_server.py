"""A small Hugging Face hub on this machine: the real client talks to it, and it notes what the client asks for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served, and what was downloaded.

    Args:
        repos: `owner/name` → a folder with its files, or the error code that the hub answers with (`GatedRepo`).
    """

    repos: Mapping[str, Path | str]
    url: str = ""
    downloads: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    lookups: list[str] = field(default_factory=list)  # revisions that were looked up


@contextmanager
def serve(repos: Mapping[str, Path | str]) -> Iterator[Hub]:
    """Serve the repositories on a free port of this machine."""
    hub = Hub(repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.hub.tokens.add(self.headers.get("Authorization"))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)/?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repo = self.hub.repos.get(match[1], "RepoNotFound") if match else "EntryNotFound"
        if isinstance(repo, str):
            return self._send(b"", {"X-Error-Code": repo}, status=403 if repo == "GatedRepo" else 404)
        if match[3 if api else 2] not in ("main", COMMIT):
            return self._send(b"", {"X-Error-Code": "RevisionNotFound"}, status=404)
        if api:
            self.hub.lookups.append(api[3])
            return self._send(json.dumps(_description(match[1], repo, match[2])).encode())
        return self._send_file(repo, file[3], with_body)

    def _send_file(self, folder: Path, name: str, with_body: bool) -> None:
        if not (folder / name).is_file():
            return self._send(b"", {"X-Error-Code": "EntryNotFound"}, status=404)
        content = (folder / name).read_bytes()
        if with_body:
            self.hub.downloads.append(name)
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT}
        return self._send(content, headers, with_body=with_body)

    def _send(
        self, content: bytes, headers: Mapping[str, str] = {}, *, status: int = 200, with_body: bool = True
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body and self.command == "GET":
            self.wfile.write(content)


def _description(repo_id: str, folder: Path, what: str) -> Any:
    """What the hub's API says of a repository (`revision`), or of its files (`tree`)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    if what == "revision":
        return {"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
    return [
        {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path.read_bytes())}
        for name, path in zip(names, files, strict=True)
    ]


def _digest(content: bytes) -> str:
    """A file's name among the blobs of a cache."""
    return hashlib.sha1(content).hexdigest()
