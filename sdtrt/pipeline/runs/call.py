"""Calls a diffusers pipeline: the arguments of one call, and how often it runs the UNet.

It neither saves images nor judges them, and frees no memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from PIL import Image

from sdtrt.models.resolve import LCM_PIPELINES
from sdtrt.pipeline.inputs.control_images import ControlImage
from sdtrt.pipeline.inputs.masks import Box
from sdtrt.pipeline.inputs.text_states import states_of
from sdtrt.pipeline.opening.open import OpenPipeline
from sdtrt.pipeline.parts import pixels
from sdtrt.specs import DEFAULT_IMAGE_GUIDANCE_SCALE, SizeConditioning, Sizes

StepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]  # diffusers' `callback_on_step_end`


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

    @classmethod
    def of(cls, one: ControlImage, sizes: Sizes, box: Box | None = None) -> Self:
        """What a ControlNet of a request goes by, at a pipeline's size; `box` is as of `ControlImage.fitted`."""
        asked = one.spec
        return cls(one.fitted(sizes.height, sizes.width, box), asked.scale, asked.start, asked.end, asked.mode)


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
        pictures: one for each IP-Adapter of the model.
        conditioning: what SDXL is told of the picture's size.
        until: the share of the noise schedule after which it ends, and a refiner takes over; None for all of it.
        after: the share of the noise schedule that is done when it takes over; `start` is latents then.
        generators: that go on where another call left them; None for new ones of the seeds.
        controls: one for each ControlNet of the pipeline.
        adapters: one for each T2I-Adapter of the pipeline: its picture, in the images' size, and its scale.
        image_guidance_scale: how closely an edit keeps to `start`.
        negative_prompts: one for each image, where they have not all the same; all of them say something, or none.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance_scale: float
    negative_prompt: str = ""
    start: Image.Image | list[Image.Image] | torch.Tensor | None = None
    strength: float = 1.0
    mask: Image.Image | None = None
    pictures: tuple[Image.Image, ...] = ()
    conditioning: SizeConditioning = field(default_factory=SizeConditioning)
    until: float | None = None
    after: float | None = None
    generators: tuple[torch.Generator, ...] | None = None
    controls: tuple[Control, ...] = ()
    adapters: tuple[tuple[Image.Image, float], ...] = ()
    image_guidance_scale: float = DEFAULT_IMAGE_GUIDANCE_SCALE
    negative_prompts: tuple[str, ...] = ()

    def count_unet_calls(self, opened: OpenPipeline) -> int:
        """How often it runs the UNet: PNDM has one timestep more than steps, Heun nearly twice as many."""
        pipe, spec = opened.pipe, opened.spec
        pipe.scheduler.set_timesteps(spec.steps, device=spec.device)
        timesteps = pipe.scheduler.timesteps
        if self.after is not None:
            return len(pipe.get_timesteps(spec.steps, self.strength, spec.device, denoising_start=self.after)[0])
        if self.start is not None and not spec.edit and not _scales_timesteps(pipe):
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
        preview: StepEnd | None = None,
    ) -> Any:
        """Make the images.

        Args:
            advance: is called after each step of the scheduler.
            preview: looks at the latents then.

        Returns:
            Pixels `[B,H,W,3]` in 0 to 1 for `np`, finite or not; a list of pictures for `pil`; latents for `latent`.
        """
        watched = {} if advance is None else _watching(opened.pipe, advance, preview)
        given = {"pil": "pt"}.get(output_type, output_type)
        made = opened.pipe(**self._arguments(opened), **watched, output_type=given).images
        if given == "pt" and not isinstance(made, torch.Tensor):  # SD's pipeline for T2I-Adapters makes arrays alone
            made = torch.from_numpy(made).permute(0, 3, 1, 2)
        return pixels.to_pictures(made) if output_type == "pil" else made

    def _arguments(self, opened: OpenPipeline) -> dict[str, Any]:
        """What diffusers' pipelines call all this."""
        spec = opened.spec
        if hasattr(opened.pipe.scheduler, "noise_sampler_seed"):  # it draws no noise from the generators
            opened.pipe.scheduler.noise_sampler_seed = self.seeds[0] if len(self.seeds) == 1 else list(self.seeds)
        common = {
            **({} if spec.eta is None else {"eta": spec.eta}),
            **self._texts(opened),
            **self._controls(),
            **self._adapters(),
            "num_inference_steps": spec.steps,
            "guidance_scale": self.guidance_scale,
            "generator": list(self.generators or generators_of(self.seeds)),
            **self._shares(),
            **_of_size(self.conditioning),
        }
        common |= {"ip_adapter_image": list(self.pictures)} if self.pictures else {}
        size = {"height": spec.sizes.height, "width": spec.sizes.width}
        if self.start is None:
            return {**common, **size}
        if spec.edit:
            own = size if spec.model.is_sdxl else {}  # others take the image's
            edits = {"image": [self.start] * len(self.prompts), "image_guidance_scale": self.image_guidance_scale}
            return {**common, **own, **edits}
        if self.mask is None:
            own = size if self.controls else {}  # others take the image's
            return {**common, **own, "image": self._started(opened), "strength": self.strength}
        each = len(self.prompts)  # of one image for all, inpainting pipelines draw the latents by the first generator
        images = {"image": [self.start] * each, "mask_image": [self.mask] * each}
        return {**common, **size, **images, "strength": self.strength}

    def _started(self, opened: OpenPipeline) -> Image.Image | list[Image.Image] | torch.Tensor:
        """What img2img starts from, on the device already, where diffusers would not change its size."""
        assert self.start is not None
        if isinstance(self.start, Image.Image) and pixels.fits(self.start, opened.pipe.vae_scale_factor):
            return pixels.to_device(self.start, opened.spec.device)
        return self.start

    def _shares(self) -> dict[str, float]:
        """The part of the noise schedule that it runs, where that is not all."""
        named = {"denoising_end": self.until, "denoising_start": self.after}
        return {name: share for name, share in named.items() if share is not None}

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

    def _adapters(self) -> dict[str, Any]:
        """What T2I-Adapters go by, each picture once an image: of fewer, diffusers makes tensors that fit no batch."""
        if not self.adapters:
            return {}
        pictures = [[picture] * len(self.prompts) for picture, _ in self.adapters]
        scales = [scale for _, scale in self.adapters]
        several = len(scales) > 1
        return {
            "image": pictures if several else pictures[0],
            "adapter_conditioning_scale": scales if several else scales[0],
        }

    def _texts(self, opened: OpenPipeline) -> dict[str, Any]:
        """The prompts, or the states that are made of them here."""
        plan = opened.spec.text
        negatives = list(self.negative_prompts) or [self.negative_prompt] * len(self.prompts)
        if plan.is_own:
            guided = self.guidance_scale > 1 and not opened.spec.model.embeds_guidance
            return states_of(opened.pipe, plan, self.prompts, negatives, guided)
        if type(opened.pipe).__name__ in LCM_PIPELINES:  # it takes no negative prompt
            return {"prompt": list(self.prompts)}
        return {"prompt": list(self.prompts), "negative_prompt": negatives if any(negatives) else None}


def _scales_timesteps(pipe: Any) -> bool:
    """Whether all steps of a pipeline from an image run, in the part of the timesteps that the strength says."""
    return type(pipe).__name__ == LCM_PIPELINES[1]


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


def _watching(pipe: Any, advance: Callable[[], object], preview: StepEnd | None) -> dict[str, Any]:
    """The argument by which a pipeline's call says that a step was done; XL's for edits has the older one alone."""
    on_step_end = _calling(advance, preview)
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        return {"callback_on_step_end": on_step_end}

    def callback(step: int, timestep: Any, latents: torch.Tensor) -> None:
        on_step_end(pipe, step, timestep, {"latents": latents})

    return {"callback": callback}


def _calling(advance: Callable[[], object], preview: StepEnd | None) -> Callable[..., dict[str, Any]]:
    """What diffusers calls after a step, and which changes none of its tensors."""

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        advance()
        return {} if preview is None else preview(pipe, step, timestep, tensors)

    return on_step_end
