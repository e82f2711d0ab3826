"""Calls a diffusers pipeline: the arguments of one call, and how often it runs the UNet.

It neither saves images nor judges them, and frees no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image

from sdtrt.pipeline.open import OpenPipeline
from sdtrt.pipeline.text_states import states_of
from sdtrt.specs import SizeConditioning


@dataclass(frozen=True)
class PipelineCall:
    """One call of an open pipeline, which makes a batch of images.

    The steps and the size are the open pipeline's.

    Args:
        prompts: one for each image.
        seeds: one for each image, whose noise a generator of its own draws on the CPU.
        start: what img2img starts from, in the images' size: one picture for all, one for each, or latents; None for
            images from text alone.
        strength: how much of `start` is replaced.
        mask: what of `start` is made anew, in white, in the same size; None for all of it.
        conditioning: what SDXL is told of the picture's size.
        until: the share of the noise schedule after which it ends, and a refiner takes over; None for all of it.
        after: the share of the noise schedule that is done when it takes over; `start` is latents then.
        generators: that go on where another call left them; None for new ones of the seeds.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance_scale: float
    negative_prompt: str = ""
    start: Image.Image | list[Image.Image] | torch.Tensor | None = None
    strength: float = 1.0
    mask: Image.Image | None = None
    conditioning: SizeConditioning = field(default_factory=SizeConditioning)
    until: float | None = None
    after: float | None = None
    generators: tuple[torch.Generator, ...] | None = None

    def count_unet_calls(self, opened: OpenPipeline) -> int:
        """How often it runs the UNet: PNDM has one timestep more than steps, Heun nearly twice as many."""
        pipe, spec = opened.pipe, opened.spec
        pipe.scheduler.set_timesteps(spec.steps, device=spec.device)
        timesteps = pipe.scheduler.timesteps
        if self.after is not None:
            return len(pipe.get_timesteps(spec.steps, self.strength, spec.device, denoising_start=self.after)[0])
        if self.start is not None:
            timesteps = pipe.get_timesteps(spec.steps, self.strength, spec.device)[0]
        if self.until is None:
            return len(timesteps)
        return timesteps_until(timesteps, self.until, pipe.scheduler.config.num_train_timesteps)

    def run(
        self,
        opened: OpenPipeline,
        *,
        output_type: Literal["np", "pil", "latent"] = "np",
        advance: Callable[[], object] | None = None,
    ) -> Any:
        """Make the images.

        Args:
            advance: is called after each step of the scheduler.

        Returns:
            Pixels `[B,H,W,3]` in 0 to 1 for `np`, finite or not; a list of pictures for `pil`; latents for `latent`.
        """
        watched = {} if advance is None else {"callback_on_step_end": _calling(advance)}
        return opened.pipe(**self._arguments(opened), **watched, output_type=output_type).images

    def _arguments(self, opened: OpenPipeline) -> dict[str, Any]:
        """What diffusers' pipelines call all this."""
        spec = opened.spec
        common = {
            **self._texts(opened),
            "num_inference_steps": spec.steps,
            "guidance_scale": self.guidance_scale,
            "generator": list(self.generators or generators_of(self.seeds)),
            **self._shares(),
            **_of_size(self.conditioning),
        }
        size = {"height": spec.sizes.height, "width": spec.sizes.width}
        if self.start is None:
            return {**common, **size}
        if self.mask is None:
            return {**common, "image": self.start, "strength": self.strength}
        each = len(self.prompts)  # of one image for all, inpainting pipelines draw the latents by the first generator
        images = {"image": [self.start] * each, "mask_image": [self.mask] * each}
        return {**common, **size, **images, "strength": self.strength}

    def _shares(self) -> dict[str, float]:
        """The part of the noise schedule that it runs, where that is not all."""
        named = {"denoising_end": self.until, "denoising_start": self.after}
        return {name: share for name, share in named.items() if share is not None}

    def _texts(self, opened: OpenPipeline) -> dict[str, Any]:
        """The prompts, or the states that are made of them here."""
        plan = opened.spec.text
        if plan.is_own:
            return states_of(opened.pipe, plan, self.prompts, self.negative_prompt, self.guidance_scale > 1)
        negative = [self.negative_prompt] * len(self.prompts) if self.negative_prompt else None
        return {"prompt": list(self.prompts), "negative_prompt": negative}


def generators_of(seeds: Sequence[int]) -> tuple[torch.Generator, ...]:
    """A generator of its own for each image, on the CPU."""
    return tuple(torch.Generator().manual_seed(seed) for seed in seeds)


def _of_size(conditioning: SizeConditioning) -> dict[str, tuple[int, int]]:
    """SDXL's size conditioning by diffusers' names, which has the height, or the top, first."""
    names = {"original_size": "original_size", "crop": "crops_coords_top_left", "target_size": "target_size"}
    return {names[name]: (second, first) for name, (first, second) in conditioning.given.items()}


def timesteps_until(timesteps: torch.Tensor, end: float, trained: int) -> int:
    """How many of the timesteps run before a share of the schedule is done, as diffusers' `denoising_end` counts."""
    return int((timesteps >= round(trained - end * trained)).sum())


def _calling(advance: Callable[[], object]) -> Callable[..., dict[str, Any]]:
    """What diffusers calls after a step, and which changes none of its tensors."""

    def on_step_end(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        advance()
        return {}

    return on_step_end
