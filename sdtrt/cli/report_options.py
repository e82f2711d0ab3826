"""The options of `verify` and `bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from typer import Option

from sdtrt.cli.image_options import GuidanceScale, Height, NegativePrompt, NoBuild, Scheduler, Steps, Width
from sdtrt.cli.options import BackendOptions
from sdtrt.common.errors import UsageError
from sdtrt.specs import (
    BASELINES,
    BENCH_TASKS,
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_STEPS,
    DEFAULT_STRENGTH,
    DEFAULT_VERIFY_SEED,
    MAX_DIGITS,
    RANDOM_SEED,
    SAMPLE_PROMPT,
    BaselineName,
    BenchSpec,
    BenchTask,
    ControlSpec,
    GenerateSpec,
    ModelSpec,
    NoiseSpec,
    Precision,
    SchedulerName,
    Thresholds,
    VerifySpec,
)


@dataclass(frozen=True)
class VerifyOptions:
    """These options say with what an engine is compared, and how close it must be."""

    engine: Annotated[
        str | None, Option("--engine", "-e", help="an engine of the engine directory, by name; else the one in use")
    ] = None
    timesteps: Annotated[int | None, Option(help="compare so many timesteps, spread evenly; by default all")] = None
    prompt: Annotated[str, Option("--prompt", "-p", help="of the image that is denoised")] = SAMPLE_PROMPT
    negative_prompt: NegativePrompt = ""
    steps: Steps = DEFAULT_STEPS
    guidance_scale: GuidanceScale = DEFAULT_GUIDANCE_SCALE
    height: Height = None
    width: Width = None
    seed: Annotated[int, Option(help="of the image's noise")] = DEFAULT_VERIFY_SEED
    scheduler: Scheduler = None
    min_cosine: Annotated[float | None, Option(help="least cosine at a timestep")] = Thresholds.min_cosine
    max_noise_ratio: Annotated[
        float | None, Option(help="most relative L2 error, in multiples of PyTorch's own in half precision")
    ] = Thresholds.max_noise_ratio
    max_relative_l2: Annotated[float | None, Option(help="most relative L2 error at a timestep")] = (
        Thresholds.max_relative_l2
    )
    min_psnr: Annotated[float | None, Option(help="least PSNR of the image, in dB")] = Thresholds.min_psnr_db
    min_ssim: Annotated[float | None, Option(help="least structural similarity of the image")] = Thresholds.min_ssim
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FOLDER", help="where the pictures go; by default this folder")
    ] = None
    no_build: NoBuild = False

    def spec(self, model: ModelSpec, backend: BackendOptions, noise: NoiseSpec, **image: Any) -> VerifySpec:
        """The comparison that is asked for; `image` holds ControlNets, and pictures for IP-Adapters.

        Raises:
            UsageError: for a random seed, as who fails wants to see it again.
        """
        backend.check()
        if self.seed == RANDOM_SEED:
            raise UsageError(
                f"verify takes no random seed, got {self.seed}", hint=f"use --seed {DEFAULT_VERIFY_SEED}, or another"
            )
        asked = GenerateSpec(
            prompts=(self.prompt,),
            model=model,
            backend=backend.backend,
            precision=cast("Precision | None", backend.precision),
            negative_prompt=self.negative_prompt,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            height=self.height,
            width=self.width,
            seed=self.seed,
            scheduler=cast("SchedulerName | None", self.scheduler),
            allow_build=not self.no_build,
            noise=noise,
            **image,
        )
        thresholds = Thresholds(
            self.min_cosine, self.max_noise_ratio, self.max_relative_l2, self.min_psnr, self.min_ssim
        )
        return VerifySpec(asked, self.engine, self.timesteps, thresholds, self.output)


@dataclass(frozen=True)
class BenchOptions:
    """These options say what is timed, and beside what."""

    task: Annotated[str, Option(help=f"{', '.join(BENCH_TASKS)} or both")] = "both"
    baselines: Annotated[
        str,
        Option(
            metavar="auto|all|none|NAME,NAME",
            help=f"what to compare with: {', '.join(BASELINES)}; auto: what suits this machine without long tuning",
        ),
    ] = "auto"
    show_baselines: Annotated[
        bool, Option("--show-baselines", help="print the Python that makes each of them, and measure nothing")
    ] = False
    steps: Steps = DEFAULT_STEPS
    guidance_scale: GuidanceScale = DEFAULT_GUIDANCE_SCALE
    strength: Annotated[float, Option(help="of img2img: the share of the steps that run")] = DEFAULT_STRENGTH
    height: Height = None
    width: Width = None
    batch_size: Annotated[str, Option(metavar="N,N,N", help="images in one call; several are compared")] = "1"
    repeats: Annotated[int, Option(help="timed calls of each row")] = 5
    warmups: Annotated[int, Option(help="calls before them that are not timed")] = 2
    scheduler: Scheduler = None
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FOLDER", help="write bench.json, bench.md and bench.png here")
    ] = None
    overwrite: Annotated[bool, Option("--overwrite", help="replace such files of an earlier run")] = False
    no_build: NoBuild = False

    def spec(
        self, model: ModelSpec, backend: BackendOptions, noise: NoiseSpec, controls: tuple[ControlSpec, ...] = ()
    ) -> BenchSpec:
        """The measurements that are asked for."""
        backend.check()
        return BenchSpec(
            model=model,
            backend=backend.backend,
            precision=cast("Precision | None", backend.precision),
            tasks=cast("tuple[BenchTask, ...]", BENCH_TASKS if self.task == "both" else (self.task,)),
            baselines=self._baselines(),
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            strength=self.strength,
            height=self.height,
            width=self.width,
            batch_sizes=_numbers("--batch-size", self.batch_size),
            repeats=self.repeats,
            warmups=self.warmups,
            scheduler=cast("SchedulerName | None", self.scheduler),
            output=self.output,
            overwrite=self.overwrite,
            allow_build=not self.no_build,
            noise=noise,
            controls=controls,
        )

    def _baselines(self) -> tuple[BaselineName, ...] | None:
        """`auto` → None, `all` and `none` → so many names, else those given."""
        if self.baselines == "auto":
            return None
        named = {"all": BASELINES, "none": ()}.get(self.baselines)
        if named is None:
            named = tuple(dict.fromkeys(self.baselines.replace(" ", "").split(",")))
        return cast("tuple[BaselineName, ...]", named)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """`1,2,4` → (1, 2, 4)."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) <= MAX_DIGITS for word in words):
        raise UsageError(
            f"{option} must be a number, or several with commas, got {text!r}", hint=f"as in {option} 1,2,4"
        )
    return tuple(dict.fromkeys(int(word) for word in words))
