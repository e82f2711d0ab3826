"""A server of the tests' own: in this process, with PyTorch, so that it starts at once; and what talks to it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest


class ThreadWorker:
    """Makes of a `WorkerProcess` one whose worker is a thread of this process."""

    def __new__(cls, *arguments):
        from sdtrt.serve.frames import Frame, Pipe
        from sdtrt.serve.worker import Worker
        from sdtrt.serve.worker_process import WorkerProcess

        class _Thread(WorkerProcess):
            async def start(self):
                loop = asyncio.get_running_loop()
                (there, here), (back, forth) = os.pipe(), os.pipe()
                self._stream = asyncio.StreamReader()
                protocol = asyncio.StreamReaderProtocol(self._stream)
                await loop.connect_read_pipe(lambda: protocol, os.fdopen(back, "rb"))
                self._writing = os.fdopen(here, "wb", buffering=0)
                pipe = Pipe(os.fdopen(there, "rb"), os.fdopen(forth, "wb"))
                self._answers[0] = asyncio.Queue()
                worker = Worker(self._spec, pipe, left=lambda: None)
                threading.Thread(target=worker.run, daemon=True).start()
                self._reader = asyncio.create_task(self._read())

            @property
            def pid(self):
                return os.getpid()

            async def send(self, frame: Frame):
                self._writing.write(frame.encode())

            async def end(self):
                self._reader.cancel()
                self._writing.close()

            async def _read(self):
                from sdtrt.serve.frames import read_frame

                while (frame := await read_frame(self._stream)) is not None:
                    if (number := frame.data.get("batch", 0)) in self._answers:
                        self._answers[number].put_nowait(frame)

        return _Thread(*arguments)


class Serving:
    """A server in a thread, on a port of its own."""

    def __init__(self, spec, folder):
        import uvicorn

        from sdtrt.serve import application
        from sdtrt.serve.catalog import Catalog
        from sdtrt.serve.dispatch import Dispatcher
        from sdtrt.serve.log import Log
        from sdtrt.serve.server import _listen

        self.spec, self.log = spec, (folder / "log").open("w+")
        listening = _listen(spec)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.dispatcher = Dispatcher(spec, Catalog.of(spec), folder, Log(self.log))
        config = uvicorn.Config(application.build(self.dispatcher), log_config=None, timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)

    def __enter__(self):
        self.thread.start()
        until = time.monotonic() + 180  # on a busy machine
        while not self.dispatcher.is_ready:
            assert time.monotonic() < until, "the server does not become ready"
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)
        self.log.close()

    def lines(self):
        """The log."""
        self.log.seek(0)
        return self.log.read().splitlines()


@contextmanager
def in_thread(folder, **options):
    """A server of the built-in model, whose worker is a thread: its working folder is this process's."""
    from sdtrt.serve import dispatch
    from sdtrt.specs.serve import ServeSpec

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(dispatch, "WorkerProcess", ThreadWorker)
        with Serving(ServeSpec(port=0, engine_dir=str(folder / "engines"), **options), folder) as server:
            yield server


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """A server in PyTorch, with small limits."""
    from sdtrt.specs.serve import Limits

    limits = Limits(body_bytes=2**20, body_s=1.0, pixels=256 * 256, steps=20, images=4, prompt=500, waiting=12)
    with in_thread(tmp_path_factory.mktemp("serving"), backend="torch", limits=limits, preview="own") as server:
        yield server


@pytest.fixture
def start(tmp_path):
    """Start servers with other options; they end with the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(in_thread(tmp_path, **options))
