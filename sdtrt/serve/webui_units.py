"""The units of web UIs' ControlNet extension (sd-webui-controlnet): what each means here, and its routes.

Source: https://github.com/Mikubill/sd-webui-controlnet/wiki/API. A unit's model is a name of the server's lists, of
ControlNets, T2I-Adapters or IP-Adapters. Knows no job.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdtrt.common.errors import UsageError
from sdtrt.pipeline.inputs.control_images import CANNY_HIGH, CANNY_LOW
from sdtrt.serve import uploads
from sdtrt.serve.answers import Answer
from sdtrt.serve.beside import CONTROL, IP_IMAGE, T2I_IMAGE, Beside, Control, Scaled
from sdtrt.serve.catalog import Catalog
from sdtrt.specs import check_choice

SCRIPT = "controlnet"  # in any case
VERSION = 2  # of the extension's interface
IP_ADAPTER = "ip-adapter"  # the modules of IP-Adapters begin so
MODULES = ("none", "canny", f"{IP_ADAPTER}-auto")
BALANCED = (0, "Balanced", None)
RESIZE_MODES: Mapping[Any, str] = {
    **{0: "stretch", "Just Resize": "stretch", "Scale to Fit (Inner Fit)": "crop", "Inner Fit": "crop"},
    **{1: "crop", "Crop and Resize": "crop", None: "crop", 2: "fill", "Resize and Fill": "fill", "Outer Fit": "fill"},
}
USUAL_THRESHOLDS = (None, -1, CANNY_LOW, CANNY_HIGH)


class _Unit(BaseModel):
    """A unit, with the extension's own defaults."""

    model_config = ConfigDict(extra="ignore")
    enabled: bool = True
    image: Any = None
    input_image: Any = None
    mask: Any = None
    module: str | None = "none"
    model: str | None = "None"
    weight: float = Field(1.0, ge=-100, le=100)
    resize_mode: int | str | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    control_mode: int | str | None = 0
    hr_option: str | None = None
    pixel_perfect: bool = False
    threshold_a: float | None = None
    threshold_b: float | None = None

    @property
    def name(self) -> str:
        """Its model's name: titles may end with a hash."""
        return (self.model or "None").partition(" [")[0]

    @property
    def kind(self) -> str:
        """Its preprocessor; an IP-Adapter's, whichever it is, by that name."""
        module = (self.module or "none").lower()
        return IP_ADAPTER if module.startswith(IP_ADAPTER) else module


@dataclass
class Units:
    """What units come to."""

    beside: Beside = field(default_factory=Beside)
    uploads: dict[str, bytes] = field(default_factory=dict)


def read(given: Sequence[Any], catalog: Catalog, width: int | None, height: int | None, pixels: int) -> Units:
    """The ControlNets and adapters of units that are enabled.

    Args:
        width, height: of the request's picture, where it says so.
        pixels: of each unit's picture at most.

    Raises:
        UsageError: for a unit that can't be had here.
    """
    controls: list[Control] = []
    scaled: dict[str, list[Scaled]] = {IP_IMAGE: [], T2I_IMAGE: []}
    files: dict[str, bytes] = {}
    for one in _enabled(given):
        _refuse(one)
        start = _kind_of(one, catalog)
        count = len(controls) if start == CONTROL else len(scaled[start])
        data = _picture(one, pixels)
        files[f"{start}{count}"] = data if start == IP_IMAGE else _framed(one, data, width, height)
        if start == CONTROL:
            controls.append(Control(one.name, one.weight, one.guidance_start, one.guidance_end, one.kind))
        else:
            scaled[start].append(Scaled(one.name, one.weight))
    return Units(Beside(tuple(controls), tuple(scaled[IP_IMAGE]), tuple(scaled[T2I_IMAGE])), files)


def notes(given: Sequence[Any]) -> list[str]:
    """What of units is not as they ask for."""
    found = [one for one in _enabled(given) if one.kind == "canny"]
    asked = [value for one in found for value in (one.threshold_a, one.threshold_b) if value not in USUAL_THRESHOLDS]
    text = f"canny looks for edges at the picture's size, with the thresholds {CANNY_LOW} and {CANNY_HIGH}"
    return [text] if asked or any(not one.pixel_perfect for one in found) else []


def titles(catalog: Catalog) -> list[str]:
    """The models that units may name."""
    return [name for kind in ("controlnet", "t2i_adapter", "ip_adapter") for name in catalog.listed[kind]]


def routes(catalog: Catalog) -> APIRouter:
    """The routes under /controlnet."""
    router = APIRouter(prefix=f"/{SCRIPT}", tags=["web UIs"])

    @router.get("/version")
    async def version() -> Answer:
        """Say which version of the extension's interface this is."""
        return Answer({"version": VERSION})

    @router.get("/model_list")
    async def model_list() -> Answer:
        """List the models that units may name."""
        return Answer({"model_list": titles(catalog)})

    @router.get("/module_list")
    async def module_list() -> Answer:
        """List the preprocessors."""
        return Answer({"module_list": list(MODULES), "module_detail": {}})

    return router


def _enabled(given: Sequence[Any]) -> list[_Unit]:
    """The units that count; some clients send `False` for none."""
    try:
        found = [_Unit.model_validate(one) for one in given if one not in (False, None)]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"a unit of ControlNet, {place}: {first['msg']}", hint="see sd-webui-controlnet's API"
        ) from error
    return [one for one in found if one.enabled and one.name != "None"]


def _refuse(one: _Unit) -> None:
    """Refuse what changes a picture there, and can't be had here."""
    if one.kind not in ("none", "canny", IP_ADAPTER):
        raise UsageError(
            f"the preprocessor {one.module!r} can't be had here", hint="send the map that it makes, with module none"
        )
    if one.control_mode not in BALANCED:
        raise UsageError(f"control_mode {one.control_mode!r} can't be had here", hint="use 0, Balanced")
    if one.mask is not None:
        raise UsageError("a unit's mask can't be had here", hint="leave the mask of the unit out")
    if one.hr_option not in (None, "Both", "HiResFixOption.BOTH"):
        raise UsageError(f"hr_option {one.hr_option!r} can't be had here", hint="use Both")


def _kind_of(one: _Unit, catalog: Catalog) -> str:
    """What a unit's picture is uploaded as, by the list that has its model. Raises `UsageError` for an unknown one."""
    if not titles(catalog):
        raise UsageError(f"unknown model of ControlNet: {one.name!r}", hint="this server was started without any")
    check_choice("model of ControlNet", one.name, tuple(titles(catalog)))
    if one.name in catalog.listed["controlnet"]:
        return CONTROL
    if (one.guidance_start, one.guidance_end) != (0, 1):
        raise UsageError(f"{one.name} is an adapter, which counts in all steps here", hint="use guidance 0 to 1")
    return T2I_IMAGE if one.name in catalog.listed["t2i_adapter"] else IP_IMAGE


def _picture(one: _Unit, pixels: int) -> bytes:
    """A unit's picture, in any of the forms that clients send: text, or an object with `image`."""
    given = one.image or one.input_image
    given = given.get("image") if isinstance(given, dict) else given
    if not isinstance(given, str) or not given:
        raise UsageError(f"the unit of {one.name} has no image", hint="send one as base64, in its field image")
    return uploads.decode(given, f"the image of {one.name}", pixels)


def _framed(one: _Unit, data: bytes, width: int | None, height: int | None) -> bytes:
    """A picture in the proportions of the request's, as the unit says: stretched as it is, or cut around its middle."""
    mode = RESIZE_MODES.get(one.resize_mode)
    if mode is None:
        raise UsageError(f"unknown resize_mode: {one.resize_mode!r}", hint="use 0, Just Resize, or 1, Crop and Resize")
    if mode == "stretch" or width is None or height is None:
        return data
    with Image.open(io.BytesIO(data)) as image:
        if image.width * height == image.height * width:
            return data
        if mode == "fill":
            raise UsageError(
                f"resize_mode {one.resize_mode!r} can't be had here, of a picture of other proportions",
                hint="use 0, Just Resize, or 1, Crop and Resize",
            )
        return _cut(one, image, width, height)


def _cut(one: _Unit, image: Image.Image, width: int, height: int) -> bytes:
    """The middle of a picture in other proportions."""
    factor = min(image.width / width, image.height / height)
    wide, high = max(1, round(width * factor)), max(1, round(height * factor))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    buffer = io.BytesIO()
    try:
        image.crop((left, top, left + wide, top + high)).save(buffer, "PNG", compress_level=1)
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"the image of {one.name} can't be read: {type(error).__name__}", hint="send a PNG") from error
    return buffer.getvalue()
