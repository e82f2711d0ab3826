"""The application: all routes behind the guard, errors in each interface's shape, health, metrics, the page, the API's.

Knows FastAPI. What the interfaces mean is known to each of them.
"""

from __future__ import annotations

import html
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from sdtrt.common.errors import SdtrtError
from sdtrt.common.version import __version__
from sdtrt.serve import native, openai_api, page_files, picture_settings, webui_api, webui_units
from sdtrt.serve.answers import Answer, Refusal, bug
from sdtrt.serve.dispatch import Dispatcher
from sdtrt.serve.following import ClientLeft
from sdtrt.serve.guard import Guard
from sdtrt.specs.serve import ServeSpec

CLIENT_LEFT = 499  # that nobody reads, but the log
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


def build(dispatcher: Dispatcher) -> ASGIApp:
    """The whole application; its life is the dispatcher's."""
    spec = dispatcher.spec

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        await dispatcher.start()
        try:
            yield
        finally:
            await dispatcher.stop()

    app = FastAPI(title="sdtrt", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    for module in (native, picture_settings, openai_api, webui_api):
        app.include_router(module.routes(dispatcher))
    app.include_router(webui_units.routes(dispatcher.catalog))
    app.include_router(page_files.routes())
    _add_operations(app, dispatcher)
    _add_page_of_api(app)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(SdtrtError, _mendable)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(ClientLeft, _left)
    app.add_exception_handler(Exception, _bug)
    return _with_origins(Guard(app, spec, dispatcher.log, dispatcher.metrics), spec)


def _with_origins(app: ASGIApp, spec: ServeSpec) -> ASGIApp:
    """The application for pages of other sites, too, where they are named."""
    if not spec.origins:
        return app
    exposed = ["Location", "Retry-After", "X-Request-Id"]
    return CORSMiddleware(app, spec.origins, allow_methods=["*"], allow_headers=["*"], expose_headers=exposed)


def _add_operations(app: FastAPI, dispatcher: Dispatcher) -> None:
    @app.get("/healthz", tags=["operation"], response_class=PlainTextResponse)
    async def healthz() -> str:
        """Say that the server lives."""
        return "ok"

    @app.get("/readyz", tags=["operation"], response_class=PlainTextResponse, responses={503: {}})
    async def readyz() -> PlainTextResponse:
        """Say whether it takes pictures now, and the sizes that it was to make ready are."""
        ready = dispatcher.is_ready
        return PlainTextResponse("ready" if ready else "not ready", 200 if ready else 503)

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Give the numbers to Prometheus."""
        return Response(dispatcher.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_page_of_api(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        """The API on a page, which loads nothing from elsewhere."""
        return HTMLResponse(_page(app.openapi()), headers={"Content-Security-Policy": PAGE_POLICY})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.answer(request.url.path)


async def _mendable(request: Request, error: Exception) -> Response:
    assert isinstance(error, SdtrtError)
    return Refusal.of(error).answer(request.url.path)


async def _malformed(request: Request, error: Exception) -> Response:
    """A body or a parameter of another form: where it is wrong, and how."""
    assert isinstance(error, RequestValidationError)
    first: Mapping[str, Any] = next(iter(error.errors()), {"loc": (), "msg": "it can't be read"})
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    status = 400 if request.url.path.startswith("/v1/") else 422
    message = f"{place}: {first['msg']}" if place else f"the body: {first['msg']}"
    return Refusal(status, "Malformed", message, "/docs says what it has to be").answer(request.url.path)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, "NoRoute", str(error.detail), "/docs lists what there is", error.headers)
    return refusal.answer(request.url.path)


async def _left(_request: Request, _error: Exception) -> Response:
    return Answer({}, CLIENT_LEFT)


async def _bug(request: Request, _error: Exception) -> Response:
    """A fault of the server, which the guard writes into its log."""
    return bug(request.scope["state"]["request_id"]).answer(request.url.path)


def _page(schema: Mapping[str, Any]) -> str:
    """The API as one page of plain HTML."""
    rows = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            words = html.escape(route.get("description") or route.get("summary", ""))
            rows.append(f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td><td>{words}</td></tr>")
    bodies = "".join(_body(name, one) for name, one in schema.get("components", {}).get("schemas", {}).items())
    style = "body{font:16px sans-serif;max-width:70em;margin:2em auto}td{padding:.2em 1em .2em 0;vertical-align:top}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>sdtrt: the API</title><style>{style}</style>'
        f'<h1>sdtrt {__version__}</h1><p><a href="/openapi.json">openapi.json</a></p>'
        f"<table>{''.join(rows)}</table>{bodies}</html>"
    )


def _body(name: str, schema: Mapping[str, Any]) -> str:
    """What a body may have."""
    fields = "".join(
        f"<tr><td><code>{html.escape(field)}</code></td><td>{html.escape(one.get('description', ''))}</td>"
        f"<td>{html.escape(str(one.get('default', '')))}</td></tr>"
        for field, one in schema.get("properties", {}).items()
    )
    return f"<h2>{html.escape(name)}</h2><p>{html.escape(schema.get('description', ''))}</p><table>{fields}</table>"
