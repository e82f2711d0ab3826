"""Jobs: what a client asked for, picture by picture, how far each is, and who follows it. In memory alone.

Knows requests and events. Knows no HTTP, no worker and no queue's order.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sdtrt.pipeline.runs.jobs import Job as Drawn
from sdtrt.pipeline.runs.jobs import Jobs
from sdtrt.serve.requests import PictureRequest
from sdtrt.specs import GenerateSpec

State = Literal["queued", "building", "running", "done", "error", "cancelled"]
ENDS: tuple[State, ...] = ("done", "error", "cancelled")
ID_BYTES = 16  # of a job's name, which nobody guesses
MOST_EVENTS = 1000  # that a follower may be behind: then it is told the state, and no more each step
MOST_JOBS = 2000  # that are remembered


@dataclass(frozen=True)
class Failure:
    """Why there is no picture: a kind of error (`UsageError`), what is wrong, and what mends it."""

    kind: str
    message: str
    hint: str


@dataclass(eq=False)
class Picture:
    """One picture of a job.

    Args:
        id: by which it is fetched; nobody guesses it.
        key: what pictures have in common that can share a call.
        attempts: workers that have begun it.
        was_built: whether engines were built for it already.
    """

    job: Job
    index: int
    drawn: Drawn
    key: str
    id: str = field(default_factory=lambda: secrets.token_urlsafe(ID_BYTES))
    state: State = "queued"
    queued_at: float = field(default_factory=time.monotonic)
    attempts: int = 0
    was_built: bool = False
    step: int = 0
    steps: int = 0
    data: bytes = b""
    preview: bytes = b""
    width: int = 0
    height: int = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing more becomes of it."""
        return self.state in ENDS


@dataclass(eq=False)
class Job:
    """One client's request.

    Args:
        client: whose turn it is when it is this job's turn.
        interface: that it came by.
    """

    request: PictureRequest
    client: str
    interface: str
    id: str = field(default_factory=lambda: secrets.token_urlsafe(ID_BYTES))
    created: float = field(default_factory=time.time)
    pictures: list[Picture] = field(default_factory=list)
    failure: Failure | None = None
    seconds_left: float | None = None
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    _followers: set[asyncio.Queue[tuple[str, Mapping[str, Any]]]] = field(default_factory=set)

    @classmethod
    def of(cls, request: PictureRequest, spec: GenerateSpec, client: str, interface: str) -> Job:
        """A job whose pictures have the prompt and the seeds that the commands would give them."""
        job, key = cls(request, client, interface), request.key
        drawn = Jobs.of(spec)
        own = [replace(one, negative_prompt=request.negative_prompt) for one in drawn.batch(0, len(drawn))]
        job.pictures = [Picture(job, number, one, key) for number, one in enumerate(own)]
        return job

    @property
    def state(self) -> State:
        """The state of its pictures taken together."""
        states = {one.state for one in self.pictures}
        if self.failure is not None and states <= set(ENDS):
            return "error"
        order: tuple[State, ...] = ("running", "building", "queued", "error", "cancelled", "done")
        return next(one for one in order if one in states)

    def settle(self, picture: Picture, state: State) -> None:
        """Give one of its pictures another state, and tell who follows."""
        if picture.is_over:
            return
        picture.state = state
        if state == "done":
            said = {"index": picture.index, "id": picture.id, "seed": picture.drawn.seed}
            self.tell("image", {**said, "width": picture.width, "height": picture.height})
        elif state in ("queued", "building", "running"):
            self.tell(state, {"index": picture.index})
        if all(one.is_over for one in self.pictures):
            self._end()

    def fail(self, picture: Picture, failure: Failure) -> None:
        """End one of its pictures with an error."""
        if not picture.is_over:
            self.failure = self.failure or failure
            self.settle(picture, "error")

    def tell(self, event: str, data: Mapping[str, Any]) -> None:
        """Tell who follows; steps and previews are left out for those who are far behind."""
        for follower in self._followers:
            if follower.qsize() < MOST_EVENTS or event not in ("step", "preview"):
                follower.put_nowait((event, data))

    async def follow(self, patience_s: float | None = None) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
        """Its events from now on, with its end as the last one; first what has come to be already.

        Args:
            patience_s: seconds after which an event without a name comes, where there is no other.
        """
        follower: asyncio.Queue[tuple[str, Mapping[str, Any]]] = asyncio.Queue()
        for picture in self.pictures:
            if picture.state == "done":
                said = {"index": picture.index, "id": picture.id, "seed": picture.drawn.seed}
                follower.put_nowait(("image", {**said, "width": picture.width, "height": picture.height}))
            elif not picture.is_over:
                follower.put_nowait((picture.state, {"index": picture.index}))
        if self.finished.is_set():
            follower.put_nowait(self._last_event())
        self._followers.add(follower)
        try:
            while True:
                try:
                    event, data = await asyncio.wait_for(follower.get(), patience_s)
                except TimeoutError:
                    event, data = "", {}
                yield event, data
                if event in ENDS:
                    return
        finally:
            self._followers.discard(follower)

    def _end(self) -> None:
        self.request = replace(self.request, uploads={})
        for picture in self.pictures:
            picture.preview = b""
        self.finished.set()
        self.tell(*self._last_event())

    def _last_event(self) -> tuple[str, Mapping[str, Any]]:
        if self.failure is not None:
            return "error", {"kind": self.failure.kind, "message": self.failure.message, "hint": self.failure.hint}
        return self.state, {"images": [one.id for one in self.pictures if one.state == "done"]}


class JobStore:
    """The jobs that are known, by name. Pictures that are done go, the oldest first, where they take too much memory.

    Args:
        kept_bytes: of pictures that are done.
    """

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes = kept_bytes
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        """Know a job from now on."""
        self._jobs[job.id] = job
        while len(self._jobs) > MOST_JOBS:
            oldest = next((one for one in self._jobs.values() if one.finished.is_set()), None)
            if oldest is None:
                break
            self.forget(oldest)

    def keep(self, picture: Picture) -> None:
        """Keep a picture that is done."""
        self._pictures[picture.id] = picture
        self._bytes += len(picture.data)
        while self._bytes > self._kept_bytes and len(self._pictures) > 1:
            self.forget(next(iter(self._pictures.values())).job)

    def forget(self, job: Job) -> None:
        """Know a job and its pictures no more."""
        self._jobs.pop(job.id, None)
        for picture in job.pictures:
            if self._pictures.pop(picture.id, None) is not None:
                self._bytes -= len(picture.data)

    def job(self, name: str) -> Job | None:
        """The job of a name."""
        return self._jobs.get(name)

    def picture(self, name: str) -> Picture | None:
        """The picture of a name, where it is done."""
        return self._pictures.get(name)

    def of(self, client: str) -> list[Job]:
        """A client's jobs, the newest first."""
        return [job for job in reversed(self._jobs.values()) if job.client == client]

    def unfinished(self) -> list[Job]:
        """The jobs that are not over."""
        return [job for job in self._jobs.values() if not job.finished.is_set()]
