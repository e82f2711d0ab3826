"""The requests that `bench`, `verify` and `engines prune` take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdtrt.common.errors import UsageError
from sdtrt.specs.adapters import AdapterSpec
from sdtrt.specs.build import ModelSpec
from sdtrt.specs.choices import (
    AUTO,
    BASELINES,
    BENCH_TASKS,
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_STEPS,
    DEFAULT_STRENGTH,
    MIN_SSIM_PIXELS,
    SAMPLE_PROMPT,
    BackendName,
    BaselineName,
    BenchTask,
    Precision,
    check_choice,
    check_output,
)
from sdtrt.specs.control import ControlSpec
from sdtrt.specs.generate import GenerateSpec, NoiseSpec, settle_scheduler
from sdtrt.specs.savings import Savings
from sdtrt.specs.schedulers import SchedulerName


@dataclass(frozen=True)
class BenchSpec:
    """Pipeline calls to be timed.

    Args:
        precision: None for the backend's default (fp16 on a GPU, fp32 on a CPU).
        tasks: whole pipeline calls, each of them with all batch sizes.
        baselines: what to compare with; None for those that suit this machine (`--baselines auto`).
        height, width: pixels; None for the model's own.
        strength: of img2img; `strength * steps` steps run.
        batch_sizes: images made in one call.
        repeats: timed calls, after `warmups` that are not.
        allow_build: export and build a missing engine on the spot (not timed).
        output: a folder for the report as JSON and Markdown, and a chart.
        overwrite: replace such files of an earlier run.
        noise, controls, adapters: as of `GenerateSpec`.
        savings: of the backend that is asked for; baselines save nothing.
    """

    model: ModelSpec = ModelSpec()
    backend: BackendName = AUTO
    precision: Precision | None = None
    tasks: tuple[BenchTask, ...] = ("txt2img",)
    baselines: tuple[BaselineName, ...] | None = None
    steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    strength: float = DEFAULT_STRENGTH
    height: int | None = None
    width: int | None = None
    batch_sizes: tuple[int, ...] = (1,)
    repeats: int = 5
    warmups: int = 2
    scheduler: SchedulerName | None = None
    allow_build: bool = True
    output: Path | None = None
    overwrite: bool = False
    noise: NoiseSpec = NoiseSpec()
    controls: tuple[ControlSpec, ...] = ()
    savings: Savings = Savings()
    adapters: tuple[AdapterSpec, ...] = ()

    def __post_init__(self) -> None:
        check_output(self.output)
        settle_scheduler(self)
        for task in self.tasks:
            check_choice("task", task, BENCH_TASKS)
        for baseline in self.baselines or ():
            check_choice("baseline", baseline, BASELINES)
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UsageError(f"batch sizes must be at least 1, got {self.batch_sizes}", hint="use --batch-size 1,2,4")
        if self.repeats < 1:
            raise UsageError(f"repeats must be at least 1, got {self.repeats}", hint="use --repeats 5")
        if self.warmups < 1:  # the first compiles and fills caches, the second captures CUDA graphs
            raise UsageError(f"warmups must be at least 1, got {self.warmups}", hint="use --warmups 1")
        if self.model.ip_adapters:
            raise UsageError("bench times no IP-Adapters", hint="benchmarks/ip_adapter_step.py does")
        if self.adapters and "img2img" in self.tasks:
            raise UsageError(
                "T2I-Adapters are for images from text alone: diffusers has no pipeline for them from an image",
                hint="use --task txt2img",
            )
        for task in self.tasks:
            self.request(task)  # what a generation would refuse, a benchmark refuses

    def request(self, task: BenchTask) -> GenerateSpec:
        """The generation that is timed."""
        return GenerateSpec(
            prompts=(SAMPLE_PROMPT,),
            model=self.model,
            backend=self.backend,
            precision=self.precision,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            height=self.height,
            width=self.width,
            scheduler=self.scheduler,
            init_image=Path("init.png") if task == "img2img" else None,
            strength=self.strength,
            noise=self.noise,
            controls=self.controls,
            savings=self.savings,
            adapters=self.adapters,
        )

    def steps_run(self, task: BenchTask) -> int:
        """Denoising steps that run: img2img leaves the first ones out."""
        return self.steps if task == "txt2img" else min(int(self.steps * self.strength), self.steps)


@dataclass(frozen=True)
class Thresholds:
    """The limits that `verify` holds an engine to; None is no limit.

    Args:
        min_cosine: of each timestep's output with the fp32 reference's, in the worse of the two guidance rows.
        max_noise_ratio: most relative L2 error, as a multiple of the error that PyTorch itself has in half precision.
        max_relative_l2: most relative L2 error.
        min_psnr_db: of the final image.
        min_ssim: of the final image.
    """

    min_cosine: float | None = 0.9999
    max_noise_ratio: float | None = 2.0
    max_relative_l2: float | None = None
    min_psnr_db: float | None = 35.0
    min_ssim: float | None = None

    def __post_init__(self) -> None:
        for name, lowest, highest in (
            ("min_cosine", -1, 1),
            ("max_noise_ratio", 0, math.inf),
            ("max_relative_l2", 0, math.inf),
            ("min_psnr_db", -math.inf, math.inf),
            ("min_ssim", -1, 1),
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and lowest <= value <= highest):
                option = f"--{name.removesuffix('_db').replace('_', '-')}"
                bounds = f" from {lowest} to {highest}" if highest == 1 else " from 0 up" if lowest == 0 else ""
                raise UsageError(
                    f"{option} must be a number{bounds}, got {value}",
                    hint=f"sdtrt verify --help shows {option}'s default",
                )


# What 8 bits are held to: a wrong engine is far beyond, the built-in model's right ones keep within. A cosine of
# four nines is not theirs: they are off by 0.01 to 0.04 (int8) and by 0.03 to 0.13 (fp8), most in the last steps.
THRESHOLDS: Mapping[Precision, Thresholds] = {
    "int8": Thresholds(min_cosine=0.998, max_noise_ratio=3.0, min_psnr_db=30.0),
    "fp8": Thresholds(min_cosine=0.98, max_noise_ratio=8.0, min_psnr_db=25.0),
}


@dataclass(frozen=True)
class VerifySpec:
    """An engine to be held against the fp32 model, over the denoising of one image.

    Args:
        image: the image that is denoised: one prompt, one image, no init image.
        engine: an engine of the engine directory by name, whatever weights it was built from; it decides backend and
            precision. None for the one that would make the image.
        timesteps: how many of the run's timesteps are compared, spread evenly; None for all.
        thresholds: None for those of the engine's precision (`THRESHOLDS`).
        output: the folder that the two pictures go into; None for the current one.
        limits: some fields of `Thresholds` that are to be otherwise.
    """

    image: GenerateSpec
    engine: str | None = None
    timesteps: int | None = None
    thresholds: Thresholds | None = None
    output: Path | None = None
    limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_output(self.output)
        self.thresholds_of("fp32")  # whatever the engine's precision is, limits that mean nothing are refused
        if self.image.init_image is not None or self.image.num_images * len(self.image.prompts) != 1:
            raise UsageError("verify makes one image from one prompt", hint="give --prompt once")
        if self.timesteps is not None and self.timesteps < 1:
            raise UsageError(f"timesteps must be at least 1, got {self.timesteps}", hint="use --timesteps 10")
        for name in ("height", "width"):
            pixels = getattr(self.image, name)
            if pixels is not None and pixels < MIN_SSIM_PIXELS:
                raise UsageError(
                    f"verify needs a {name} of at least {MIN_SSIM_PIXELS}, got {pixels}",
                    hint=f"use --{name} {MIN_SSIM_PIXELS}",
                )

    def thresholds_of(self, precision: Precision) -> Thresholds:
        """What an engine in a precision is held to."""
        return replace(self.thresholds or THRESHOLDS.get(precision, Thresholds()), **self.limits)


@dataclass(frozen=True)
class PruneSpec:
    """Entries of the engine directory to be removed.

    Args:
        older_than_days: those not used for so long.
        keep_bytes: the least recently used ones, until the rest fits.
        foreign: those that this machine can't load (another GPU, library version or sdtrt), and those of other formats.
        damaged: those whose content is not what was published.
        dry_run: only say what would go.
    """

    older_than_days: float | None = None
    keep_bytes: int | None = None
    foreign: bool = False
    damaged: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        days = self.older_than_days
        if days is not None and not (math.isfinite(days) and days >= 0):
            raise UsageError(
                f"--older-than-days must be a number from 0 up, got {days}", hint="as in --older-than-days 30"
            )
