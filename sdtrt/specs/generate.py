"""The request that `txt2img`, `img2img` and `inpaint` take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdtrt.common.errors import UsageError
from sdtrt.specs.build import ModelSpec
from sdtrt.specs.choices import (
    AUTO,
    COMPONENTS,
    DEFAULT_GUIDANCE_SCALE,
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
    SCHEDULERS,
    TIMESTEP_SPACINGS,
    BackendName,
    Component,
    Precision,
    PredictionType,
    SchedulerName,
    TimestepSpacing,
    check_choice,
    check_output,
)
from sdtrt.specs.recipe import Recipe
from sdtrt.specs.sizes import check_size
from sdtrt.specs.stages import RefinerSpec, SizeConditioning, UpscaleSpec
from sdtrt.specs.texts import PROMPT_SYNTAXES, EmbeddingSpec, PromptSyntax


@dataclass(frozen=True)
class NoiseSpec:
    """Values for a scheduler in the place of its model's configuration; None leaves that as it is.

    Args:
        prediction_type: what the UNet was trained to give.
        timestep_spacing: which of the trained timesteps run.
        zero_snr: rescale the noise schedule so that nothing of the image is left at its last timestep
            (https://arxiv.org/abs/2305.08891); timesteps are `trailing` then, if nothing else is said: it has to run.
        sources: who said so, for the reader, by the field's name; an option, if nobody else.
    """

    prediction_type: PredictionType | None = None
    timestep_spacing: TimestepSpacing | None = None
    zero_snr: bool | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.prediction_type is not None:
            check_choice("prediction-type", self.prediction_type, PREDICTION_TYPES)
        if self.timestep_spacing is not None:
            check_choice("timestep-spacing", self.timestep_spacing, TIMESTEP_SPACINGS)

    def over(self, other: NoiseSpec) -> NoiseSpec:
        """This where it says something, else the other."""
        names = ("prediction_type", "timestep_spacing", "zero_snr")
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
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
        words = [f"{what} ({self.source(name)})" for name, what in said.items() if what]
        if self.zero_snr and spacing is None:
            words.append("trailing timesteps (zero terminal SNR needs the last one)")
        return ", ".join(words)


@dataclass(frozen=True)
class GenerateSpec:
    """Images to be made from text, from an image and text, or in the part of an image that a mask covers.

    Args:
        prompts: one or more prompts; each gives `num_images` images.
        precision: None for the backend's default (fp16 on a GPU, fp32 on a CPU).
        height, width: pixels; None for the init image's size, else the model's own. With `padding_crop` the part is
            made at that size, by default the model's own, and scaled into the init image.
        seed: of each prompt's first image (the next ones count up from it); None, or `RANDOM_SEED`, for a random one.
        batch_size: images made at once, with an engine for that batch; each is the image of its seed all the same.
        scheduler: None for the model's own.
        noise: what the scheduler is told, whatever the model's configuration and its checkpoint say.
        components: the parts that engines run, the others stay PyTorch's; none for the backend's default.
        init_image: start from this image instead of from noise (img2img).
        strength: how much of the init image is replaced, above 0 to 1; `strength * steps` steps run.
        mask: an image of the init image's size: what it has in white is made anew (inpainting).
        mask_blur: radius in pixels of the Gaussian that softens the mask, 0 for none.
        padding_crop: make the part that the mask covers alone, with so many pixels around it, and lay it over the init
            image, which stays as it is elsewhere; None to make the whole image.
        output: a file, or a folder where every image gets a new name; None for the current folder.
        overwrite: replace the file `output`; in a folder nothing is ever replaced.
        allow_build: export and build a missing engine on the spot.
        embeddings: textual inversions, whose words the prompts may have.
        clip_skip: how many of the text encoder's last layers are left out, as in diffusers.
        prompt_syntax: `webui` reads weights and BREAK, and takes long prompts in chunks; `plain` takes text as it is.
        vae_tiling: decode and encode what is larger than one of the VAE's tiles in tiles: memory stays flat.
        refiner: an SDXL model for the last steps.
        upscale: a second pass at a larger size, for pictures from text alone.
        conditioning: what SDXL is told of the picture's size.
        recipe: of the file whose picture is made anew, to tell what was taken of it, and what differs.
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
    output: Path | None = None
    overwrite: bool = False
    allow_build: bool = True
    components: tuple[Component, ...] = ()
    noise: NoiseSpec = NoiseSpec()
    embeddings: tuple[EmbeddingSpec, ...] = ()
    clip_skip: int = 0
    prompt_syntax: PromptSyntax = "plain"
    vae_tiling: bool = False
    refiner: RefinerSpec | None = None
    upscale: UpscaleSpec | None = None
    conditioning: SizeConditioning = field(default_factory=SizeConditioning)
    recipe: Recipe | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.seed == RANDOM_SEED:
            object.__setattr__(self, "seed", None)
        for component in self.components:
            check_choice("component", component, COMPONENTS)
        if self.precision is not None:
            check_choice("precision", self.precision, PRECISIONS)
        if self.scheduler is not None:
            check_choice("scheduler", self.scheduler, SCHEDULERS)
        check_choice("prompt-syntax", self.prompt_syntax, PROMPT_SYNTAXES)
        if self.clip_skip < 0:
            raise UsageError(
                f"clip-skip must be at least 0, got {self.clip_skip}", hint="use --clip-skip 1, or leave it out"
            )
        check_output(self.output)
        self._check_prompts()
        self._check_numbers()
        self._check_mask()
        self._check_upscale()
        for name in ("height", "width"):
            pixels = getattr(self, name)
            if pixels is not None:
                check_size(name, pixels)

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
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED - self.num_images + 1:
            most = MAX_SEED - self.num_images + 1
            raise UsageError(
                f"seed must be from 0 to {most}, got {self.seed}",
                hint="use --seed 42, or leave --seed out for a random one",
            )
        if self.init_image is not None and not 0 < self.strength <= 1:
            raise UsageError(
                f"strength must be above 0 and at most 1, got {self.strength}",
                hint=f"use --strength {DEFAULT_STRENGTH}",
            )
        if self.init_image is not None and int(self.steps * self.strength) < 1:
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

    def _check_upscale(self) -> None:
        """Refuse a second pass where there is none."""
        if self.upscale is None:
            return
        if self.init_image is not None:
            raise UsageError("upscale is for images from text alone", hint="use --height and --width with --init-image")
        if self.refiner is not None:
            raise UsageError("upscale and a refiner don't go together yet", hint="leave --upscale or --refiner out")
        self.upscale.schedule(self.steps)

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
        """Whether classifier-free guidance doubles the UNet's batch (diffusers' own rule)."""
        return self.guidance_scale > 1
