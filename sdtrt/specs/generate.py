"""The request that `txt2img`, `img2img` and `inpaint` take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from sdtrt.common.errors import UsageError
from sdtrt.specs.adapters import AdapterSpec
from sdtrt.specs.build import ModelSpec
from sdtrt.specs.choices import (
    AUTO,
    COMPONENTS,
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_IMAGE_GUIDANCE_SCALE,
    DEFAULT_PREVIEW_EVERY,
    DEFAULT_STEPS,
    DEFAULT_STRENGTH,
    MAX_BATCH,
    MAX_IMAGES,
    MAX_MASK_BLUR,
    MAX_PIXELS,
    MAX_SEED,
    MOST_STEPS,
    PRECISIONS,
    PREDICTION_TYPES,
    RANDOM_SEED,
    TIMESTEP_SPACINGS,
    BackendName,
    Component,
    Precision,
    PredictionType,
    TimestepSpacing,
    check_choice,
    check_output,
)
from sdtrt.specs.control import ControlSpec
from sdtrt.specs.image_prompts import ImagePromptSpec
from sdtrt.specs.presets import QualityName, preset
from sdtrt.specs.recipe import Recipe
from sdtrt.specs.savings import Savings
from sdtrt.specs.schedulers import SIGMAS, SchedulerName, Sigmas, find_scheduler
from sdtrt.specs.sizes import check_size
from sdtrt.specs.stages import RefinerSpec, SizeConditioning, UpscaleSpec
from sdtrt.specs.texts import PROMPT_SYNTAXES, EmbeddingSpec, PromptSyntax

# Schedule types that are nothing but timesteps, as diffusers has them (docs/source/en/api/schedulers/overview.md).
SPACING_OF_SIGMAS: Mapping[str, TimestepSpacing] = {
    "uniform": "linspace",
    "sgm_uniform": "trailing",
    "simple": "trailing",
    "ddim_uniform": "leading",
}


@dataclass(frozen=True)
class NoiseSpec:
    """Values for a scheduler in the place of its model's configuration; None leaves that as it is.

    Args:
        prediction_type: what the UNet was trained to give.
        timestep_spacing: which of the trained timesteps run.
        sigmas: how the noise levels are spaced: web UIs' schedule type.
        zero_snr: rescale the noise schedule so that nothing of the image is left at its last timestep
            (https://arxiv.org/abs/2305.08891); timesteps are `trailing` then, if nothing else is said: it has to run.
        sources: who said so, for the reader, by the field's name; an option, if nobody else.
    """

    prediction_type: PredictionType | None = None
    timestep_spacing: TimestepSpacing | None = None
    zero_snr: bool | None = None
    sigmas: Sigmas | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.prediction_type is not None:
            check_choice("prediction-type", self.prediction_type, PREDICTION_TYPES)
        if self.timestep_spacing is not None:
            check_choice("timestep-spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.sigmas is not None:
            check_choice("sigmas", self.sigmas, SIGMAS)
        spacing = SPACING_OF_SIGMAS.get(self.sigmas) if self.sigmas else None
        if spacing is not None and self.timestep_spacing not in (None, spacing):
            raise UsageError(
                f"sigmas {self.sigmas} are at {spacing} timesteps, not at {self.timestep_spacing} ones",
                hint="use --timestep-spacing alone, or --sigmas alone",
            )

    def over(self, other: NoiseSpec) -> NoiseSpec:
        """This where it says something, else the other."""
        names = ("prediction_type", "timestep_spacing", "zero_snr", "sigmas")
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
        if "sigmas" in own and "timestep_spacing" not in own:
            other = replace(other, timestep_spacing=None)  # sigmas may be nothing but timesteps
        theirs = {name: source for name, source in other.sources.items() if name not in own}
        return replace(other, **own, sources={**theirs, **self.sources})

    def source(self, name: str) -> str:
        """Name who said a field's value."""
        no = "no-" if getattr(self, name) is False else ""
        return self.sources.get(name, f"--{no}{name.replace('_', '-')}")

    def describe(self) -> str:
        """Say for the reader what is said and by whom; empty where nothing is."""
        snr = None if self.zero_snr is None else "zero terminal SNR" if self.zero_snr else "no zero terminal SNR"
        spacing = self.timestep_spacing and f"{self.timestep_spacing} timesteps"
        said = {"prediction_type": self.prediction_type, "zero_snr": snr, "timestep_spacing": spacing}
        said["sigmas"] = self.sigmas and f"{self.sigmas} sigmas"
        words = [f"{what} ({self.source(name)})" for name, what in said.items() if what]
        if self.zero_snr and spacing is None and self.sigmas not in SPACING_OF_SIGMAS:
            words.append("trailing timesteps (zero terminal SNR needs the last one)")
        return ", ".join(words)


@dataclass(frozen=True)
class GenerateSpec:
    """Images to be made from text, from an image and text, or in the part of an image that a mask covers.

    Args:
        prompts: one or more prompts; each gives `num_images` images.
        precision: None for the backend's default (fp16 on a GPU, fp32 on a CPU).
        height, width: pixels; None for the init image's size, else the first control image's, else the model's own.
            With `padding_crop` the part is made at that size, by default the model's own, and scaled into the image.
        seed: of each prompt's first image (the next ones count up from it); None, or `RANDOM_SEED`, for a random one.
        batch_size: images made at once, with an engine for that batch; each is the image of its seed all the same.
        scheduler: None for the model's own; any of its names (`find_scheduler`), also with the sigmas at their end.
        eta: how much noise DDIM and TCD (its gamma) add in each step, 0 to 1; None for diffusers' default, 0.
        noise: what the scheduler is told, whatever the model's configuration and its checkpoint say.
        components: the parts that engines run, the others stay PyTorch's; none for the backend's default.
        init_image: start from this image instead of from noise (img2img).
        strength: how much of the init image is replaced, above 0 to 1; `strength * steps` steps run.
        mask: an image of the init image's size: what it has in white is made anew (inpainting).
        mask_blur: radius in pixels of the Gaussian that softens the mask, 0 for none.
        edit: change the init image as the prompt says, by a model for that (instruct-pix2pix); it starts from noise.
        image_guidance_scale: how closely such an image keeps to the init image, from 1 up.
        padding_crop: make the part that the mask covers alone, with so many pixels around it, and lay it over the init
            image, which stays as it is elsewhere; None to make the whole image.
        output: a file, or a folder where every image gets a new name; None for the current folder.
        overwrite: replace the file `output`; in a folder nothing is ever replaced.
        allow_build: export and build a missing engine on the spot.
        embeddings: textual inversions, whose words the prompts may have.
        clip_skip: how many of the text encoder's last layers are left out, as in diffusers.
        preview: a tiny VAE, which decodes a small picture while the steps run; None for none.
        preview_every: steps from one such picture to the next.
        ip_images: a picture for each of the model's IP-Adapters, or the embedding of a face, in their order.
        prompt_syntax: `webui` reads weights and BREAK, and takes long prompts in chunks; `plain` takes text as it is.
        vae_tiling: decode and encode what is larger than one of the VAE's tiles in tiles: memory stays flat.
        refiner: an SDXL model for the last steps.
        upscale: a second pass at a larger size, for pictures from text alone.
        conditioning: what SDXL is told of the picture's size.
        recipe: of the file whose picture is made anew, to tell what was taken of it, and what differs.
        controls: ControlNets, each with the picture that it goes by.
        adapters: T2I-Adapters, each with the picture that it goes by; for images from text alone.
        savings: what of a run's work is left out: guidance in a part of the steps, deep features that are kept.
        quality: the preset that the savings are of. Where they save nothing they become that preset's; others win.
    """

    prompts: tuple[str, ...]
    model: ModelSpec = ModelSpec()
    backend: BackendName = AUTO
    precision: Precision | None = None
    negative_prompt: str = ""
    steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    num_images: int = 1
    batch_size: int = 1
    scheduler: SchedulerName | None = None
    init_image: Path | None = None
    strength: float = DEFAULT_STRENGTH
    mask: Path | None = None
    mask_blur: int = 0
    padding_crop: int | None = None
    edit: bool = False
    image_guidance_scale: float = DEFAULT_IMAGE_GUIDANCE_SCALE
    output: Path | None = None
    overwrite: bool = False
    allow_build: bool = True
    components: tuple[Component, ...] = ()
    noise: NoiseSpec = NoiseSpec()
    embeddings: tuple[EmbeddingSpec, ...] = ()
    clip_skip: int = 0
    prompt_syntax: PromptSyntax = "plain"
    eta: float | None = None
    preview: str | None = None
    preview_every: int = DEFAULT_PREVIEW_EVERY
    ip_images: tuple[ImagePromptSpec, ...] = ()
    vae_tiling: bool = False
    refiner: RefinerSpec | None = None
    upscale: UpscaleSpec | None = None
    conditioning: SizeConditioning = field(default_factory=SizeConditioning)
    recipe: Recipe | None = field(default=None, compare=False, repr=False)
    controls: tuple[ControlSpec, ...] = ()
    adapters: tuple[AdapterSpec, ...] = ()
    savings: Savings = Savings()
    quality: QualityName | None = None

    def __post_init__(self) -> None:
        if self.seed == RANDOM_SEED:
            object.__setattr__(self, "seed", None)
        if self.quality is not None and self.savings == Savings():
            object.__setattr__(self, "savings", preset(self.quality).savings)
        for component in self.components:
            check_choice("component", component, COMPONENTS)
        if self.precision is not None:
            check_choice("precision", self.precision, PRECISIONS)
        settle_scheduler(self)
        check_choice("prompt-syntax", self.prompt_syntax, PROMPT_SYNTAXES)
        if self.clip_skip < 0:
            raise UsageError(
                f"clip-skip must be at least 0, got {self.clip_skip}", hint="use --clip-skip 1, or leave it out"
            )
        if self.preview_every < 1:
            raise UsageError(
                f"preview-every must be at least 1, got {self.preview_every}", hint="use --preview-every 5, or 1"
            )
        check_output(self.output)
        self._check_prompts()
        self._check_numbers()
        self._check_mask()
        self._check_ip_images()
        self._check_upscale()
        self._check_refiner()
        self._check_edit()
        self._check_beside()
        for name in ("height", "width"):
            pixels = getattr(self, name)
            if pixels is not None:
                check_size(name, pixels)

    def _check_beside(self) -> None:
        """Refuse what is beside a model without a picture, and what diffusers has no pipeline for."""
        if self.model.controlnet is not None:
            raise UsageError(
                f"the ControlNet {self.model.controlnet} of a ModelSpec goes by no picture",
                hint="name both in controls=(ControlSpec(name, image),)",
            )
        if self.model.t2i_adapter is not None:
            raise UsageError(
                f"the T2I-Adapter {self.model.t2i_adapter} of a ModelSpec goes by no picture",
                hint="name both in adapters=(AdapterSpec(name, image),)",
            )
        given = {"--init-image": self.init_image, "--controlnet": self.controls, "--upscale": self.upscale}
        for option, value in given.items() if self.adapters else ():
            if value:
                raise UsageError(
                    f"T2I-Adapter {self.adapters[0].name} and {option} don't go together: diffusers has no such"
                    " pipeline",
                    hint=f"leave {option} or --t2i-adapter out",
                )

    def _check_prompts(self) -> None:
        if not self.prompts:
            raise UsageError("no prompt was given", hint='use --prompt "a red circle on a blue background"')
        for text in (*self.prompts, self.negative_prompt):
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # what Python makes of other bytes in argv
                raise UsageError(f"a prompt must be valid UTF-8, got {text!r}", hint="check the terminal's encoding")

    def _check_numbers(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, got {self.steps}", hint=f"use --steps {DEFAULT_STEPS}")
        if self.num_images < 1:
            raise UsageError(f"num-images must be at least 1, got {self.num_images}", hint="use --num-images 1")
        if self.num_images > MAX_IMAGES:
            raise UsageError(
                f"num-images must be at most {MAX_IMAGES}, got {self.num_images}",
                hint=f"use --num-images {MAX_IMAGES}, and a --seed that goes on from there the next time",
            )
        if self.batch_size < 1:
            raise UsageError(f"batch size must be at least 1, got {self.batch_size}", hint="use --batch-size 1")
        if self.images_at_once > MAX_BATCH:
            raise UsageError(
                f"batch size must be at most {MAX_BATCH}, got {self.batch_size}", hint="use --batch-size 16, or no more"
            )
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise UsageError(
                f"guidance scale must be a number from 0 up, got {self.guidance_scale}",
                hint=f"use --guidance-scale {DEFAULT_GUIDANCE_SCALE}",
            )
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise UsageError(f"eta must be from 0 to 1, got {self.eta}", hint="use --eta 0.3")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED - self.num_images + 1:
            most = MAX_SEED - self.num_images + 1
            raise UsageError(
                f"seed must be from 0 to {most}, got {self.seed}",
                hint="use --seed 42, or leave --seed out for a random one",
            )
        starts = self.init_image is not None and not self.edit
        if starts and not 0 < self.strength <= 1:
            raise UsageError(
                f"strength must be above 0 and at most 1, got {self.strength}",
                hint=f"use --strength {DEFAULT_STRENGTH}",
            )
        if starts and int(self.steps * self.strength) < 1:
            raise UsageError(
                f"strength {self.strength} of {self.steps} steps leaves no step to run", hint=self._more_to_run()
            )

    def _check_mask(self) -> None:
        if self.mask is None:
            for name, value in (("mask-blur", self.mask_blur or None), ("padding-crop", self.padding_crop)):
                if value is not None:
                    raise UsageError(f"{name} {value} is about a mask, and there is none", hint="use --mask FILE")
            return
        if self.refiner is not None:
            raise UsageError("a refiner changes whole pictures, and a mask covers a part", hint="leave --refiner out")
        if self.init_image is None:
            raise UsageError(f"mask {self.mask} covers no init image", hint="use --init-image FILE")
        for name, pixels, most, usual in (
            ("mask-blur", self.mask_blur, MAX_MASK_BLUR, 4),
            ("padding-crop", self.padding_crop or 0, MAX_PIXELS, 32),
        ):
            if not 0 <= pixels <= most:
                raise UsageError(f"{name} must be from 0 to {most} pixels, got {pixels}", hint=f"use --{name} {usual}")

    def _check_ip_images(self) -> None:
        adapters, pictures = len(self.model.ip_adapters), len(self.ip_images)
        if adapters != pictures:
            raise UsageError(
                f"{adapters} IP-Adapter{'s' * (adapters != 1)} and {pictures} picture{'s' * (pictures != 1)} for them"
                " were given",
                hint="give an --ip-image FILE[:SCALE], or --ip-embeds, for each --ip-adapter, in their order",
            )

    def _check_upscale(self) -> None:
        """Refuse a second pass where there is none."""
        if self.upscale is None:
            return
        if self.init_image is not None:
            raise UsageError("upscale is for images from text alone", hint="use --height and --width with --init-image")
        if self.refiner is not None:
            raise UsageError("upscale and a refiner don't go together yet", hint="leave --upscale or --refiner out")
        self.upscale.schedule(self.steps)

    def _check_refiner(self) -> None:
        """Refuse a refiner behind a pipeline that diffusers lets run to its end alone."""
        if self.refiner is not None and self.controls and self.init_image is not None:
            raise UsageError(
                f"a refiner does not go on behind ControlNet {self.controls[0].name} and an image: diffusers' pipeline"
                " for these makes all steps",
                hint="leave --refiner, --controlnet or --init-image out",
            )

    def _check_edit(self) -> None:
        scale = self.image_guidance_scale
        if not (math.isfinite(scale) and scale >= 1):
            raise UsageError(
                f"image guidance scale must be a number from 1 up, got {scale}",
                hint=f"use --image-guidance-scale {DEFAULT_IMAGE_GUIDANCE_SCALE}",
            )
        if not self.edit:
            if scale != DEFAULT_IMAGE_GUIDANCE_SCALE:
                raise UsageError(f"image guidance scale {scale:g} is about --edit, which is off", hint="add --edit")
            return
        if self.init_image is None:
            raise UsageError("there is no image to edit", hint="use --init-image FILE")
        if self.mask is not None or self.controls:
            what = f"mask {self.mask}" if self.mask is not None else f"ControlNet {self.controls[0].name}"
            raise UsageError(
                f"{what} has no effect on edits: diffusers has no such pipeline",
                hint="leave it out, or leave --edit out",
            )

    def _more_to_run(self) -> str:
        """What makes img2img run a step: more of them where schedulers have so many, else more strength."""
        if self.strength >= 1 / MOST_STEPS and int(self.strength * (steps := math.ceil(1 / self.strength))):
            return f"use --steps {steps} or a higher --strength"
        return f"use --strength {math.ceil(1000 / self.steps) / 1000:g} or higher"

    @property
    def images_at_once(self) -> int:
        """Images made by one pipeline call: no more than there are to make."""
        return min(self.batch_size, len(self.prompts) * self.num_images)

    @property
    def uses_guidance(self) -> bool:
        """Whether classifier-free guidance widens the UNet's batch (diffusers' own rule)."""
        return self.guidance_scale > 1

    @property
    def rows_per_image(self) -> int:
        """The rows of a UNet call that make one image: with guidance two, of an edit three."""
        return (3 if self.edit else 2) if self.uses_guidance else 1


class _Scheduled(Protocol):
    """A request with a scheduler."""

    @property
    def scheduler(self) -> str | None:
        """Its name."""

    @property
    def noise(self) -> NoiseSpec:
        """What it is told."""


def settle_scheduler(spec: _Scheduled) -> None:
    """Put a scheduler's own name in the place of any other, and the sigmas that its name ends with into the noise.

    Raises:
        UsageError: for an unknown name, and for sigmas that are said twice, and differently.
    """
    if spec.scheduler is None:
        return
    name, sigmas = find_scheduler(spec.scheduler)
    if sigmas is not None and spec.noise.sigmas not in (None, sigmas):
        raise UsageError(
            f"scheduler {spec.scheduler!r} has {sigmas} sigmas, and --sigmas says {spec.noise.sigmas}",
            hint=f"use --scheduler {name} --sigmas {spec.noise.sigmas}",
        )
    if sigmas is not None:
        sources = {"sigmas": f"--scheduler {spec.scheduler!r}", **spec.noise.sources}
        object.__setattr__(spec, "noise", replace(spec.noise, sigmas=sigmas, sources=sources))
    object.__setattr__(spec, "scheduler", name)
