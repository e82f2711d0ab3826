"""What a picture's text says of how it was made, as fields of the native interface; and what a job has by default.

Knows the texts that sdtrt and web UIs write. Looks for no file of the server's: models and LoRAs go by the names that
requests may use, and what can't be had here is told by name.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from sdtrt.common.errors import UsageError
from sdtrt.pipeline.inputs import images
from sdtrt.pipeline.inputs.images import Metadata, parse_parameters
from sdtrt.pipeline.recipes.samplers import scheduler_options
from sdtrt.serve import uploads
from sdtrt.serve.answers import Answer
from sdtrt.serve.catalog import Catalog, without_paths
from sdtrt.serve.dispatch import Dispatcher
from sdtrt.serve.requests import usual_steps
from sdtrt.specs import DEFAULT_GUIDANCE_SCALE, DEFAULT_STRENGTH
from sdtrt.specs.serve import Limits

NUMBER = (int, float)
LONGEST = 200  # characters of a value that is told to be left
# Of sdtrt's own text: field → where it is, and of which types.
OURS: Mapping[str, tuple[tuple[str, ...], tuple[type, ...]]] = {
    "prompt": (("prompt",), (str,)),
    "negative_prompt": (("negative_prompt",), (str,)),
    "seed": (("seed",), (int,)),
    "width": (("width",), (int,)),
    "height": (("height",), (int,)),
    "steps": (("steps",), (int,)),
    "guidance_scale": (("guidance_scale",), NUMBER),
    "scheduler": (("scheduler", "name"), (str,)),
    "sigmas": (("noise", "sigmas"), (str,)),
    "strength": (("strength",), NUMBER),
    "mask_blur": (("mask_blur",), (int,)),
    "padding_crop": (("padding_crop",), (int,)),
    "edit": (("edit",), (bool,)),
    "image_guidance_scale": (("image_guidance_scale",), NUMBER),
    "clip_skip": (("clip_skip",), (int,)),
    "prompt_syntax": (("prompt_syntax",), (str,)),
    "eta": (("eta",), NUMBER),
    "vae_tiling": (("vae_tiling",), (bool,)),
    "quality": (("quality",), (str,)),
}
# What changes a picture, and goes by pictures and files that no text holds: it is to be given again.
LEFT = ("controlnets", "ip_adapters", "t2i_adapters", "embeddings", "upscale", "refiner", "init_image", "mask")
# Of web UIs' text: name → field and type.
THEIRS: Mapping[str, tuple[str, type]] = {
    "Steps": ("steps", int),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Denoising strength": ("strength", float),
    "Mask blur": ("mask_blur", int),
}
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_TAG = re.compile(r"<(?:lora|lyco):([^:>]+)(?::([^:>]*))?[^>]*>")
_CHANGES = re.compile(r"Hires|ControlNet|Refiner|Variation|Face restoration|Tiling|Clip skip")


@dataclass
class _Found:
    """What a text says: fields of a job, and what of it is left."""

    fields: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def leave(self, words: str) -> None:
        self.left.append(without_paths(words)[:LONGEST])


class SettingsBody(BaseModel):
    """A picture whose settings are read: base64, with or without `data:image/png;base64,`."""

    model_config = ConfigDict(extra="forbid")
    image: str


def routes(dispatcher: Dispatcher) -> APIRouter:
    """The route under /api/v1."""
    router = APIRouter(prefix="/api/v1", tags=["native"])
    pixels = dispatcher.spec.limits.pixels

    @router.post("/settings")
    def settings(body: SettingsBody) -> Answer:
        """Read how a picture of sdtrt or of a web UI was made: fields of a job, and what of it can't be had here."""
        found = _read(uploads.decode(body.image, "image", pixels), dispatcher.catalog)
        return Answer({"settings": found.fields, "left": found.left})

    return router


def defaults(limits: Limits) -> dict[str, float]:
    """What a job has that names nothing: what a form shows first."""
    return {
        "steps": usual_steps(None, limits),
        "guidance_scale": DEFAULT_GUIDANCE_SCALE,
        "strength": DEFAULT_STRENGTH,
    }


def _read(data: bytes, catalog: Catalog) -> _Found:
    with tempfile.TemporaryDirectory(prefix="sdtrt-") as folder:
        path = Path(folder, "image")
        path.write_bytes(data)
        try:
            metadata = images.read_metadata(path)
        except UsageError as error:
            raise UsageError("image can't be read: it is damaged", hint="send a PNG, JPEG or WebP file") from error
    if metadata is None or not metadata.parameters.strip():
        raise UsageError(
            "the picture carries no text that says how it was made", hint="use a PNG of sdtrt or of a web UI"
        )
    return _of_ours(metadata, catalog) if metadata.details else _of_theirs(metadata.parameters, catalog)


def _of_ours(metadata: Metadata, catalog: Catalog) -> _Found:
    details, found = metadata.details, _Found()
    for name, (keys, types) in OURS.items():
        value = _at(details, keys)
        if _fits(value, types):
            found.fields[name] = value
    model = _at(details, ("model",))
    model = model if isinstance(model, dict) else {}
    _take_model(found, model.get("name"), catalog)
    loras = model.get("loras")
    for one in loras if isinstance(loras, list) else []:
        if isinstance(one, dict):
            _take_lora(found, one.get("name"), one.get("weight", 1.0), catalog)
    for name in LEFT:
        if details.get(name):
            found.leave(f"{name.replace('_', ' ')}: give it again")
    return found


def _of_theirs(text: str, catalog: Catalog) -> _Found:
    read, found = parse_parameters(text), _Found()
    if not read.fields:
        raise UsageError("the picture's text has no settings (Steps: 20, Sampler: ...)", hint="use another picture")
    for tag in _TAG.finditer(read.prompt):
        _take_lora(found, tag[1], _number(tag[2] or "1", float), catalog)
    found.fields |= {"prompt": _TAG.sub("", read.prompt).strip(), "negative_prompt": read.negative_prompt}
    found.fields["prompt_syntax"] = "plain" if read.fields.get("Emphasis") == "None" else "webui"
    for name, (own, kind) in THEIRS.items():
        if name in read.fields and (value := _number(read.fields[name], kind)) is not None:
            found.fields[own] = value
    if size := _SIZE.fullmatch(read.fields.get("Size", "")):
        found.fields |= {"width": int(size[1]), "height": int(size[2])}
    options, left = scheduler_options(read.fields.get("Sampler"), read.fields.get("Schedule type"))
    found.fields |= {name: options[name] for name in ("scheduler", "sigmas") if name in options}
    for words in (*left, *(f"{name}: {value}" for name, value in read.fields.items() if _CHANGES.match(name))):
        found.leave(words)
    _take_model(found, read.fields.get("Model"), catalog)
    return found


def _take_model(found: _Found, name: Any, catalog: Catalog) -> None:
    if not isinstance(name, str) or not name:
        return
    if (own := _known(name, catalog.models)) is not None:
        found.fields["model"] = own
    else:
        found.leave(f"model {PurePosixPath(name).name}: this server has no such model")


def _take_lora(found: _Found, name: Any, weight: Any, catalog: Catalog) -> None:
    if not isinstance(name, str) or not name:
        return
    own = _known(name, catalog.loras)
    if own is None or not _fits(weight, NUMBER):
        found.leave(f"LoRA {PurePosixPath(name).name}: this server has no such LoRA")
    else:
        found.fields.setdefault("loras", []).append({"name": own, "weight": weight})


def _known(name: str, names: Collection[str]) -> str | None:
    """What this server calls a model or a LoRA that a picture's text names, maybe as a file."""
    path = PurePosixPath(name.replace("\\", "/"))
    return next((one for one in (name, path.name, path.stem) if one in names), None)


def _at(details: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    found: Any = details
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _fits(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types) and not (isinstance(value, float) and not math.isfinite(value))


def _number(text: str, kind: type) -> Any:
    """A number in a text; None where it is none."""
    try:
        value = kind(text.strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None
