"""Runs a server: the port, the signals, and the folder that its workers have. What it serves is the application's."""

from __future__ import annotations

import asyncio
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sdtrt.common import interrupts
from sdtrt.common.errors import UsageError
from sdtrt.serve import application
from sdtrt.serve.at_start import check_there
from sdtrt.serve.catalog import Catalog
from sdtrt.serve.dispatch import Dispatcher
from sdtrt.serve.log import Log
from sdtrt.serve.maker import Place
from sdtrt.specs.serve import ServeSpec

MOST_CONNECTIONS = 512
BACKLOG = 256
LINGER_S = 2  # for answers that are on their way when all is done


class _Timed(H11Protocol):
    """A connection that is closed where the header of its first request is slow to come."""

    header_s = 30.0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait."""
        super().connection_made(transport)
        self.loop.call_later(self.header_s, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class _Graceful(uvicorn.Server):
    """Ends well when the work that was accepted is done; at a second signal at once."""

    def __init__(self, config: uvicorn.Config, dispatcher: Dispatcher) -> None:
        super().__init__(config)
        self._dispatcher = dispatcher
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._is_asked = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal ends it."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Python calls it at a signal, between two of its instructions."""
        if self._is_asked or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._drain)
        self._is_asked = True

    def _drain(self) -> None:
        self._dispatcher.log.info("ending", waiting=len(self._dispatcher.queue))
        self._draining = asyncio.create_task(self._drained())

    async def _drained(self) -> None:
        await self._dispatcher.drain()
        self.should_exit = True


def run(spec: ServeSpec, *, quiet: bool = False) -> None:
    """Serve until a signal ends the process.

    Raises:
        UsageError, ModelError: where a model that requests may name is not there, before anything is loaded.
        UsageError: where the port can't be had.
    """
    catalog, log, stdout = Catalog.of(spec), Log(quiet=quiet), sys.stdout
    check_there(catalog, spec)
    listening = _listen(spec)
    with tempfile.TemporaryDirectory(prefix="sdtrt-serve-") as folder, listening, _places(spec, log) as places:
        dispatcher = Dispatcher(spec, catalog, Path(folder), log, places)
        config = uvicorn.Config(
            application.build(dispatcher),
            http=_Timed,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            backlog=BACKLOG,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=LINGER_S,
            proxy_headers=False,
        )
        _Timed.header_s = spec.limits.body_s
        interrupts.stop_listening()  # from here on a signal ends it when its work is done
        host, port = listening.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        log.info("listening", url=f"http://{name}:{port}", models=list(catalog.models), docs="/docs")
        print(f"http://{name}:{port}", file=stdout, flush=True)
        _Graceful(config, dispatcher).run([listening])
    sys.stdout.flush()


@contextmanager
def _places(spec: ServeSpec, log: Log) -> Iterator[Sequence[Place]]:
    """Where pictures are made: on Ray's replicas where they are asked for, else as the dispatcher has it."""
    if spec.ray is None:
        yield ()
        return
    from sdtrt.serve import ray_cluster

    with ray_cluster.replicas(spec, spec.ray, log) as places:
        yield places


def _listen(spec: ServeSpec) -> socket.socket:
    """The port, which may be 0 for any that is free."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(spec.host, spec.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        raise UsageError(
            f"can't listen on {spec.host}, port {spec.port}: {error.strerror or error}",
            hint="use another --port (0 for any that is free), or end what has it",
        ) from error
    return listening
