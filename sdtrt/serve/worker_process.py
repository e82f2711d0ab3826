"""A server's side of a worker: starts the process, sends it frames, and gives out what it answers.

Knows the process and its frames. What is made of them is the dispatcher's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtrt.serve.catalog import without_paths
from sdtrt.serve.frames import Frame, read_frame
from sdtrt.serve.jobs import Failure
from sdtrt.serve.log import Log
from sdtrt.serve.requests import PictureRequest
from sdtrt.specs.serve import ServeSpec

PATIENCE_S = 600.0  # for a word of a worker: opening a large model takes a while
BUILD_PATIENCE_S = 3600.0  # for a word of a build
BUG = Failure("ServerError", "this picture failed by a fault of the server", "its log says more")
LAST_S = 5.0  # from its last frame to its end
CODE = "import sys; sys.path[:] = [p for p in sys.path if p]; from sdtrt.serve.worker import serve; serve()"


class WorkerGone(Exception):  # noqa: N818 (what becomes of its work is for the dispatcher to say)
    """The process is gone, with its exit code, or without one where it was ended for saying nothing."""


class WorkerProcess:
    """One worker.

    Args:
        folder: where it works; made here, and its own.
        device: the number of the GPU that it sees; None for what this process sees.
    """

    def __init__(self, spec: ServeSpec, folder: Path, device: int | None = None) -> None:
        self._spec, self._folder, self._device = spec, folder, device
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Queue[Frame | None]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self.gone = asyncio.Event()

    async def start(self) -> None:
        """Start the process; what it says about itself comes as the answer to batch 0."""
        self._folder.mkdir(mode=0o700)
        paths = os.pathsep.join(path for path in sys.path if path)  # it finds what this process finds
        device = {} if self._device is None else {"CUDA_VISIBLE_DEVICES": str(self._device)}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            CODE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **device, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # a Ctrl-C at the terminal is for the server to handle
        )
        self._answers[0] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read())
        await self.send(Frame("hello", {"spec": self._spec.to_json(), "folder": str(self._folder)}))

    async def send(self, frame: Frame) -> None:
        """Send a frame. Raises `WorkerGone`."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(frame.encode())
            await self._process.stdin.drain()
        except (ConnectionError, RuntimeError) as error:
            raise WorkerGone(str(error)) from error

    async def ask(self, kind: str, data: Mapping[str, Any], blobs: Sequence[bytes], patience_s: float) -> Answers:
        """Send a request, and get its answers. Raises `WorkerGone`."""
        number = next(self._numbers)
        self._answers[number] = asyncio.Queue()
        await self.send(Frame(kind, {**data, "batch": number}, tuple(blobs)))
        return Answers(self, number, patience_s)

    async def about_itself(self, patience_s: float) -> Frame:
        """What it says when it has started: `ready`, or what is wrong. Raises `WorkerGone`."""
        return await self.answer(0, patience_s)

    async def answer(self, number: int, patience_s: float) -> Frame:
        """The next answer to a request. Raises `WorkerGone`, also where it says nothing for so long."""
        try:
            frame = await asyncio.wait_for(self._answers[number].get(), patience_s)
        except TimeoutError:
            await self.end()
            raise WorkerGone(f"it said nothing for {patience_s:.0f} s") from None
        if frame is None:
            raise WorkerGone(await self._how_it_ended())
        return frame

    def forget(self, number: int) -> None:
        """Expect no more answers to a request."""
        self._answers.pop(number, None)

    async def end(self) -> None:
        """End the process now."""
        if self._process is not None:
            self._kill()
            await self._process.wait()
        if self._reader is not None:
            await self._reader

    def _kill(self) -> None:
        """End the process. Not by `Process.kill`, which may wait for it in the place of asyncio's own watcher."""
        assert self._process is not None
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def _how_it_ended(self) -> str:
        assert self._process is not None
        code = await self._process.wait()
        return f"exit code {code}" if code >= 0 else f"signal {-code}"

    async def _read(self) -> None:
        """Hand out what it says, until it is gone."""
        assert self._process is not None
        assert self._process.stdout is not None
        while (frame := await read_frame(self._process.stdout)) is not None:
            number = frame.data.get("batch", 0)
            if number in self._answers:
                self._answers[number].put_nowait(frame)
        try:
            await asyncio.wait_for(self._process.wait(), LAST_S)
        except TimeoutError:  # it sends no frames any more: it is no worker, whatever it does
            self._kill()
        self.gone.set()
        for answers in self._answers.values():
            answers.put_nowait(None)


class Answers:
    """The answers to one request, until it is done."""

    def __init__(self, worker: WorkerProcess, number: int, patience_s: float) -> None:
        self._worker, self.number, self._patience_s = worker, number, patience_s

    async def __aiter__(self) -> AsyncIterator[Frame]:
        try:
            while (frame := await self._worker.answer(self.number, self._patience_s)).kind != "done":
                yield frame
            yield frame
        finally:
            self._worker.forget(self.number)


def plain(request: PictureRequest) -> dict[str, Any]:
    """A request as frames have it; its uploads are blobs."""
    return {"request": request.to_json(), "uploads": list(request.uploads)}


def failure_of(frame: Frame, log: Log) -> Failure | None:
    """What a frame says that went wrong, and is logged whole; None where it says nothing of that kind."""
    if frame.kind == "bug":
        log.error("bug", text=frame.data["text"])
        return BUG
    if frame.kind != "error":
        return None
    kind, message, hint = (frame.data[name] for name in ("error", "message", "hint"))
    log.warn("refused", kind=kind, message=message, hint=hint)
    return Failure(kind, without_paths(message), without_paths(hint))
