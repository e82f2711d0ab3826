"""The web UIs' interface (AUTOMATIC1111's, Forge's): its routes, as clients written for it call them.

Knows that interface's fields. What changes a picture there and can't be had here is refused in words; LoRAs come in the
field `lora`, as stable-diffusion.cpp has it, and are never read from a prompt.
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field

from sdtrt.common.errors import UsageError
from sdtrt.pipeline.inputs import images
from sdtrt.serve import uploads, webui_units
from sdtrt.serve.answers import Answer
from sdtrt.serve.catalog import Catalog
from sdtrt.serve.dispatch import Dispatcher
from sdtrt.serve.following import client_of, finish, submit
from sdtrt.serve.jobs import Job
from sdtrt.serve.requests import INIT, MASK, PictureRequest, usual_steps
from sdtrt.specs import (
    LANCZOS,
    LATENT,
    SCHEDULERS,
    SIGMAS,
    LoraSpec,
    UpscaleSpec,
    check_choice,
    find_scheduler,
)
from sdtrt.specs.serve import Limits

INTERFACE = "webui"
MOST_LORAS = 8
WITH_ETA = ("ddim", "tcd")  # samplers that have one here
USUAL_ETA = (None, 0, 1)  # of the others, which clients send along
# What changes a picture there, by its field and the values that mean nothing.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "restore_faces": (None, False),
    "tiling": (None, False),
    "styles": (None, []),
    "script_name": (None, ""),
    "subseed_strength": (None, 0),
    "seed_resize_from_h": (None, 0, -1),
    "seed_resize_from_w": (None, 0, -1),
    "firstphase_width": (None, 0),
    "firstphase_height": (None, 0),
    "s_churn": (None, 0),
    "s_tmin": (None, 0),
    "initial_noise_multiplier": (None, 1),
    "latent_mask": (None,),
}
# The same of hires fix, where it is asked for.
REFUSED_OF_HIRES: Mapping[str, tuple[Any, ...]] = {
    "hr_resize_x": (None, 0),
    "hr_resize_y": (None, 0),
    "hr_checkpoint_name": (None, "", "Use same checkpoint"),
    "hr_sampler_name": (None, "", "Use same sampler"),
    "hr_scheduler": (None, "", "Use same scheduler"),
    "hr_prompt": (None, ""),
    "hr_negative_prompt": (None, ""),
    "hr_cfg": (None, 0),
}
UPSCALERS: Mapping[str, str] = {LATENT: "Latent", LANCZOS: "Lanczos"}  # by our names
OPTIONS = ("sd_model_checkpoint", "CLIP_stop_at_last_layers", "samples_format", "save_images_add_number")


class LoraField(BaseModel):
    """A LoRA of the server's list, by `name` or `path`, which is no path here."""

    name: str = ""
    path: str = ""
    multiplier: float = 1.0


class WebUiBody(BaseModel):
    """What both routes take."""

    model_config = ConfigDict(extra="allow")
    prompt: str = ""
    negative_prompt: str | None = ""
    seed: int | None = -1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: int = 1
    n_iter: int = 1
    steps: int | None = None
    cfg_scale: float | None = 7.0
    width: int | None = None
    height: int | None = None
    eta: float | None = None
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool = True
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    lora: list[LoraField] = Field(default_factory=list, max_length=MOST_LORAS)

    def fields(self, model: str, limits: Limits, catalog: Catalog) -> dict[str, Any]:
        """The request's fields, but for its own pictures. Raises `UsageError` for what can't be had here."""
        self._refuse()
        settings = self.override_settings or {}
        for name in settings:
            check_choice("override_settings", name, OPTIONS)
        called = self.sampler_name or self.sampler_index
        sampler, sigmas = find_scheduler(called) if called else (None, None)
        schedule = None if self.scheduler in (None, "") else self.scheduler
        units = webui_units.read(self.units(), catalog, self.width, self.height, limits.pixels)
        return {
            "prompt": self.prompt,
            "model": _model_of(settings.get("sd_model_checkpoint"), model),
            "negative_prompt": self.negative_prompt or "",
            "steps": usual_steps(self.steps, limits),
            "guidance_scale": 7.0 if self.cfg_scale is None else self.cfg_scale,
            "height": self.height,
            "width": self.width,
            "seed": self.seed,
            "count": _count(self.batch_size, self.n_iter),
            "scheduler": sampler,
            "sigmas": schedule or sigmas,
            "clip_skip": _clip_skip(settings.get("CLIP_stop_at_last_layers")),
            "prompt_syntax": "webui",
            "eta": self._eta(sampler),
            "loras": tuple(LoraSpec(one.name or one.path, one.multiplier) for one in self.lora),
            "beside": replace(units.beside, **self._refiner()),
            "uploads": units.uploads,
        }

    def _refiner(self) -> dict[str, Any]:
        """The refiner, which web UIs call by its title; none of it where it takes over at 0 or 1, as there."""
        title, start = self.refiner_checkpoint, 0.8 if self.refiner_switch_at is None else self.refiner_switch_at
        if title in (None, "", "None") or start in (0, 1):
            return {}
        return {"refiner": (title or "").partition(" [")[0], "refiner_start": start}

    def _refuse(self) -> None:
        said = {**(self.model_extra or {})}
        for name, nothing in REFUSED.items():
            if said.get(name) not in nothing:
                raise UsageError(f"{name} can't be had here, got {said[name]!r:.60}", hint=f"leave {name} out")
        for name, script in (self.alwayson_scripts or {}).items():
            arguments = script.get("args") if isinstance(script, dict) else script
            if name.lower() != webui_units.SCRIPT and arguments not in ([], [False], None):
                raise UsageError(f"the script {name!r} can't be had here", hint="leave alwayson_scripts out")

    def units(self) -> list[Any]:
        """The units of the ControlNet extension."""
        scripts = {name.lower(): script for name, script in (self.alwayson_scripts or {}).items()}
        script = scripts.get(webui_units.SCRIPT)
        units = script.get("args") if isinstance(script, dict) else script
        if units is not None and not isinstance(units, list):
            raise UsageError(f"ControlNet's args must be a list, got {units!r:.60}", hint="send a list of its units")
        return units or []

    def _eta(self, sampler: str | None) -> float | None:
        if sampler in WITH_ETA:
            return self.eta
        is_ancestral = (sampler or "").endswith("-a")
        if self.eta not in (USUAL_ETA if not is_ancestral else (None, 1)):
            raise UsageError(
                f"eta of {sampler or 'this sampler'} can't be changed, got {self.eta}", hint="leave eta out"
            )
        return None


class Txt2ImgBody(WebUiBody):
    """What txt2img takes besides: hires fix."""

    enable_hr: bool | None = False
    denoising_strength: float | None = None
    hr_scale: float | None = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = 0

    def request(self, model: str, limits: Limits, catalog: Catalog) -> PictureRequest:
        """The request. Raises `UsageError`."""
        fields = self.fields(model, limits, catalog)
        if self.enable_hr:
            fields["beside"] = replace(fields["beside"], upscale=self._upscale(catalog))
        return PictureRequest(**fields)

    def _upscale(self, catalog: Catalog) -> UpscaleSpec:
        """The second pass, whose upscaler has its title there."""
        said = self.model_extra or {}
        for name, nothing in REFUSED_OF_HIRES.items():
            if said.get(name) not in nothing:
                raise UsageError(f"{name} can't be had here, got {said[name]!r:.60}", hint=f"leave {name} out")
        title = self.hr_upscaler or UPSCALERS[LATENT]
        named = {shown: name for name, shown in UPSCALERS.items()}
        check_choice("hr_upscaler", title, (*named, *catalog.listed["upscaler"]))
        strength = 0.75 if self.denoising_strength is None else self.denoising_strength
        factor = 2.0 if self.hr_scale is None else self.hr_scale
        return UpscaleSpec(factor, named.get(title, title), self.hr_second_pass_steps or None, strength)


class Img2ImgBody(WebUiBody):
    """What img2img takes besides."""

    init_images: list[str] = Field(default_factory=list)
    denoising_strength: float | None = 0.75
    mask: str | None = None
    mask_blur: int | None = 4
    resize_mode: int = 0
    inpainting_fill: int | None = 0
    inpaint_full_res: bool | int | None = True
    inpaint_full_res_padding: int | None = 0
    inpainting_mask_invert: int | bool | None = 0

    def request(self, model: str, limits: Limits, catalog: Catalog) -> PictureRequest:
        """The request. Raises `UsageError`."""
        if len(self.init_images) != 1:
            raise UsageError(f"one picture is changed at a time, got {len(self.init_images)}", hint="send one")
        if self.resize_mode != 0:
            raise UsageError(f"resize_mode {self.resize_mode} can't be had here", hint="use 0, which just resizes")
        fields = self.fields(model, limits, catalog) | {
            "strength": 0.75 if self.denoising_strength is None else self.denoising_strength
        }
        files = fields.pop("uploads") | {INIT: uploads.decode(self.init_images[0], "init_images", limits.pixels)}
        if self.mask is not None:
            files[MASK] = uploads.decode(self.mask, "mask", limits.pixels)
            files[MASK] = _inverted(files[MASK]) if self.inpainting_mask_invert else files[MASK]
            padding = (self.inpaint_full_res_padding or 0) if self.inpaint_full_res else None
            fields |= {"mask_blur": self.mask_blur or 0, "padding_crop": padding}
        return PictureRequest(**fields, uploads=files)


class ImageBody(BaseModel):
    """A picture whose text is read."""

    image: str


def routes(dispatcher: Dispatcher) -> APIRouter:
    """The routes under /sdapi/v1."""
    router = APIRouter(prefix="/sdapi/v1", tags=["web UIs"])
    chosen = {"model": dispatcher.catalog.default}
    _add_making(router, dispatcher, chosen)
    _add_lists(router, dispatcher)
    _add_options(router, dispatcher, chosen)
    _add_state(router, dispatcher)
    return router


def _add_making(router: APIRouter, dispatcher: Dispatcher, chosen: dict[str, str]) -> None:
    limits, catalog = dispatcher.spec.limits, dispatcher.catalog

    @router.post("/txt2img")
    async def txt2img(body: Txt2ImgBody, request: Request) -> Answer:
        """Make pictures from text."""
        job = await submit(
            dispatcher, lambda: body.request(chosen["model"], limits, catalog), client_of(request), INTERFACE
        )
        return Answer(_made(await finish(request, dispatcher, job), body))

    @router.post("/img2img")
    async def img2img(body: Img2ImgBody, request: Request) -> Answer:
        """Make pictures from a picture and text, or what a mask covers of it."""
        job = await submit(
            dispatcher, lambda: body.request(chosen["model"], limits, catalog), client_of(request), INTERFACE
        )
        return Answer(_made(await finish(request, dispatcher, job), body))


def _add_lists(router: APIRouter, dispatcher: Dispatcher) -> None:
    @router.get("/samplers")
    async def samplers() -> Answer:
        """List the samplers."""
        return Answer([{"name": name, "aliases": [name], "options": {}} for name in SCHEDULERS])

    @router.get("/schedulers")
    async def schedulers() -> Answer:
        """List the schedule types."""
        return Answer([{"name": name, "label": name, "aliases": [name]} for name in ("automatic", *SIGMAS)])

    @router.get("/sd-models")
    async def sd_models() -> Answer:
        """List the models."""
        names = dispatcher.catalog.models
        nothing: dict[str, Any] = {"hash": None, "sha256": None, "config": None}
        return Answer([{"title": name, "model_name": name, "filename": name, **nothing} for name in names])

    @router.get("/loras")
    async def loras() -> Answer:
        """List the LoRAs, which the field `lora` names."""
        return Answer([{"name": one, "alias": one, "path": one, "metadata": {}} for one in dispatcher.catalog.loras])

    @router.get("/refiners")
    async def refiners() -> Answer:
        """List the refiners, which `refiner_checkpoint` names."""
        return Answer([{"title": name, "model_name": name} for name in dispatcher.catalog.listed["refiner"]])

    @router.get("/upscalers")
    async def upscalers() -> Answer:
        """List the upscalers of a second pass, but for that of latents."""
        names = (UPSCALERS[LANCZOS], *dispatcher.catalog.listed["upscaler"])
        return Answer([{"name": name, "model_name": None, "model_path": None, "scale": 1} for name in names])

    @router.get("/latent-upscale-modes")
    async def latent_upscale_modes() -> Answer:
        """List how latents are enlarged before a second pass."""
        return Answer([{"name": UPSCALERS[LATENT]}])

    @router.get("/scripts")
    async def scripts() -> Answer:
        """List the scripts: ControlNet's, where there is a model for it."""
        names = [webui_units.SCRIPT] if webui_units.titles(dispatcher.catalog) else []
        return Answer({"txt2img": names, "img2img": names})


def _add_options(router: APIRouter, dispatcher: Dispatcher, chosen: dict[str, str]) -> None:
    @router.get("/options")
    async def options() -> Answer:
        """Say which model requests get that name none."""
        return Answer({"sd_model_checkpoint": chosen["model"], "CLIP_stop_at_last_layers": 1, "samples_format": "png"})

    @router.post("/options")
    async def set_options(body: dict[str, Any]) -> Answer:
        """Choose the model of requests that name none."""
        for name in body:
            check_choice("option", name, ("sd_model_checkpoint",))
        model = _model_of(body.get("sd_model_checkpoint"), chosen["model"])
        dispatcher.catalog.model(model)
        chosen["model"] = model
        return Answer({})


def _add_state(router: APIRouter, dispatcher: Dispatcher) -> None:
    limits = dispatcher.spec.limits

    @router.get("/progress")
    async def progress(skip_current_image: bool = False) -> Answer:
        """Say how far the picture is that is being made for this interface."""
        return Answer(_progress(dispatcher, skip_current_image))

    @router.post("/interrupt")
    async def interrupt(request: Request) -> Answer:
        """Cancel what is being made for who asks."""
        for job in _running(dispatcher):
            if job.client == client_of(request):
                dispatcher.cancel(job)
        return Answer({})

    @router.post("/png-info")
    def png_info(body: ImageBody) -> Answer:
        """Read the settings in a picture."""
        return Answer(_png_info(uploads.decode(body.image, "image", limits.pixels)))


def _model_of(title: Any, usual: str) -> str:
    """The name of a model that a client calls by its title, which may end with a hash."""
    if title is None or title == "":
        return usual
    if not isinstance(title, str):
        raise UsageError(f"sd_model_checkpoint must be a name, got {title!r:.60}", hint="use one of sd-models")
    return title.partition(" [")[0]


def _count(batch_size: int, n_iter: int) -> int:
    for name, value in (("batch_size", batch_size), ("n_iter", n_iter)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}", hint=f"use {name} 1")
    return batch_size * n_iter


def _clip_skip(layer: Any) -> int:
    """diffusers' number for the layer that web UIs count from the end."""
    if layer is None:
        return 0
    if type(layer) is not int or not 0 <= layer <= 12:
        raise UsageError(f"CLIP_stop_at_last_layers must be from 1 to 12, got {layer!r:.60}", hint="use 1")
    return max(0, layer - 1)


def _inverted(data: bytes) -> bytes:
    """A mask with black for white."""
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data)) as image:
            ImageOps.invert(image.convert("L")).save(buffer, "PNG", compress_level=1)
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"mask can't be read: {type(error).__name__}", hint="send a PNG file") from error
    return buffer.getvalue()


def _made(job: Job, body: WebUiBody) -> dict[str, Any]:
    """The answer: pictures, what was asked for, and what was made of it."""
    files = [base64.b64encode(one.data).decode() for one in job.pictures] if body.send_images else []
    asked = body.model_dump(exclude={"init_images", "mask", "alwayson_scripts"})
    texts = [_text_in(one.data) for one in job.pictures]
    first = job.pictures[0]
    fills = isinstance(body, Img2ImgBody) and body.mask is not None and body.inpainting_fill != 1
    notes = ["inpainting_fill is 1 here, the original, whatever is asked for"] if fills else []
    notes += webui_units.notes(body.units())
    info = {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(job.pictures),
        "negative_prompt": body.negative_prompt or "",
        "seed": first.drawn.seed,
        "all_seeds": [one.drawn.seed for one in job.pictures],
        "width": first.width,
        "height": first.height,
        "sampler_name": body.sampler_name or body.sampler_index,
        "cfg_scale": body.cfg_scale,
        "steps": body.steps,
        "batch_size": body.batch_size,
        "sd_model_name": job.request.model,
        "infotexts": texts,
        "notes": notes,
    }
    return {"images": files, "parameters": asked, "info": json.dumps(info)}


def _text_in(data: bytes) -> str:
    """The text that a picture of ours carries."""
    with Image.open(io.BytesIO(data)) as image:
        return str(image.info.get("parameters", ""))


def _running(dispatcher: Dispatcher) -> list[Job]:
    return [job for job in dispatcher.store.unfinished() if job.interface == INTERFACE]


def _progress(dispatcher: Dispatcher, skip_image: bool) -> dict[str, Any]:
    jobs = _running(dispatcher)
    job = next((one for one in jobs if one.state == "running"), jobs[0] if jobs else None)
    picture = None if job is None else max(job.pictures, key=lambda one: (one.state == "running", one.step))
    share = 0.0 if picture is None or not picture.steps else picture.step / picture.steps
    preview = b"" if picture is None or skip_image else picture.preview
    state = {
        "skipped": False,
        "interrupted": False,
        "job": "" if job is None else job.id,
        "job_count": len(jobs),
        "job_no": 0,
        "sampling_step": 0 if picture is None else picture.step,
        "sampling_steps": 0 if picture is None else picture.steps,
    }
    left = 0.0 if job is None else job.seconds_left or 0.0
    image = base64.b64encode(preview).decode() or None
    return {"progress": share, "eta_relative": left, "state": state, "current_image": image, "textinfo": None}


def _png_info(data: bytes) -> dict[str, Any]:
    """A picture's text, and its fields."""
    with tempfile.TemporaryDirectory(prefix="sdtrt-") as folder:
        path = Path(folder, "image")
        path.write_bytes(data)
        found = images.read_metadata(path)
    if found is None:
        return {"info": "", "items": {}, "parameters": {}}
    read = images.parse_parameters(found.parameters)
    fields = {"Prompt": read.prompt, "Negative prompt": read.negative_prompt, **read.fields}
    return {"info": found.parameters, "items": {"parameters": found.parameters}, "parameters": fields}
