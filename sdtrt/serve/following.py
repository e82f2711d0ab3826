"""What the interfaces have in common: a request's client, its job, and the wait for it. Knows HTTP's two ends alone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from starlette.requests import Request

from sdtrt.serve.answers import Refusal
from sdtrt.serve.dispatch import Dispatcher, Ending
from sdtrt.serve.fair_queue import QueueFull
from sdtrt.serve.jobs import Failure, Job
from sdtrt.serve.requests import PictureRequest

_CLIENT = re.compile(r"[\w.@:-]{1,64}")


class ClientLeft(Exception):  # noqa: N818 (nobody reads an answer)
    """Who asked is gone."""


def client_of(request: Request, said: str | None = None) -> str:
    """Whose turn a request takes: who it says it is (`X-Client-Id`), else the address that it comes from."""
    named = said or request.headers.get("x-client-id") or ""
    address = request.client.host if request.client is not None else "somebody"
    return f"{address} {named}" if _CLIENT.fullmatch(named) else address


async def submit(dispatcher: Dispatcher, asked: Callable[[], PictureRequest], client: str, interface: str) -> Job:
    """A job of a request, whose pictures are looked at in a thread of their own.

    Raises:
        UsageError: for a request that is wrong by itself.
        Refusal: where there is no room for it.
    """
    try:
        return dispatcher.submit(await asyncio.to_thread(asked), client, interface)
    except QueueFull:
        seconds = dispatcher.retry_after()
        raise Refusal(
            429,
            "QueueFull",
            f"{len(dispatcher.queue)} pictures wait already",
            f"ask again in {seconds} s",
            {"Retry-After": f"{seconds}"},
        ) from None
    except Ending:
        raise Refusal.of_failure(Failure("ServerEnding", "the server ends", "ask again, in a while")) from None


async def finish(request: Request, dispatcher: Dispatcher, job: Job) -> Job:
    """Wait for a job, which is cancelled where its client leaves.

    Raises:
        Refusal: where it has no picture.
        ClientLeft: where nobody is there any more.
    """
    leaving, ending = asyncio.create_task(_left(request)), asyncio.create_task(job.finished.wait())
    try:
        await asyncio.wait((leaving, ending), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        ending.cancel()
        if not job.finished.is_set():
            dispatcher.cancel(job)
    if job.failure is not None:
        raise Refusal.of_failure(job.failure)
    if job.state != "done":
        if leaving.done() and not leaving.cancelled():
            raise ClientLeft
        raise Refusal(409, "Cancelled", "the job was cancelled", "ask again")
    return job


async def _left(request: Request) -> None:
    """Return when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
