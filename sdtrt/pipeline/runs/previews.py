"""Small pictures of what a pipeline is making, decoded by a tiny VAE while its steps run.

Knows latents, a VAE, and diffusers' `callback_on_step_end`. Writes no file, and costs nothing where nobody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch.nn import functional

from sdtrt.common.console import Console
from sdtrt.common.errors import ModelError, SdtrtError, UsageError
from sdtrt.models import loading
from sdtrt.models.resolve import Model, resolve_model
from sdtrt.pipeline.opening.open import OpenPipeline
from sdtrt.specs import DEFAULT_PREVIEW_EVERY
from sdtrt.specs.contract import is_tiny_vae

SIDE = 64  # latents: the longer side of what is decoded, 512 pixels

Show = Callable[[int, Sequence[Image.Image]], object]


class Preview:
    """What a diffusers pipeline takes as `callback_on_step_end`: every few steps it shows the latents, decoded.

    Args:
        vae: a tiny VAE for such latents, which moves to where they are; a pipeline's own stays, and runs in its engine.
        show: gets the number of the step that is done, from 1, and a picture for each image.
        every: steps from one picture to the next.
    """

    def __init__(self, vae: Any, show: Show, every: int = DEFAULT_PREVIEW_EVERY) -> None:
        if every < 1:
            raise UsageError(f"a preview is made every {every} steps", hint="use 1, or more")
        self.vae, self.show, self.every = vae, show, every

    def __call__(self, pipe: Any, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        """Be called after a step, from 0; nothing of the pipeline's changes."""
        if (step + 1) % self.every == 0:
            latents = tensors["latents"].float() * variance_factor(pipe.scheduler)
            self.show(step + 1, self.decode(latents, moves=pipe.vae is not self.vae))
        return {}

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, *, moves: bool = True) -> list[Image.Image]:
        """Pictures of latents `[B,C,H,W]` of unit variance.

        Args:
            moves: whether the VAE goes to where the latents are, and what is larger than `SIDE` is scaled down for it.
        """
        if moves:
            dtype = torch.float16 if latents.device.type == "cuda" else torch.float32
            torch.nn.Module.to(self.vae, latents.device, dtype)
            if (longer := max(latents.shape[-2:])) > SIDE:
                latents = functional.interpolate(latents, scale_factor=SIDE / longer, mode="area")
        given = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        pixels = self.vae.decode(given, return_dict=False)[0]
        levels = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return [Image.fromarray(one) for one in levels.permute(0, 2, 3, 1).cpu().numpy()]


def preview(vae: str | AutoencoderTiny, show: Show, *, every: int = DEFAULT_PREVIEW_EVERY) -> Preview:
    """Make small pictures while a diffusers pipeline's steps run: pass it what this returns as `callback_on_step_end`.

    Args:
        vae: an `AutoencoderTiny`, its folder, or its hub id: `madebyollin/taesd`, or `taesdxl` for SDXL. Where the
            pipeline's own is one (`pipe.vae`), that may be it.
        show: gets the number of the step that is done, and a list of pictures, one for each image.
        every: steps from one picture to the next.

    Raises:
        UsageError: for a number of steps below 1.

    Example:
        >>> shown = sdtrt.preview("madebyollin/taesd", lambda step, pictures: pictures[0].save("preview.png"))
        >>> pipe("a lighthouse at dawn", callback_on_step_end=shown)
    """
    found = AutoencoderTiny.from_pretrained(vae) if isinstance(vae, str) else vae
    return Preview(found, show, every)


def variance_factor(scheduler: Any) -> float:
    """What brings latents back to the variance that a VAE knows: some schedulers add the noise and scale nothing.

    Those begin with noise of a deviation above 1, as k-diffusion's do. After a step, the latents' is 1 + σ².
    """
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is None or index is None or float(scheduler.init_noise_sigma) <= 1:
        return 1.0
    sigma = float(sigmas[min(index, len(sigmas) - 1)])
    return float((sigma**2 + 1) ** -0.5)


def find_preview_vae(name: str, model: Model, console: Console) -> Model:
    """The model with a tiny VAE in the place of its own; nothing is loaded.

    Raises:
        UsageError, ModelError: where there is none of that name, or it is not one for these latents.
    """
    try:
        found = resolve_model(replace(model.spec, vae=name, loras=()), console)
        config = found.config("vae")
    except SdtrtError as error:
        hint = (error.hint or "").replace("--vae", "--preview")
        raise type(error)(error.message.replace("--vae", "--preview"), hint=hint) from error
    if not is_tiny_vae(config):
        raise ModelError(
            f"{name} is no tiny VAE, and a full one is too slow for previews",
            hint="use --preview madebyollin/taesd, or madebyollin/taesdxl for SDXL",
        )
    return found


def load_preview(found: Model, opened: OpenPipeline, show: Show, every: int) -> Preview:
    """A preview by the VAE of a model that `find_preview_vae` found; an open pipeline's own, where it is that one."""
    is_own = found.spec.vae == opened.spec.model.spec.vae
    vae = opened.pipe.vae if is_own else loading.load_parts(found, ("vae",), torch.float32)["vae"]
    return Preview(vae, show, every)
