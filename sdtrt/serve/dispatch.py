"""Brings pictures to workers and what comes of them back to their jobs, and starts workers anew.

Knows the queue, the workers' frames and jobs. Knows no HTTP, no pipeline and no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

from sdtrt.common.errors import SdtrtError, UsageError
from sdtrt.serve.builds import Builds
from sdtrt.serve.catalog import Catalog, without_paths
from sdtrt.serve.fair_queue import FairQueue
from sdtrt.serve.frames import Frame
from sdtrt.serve.jobs import Failure, Job, JobStore, Picture
from sdtrt.serve.log import Log
from sdtrt.serve.maker import Maker, Place
from sdtrt.serve.metrics import Metrics
from sdtrt.serve.requests import PictureRequest
from sdtrt.serve.worker_process import PATIENCE_S, WorkerGone, WorkerProcess, failure_of, plain
from sdtrt.specs.serve import ServeSpec

MOST_ATTEMPTS = 2  # to make a picture: whatever ends two workers would end a third
LONGEST_PAUSE_S = 30.0  # before a worker that keeps ending is started again
WARM_UP_STEPS = 2  # as few as all schedulers take
WARM_UP = "warm-up"  # the interface, and the client, of pictures that make sizes ready


class Ending(Exception):  # noqa: N818 (no failure: the server was asked to)
    """The server takes no more requests."""


class Dispatcher:
    """The middle of a server.

    Args:
        folder: where workers have folders of their own.
        places: that each have a worker at any time; none for a process on each GPU of this machine.
    """

    def __init__(self, spec: ServeSpec, catalog: Catalog, folder: Path, log: Log, places: Sequence[Place] = ()) -> None:
        self.spec, self.catalog, self.log = spec, catalog, log
        self.queue = FairQueue(spec.limits.waiting)
        self.store = JobStore(spec.limits.kept_bytes)
        self.metrics = Metrics(lambda: len(self.queue))
        self.models: list[Mapping[str, Any]] = []
        self.is_ending = False
        self.warmed = asyncio.Event()
        self._folder, self._numbers = folder, itertools.count(1)
        self._places = places or [partial(self._worker, device) for device in spec.devices or (None,)]
        self._workers: list[Maker] = []  # those that are ready
        self._making: dict[str, Maker] = {}  # by the names of pictures
        self._warming: set[tuple[int, str, tuple[int, int]]] = set()  # workers' numbers, models and sizes
        self._tasks: set[asyncio.Task[None]] = set()
        self.builds = Builds(self._places[0], log, self.metrics, self._built)
        self._seconds = 1.0  # that a picture took lately

    # --- for the interfaces ------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether a worker takes pictures, and the sizes that were asked for are warm."""
        return bool(self._workers) and self.warmed.is_set() and not self.is_ending

    def submit(self, request: PictureRequest, client: str, interface: str) -> Job:
        """Take a request. Raises `UsageError`, `QueueFull`, `Ending`."""
        if self.is_ending:
            raise Ending
        request = replace(request, model=request.model or self.catalog.default)
        request.check(self.spec.limits, self.catalog, self.spec)
        job = Job.of(request, request.spec(self.catalog, self.spec), client, interface)
        self.queue.put(job.pictures)
        self.store.add(job)
        return job

    def cancel(self, job: Job) -> None:
        """Want none of a job's pictures any more: one that is being made is dropped after its step."""
        for picture in job.pictures:
            if not picture.is_over:
                self.queue.drop(picture)
                self._settle(picture, "cancelled")
            if (worker := self._making.get(picture.id)) is not None:
                self._spawn(_send_if_there(worker, Frame("cancel", {"units": [picture.id]})))

    def retry_after(self) -> int:
        """Seconds after which there will be room, about."""
        return max(1, round(len(self.queue) * self._seconds / max(1, len(self._workers))))

    async def count_tokens(self, model: str | None, texts: Sequence[str]) -> tuple[list[int], int]:
        """How many tokens texts have, and how many one chunk holds. Raises `UsageError`, `WorkerGone`."""
        self.catalog.model(model)
        if not self._workers:
            raise WorkerGone("no worker is ready")
        name, worker = model or self.catalog.default, self._workers[0]
        answers = await worker.ask("tokens", {"model": name, "texts": list(texts)}, (), PATIENCE_S)
        frame, *_ = [frame async for frame in answers]
        if frame.kind != "tokens":
            raise UsageError(
                without_paths(frame.data.get("message", "the tokens can't be counted")), hint="see the log"
            )
        return frame.data["counts"], frame.data["limit"]

    # --- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the workers; returns before they are ready."""
        for number, place in enumerate(self._places):
            self._spawn(self._keep_working(number, place))
        self._spawn(self.builds.run())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something meanwhile, until it is done or the server ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """Take no more; finish what was accepted while there is time, and refuse the rest in words."""
        self.is_ending = True
        until = time.monotonic() + self.spec.grace_s
        while self.store.unfinished() and time.monotonic() < until:
            await asyncio.sleep(0.05)
        ending = Failure("ServerEnding", "the server ends, and had no time for this picture", "ask again, in a while")
        for job in self.store.unfinished():
            for picture in job.pictures:
                self._fail(picture, ending)

    async def stop(self) -> None:
        """End all workers."""
        self.is_ending = True
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _warm_up(self, worker: Maker, number: int) -> None:
        """Have a worker make one picture of each size, so that its pipelines are open before it takes requests.

        What has no engines is built meanwhile, and comes back by the queue. Raises `WorkerGone`.
        """
        jobs = []
        for name, size in itertools.product(self.catalog.models, self.spec.warm):
            if (number, name, size) in self._warming:
                continue
            # Until it is made: what ended a worker is not tried by the one that follows.
            self._warming.add((number, name, size))
            if (job := self._warm_up_job(name, size)) is not None:
                jobs.append(job)
                await self._make(worker, number, job.pictures)
            self._warming.discard((number, name, size))
        self._spawn(self._warmed(jobs))

    def _warm_up_job(self, name: str, size: tuple[int, int]) -> Job | None:
        """One small picture of a size; None for what no request may ask for, which is logged."""
        steps = min(WARM_UP_STEPS, self.spec.limits.steps)
        request = PictureRequest("", name, steps=steps, width=size[0], height=size[1], seed=0)
        try:
            request.check(self.spec.limits, self.catalog, self.spec)
            return Job.of(request, request.spec(self.catalog, self.spec), WARM_UP, WARM_UP)
        except SdtrtError as error:
            self._tell_cold(request, error.message)
            return None

    async def _warmed(self, jobs: Sequence[Job]) -> None:
        """Say that sizes are ready when they are, or why they are not."""
        for job in jobs:
            await job.finished.wait()
            if job.failure is not None:
                self._tell_cold(job.request, job.failure.message)
        self.warmed.set()

    def _tell_cold(self, request: PictureRequest, message: str) -> None:
        self.log.warn("not warm", model=request.model, size=f"{request.width}x{request.height}", message=message)

    def _worker(self, device: int | None) -> WorkerProcess:
        """A worker that is not started yet."""
        return WorkerProcess(self.spec, self._folder / f"{next(self._numbers)}", device)

    # --- workers -----------------------------------------------------------------------------------------------------

    async def _keep_working(self, number: int, place: Place) -> None:
        """Have one worker at any time."""
        pause = 0.0
        while True:
            worker, began = place(), time.monotonic()
            try:
                await worker.start()
                await self._work_with(worker, number)
            except WorkerGone as gone:
                self.metrics.restarts.inc()
                self.log.error("worker ended", worker=number, reason=str(gone))
                if not self._workers:  # nor any other one: this one did not even start
                    self.fail_all(list(self.queue), Failure("WorkerEnded", "no worker starts", "its log says why"))
            finally:
                if worker in self._workers:
                    self._workers.remove(worker)
                self.metrics.ready.set(len(self._workers))
                await worker.end()
            lasted = time.monotonic() - began > LONGEST_PAUSE_S
            pause = 0.0 if lasted else min(LONGEST_PAUSE_S, 2 * pause + 0.5)
            await asyncio.sleep(pause)

    async def _work_with(self, worker: Maker, number: int) -> None:
        """Have a worker make pictures until it is gone. Raises `WorkerGone`."""
        about = await worker.about_itself(PATIENCE_S)
        if about.kind != "ready":
            raise WorkerGone(about.data.get("message") or about.data.get("text", ""))
        self.models = about.data["models"]
        for one in self.models:
            if "error" in one:
                self.log.error("model", name=one["name"], message=one["error"], hint=one["hint"])
        self._workers.append(worker)
        self.metrics.ready.set(len(self._workers))
        self.log.info("worker ready", worker=number, pid=about.data["pid"])
        await self._warm_up(worker, number)
        while True:
            batch = [one for one in await self._next_or_gone(worker) if not one.is_over]
            if batch:
                await self._make(worker, number, batch)

    async def _next_or_gone(self, worker: Maker) -> list[Picture]:
        """The next batch. Raises `WorkerGone` where the worker goes before there is one."""
        wait_s = self.spec.batch_wait_ms / 1000
        taking = asyncio.create_task(self.queue.next_batch(self.spec.max_batch, wait_s))
        going = asyncio.create_task(worker.gone.wait())
        try:
            await asyncio.wait((taking, going), return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                raise WorkerGone("it ended while it had nothing to do")
            return taking.result()
        finally:
            taking.cancel()
            going.cancel()

    async def _make(self, worker: Maker, number: int, batch: Sequence[Picture]) -> None:
        """Have one batch made. Its pictures come again once where the worker goes. Raises `WorkerGone`."""
        began = time.monotonic()
        for picture in batch:
            picture.attempts += 1
            self._making[picture.id] = worker
            picture.job.settle(picture, "running")
            self.metrics.wait.observe(began - picture.queued_at)
        self.metrics.batch.observe(len(batch))
        self.log.info("batch", pictures=len(batch), jobs=[one.job.id for one in batch], worker=number)
        request = batch[0].job.request
        data = {**plain(request), "units": [one.id for one in batch]}
        data["jobs"] = [astuple(one.drawn) for one in batch]
        try:
            answers = await worker.ask("make", data, list(request.uploads.values()), PATIENCE_S)
            following = _Following(self, batch)
            async for frame in answers:
                following.take(frame)
        except WorkerGone as gone:
            self._come_again(batch, gone)
            raise
        finally:
            for picture in batch:
                self._making.pop(picture.id, None)
        self._seconds += 0.2 * ((time.monotonic() - began) / len(batch) - self._seconds)

    def _come_again(self, batch: Sequence[Picture], gone: WorkerGone) -> None:
        """Put a gone worker's pictures back, but for those that have ended another one before."""
        words = f"the worker ended while it made this picture ({gone})"
        again = []
        for picture in batch:
            if picture.is_over:
                continue
            if picture.attempts >= MOST_ATTEMPTS:
                self._fail(picture, Failure("WorkerEnded", words, "ask for a smaller picture, or again in a while"))
                continue
            picture.job.settle(picture, "queued")
            again.append(picture)
        self.queue.put_back(again)

    def _built(self, pictures: Sequence[Picture], failure: Failure | None) -> None:
        """Take back pictures whose engines are there now, or can't be."""
        again = [one for one in pictures if not one.is_over]
        for picture in again:
            if failure is None:
                picture.job.settle(picture, "queued")
            else:
                self._fail(picture, failure)
        self.queue.put_back([one for one in again if not one.is_over])

    # --- ends --------------------------------------------------------------------------------------------------------

    def done(self, picture: Picture, frame: Frame) -> None:
        """Take a picture that is made."""
        if picture.is_over:  # nobody waits for it any more
            return
        picture.data, picture.width, picture.height = frame.blobs[0], frame.data["width"], frame.data["height"]
        if self.store.job(picture.job.id) is not None:
            self.store.keep(picture)
        self.metrics.picture.labels(picture.job.interface).observe(time.monotonic() - picture.queued_at)
        self._settle(picture, "done")

    def fail_all(self, batch: Sequence[Picture], failure: Failure) -> None:
        """End pictures with an error, those that are not over."""
        for picture in batch:
            self._fail(picture, failure)

    def _fail(self, picture: Picture, failure: Failure) -> None:
        self.queue.drop(picture)
        if not picture.is_over:
            self.metrics.pictures.labels(picture.job.interface, failure.kind).inc()
            picture.job.fail(picture, failure)

    def _settle(self, picture: Picture, state: str) -> None:
        if not picture.is_over:
            self.metrics.pictures.labels(picture.job.interface, state).inc()
            picture.job.settle(picture, "done" if state == "done" else "cancelled")


class _Following:
    """Takes what a worker says of one batch."""

    def __init__(self, dispatcher: Dispatcher, batch: Sequence[Picture]) -> None:
        self._dispatcher, self._batch = dispatcher, batch
        self._by_id = {one.id: one for one in batch}
        self._stepped = time.monotonic()

    def take(self, frame: Frame) -> None:
        """Take one frame."""
        dispatcher = self._dispatcher
        if frame.kind == "step":
            self._step(frame)
        elif frame.kind == "preview":
            self._preview(frame)
        elif frame.kind == "picture":
            dispatcher.done(self._by_id[frame.data["unit"]], frame)
        elif frame.kind == "missing":
            dispatcher.builds.ask(self._batch)
        elif frame.kind == "log" and frame.data["level"] == "warning":
            dispatcher.log.warn("worker", text=frame.data["text"])
        elif frame.kind == "done":
            dispatcher.metrics.note_memory(frame.data["memory"])
        elif (failure := failure_of(frame, dispatcher.log)) is not None:
            dispatcher.fail_all(self._batch, failure)

    def _step(self, frame: Frame) -> None:
        now, step, steps = time.monotonic(), frame.data["step"], frame.data["steps"]
        if step > 1:
            self._dispatcher.metrics.step.observe(now - self._stepped)
        left = (now - self._stepped) * (steps - step) if step > 1 else None
        self._stepped = now
        for picture in (self._by_id[name] for name in frame.data["units"]):
            picture.step, picture.steps, picture.job.seconds_left = step, steps, left
            said = {"index": picture.index, "step": step, "steps": steps, "seconds_left": left}
            picture.job.tell("step", said)

    def _preview(self, frame: Frame) -> None:
        for name, data in zip(frame.data["units"], frame.blobs, strict=True):
            picture = self._by_id[name]
            picture.preview = data
            picture.job.tell("preview", {"index": picture.index, "step": frame.data["step"]})


async def _send_if_there(worker: Maker, frame: Frame) -> None:
    with contextlib.suppress(WorkerGone):
        await worker.send(frame)
