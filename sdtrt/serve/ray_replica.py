"""A replica of Ray's: it has a worker process of its own on its GPU, and hands frames between it and the front door.

It is ready when its worker is, and builds no engine before that. Where its worker ends it ends, too, and Ray starts
another one. Knows no queue and no job; of Ray it knows nothing but how it is called.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtrt.serve.frames import Frame
from sdtrt.serve.worker_process import BUILD_PATIENCE_S, PATIENCE_S, WorkerGone, WorkerProcess
from sdtrt.specs.serve import ServeSpec


class Pictures:
    """Makes one batch at a time, and meanwhile cancels, counts tokens and builds engines."""

    async def __init__(self, spec: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._spec, self._numbers = ServeSpec.from_json(spec), itertools.count(1)
        self._folder = Path(tempfile.mkdtemp(prefix="sdtrt-replica-"))
        self._turn = asyncio.Lock()
        self._worker = self._process()
        self._about = await _started(self._worker)
        self._watching = asyncio.create_task(self._end_with_worker())

    def _process(self) -> WorkerProcess:
        return WorkerProcess(self._spec, self._folder / f"{next(self._numbers)}")

    async def _end_with_worker(self) -> None:
        await self._worker.gone.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(1)

    async def about_itself(self) -> list[Frame]:
        """What its worker said when it had started."""
        return [self._about]

    async def make(self, data: Mapping[str, Any], blobs: Sequence[bytes]) -> AsyncIterator[Frame]:
        """Make a batch, and tell what comes of it. Another one waits: it is here where no other replica is up."""
        async with self._turn:
            async for frame in await self._worker.ask("make", data, blobs, PATIENCE_S):
                yield frame

    async def cancel(self, units: Sequence[str]) -> list[Frame]:
        """Want pictures no more. Those that are not made here are no matter."""
        await self._worker.send(Frame("cancel", {"units": units}))
        return []

    async def tokens(self, data: Mapping[str, Any], _blobs: Sequence[bytes]) -> list[Frame]:
        """Count tokens."""
        return [frame async for frame in await self._worker.ask("tokens", data, (), PATIENCE_S)]

    async def build(self, data: Mapping[str, Any], blobs: Sequence[bytes]) -> list[Frame]:
        """Build engines in a process of its own. Where another replica builds the same in this directory, it waits."""
        worker = self._process()
        try:
            await _started(worker)
            return [frame async for frame in await worker.ask("build", data, blobs, BUILD_PATIENCE_S)]
        finally:
            await worker.end()

    async def __del__(self) -> None:
        self._watching.cancel()
        await self._worker.end()
        shutil.rmtree(self._folder, ignore_errors=True)


async def _started(worker: WorkerProcess) -> Frame:
    """Start a worker, and get what it says about itself. Raises `WorkerGone`."""
    await worker.start()
    about = await worker.about_itself(PATIENCE_S)
    if about.kind != "ready":
        raise WorkerGone(about.data.get("message") or about.data.get("text", ""))
    return about
