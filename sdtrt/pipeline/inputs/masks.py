"""Masks of inpainting: read and checked, fitted to the size of a call, and the result laid over its image.

Knows pictures and diffusers' way to crop them. Knows no model, and makes no image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import UsageError
from sdtrt.pipeline.inputs.images import InitImage, read_init_image

WHITE = 128  # of 255, and above: diffusers' pipelines make those pixels anew, and leave the others

Box = tuple[int, int, int, int]  # left, upper, right, lower


@dataclass(frozen=True)
class Mask:
    """What of an init image is made anew: where it was, sha256 (hex) of its file, its softened pixels in grey."""

    path: Path
    sha256: str
    pixels: Image.Image


def read_mask(path: Path, init: InitImage, blur: int = 0, console: Console = QUIET) -> Mask:
    """Read the mask of an init image, as init images are read: upright, and white where it is transparent.

    Args:
        blur: radius in pixels of the Gaussian that softens it, as the mask processor of diffusers' pipelines does it.

    Raises:
        UsageError: for a file that is none of an init image, for another size than the init image's, and for a mask
            that covers nothing.
    """
    read = read_init_image(path, console, "mask")
    if read.pixels.size != init.pixels.size:
        own, wanted = ("x".join(map(str, one.pixels.size)) for one in (read, init))
        raise UsageError(
            f"mask {path} is {own}, where init image {init.path} is {wanted}", hint=f"make the mask {wanted}"
        )
    grey = read.pixels.convert("L")
    if not _covers(grey):
        raise UsageError(
            f"mask {path} covers nothing: none of its pixels is white", hint="paint white what is to be made anew"
        )
    softened = grey.filter(ImageFilter.GaussianBlur(blur)) if blur else grey
    if not _covers(softened):
        raise UsageError(
            f"mask-blur {blur} leaves nothing of mask {path}", hint="use a smaller --mask-blur, or a larger mask"
        )
    return Mask(path, read.sha256, softened)


def _covers(mask: Image.Image, step: int = 1) -> bool:
    """Whether a mask makes any pixel anew, of those that are `step` pixels apart."""
    return bool((np.asarray(mask)[::step, ::step] >= WHITE).any())


@dataclass(frozen=True)
class Inpainting:
    """An image and its mask as a pipeline takes them.

    Args:
        init, mask: as they were read.
        image, covered: of `init` and `mask` what the pipeline gets, in its size.
        box: where that lies in `init`; None for all of it.
    """

    init: InitImage
    mask: Mask
    image: Image.Image
    covered: Image.Image
    box: Box | None

    def finished(self, made: Image.Image) -> Image.Image:
        """What a pipeline made, laid over the init image where that was cropped; else as it is."""
        if self.box is None:
            return made
        overlaid: Image.Image = _processor().apply_overlay(self.mask.pixels, self.init.pixels, made, self.box)
        return overlaid


def fit(init: InitImage, mask: Mask, size: tuple[int, int], padding: int | None, latent: int) -> Inpainting:
    """Fit an image and its mask to the size that a pipeline works at, as diffusers' pipelines do it.

    diffusers crops one image for a whole batch, and draws the latents of all by the first image's generator. So this
    is done before, and the pipeline gets an image for each.

    Args:
        size: height and width.
        padding: `padding_mask_crop` of diffusers' pipelines; None to take the whole image.
        latent: pixels per latent: of so many in a row one decides whether they are made anew.

    Raises:
        UsageError: where the mask is so small that it covers no latent, or the part that it covers is too long.
    """
    height, width = size
    if padding is None:
        image = init.fitted(height, width)
        covered, box = mask.pixels.resize((width, height), Image.Resampling.LANCZOS), None
    else:
        processor = _processor()
        box = processor.get_crop_region(mask.pixels, width, height, pad=padding)
        _check_proportions(box, height, width)
        image, covered = (
            processor.resize(one.crop(box), height, width, resize_mode="fill") for one in (init.pixels, mask.pixels)
        )
    if not _covers(covered, latent):
        raise UsageError(
            f"mask {mask.path} is too small: at {width}x{height} it covers none of the model's latents, which are"
            f" {latent} pixels apart",
            hint="make the mask larger" if padding is not None else "use --padding-crop 32, or a larger mask",
        )
    return Inpainting(init, mask, image, covered, box)


def _check_proportions(box: Box, height: int, width: int) -> None:
    """Refuse a part of an image that would be scaled to less than a pixel of height or width."""
    across, down = box[2] - box[0], box[3] - box[1]
    if min(down * width // across, across * height // down) < 1:
        raise UsageError(
            f"the part of {across}x{down} pixels that the mask covers is too long to be made at {width}x{height}",
            hint="give --height and --width of its proportions, or leave --padding-crop out",
        )


def _processor() -> Any:
    """diffusers' own way to crop, scale and overlay images, with its pipelines' settings."""
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor()
