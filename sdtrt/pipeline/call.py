"""Calls a diffusers pipeline: the arguments of one call, and how often it runs the UNet.

It neither saves images nor judges them, and frees no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

from sdtrt.models.resolve import LCM_PIPELINES
from sdtrt.pipeline import pixels
from sdtrt.pipeline.open import OpenPipeline
from sdtrt.pipeline.previews import Preview
from sdtrt.pipeline.text_states import states_of


@dataclass(frozen=True)
class PipelineCall:
    """One call of an open pipeline, which makes a batch of images.

    The steps and the size are the open pipeline's.

    Args:
        prompts: one for each image.
        seeds: one for each image, whose noise a generator of its own draws on the CPU.
        start: what img2img starts from, in the images' size; None for images from text alone.
        strength: how much of `start` is replaced.
        mask: what of `start` is made anew, in white, in the same size; None for all of it.
        pictures: one for each IP-Adapter of the model.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance_scale: float
    negative_prompt: str = ""
    start: Image.Image | None = None
    strength: float = 1.0
    mask: Image.Image | None = None
    pictures: tuple[Image.Image, ...] = ()

    def count_unet_calls(self, opened: OpenPipeline) -> int:
        """How often it runs the UNet: PNDM has one timestep more than steps, Heun nearly twice as many."""
        pipe, spec = opened.pipe, opened.spec
        pipe.scheduler.set_timesteps(spec.steps, device=spec.device)
        if self.start is None or _scales_timesteps(pipe):
            return len(pipe.scheduler.timesteps)
        return len(pipe.get_timesteps(spec.steps, self.strength, spec.device)[0])

    def run(
        self,
        opened: OpenPipeline,
        *,
        output_type: Literal["np", "pil"] = "np",
        advance: Callable[[], object] | None = None,
        preview: Preview | None = None,
    ) -> Any:
        """Make the images.

        Args:
            advance: is called after each step of the scheduler.
            preview: looks at the latents then.

        Returns:
            Pixels `[B,H,W,3]` in 0 to 1 for `np`, finite or not; a list of pictures for `pil`.
        """
        watched = {} if advance is None else {"callback_on_step_end": _calling(advance, preview)}
        given = {"pil": "pt"}.get(output_type, output_type)
        made = opened.pipe(**self._arguments(opened), **watched, output_type=given).images
        return pixels.to_pictures(made) if output_type == "pil" else made

    def _arguments(self, opened: OpenPipeline) -> dict[str, Any]:
        """What diffusers' pipelines call all this."""
        spec = opened.spec
        if hasattr(opened.pipe.scheduler, "noise_sampler_seed"):  # it draws no noise from the generators
            opened.pipe.scheduler.noise_sampler_seed = self.seeds[0] if len(self.seeds) == 1 else list(self.seeds)
        common = {
            **({} if spec.eta is None else {"eta": spec.eta}),
            **self._texts(opened),
            "num_inference_steps": spec.steps,
            "guidance_scale": self.guidance_scale,
            "generator": [torch.Generator().manual_seed(seed) for seed in self.seeds],
        }
        common |= {"ip_adapter_image": list(self.pictures)} if self.pictures else {}
        size = {"height": spec.sizes.height, "width": spec.sizes.width}
        if self.start is None:
            return {**common, **size}
        if self.mask is None:
            return {**common, "image": self._started(opened), "strength": self.strength}
        each = len(self.prompts)  # of one image for all, inpainting pipelines draw the latents by the first generator
        images = {"image": [self.start] * each, "mask_image": [self.mask] * each}
        return {**common, **size, **images, "strength": self.strength}

    def _started(self, opened: OpenPipeline) -> Image.Image | torch.Tensor:
        """What img2img starts from, on the device already, where diffusers would not change its size."""
        assert self.start is not None
        if pixels.fits(self.start, opened.pipe.vae_scale_factor):
            return pixels.to_device(self.start, opened.spec.device)
        return self.start

    def _texts(self, opened: OpenPipeline) -> dict[str, Any]:
        """The prompts, or the states that are made of them here."""
        plan = opened.spec.text
        if plan.is_own:
            guided = self.guidance_scale > 1 and not opened.spec.model.embeds_guidance
            return states_of(opened.pipe, plan, self.prompts, self.negative_prompt, guided)
        if type(opened.pipe).__name__ in LCM_PIPELINES:  # it takes no negative prompt
            return {"prompt": list(self.prompts)}
        negative = [self.negative_prompt] * len(self.prompts) if self.negative_prompt else None
        return {"prompt": list(self.prompts), "negative_prompt": negative}


def _scales_timesteps(pipe: Any) -> bool:
    """Whether all steps of a pipeline from an image run, in the part of the timesteps that the strength says."""
    return type(pipe).__name__ == LCM_PIPELINES[1]


def _calling(advance: Callable[[], object], preview: Preview | None) -> Callable[..., dict[str, Any]]:
    """What diffusers calls after a step, and which changes none of its tensors."""

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        advance()
        return {} if preview is None else preview(pipe, step, timestep, tensors)

    return on_step_end
