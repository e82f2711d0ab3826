"""Calls a diffusers pipeline: the arguments of one call, and how often it runs the UNet.

It neither saves images nor judges them, and frees no memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

from sdtrt.pipeline.open import OpenPipeline
from sdtrt.pipeline.text_states import states_of
from sdtrt.specs import DEFAULT_IMAGE_GUIDANCE_SCALE


@dataclass(frozen=True)
class Control:
    """What a ControlNet of an open pipeline goes by in a call.

    Args:
        image: its map, in the images' size.
        scale, start, end, mode: as of `ControlSpec`.
    """

    image: Image.Image
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: int | None = None


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
        controls: one for each ControlNet of the pipeline.
        image_guidance_scale: how closely an edit keeps to `start`.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance_scale: float
    negative_prompt: str = ""
    start: Image.Image | None = None
    strength: float = 1.0
    mask: Image.Image | None = None
    controls: tuple[Control, ...] = ()
    image_guidance_scale: float = DEFAULT_IMAGE_GUIDANCE_SCALE

    def count_unet_calls(self, opened: OpenPipeline) -> int:
        """How often it runs the UNet: PNDM has one timestep more than steps, Heun nearly twice as many."""
        pipe, spec = opened.pipe, opened.spec
        pipe.scheduler.set_timesteps(spec.steps, device=spec.device)
        if self.start is None or spec.edit:
            return len(pipe.scheduler.timesteps)
        return len(pipe.get_timesteps(spec.steps, self.strength, spec.device)[0])

    def run(
        self,
        opened: OpenPipeline,
        *,
        output_type: Literal["np", "pil"] = "np",
        advance: Callable[[], object] | None = None,
    ) -> Any:
        """Make the images.

        Args:
            advance: is called after each step of the scheduler.

        Returns:
            Pixels `[B,H,W,3]` in 0 to 1 for `np`, finite or not; a list of pictures for `pil`.
        """
        watched = {} if advance is None else _watching(opened.pipe, advance)
        return opened.pipe(**self._arguments(opened), **watched, output_type=output_type).images

    def _arguments(self, opened: OpenPipeline) -> dict[str, Any]:
        """What diffusers' pipelines call all this."""
        spec = opened.spec
        common = {
            **self._texts(opened),
            **self._controls(),
            "num_inference_steps": spec.steps,
            "guidance_scale": self.guidance_scale,
            "generator": [torch.Generator().manual_seed(seed) for seed in self.seeds],
        }
        size = {"height": spec.sizes.height, "width": spec.sizes.width}
        if self.start is None:
            return {**common, **size}
        if spec.edit:
            own = size if spec.model.is_sdxl else {}  # others take the image's
            edits = {"image": [self.start] * len(self.prompts), "image_guidance_scale": self.image_guidance_scale}
            return {**common, **own, **edits}
        if self.mask is None:
            own = size if self.controls else {}  # others take the image's
            return {**common, **own, "image": self.start, "strength": self.strength}
        each = len(self.prompts)  # of one image for all, inpainting pipelines draw the latents by the first generator
        images = {"image": [self.start] * each, "mask_image": [self.mask] * each}
        return {**common, **size, **images, "strength": self.strength}

    def _controls(self) -> dict[str, Any]:
        """What ControlNets go by; lists where there are several."""
        if not self.controls:
            return {}
        given: dict[str, list[Any]] = {
            "image" if self.start is None else "control_image": [one.image for one in self.controls],
            "controlnet_conditioning_scale": [one.scale for one in self.controls],
            "control_guidance_start": [one.start for one in self.controls],
            "control_guidance_end": [one.end for one in self.controls],
        }
        found = {name: values if len(values) > 1 else values[0] for name, values in given.items()}
        first = self.controls[0]
        if first.mode is None:
            return found
        found.pop("image", None)  # a union's pipelines call it like the others' for images
        return {**found, "control_image": [first.image], "control_mode": [first.mode]}

    def _texts(self, opened: OpenPipeline) -> dict[str, Any]:
        """The prompts, or the states that are made of them here."""
        plan = opened.spec.text
        if plan.is_own:
            return states_of(opened.pipe, plan, self.prompts, self.negative_prompt, self.guidance_scale > 1)
        negative = [self.negative_prompt] * len(self.prompts) if self.negative_prompt else None
        return {"prompt": list(self.prompts), "negative_prompt": negative}


def _watching(pipe: Any, advance: Callable[[], object]) -> dict[str, Any]:
    """The argument by which a pipeline's call says that a step was done; XL's for edits has the older one alone."""
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        return {"callback_on_step_end": _calling(advance)}
    return {"callback": lambda *_: advance()}


def _calling(advance: Callable[[], object]) -> Callable[..., dict[str, Any]]:
    """What diffusers calls after a step, and which changes none of its tensors."""

    def on_step_end(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        advance()
        return {}

    return on_step_end
