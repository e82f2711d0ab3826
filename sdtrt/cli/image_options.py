"""The options that describe an image, and those of `txt2img`, `img2img` and `inpaint`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

from typer import Argument, Option

from sdtrt.cli.control_options import IpAdapter, IpImage
from sdtrt.cli.from_file import FromFile
from sdtrt.cli.options import BackendOptions
from sdtrt.specs import (
    COMPONENTS,
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_PREVIEW_EVERY,
    DEFAULT_REFINER_START,
    DEFAULT_STEPS,
    DEFAULT_UPSCALE_STRENGTH,
    LATENT,
    PREDICTION_TYPES,
    PROMPT_SYNTAXES,
    SCHEDULERS,
    SIGMAS,
    TIMESTEP_SPACINGS,
    Component,
    EmbeddingSpec,
    GenerateSpec,
    ImagePromptSpec,
    ModelSpec,
    NoiseSpec,
    Precision,
    PredictionType,
    PromptSyntax,
    RefinerSpec,
    SchedulerName,
    SizeConditioning,
    TimestepSpacing,
    UpscaleSpec,
    find_sigmas,
)

# What several commands ask about an image.
NegativePrompt = Annotated[str, Option("--negative-prompt", "-n", help="what the image must not show")]
Steps = Annotated[int, Option("--steps", "--num-inference-steps", help="denoising steps")]
GuidanceScale = Annotated[
    float, Option("--guidance-scale", "--cfg-scale", help="how closely the prompt is followed; up to 1 is off")
]
Height = Annotated[int | None, Option("--height", "-H", help="pixels, a multiple of 8")]
Width = Annotated[int | None, Option("--width", "-W", help="pixels, a multiple of 8")]
InitImage = Annotated[Path, Option("--init-image", "-i", help="the image to start from")]
Scheduler = Annotated[
    str | None,
    Option(
        "--scheduler",
        "--sampler",
        help=f"one of {', '.join(SCHEDULERS)}, or what diffusers and web UIs call it; by default the model's own",
    ),
]


@dataclass(frozen=True)
class NoiseOptions:
    """These options say how noise is added and predicted, where the model does not say it, or says it wrongly."""

    prediction_type: Annotated[
        str | None, Option(help=f"{' or '.join(PREDICTION_TYPES)}; by default as the model says")
    ] = None
    timestep_spacing: Annotated[
        str | None, Option(help=f"{', '.join(TIMESTEP_SPACINGS)}; by default as the model says")
    ] = None
    zero_snr: Annotated[
        bool | None, Option(help="rescale the noise schedule to zero terminal SNR; by default as the model says")
    ] = None

    sigmas: Annotated[
        str | None,
        Option(
            "--sigmas",
            "--schedule-type",
            help=f"spacing of noise levels: {', '.join(SIGMAS)}; else as the model says",
        ),
    ] = None

    def spec(self) -> NoiseSpec:
        """The noise that is asked for."""
        return NoiseSpec(
            cast("PredictionType | None", self.prediction_type),
            cast("TimestepSpacing | None", self.timestep_spacing),
            self.zero_snr,
            None if self.sigmas is None else find_sigmas(self.sigmas),
        )


@dataclass(frozen=True)
class SizeOptions:
    """These options say what SDXL is told of an image's size."""

    original_size: Annotated[
        str | None, Option(metavar="WxH", help="SDXL: the size before scaling that it is told; by default the image's")
    ] = None
    crop: Annotated[
        str | None, Option(metavar="LEFT,TOP", help="SDXL: where it is told that the image was cut out; 0,0 by default")
    ] = None
    target_size: Annotated[
        str | None, Option(metavar="WxH", help="SDXL: the size that it is told to aim at; by default the image's")
    ] = None

    def spec(self) -> SizeConditioning:
        """What is said of sizes."""
        return SizeConditioning.parse(self.original_size, self.crop, self.target_size)


@dataclass(frozen=True)
class RefinerOptions:
    """These options name an SDXL model for the last steps."""

    refiner: Annotated[
        str | None, Option(metavar="MODEL", help="an SDXL model (its refiner, usually) that does the last steps")
    ] = None
    refiner_start: Annotated[
        float, Option(help="the share of the noise schedule after which the refiner takes over")
    ] = DEFAULT_REFINER_START

    def spec(self, model: ModelSpec) -> RefinerSpec | None:
        """The refiner: looked for as its model is, and with the same VAE."""
        if self.refiner is None:
            return None
        named = ModelSpec(self.refiner, variant=model.variant, offline=model.offline, vae=model.vae)
        return RefinerSpec(named, self.refiner_start)


@dataclass(frozen=True)
class UpscaleOptions:
    """These options are about a second pass at a larger size."""

    upscale: Annotated[
        float | None, Option(metavar="FACTOR", help="make the image so many times larger in a second pass (hires fix)")
    ] = None
    upscaler: Annotated[
        str, Option(metavar="latent|lanczos|FILE", help="what enlarges it; FILE is of a model that spandrel reads")
    ] = LATENT
    upscale_steps: Annotated[
        int | None, Option(help="denoising steps that run in the second pass; by default as many as in the first")
    ] = None
    upscale_strength: Annotated[float, Option(help="how much of the larger image is replaced: above 0, at most 1")] = (
        DEFAULT_UPSCALE_STRENGTH
    )

    def spec(self) -> UpscaleSpec | None:
        """The second pass."""
        if self.upscale is None:
            return None
        return UpscaleSpec(self.upscale, self.upscaler, self.upscale_steps, self.upscale_strength)


NoBuild = Annotated[bool, Option("--no-build", help="fail rather than build a missing engine")]


@dataclass(frozen=True)
class GenerateOptions:
    """These options describe the images to be made."""

    text: Annotated[
        str | None, Argument(metavar="PROMPT", help="what the image shows; --prompt says it, too", show_default=False)
    ] = None
    prompt: Annotated[
        list[str] | None, Option("--prompt", "-p", help="what the image shows; give it again for more images")
    ] = None
    from_file: FromFile = None
    negative_prompt: NegativePrompt = ""
    prompt_syntax: Annotated[
        str,
        Option(help=f"{' or '.join(PROMPT_SYNTAXES)}: webui reads (word:1.3) and BREAK, and takes long prompts whole"),
    ] = "plain"
    embedding: Annotated[
        list[str] | None,
        Option("--embedding", metavar="FILE[:TOKEN]", help="a textual inversion, and its word; again for more"),
    ] = None
    ip_adapter: IpAdapter = None
    ip_image: IpImage = None
    clip_skip: Annotated[int, Option(help="last layers of the text encoder that are left out, as in diffusers")] = 0
    steps: Steps = DEFAULT_STEPS
    guidance_scale: GuidanceScale = DEFAULT_GUIDANCE_SCALE
    height: Height = None
    width: Width = None
    seed: Annotated[
        int | None, Option(help="of the first image, the next ones count up; by default, or at -1, random")
    ] = None
    num_images: Annotated[int, Option(help="images for each prompt")] = 1
    batch_size: Annotated[int, Option(help="images made at once; more are faster where memory allows")] = 1
    scheduler: Scheduler = None
    eta: Annotated[float | None, Option(help="noise that DDIM and TCD (its gamma) add in each step, 0 to 1")] = None
    output: Annotated[
        Path | None, Option("--output", "-o", help="file or folder (made if missing); by default this folder")
    ] = None
    overwrite: Annotated[bool, Option("--overwrite", help="replace an output file that exists")] = False
    preview: Annotated[
        str | None,
        Option(metavar="FILE|FOLDER|ID", help="a tiny VAE (such as TAESD) that shows the picture while steps run"),
    ] = None
    preview_every: Annotated[int, Option(help="steps from one preview to the next")] = DEFAULT_PREVIEW_EVERY
    vae_tiling: Annotated[
        bool, Option("--vae-tiling", help="decode and encode large images in tiles, by PyTorch: memory stays flat")
    ] = False
    no_build: NoBuild = False
    component: Annotated[
        list[str] | None,
        Option(help=f"a part that an engine runs ({', '.join(COMPONENTS)}); give it again for more"),
    ] = None

    def spec(self, model: ModelSpec, backend: BackendOptions, **image: Any) -> GenerateSpec:
        """The images that are asked for; `image` holds the noise, and what only img2img and inpaint have."""
        backend.check(self.component or ())
        return GenerateSpec(
            prompts=self._prompts(),
            model=replace(model, ip_adapters=tuple(self.ip_adapter or ())),
            backend=backend.backend,
            precision=cast("Precision | None", backend.precision),
            negative_prompt=self.negative_prompt,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            height=self.height,
            width=self.width,
            seed=self.seed,
            num_images=self.num_images,
            batch_size=self.batch_size,
            scheduler=cast("SchedulerName | None", self.scheduler),
            output=self.output,
            overwrite=self.overwrite,
            allow_build=not self.no_build,
            eta=self.eta,
            preview=self.preview,
            preview_every=self.preview_every,
            components=cast("tuple[Component, ...]", tuple(self.component or ())),
            embeddings=tuple(map(EmbeddingSpec.parse, self.embedding or ())),
            ip_images=tuple(map(ImagePromptSpec.parse, self.ip_image or ())),
            clip_skip=self.clip_skip,
            prompt_syntax=cast("PromptSyntax", self.prompt_syntax),
            vae_tiling=self.vae_tiling,
            recipe=self.from_file,
            **image,
        )

    def _prompts(self) -> tuple[str, ...]:
        """The prompt that stands as an argument, then those of `--prompt`."""
        return (*(() if self.text is None else (self.text,)), *(self.prompt or ()))
