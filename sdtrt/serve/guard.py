"""What stands before all routes: who may ask, how large and how slow a body may be, request ids and the log.

Knows HTTP and the server's own limits. Knows no interface and no job.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import re
import secrets
import time
import traceback
from collections.abc import Mapping
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdtrt.serve import page_files
from sdtrt.serve.answers import Refusal, bug
from sdtrt.serve.log import Log
from sdtrt.serve.metrics import Metrics
from sdtrt.specs.serve import ServeSpec

# That say one word, and that whoever watches over the server has no key for; and the page, which asks for the key.
OPEN_PATHS = frozenset(("/healthz", "/readyz", *page_files.PATHS))
_REQUEST_ID = re.compile(r"[\w.-]{1,64}")
SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
POLICY = "default-src 'none'; frame-ancestors 'none'"  # of what is no page


class Guard:
    """The outermost part of the application."""

    def __init__(self, app: ASGIApp, spec: ServeSpec, log: Log, metrics: Metrics) -> None:
        self._app, self._spec, self._log, self._metrics = app, spec, log, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        await _Exchange(self, scope, send).run(receive)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on. Raises `Refusal`."""
        headers = Headers(scope=scope)
        self._check_host(headers)
        self._check_origin(headers, scope["path"])
        self._check_key(headers, scope["path"])
        await self._app(scope, await self._bounded(headers, receive), send)

    def note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        """Count an answer, and write its line."""
        self._metrics.answers.labels(str(status)).inc()
        client = (scope.get("client") or ("",))[0]
        facts = {"method": scope["method"], "path": scope["path"], "status": status, "client": client}
        self._log.info("request", request_id=request_id, **facts, ms=round(1000 * seconds, 1))

    def note_bug(self, request_id: str) -> None:
        """Write down an exception that nobody expected."""
        self._log.error("bug", request_id=request_id, text=traceback.format_exc())

    def _check_host(self, headers: Headers) -> None:
        """Refuse names that are not this server's: a page elsewhere may have its own name lead here (DNS rebinding)."""
        if not self._spec.is_local and not self._spec.hosts:
            return  # the key keeps pages out, which don't know it
        name = _host_of(headers.get("host", ""))
        if name not in ("localhost", *self._spec.hosts) and not _is_loopback(name):
            raise Refusal(421, "WrongHost", f"this server is not called {name!r}", "start it with --allow-host NAME")

    def _check_origin(self, headers: Headers, path: str) -> None:
        """Refuse what a page of another site sends."""
        origin = headers.get("origin")
        if origin is not None and ("*" in self._spec.origins or origin in self._spec.origins):
            return
        own = headers.get("host", "")
        foreign = origin is not None and not (own and origin in (f"http://{own}", f"https://{own}"))
        elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site") and path != "/"
        if foreign or elsewhere:
            raise Refusal(
                403, "CrossSite", "pages of other sites may not ask this server", "start it with --cors ORIGIN"
            )

    def _check_key(self, headers: Headers, path: str) -> None:
        """Refuse who lacks the key; the time that it takes tells nothing of it."""
        if self._spec.api_key is None or path in OPEN_PATHS:
            return
        given = sha256(_key_of(headers).encode("utf-8", "surrogateescape")).digest()
        if not hmac.compare_digest(given, sha256(self._spec.api_key.encode()).digest()):
            hint = "send it as Authorization: Bearer KEY"
            raise Refusal(401, "WrongKey", "the API key is missing or wrong", hint, {"WWW-Authenticate": "Bearer"})

    async def _bounded(self, headers: Headers, receive: Receive) -> Receive:
        """What gives the body, which is read here whole: a slow or large one occupies nothing else."""
        limits, body = self._spec.limits, bytearray()
        hint = f"send at most {limits.body_bytes} bytes"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()) or int(length) > limits.body_bytes:
            raise Refusal(413, "BodyTooLarge", "the body is too large", hint, {"Connection": "close"})
        try:
            async with asyncio.timeout(limits.body_s):
                while (message := await receive())["type"] == "http.request":
                    body += message.get("body", b"")
                    if len(body) > limits.body_bytes:
                        raise Refusal(413, "BodyTooLarge", "the body is too large", hint, {"Connection": "close"})
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            words = f"the body was not there after {limits.body_s:g} s"
            raise Refusal(408, "BodyTooSlow", words, "send it faster", {"Connection": "close"}) from None
        first: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
        if message["type"] == "http.disconnect":
            first = [message]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, send: Send) -> None:
        self._guard, self._scope, self._send = guard, scope, send
        given = Headers(scope=scope).get("x-request-id", "")
        self._id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        self._status = 0

    async def run(self, receive: Receive) -> None:
        """Serve it; whatever goes wrong is answered, and logged."""
        began = time.monotonic()
        self._scope.setdefault("state", {})["request_id"] = self._id
        try:
            await self._guard.serve(self._scope, receive, self._sending)
        except Refusal as refusal:
            await refusal.answer(self._scope["path"])(self._scope, receive, self._sending)
        except Exception:
            self._guard.note_bug(self._id)
            if self._status:
                return  # an answer has begun: what is open is closed
            await bug(self._id).answer(self._scope["path"])(self._scope, receive, self._sending)
        finally:
            self._guard.note(self._scope, self._id, self._status, time.monotonic() - began)

    async def _sending(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _headers(self._id, headers).items():
                headers[name] = value
        await self._send(message)


def _headers(request_id: str, own: Mapping[str, Any]) -> dict[str, str]:
    policy = own.get("content-security-policy", POLICY)
    return {**SAFE_HEADERS, "content-security-policy": policy, "x-request-id": request_id}


def _host_of(header: str) -> str:
    """The name in a `Host` header, without the port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _key_of(headers: Headers) -> str:
    """The key that a request has: as a bearer, as the password of whichever user, or in a header of its own."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8", "surrogateescape").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return headers.get("x-api-key", "")
