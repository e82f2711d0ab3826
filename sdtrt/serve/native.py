"""sdtrt's own interface: submit a job, follow it, cancel it, fetch its pictures; what there is; count tokens."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from sdtrt.common.version import __version__
from sdtrt.serve.answers import Answer, Refusal
from sdtrt.serve.dispatch import Dispatcher
from sdtrt.serve.following import client_of, submit
from sdtrt.serve.jobs import Job, Picture
from sdtrt.serve.native_body import JobBody
from sdtrt.serve.picture_settings import defaults
from sdtrt.serve.worker_process import WorkerGone
from sdtrt.specs import (
    LANCZOS,
    LATENT,
    PREDICTION_TYPES,
    PREPROCESSORS,
    PROMPT_SYNTAXES,
    QUALITIES,
    SCHEDULERS,
    SIGMAS,
    TIMESTEP_SPACINGS,
)
from sdtrt.specs.savings import CACHE_SCHEDULES

KEEP_ALIVE_S = 15.0  # between two signs of life on a stream of events
INTERFACE = "native"
MOST_TEXTS = 32  # of one count of tokens
MOST_LISTED = 200  # jobs


class TokensBody(BaseModel):
    """Texts whose tokens are counted."""

    model_config = ConfigDict(extra="forbid")
    texts: list[str] = Field(max_length=MOST_TEXTS)
    model: str | None = None


def routes(dispatcher: Dispatcher) -> APIRouter:
    """The routes under /api/v1."""
    router = APIRouter(prefix="/api/v1", tags=["native"])
    _add_jobs(router, dispatcher)
    _add_facts(router, dispatcher)
    return router


def _add_jobs(router: APIRouter, dispatcher: Dispatcher) -> None:
    limits = dispatcher.spec.limits

    @router.post("/jobs", status_code=202)
    async def submit_job(body: JobBody, request: Request) -> Answer:
        """Submit a job; its answer has the job's id and the seeds of its pictures."""
        job = await submit(dispatcher, lambda: body.request(limits), client_of(request), INTERFACE)
        return Answer(told(job), 202, headers={"Location": f"/api/v1/jobs/{job.id}"})

    @router.get("/jobs")
    async def list_jobs(request: Request) -> Answer:
        """List this client's jobs, the newest first."""
        return Answer({"jobs": [told(job) for job in dispatcher.store.of(client_of(request))[:MOST_LISTED]]})

    @router.get("/jobs/{job_id}")
    async def get_job(job_id: str) -> Answer:
        """Say how far a job is."""
        return Answer(told(_job(dispatcher, job_id)))

    @router.delete("/jobs/{job_id}")
    async def cancel_job(job_id: str) -> Answer:
        """Cancel what of a job is not done; a picture that is being made is dropped after its step."""
        job = _job(dispatcher, job_id)
        dispatcher.cancel(job)
        return Answer(told(job))

    @router.get("/jobs/{job_id}/events", response_class=StreamingResponse)
    async def follow_job(
        job_id: str, cancel_on_leave: Annotated[bool, Query(description="cancel it where the reader leaves")] = False
    ) -> StreamingResponse:
        """Follow a job by server-sent events: queued, building, running, step, preview, image; at last done, error or
        cancelled."""
        events = _events(dispatcher, _job(dispatcher, job_id), cancel_on_leave)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _add_facts(router: APIRouter, dispatcher: Dispatcher) -> None:
    @router.get("/images/{image_id}", response_class=Response)
    async def get_image(image_id: str) -> Response:
        """Fetch a picture as PNG, with its settings in it."""
        picture = dispatcher.store.picture(image_id.removesuffix(".png"))
        if picture is None:
            raise Refusal(404, "NotFound", "there is no such picture (any more)", "make it again, by its seed")
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return Response(picture.data, media_type="image/png", headers=headers)

    @router.get("/capabilities")
    async def capabilities() -> Answer:
        """Say what there is: models, LoRAs, ControlNets, adapters, schedulers, limits."""
        return Answer(_capabilities(dispatcher))

    @router.post("/tokens")
    async def tokens(body: TokensBody) -> Answer:
        """Count the tokens of texts, as the model's text encoder does."""
        return Answer(await _tokens(dispatcher, body))


def told(job: Job) -> dict[str, Any]:
    """A job as clients get it."""
    failure = job.failure
    running = [one for one in job.pictures if one.state == "running"]
    return {
        "id": job.id,
        "state": job.state,
        "created": job.created,
        "model": job.request.model,
        "prompt": job.request.prompt,
        "images": [_told(one) for one in job.pictures],
        "step": max((one.step for one in running), default=None),
        "steps": max((one.steps for one in running), default=None),
        "seconds_left": job.seconds_left if running else None,
        "error": None if failure is None else {"kind": failure.kind, "message": failure.message, "hint": failure.hint},
    }


def _told(picture: Picture) -> dict[str, Any]:
    done = picture.state == "done"
    return {
        "index": picture.index,
        "seed": picture.drawn.seed,
        "state": picture.state,
        "url": f"/api/v1/images/{picture.id}.png" if done else None,
        "width": picture.width if done else None,
        "height": picture.height if done else None,
    }


def _job(dispatcher: Dispatcher, name: str) -> Job:
    job = dispatcher.store.job(name)
    if job is None:
        raise Refusal(404, "NotFound", "there is no such job (any more)", "submit it again")
    return job


async def _events(dispatcher: Dispatcher, job: Job, cancel_on_leave: bool) -> AsyncIterator[str]:
    """A job's events as text; signs of life between them keep proxies from closing the stream."""
    try:
        async for event, data in job.follow(KEEP_ALIVE_S):
            yield ": waiting\n\n" if event == "" else _event(job, event, data)
    finally:
        if cancel_on_leave and not job.finished.is_set():
            dispatcher.cancel(job)


def _event(job: Job, event: str, data: Mapping[str, Any]) -> str:
    """One event; a preview brings its picture, an image its address."""
    said = dict(data)
    if event == "preview":
        picture = job.pictures[data["index"]].preview
        said["image"] = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
    if event == "image":
        said["url"] = f"/api/v1/images/{data['id']}.png"
    return f"event: {event}\ndata: {json.dumps(said)}\n\n"


def _capabilities(dispatcher: Dispatcher) -> dict[str, Any]:
    spec, limits = dispatcher.spec, dispatcher.spec.limits
    facts, listed = {one["name"]: one for one in dispatcher.models}, dispatcher.catalog.listed
    return {
        "version": __version__,
        "models": [
            {key: value for key, value in facts.get(name, {"name": name}).items() if key != "hint"}
            for name in dispatcher.catalog.models
        ],
        "default_model": dispatcher.catalog.default,
        "loras": list(dispatcher.catalog.loras),
        "controlnets": list(listed["controlnet"]),
        "ip_adapters": list(listed["ip_adapter"]),
        "t2i_adapters": list(listed["t2i_adapter"]),
        "embeddings": list(listed["embedding"]),
        "refiners": list(listed["refiner"]),
        "upscalers": [LATENT, LANCZOS, *listed["upscaler"]],
        "schedulers": list(SCHEDULERS),
        "sigmas": list(SIGMAS),
        "timestep_spacings": list(TIMESTEP_SPACINGS),
        "prediction_types": list(PREDICTION_TYPES),
        "prompt_syntaxes": list(PROMPT_SYNTAXES),
        "preprocessors": list(PREPROCESSORS),
        "qualities": list(QUALITIES),
        "cache_schedules": list(CACHE_SCHEDULES),
        "previews": spec.preview is not None,
        "builds": spec.allow_build,
        "max_batch": spec.max_batch,
        "defaults": defaults(limits),
        "limits": {
            "body_bytes": limits.body_bytes,
            "pixels": limits.pixels,
            "steps": limits.steps,
            "images": limits.images,
            "prompt": limits.prompt,
        },
    }


async def _tokens(dispatcher: Dispatcher, body: TokensBody) -> dict[str, Any]:
    longest = max(map(len, body.texts), default=0)
    if longest > dispatcher.spec.limits.prompt:
        raise Refusal(400, "UsageError", f"a text of {longest} characters is too long", "send a shorter one")
    if any("\ud800" <= letter <= "\udfff" for text in body.texts for letter in text):
        raise Refusal(400, "UsageError", "a text must be valid UTF-8", "check its encoding")
    try:
        counts, limit = await dispatcher.count_tokens(body.model, body.texts)
    except WorkerGone:
        raise Refusal(503, "NotReady", "no worker is ready", "ask again, in a while", {"Retry-After": "5"}) from None
    return {"counts": counts, "limit": limit}
