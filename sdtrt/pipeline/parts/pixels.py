"""Pictures between the host and a pipeline's device: bytes go from one to the other, and are floats on the device.

The numbers are those of diffusers' `VaeImageProcessor` to the last bit, which computes them on the host, in NumPy.
Knows no pipeline.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

LEVELS = 256


def fits(picture: Image.Image, multiple: int) -> bool:
    """Whether diffusers takes a picture as it is: as RGB, of sides that are multiples of the VAE's factor."""
    return picture.mode == "RGB" and not any(side % multiple for side in picture.size)


def to_device(picture: Image.Image, device: torch.device) -> torch.Tensor:
    """An RGB picture as the tensor that diffusers makes of it: `[1,3,H,W]`, fp32 in 0 to 1, channels last."""
    levels = np.arange(LEVELS, dtype=np.uint8).astype(np.float32) / 255.0  # a GPU divides by a number less exactly
    table = torch.from_numpy(levels).to(device, non_blocking=True)
    given = torch.from_numpy(np.array(picture)).to(device, non_blocking=True)
    pixels: torch.Tensor = table[given.long()]
    return pixels[None].permute(0, 3, 1, 2)


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """Pixels `[B,3,H,W]` in 0 to 1 as RGB pictures; what is not finite may come out as any colour."""
    # PyTorch and NumPy both round halves to the even neighbour.
    levels = pixels.detach().permute(0, 2, 3, 1).float().mul(LEVELS - 1).round()
    return [Image.fromarray(one) for one in levels.to(torch.uint8).contiguous().cpu().numpy()]


class _OnDevice(VaeImageProcessor):  # type: ignore[misc]  # diffusers is not typed
    """diffusers' own, but that pictures are rounded on the device. It is a module's, so that pickles find it."""

    def postprocess(
        self, image: torch.Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None
    ) -> Any:
        """Turn what a VAE gives into `output_type`, as diffusers does."""
        if output_type != "pil" or not isinstance(image, torch.Tensor) or image.shape[1] != len("RGB"):
            return super().postprocess(image, output_type, do_denormalize)
        return to_pictures(super().postprocess(image, "pt", do_denormalize))


def round_on_device(processor: Any) -> None:
    """Let a pipeline's image processor round pictures on the device; one that is not diffusers' own stays as it is."""
    if type(processor) is VaeImageProcessor:
        processor.__class__ = _OnDevice


def let_go(processor: Any) -> None:
    """Undo `round_on_device`."""
    if type(processor) is _OnDevice:
        processor.__class__ = VaeImageProcessor
