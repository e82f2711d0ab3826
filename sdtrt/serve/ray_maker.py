"""The front door's side of Ray's replicas: sends them batches through Ray Serve's router, and gives out their answers.

A batch goes to whichever replica is free: Ray knows which are, starts more of them where batches wait, and replaces
those that died. Knows frames and Ray Serve's handles. What is made of the frames is the dispatcher's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from sdtrt.serve.frames import Frame
from sdtrt.serve.worker_process import WorkerGone

LOOK_AGAIN_S = 0.2  # whether a replica is up


class Idlest(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray is not read for types
    """Routes a batch to a replica that has nothing to do, if there is one.

    Ray's own router looks at two of them alone, and takes one that is busy before one that it knows nothing of.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Those that are idle, or that nothing is known of; if none takes it, the others."""
        known = self.replica_queue_len_cache
        idle = [one for one in candidate_replicas if not known.get(one.replica_id)]
        busy = [one for one in candidate_replicas if known.get(one.replica_id)]
        return [group for group in (idle, busy) if group]


class ReplicaMaker:
    """Takes one batch at a time to a replica. There are as many of them as there may be replicas.

    Args:
        pictures: the deployment.
    """

    def __init__(self, pictures: DeploymentHandle[Any]) -> None:
        self._pictures = pictures
        self.gone = asyncio.Event()  # never: Ray has another replica for the next batch

    async def start(self) -> None:
        """Start nothing: Ray does."""

    async def about_itself(self, patience_s: float) -> Frame:
        """What a replica says, as soon as one is up. Raises `WorkerGone`."""
        try:
            async with asyncio.timeout(patience_s):
                while True:
                    try:
                        return (await self._of_all("about_itself", patience_s))[0]
                    except WorkerGone:
                        await asyncio.sleep(LOOK_AGAIN_S)
        except TimeoutError:
            raise WorkerGone(f"no replica was up after {patience_s:.0f} s") from None

    async def ask(
        self, kind: str, data: Mapping[str, Any], blobs: Sequence[bytes], patience_s: float
    ) -> AsyncIterator[Frame]:
        """Send a request, and get its answers; they raise `WorkerGone` where its replica goes."""
        if kind == "make":
            return self._made(data, blobs, patience_s)
        return self._given(kind, data, blobs, patience_s)

    async def send(self, frame: Frame) -> None:
        """Cancel pictures, wherever they are made. Raises `WorkerGone`."""
        await self._of_all(frame.kind, LOOK_AGAIN_S * 100, frame.data["units"])

    async def end(self) -> None:
        """End nothing: Ray does."""

    async def _made(self, data: Mapping[str, Any], blobs: Sequence[bytes], patience_s: float) -> AsyncIterator[Frame]:
        with _words_of_ray():
            frames = self._pictures.options(stream=True).make.remote({**data, "batch": 0}, list(blobs))
            while (frame := await asyncio.wait_for(anext(frames), patience_s)).kind != "done":
                yield frame
            yield frame

    async def _given(
        self, kind: str, data: Mapping[str, Any], blobs: Sequence[bytes], patience_s: float
    ) -> AsyncIterator[Frame]:
        for frame in await self._of_all(kind, patience_s, dict(data), list(blobs)):
            yield frame

    async def _of_all(self, method: str, patience_s: float, *given: object) -> list[Frame]:
        """Call all replicas, also those that make a batch, and get the answer of one that failed in nothing.

        It has what the others logged, too.

        Raises:
            WorkerGone: where none answered.
        """
        with _words_of_ray():
            said = await self._pictures.broadcast(method, *given).results_async(
                timeout_s=patience_s, return_exceptions=True
            )
        answers = [one for one in said if not isinstance(one, BaseException)]
        if not answers:
            raise WorkerGone(_words(said[0]) if said else "no replica is up")
        best = min(answers, key=_failures)
        return [frame for one in answers for frame in one if one is best or frame.kind == "log"]


def _failures(frames: Sequence[Frame]) -> int:
    return sum(frame.kind in ("error", "bug") for frame in frames)


@contextmanager
def _words_of_ray() -> Iterator[None]:
    """Raise `WorkerGone` for what Ray raises where a replica is gone or silent."""
    try:
        yield
    except (RayError, RayServeException, StopAsyncIteration, TimeoutError) as error:
        raise WorkerGone(_words(error)) from error


def _words(error: BaseException) -> str:
    """What kind of error it is: its text has many lines, and paths."""
    return type(error).__name__
