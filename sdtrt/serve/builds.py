"""Has engines built that are missing, each in a process of its own, while the rest is served.

Knows pictures that wait, and a worker's frames. Knows no queue: who waits goes back where it came from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import astuple

from sdtrt.serve.jobs import Failure, Picture
from sdtrt.serve.log import Log
from sdtrt.serve.maker import Maker, Place
from sdtrt.serve.metrics import Metrics
from sdtrt.serve.worker_process import BUILD_PATIENCE_S, PATIENCE_S, WorkerGone, failure_of, plain

IN_VAIN = Failure("EngineError", "its engines were built, and none fits", "the server's log says which were built")

Built = Callable[[Sequence[Picture], Failure | None], object]


class Builds:
    """The builds that are asked for, one after the other.

    Args:
        worker: gives one that is not started.
        built: gets the pictures that waited, and why there are no engines, where there are none.
    """

    def __init__(self, worker: Place, log: Log, metrics: Metrics, built: Built) -> None:
        self._worker, self._log, self._metrics, self._built = worker, log, metrics, built
        self._waiting: dict[str, list[Picture]] = {}
        self._asked = asyncio.Event()

    def ask(self, batch: Sequence[Picture]) -> None:
        """Let the pictures of a batch wait until their engines are built; what was built for in vain ends in words."""
        self._built([one for one in batch if one.was_built], IN_VAIN)
        waiting = [one for one in batch if not one.is_over]
        for picture in waiting:
            picture.attempts, picture.was_built = picture.attempts - 1, True  # it was not begun
            picture.job.settle(picture, "building")
        if waiting:
            self._waiting.setdefault(waiting[0].key, []).extend(waiting)
            self._asked.set()

    async def run(self) -> None:
        """Build what is asked for, for ever."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            while self._waiting:
                key, waiting = next(iter(self._waiting.items()))
                wanted = next((one for one in waiting if not one.is_over), None)
                failure = None if wanted is None else await self._build(wanted)
                self._metrics.builds.labels("done" if failure is None else "failed").inc()
                self._built(self._waiting.pop(key), failure)

    async def _build(self, picture: Picture) -> Failure | None:
        """Build the engines of one picture; why not, where that fails."""
        worker = self._worker()
        try:
            await worker.start()
            about = await worker.about_itself(PATIENCE_S)
            if about.kind != "ready":
                raise WorkerGone(about.data.get("message", ""))
            return await self._built_by(worker, picture)
        except WorkerGone as gone:
            return Failure("BuildError", f"the process that built the engines ended ({gone})", "its log says more")
        finally:
            await worker.end()

    async def _built_by(self, worker: Maker, picture: Picture) -> Failure | None:
        """Follow a build. Raises `WorkerGone`."""
        request, failure = picture.job.request, None
        data = {**plain(request), "units": [], "jobs": [astuple(picture.drawn)]}
        async for frame in await worker.ask("build", data, list(request.uploads.values()), BUILD_PATIENCE_S):
            if frame.kind == "log":
                self._log.info("build", job=picture.job.id, text=frame.data["text"])
            failure = failure or failure_of(frame, self._log)
        return failure
