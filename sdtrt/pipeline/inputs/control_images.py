"""The pictures that ControlNets go by: read, refused where they are no map, made into one, fitted to a size.

Knows pictures, and OpenCV where edges are wanted. Knows no ControlNet but by its name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from PIL import Image

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import UsageError
from sdtrt.pipeline.inputs import masks
from sdtrt.pipeline.inputs.images import InitImage, read_init_image
from sdtrt.specs import ControlSpec, GenerateSpec

WHAT = "control image"
CANNY_LOW, CANNY_HIGH = 100, 200  # thresholds of gradients, as in ControlNet's own examples and in web UIs
DARK, LIGHT = 48, 207  # of 255: a line map's pixels are darker or lighter, but for the edges of its lines
MOST_BETWEEN = 0.5  # of a line map's pixels: a photograph has most of its pixels there
MOST_LOOKED_AT = 2**20  # of a picture's pixels
MOST_COLOUR = 16  # levels between a grey map's channels, as JPEG leaves some
# What a ControlNet wants, told by its name: maps of lines, or of grey.
_LINES = re.compile(r"canny|mlsd|scribble|lineart|softedge|hed(?![a-z])", re.IGNORECASE)
_GREY = re.compile(r"depth", re.IGNORECASE)


@dataclass(frozen=True)
class ControlImage:
    """A ControlNet of a request, and its picture as it was read."""

    spec: ControlSpec
    picture: InitImage

    def fitted(self, height: int, width: int, box: masks.Box | None = None) -> Image.Image:
        """The map at exactly this size; edges are looked for in the picture as it is then.

        Args:
            box: of the picture, where a part of an image is made alone.
        """
        if box is None:
            fitted = self.picture.fitted(height, width)
        else:
            fitted = self.picture.pixels.crop(box).resize((width, height), Image.Resampling.LANCZOS)
        return edges(fitted) if self.spec.preprocessor == "canny" else fitted


def read_control_images(
    spec: GenerateSpec, init: InitImage | None, console: Console = QUIET
) -> tuple[ControlImage, ...]:
    """Read the pictures of a request's ControlNets, as init images are read.

    Raises:
        UsageError: for a file that is none of an image, for what is no map, where OpenCV is missing, and for another
            size than the init image's where a part of that is cropped.
    """
    if any(one.preprocessor == "canny" for one in spec.controls):
        require_opencv()
    found = tuple(ControlImage(one, read_init_image(one.image, console, WHAT)) for one in spec.controls)
    for one in found:
        if one.spec.preprocessor is None:
            _check_map(one)
        if spec.padding_crop is not None and init is not None:
            _check_size(one.picture, init)
    return found


class _Shown(Protocol):
    """What goes by a picture: a ControlNet, a T2I-Adapter."""

    @property
    def picture(self) -> InitImage:
        """The picture as it was read."""


def note_sizes(found: Sequence[_Shown], height: int, width: int, console: Console, what: str = WHAT) -> None:
    """Say which pictures are resized, as diffusers would do it: the proportions change where the size's do."""
    for one in found:
        own_width, own_height = one.picture.pixels.size
        if (own_width, own_height) == (width, height):
            continue
        text = f"{what} {one.picture.path}: resized from {own_width}x{own_height} to {width}x{height} (Lanczos)"
        if abs(own_width * height - own_height * width) > own_width * own_height // 16:
            console.warn(f"{text}: its proportions change, and with them what the picture shows")
        else:
            console.note(text)


def require_opencv() -> None:
    """Raise `UsageError` where OpenCV is missing, which finds edges."""
    if find_spec("cv2") is None:
        raise UsageError(
            "--control-preprocessor canny needs OpenCV, which is not installed",
            hint='pip install "sdtrt[control]", or pip install opencv-python-headless',
        )


def edges(picture: Image.Image) -> Image.Image:
    """White edges on black, by Canny's method (OpenCV's), in three channels."""
    import cv2

    found = cv2.Canny(np.asarray(picture.convert("RGB")), CANNY_LOW, CANNY_HIGH)
    return Image.fromarray(found).convert("RGB")


def _check_map(one: ControlImage) -> None:
    """Refuse a picture that is plainly no map of the kind that a ControlNet's name says."""
    path, name, picture = one.picture.path, one.spec.name, one.picture.pixels
    as_it_is = "--control-preprocessor none takes it as it is"
    if all(low == high for low, high in cast("tuple[tuple[int, int], ...]", picture.getextrema())):
        raise UsageError(f"control image {path} is no map: all its pixels have one colour", hint=as_it_is)
    known = Path(name).name
    step = 1 + int((picture.width * picture.height / MOST_LOOKED_AT) ** 0.5)
    pixels = np.asarray(picture)[::step, ::step].astype(np.int16)
    between = float(((pixels.mean(axis=-1) > DARK) & (pixels.mean(axis=-1) < LIGHT)).mean())
    if _LINES.search(known) and between > MOST_BETWEEN:
        mend = "use --control-preprocessor canny, which makes one of it; " if "canny" in known.lower() else ""
        raise UsageError(
            f"control image {path} is no map of lines, which {name} goes by: {between:.0%} of its pixels are neither"
            " dark nor light",
            hint=f"{mend}{as_it_is}",
        )
    colour = float(np.ptp(pixels, axis=-1).mean())
    if _GREY.search(known) and colour > MOST_COLOUR:
        raise UsageError(
            f"control image {path} is no map of depth, which {name} goes by: it is in colour",
            hint=f"use a map in grey; {as_it_is}",
        )


def _check_size(picture: InitImage, init: InitImage) -> None:
    """Raise `UsageError` unless a control image has an init image's size, of which a part is cropped."""
    if picture.pixels.size != init.pixels.size:
        own, wanted = ("x".join(map(str, one.pixels.size)) for one in (picture, init))
        raise UsageError(
            f"control image {picture.path} is {own}, where init image {init.path} is {wanted}, and --padding-crop"
            " takes the same part of both",
            hint=f"make the control image {wanted}, or leave --padding-crop out",
        )
