"""The page: plain files that a browser gets as they lie in `page/`, under a strict policy.

Knows their names, types and headers. What they do is known to themselves: they ask the native interface for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

FOLDER = Path(__file__).parent / "page"
FIRST = "index.html"
PARTS = (
    *("page.css", "icon.svg", "app.js", "beside.js", "dom.js", "gallery.js", "inputs.js"),
    *("jobs.js", "mask.js", "server.js", "settings.js", "stage.js", "store.js"),
)
PREFIX = "/page/"
# None holds a secret, so they need no key: the page asks for it.
PATHS = ("/", *(PREFIX + name for name in PARTS))
TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Pictures that it shows are its own: blobs of what it fetched, and previews, which come as data.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-cache",  # a browser keeps them, and asks whether they are the same still
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page: its bytes, its type, and a tag that changes with them."""

    data: bytes
    media_type: str
    tag: str

    @classmethod
    def read(cls, path: Path) -> PageFile:
        """Read it from the package."""
        data = path.read_bytes()
        return cls(data, TYPES[path.suffix], f'"{sha256(data).hexdigest()[:20]}"')

    async def answer(self, request: Request) -> Response:
        """The file, or the word that the browser's copy is the same."""
        headers = {**HEADERS, "ETag": self.tag}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.data, media_type=self.media_type, headers=headers)


def routes() -> APIRouter:
    """The page at `/`, and its files below `/page/`, as they are when the server starts; nothing else is read."""
    router = APIRouter(include_in_schema=False)
    for path, name in zip(PATHS, (FIRST, *PARTS), strict=True):
        router.add_api_route(path, PageFile.read(FOLDER / name).answer, methods=["GET"], response_model=None)
    return router
