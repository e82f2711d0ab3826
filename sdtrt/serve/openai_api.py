"""OpenAI's interface for images, as its clients speak it; what it has not comes in extra fields of the usual names.

Knows that interface's fields and shapes. `quality`, `style`, `background` and `moderation` mean nothing to these
models.
"""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from sdtrt.common.errors import UsageError
from sdtrt.common.version import __version__
from sdtrt.serve import uploads
from sdtrt.serve.answers import Answer, Refusal
from sdtrt.serve.dispatch import Dispatcher
from sdtrt.serve.following import client_of, finish, submit
from sdtrt.serve.jobs import Job, Picture
from sdtrt.serve.requests import INIT, MASK, PictureRequest, usual_steps
from sdtrt.specs import DEFAULT_GUIDANCE_SCALE, DEFAULT_STRENGTH
from sdtrt.specs.serve import Limits

INTERFACE = "openai"
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
MOST_FILES = 4


class ImagesBody(BaseModel):
    """What both routes take, in OpenAI's words, and in extra fields as other servers have them."""

    model_config = ConfigDict(extra="ignore")
    prompt: str
    model: str | None = None
    n: int | None = 1
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    stream: bool | None = None
    user: str | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    scheduler: str | None = None
    strength: float | None = None

    def request(self, files: Mapping[str, bytes], limits: Limits, *, edit: bool) -> PictureRequest:
        """The request. Raises `UsageError`."""
        width, height = _size(self.size)
        if self.stream:
            raise UsageError("pictures are not streamed here", hint="leave stream out, or use /api/v1/jobs")
        return PictureRequest(
            self.prompt,
            self.model or None,
            self.negative_prompt or "",
            usual_steps(self.num_inference_steps, limits),
            _or(self.guidance_scale, DEFAULT_GUIDANCE_SCALE),
            height,
            width,
            self.seed,
            _or(self.n, 1),
            self.scheduler,
            strength=_or(self.strength, DEFAULT_STRENGTH),
            edit=edit,
            uploads=files,
        )


def routes(dispatcher: Dispatcher) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    limits = dispatcher.spec.limits

    @router.get("/models")
    async def list_models() -> Answer:
        """List the models that requests may name."""
        return Answer({"object": "list", "data": [_model(name) for name in dispatcher.catalog.models]})

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> Answer:
        """Say whether there is a model."""
        if name not in dispatcher.catalog.models:
            known = ", ".join(dispatcher.catalog.models)
            raise Refusal(404, "model_not_found", f"there is no model {name!r}", f"there are {known}")
        return Answer(_model(name))

    @router.post("/images/generations")
    async def generate(body: ImagesBody, request: Request) -> Answer:
        """Make pictures from text."""
        job = await submit(
            dispatcher, lambda: body.request({}, limits, edit=False), client_of(request, body.user), INTERFACE
        )
        return Answer(_made(await finish(request, dispatcher, job), body, request))

    @router.post("/images/edits", openapi_extra={"requestBody": _FORM})
    async def edit(request: Request) -> Answer:
        """Change a picture: as the prompt says (by a model for edits), where the mask is transparent, or all of it."""
        async with request.form(max_files=MOST_FILES, max_fields=64) as form:
            body, files = _fields(form), await _files(form, limits.pixels)
        edits = _is_editing(dispatcher, body.model)
        job = await submit(
            dispatcher, lambda: body.request(files, limits, edit=edits), client_of(request, body.user), INTERFACE
        )
        return Answer(_made(await finish(request, dispatcher, job), body, request))

    return router


_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image", "prompt"],
                "properties": {
                    "image": {"type": "string", "format": "binary"},
                    "mask": {"type": "string", "format": "binary"},
                    **{name: {"type": "string"} for name in ImagesBody.model_fields},
                },
            }
        }
    },
}


def _fields(form: FormData) -> ImagesBody:
    """A form's texts."""
    texts = {name: value for name, value in form.items() if isinstance(value, str) and value != ""}
    try:
        return ImagesBody.model_validate(texts)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from error


async def _files(form: FormData, pixels: int) -> dict[str, bytes]:
    """A form's picture and mask."""
    pictures = [one for name in ("image", "image[]") for one in form.getlist(name) if isinstance(one, UploadFile)]
    masks = [one for one in form.getlist("mask") if isinstance(one, UploadFile)]
    if len(pictures) != 1:
        raise UsageError(f"one picture is edited at a time, got {len(pictures)}", hint="send one file as image")
    files = {INIT: uploads.check(await pictures[0].read(), "image", pixels)}
    if masks:
        files[MASK] = uploads.mask_of_alpha(uploads.check(await masks[0].read(), "mask", pixels))
    return files


def _is_editing(dispatcher: Dispatcher, name: str | None) -> bool:
    """Whether a model edits pictures as a text says, as far as a worker has told."""
    wanted = name or dispatcher.catalog.default
    return any(one["name"] == wanted and one.get("task") == "edit" for one in dispatcher.models)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _size(text: str | None) -> tuple[int | None, int | None]:
    """(width, height); None for the model's own, or the picture's."""
    if text in (None, "", "auto"):
        return None, None
    match = _SIZE.fullmatch(text or "")
    if match is None:
        raise UsageError(f"size must be WIDTHxHEIGHT or auto, got {text!r}", hint="use 512x512")
    return int(match[1]), int(match[2])


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": f"sdtrt {__version__}"}


def _made(job: Job, body: ImagesBody, request: Request) -> dict[str, Any]:
    """The answer: pictures, or where they are."""
    form = body.output_format or "png"
    if body.response_format == "url":
        if form != "png":
            raise Refusal(400, "UsageError", f"pictures at a url are PNG, not {form}", "use response_format b64_json")
        data = [{"url": str(request.url_for("get_image", image_id=f"{one.id}.png"))} for one in job.pictures]
    else:
        data = [
            {"b64_json": base64.b64encode(_file(one, form, body.output_compression)).decode()} for one in job.pictures
        ]
    seeds = [one.drawn.seed for one in job.pictures]
    size = f"{job.pictures[0].width}x{job.pictures[0].height}"
    return {"created": int(time.time()), "data": data, "output_format": form, "size": size, "seeds": seeds}


def _file(picture: Picture, form: str, quality: int | None) -> bytes:
    """A picture's file; its settings are in the PNG alone."""
    if form == "png":
        return picture.data
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(picture.data)) as image:
        image.convert("RGB").save(buffer, form.upper(), quality=95 if quality is None else quality)
    return buffer.getvalue()
