"""The options of `verify`, `bench` and `doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
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
    QUALITIES,
    RANDOM_SEED,
    SAMPLE_PROMPT,
    THRESHOLDS,
    VERIFY_AGAINST,
    AdapterSpec,
    BaselineName,
    BenchSpec,
    BenchTask,
    ControlSpec,
    GenerateSpec,
    LossLimits,
    MetricsSpec,
    ModelSpec,
    NoiseSpec,
    Precision,
    QualityBenchSpec,
    QualitySpec,
    Savings,
    SchedulerName,
    Thresholds,
    VerifySpec,
    check_choice,
)
from sdtrt.specs.quality import EVERYTHING, KNOBS, parse_choices

LIMITS = LossLimits()


def _usual(name: str) -> str:
    """A threshold's default, and that of precisions which have one of their own: `35, int8 30, fp8 25`."""
    others = (f"{precision} {getattr(one, name):g}" for precision, one in THRESHOLDS.items())
    return ", ".join([f"{getattr(Thresholds(), name):g}", *others])


@dataclass(frozen=True)
class DoctorOptions:
    """These options say how closely this machine is looked at."""

    prove: Annotated[
        bool,
        Option(
            "--prove",
            help="build, verify and time the built-in model on every backend that runs here, in minutes, and print a"
            " report to paste; leaves no engines",
        ),
    ] = False


@dataclass(frozen=True)
class VerifyOptions:
    """These options say with what an engine is compared, and how close it must be.

    Limits are None where the comparison's own are to hold: they differ.
    """

    against: Annotated[
        str,
        Option(
            metavar="|".join(VERIFY_AGAINST),
            help="fp32: the UNet's engine, by PyTorch; exact: savings, by the same request without any in the same"
            " backend, or in PyTorch fp32",
        ),
    ] = "fp32"
    engine: Annotated[
        str | None, Option("--engine", "-e", help="an engine of the engine directory, by name; else the one in use")
    ] = None
    timesteps: Annotated[int | None, Option(help="compare so many timesteps, spread evenly; by default all")] = None
    prompt: Annotated[
        list[str] | None, Option("--prompt", "-p", help="of the image that is denoised; against exact: again for more")
    ] = None
    negative_prompt: NegativePrompt = ""
    steps: Steps = DEFAULT_STEPS
    guidance_scale: GuidanceScale = DEFAULT_GUIDANCE_SCALE
    height: Height = None
    width: Width = None
    seed: Annotated[int, Option(help="of the (first) image's noise")] = DEFAULT_VERIFY_SEED
    scheduler: Scheduler = None
    min_cosine: Annotated[
        float | None,
        Option(help=f"least cosine at a timestep ({_usual('min_cosine')}), or of the latents at the end"),
    ] = None
    max_noise_ratio: Annotated[
        float | None,
        Option(
            help="most relative L2 error, in multiples of PyTorch's own in half precision"
            f" ({_usual('max_noise_ratio')})"
        ),
    ] = None
    max_relative_l2: Annotated[
        float | None, Option(help="most relative L2 error at a timestep, or of the latents at the end")
    ] = None
    min_psnr: Annotated[
        float | None,
        Option(help=f"least PSNR of the image, in dB ({_usual('min_psnr_db')}; against exact {LIMITS.min_psnr_db:g})"),
    ] = None
    min_ssim: Annotated[
        float | None, Option(help=f"least structural similarity of the image (against exact {LIMITS.min_ssim:g})")
    ] = None
    max_lpips: Annotated[float | None, Option(help=f"against exact: most LPIPS ({LIMITS.max_lpips:g})")] = None
    max_clip_loss: Annotated[
        float | None, Option(help=f"against exact: most points of 100 that CLIP falls ({LIMITS.max_clip_loss:g})")
    ] = None
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FOLDER", help="where the pictures go; by default this folder")
    ] = None
    no_build: NoBuild = False

    def spec(self, model: ModelSpec, backend: BackendOptions, noise: NoiseSpec, image: Mapping[str, Any]) -> VerifySpec:
        """The comparison of an engine that is asked for.

        Args:
            image: of `GenerateSpec`: savings, ControlNets, T2I-Adapters, pictures for IP-Adapters.

        Raises:
            UsageError: for what is about savings alone.
        """
        about = {"--max-lpips": self.max_lpips, "--max-clip-loss": self.max_clip_loss}
        self._refuse("savings", "add --against exact", about)
        own = (self.min_cosine, self.max_noise_ratio, self.max_relative_l2, self.min_psnr, self.min_ssim)
        names = (one.name for one in fields(Thresholds))
        limits = {name: value for name, value in zip(names, own, strict=True) if value is not None}
        asked = self._image(model, backend, noise, image)
        return VerifySpec(asked, self.engine, self.timesteps, output=self.output, limits=limits)

    def quality_spec(
        self,
        model: ModelSpec,
        backend: BackendOptions,
        noise: NoiseSpec,
        metrics: MetricsSpec,
        saved: Mapping[str, Any],
    ) -> QualitySpec:
        """The comparison of savings that is asked for. Raises `UsageError` for what is about an engine alone."""
        check_choice("against", self.against, VERIFY_AGAINST)
        about = {"--engine": self.engine, "--timesteps": self.timesteps, "--max-noise-ratio": self.max_noise_ratio}
        self._refuse("an engine", f"leave it out beside --against {self.against}", about)
        own = (self.min_cosine, self.max_relative_l2, self.min_psnr, self.min_ssim, self.max_lpips, self.max_clip_loss)
        usual = astuple(LIMITS)
        limits = LossLimits(*(one if one is not None else other for one, other in zip(own, usual, strict=True)))
        image = self._image(model, backend, noise, saved)
        return QualitySpec(image, self.against == "exact-fp32", metrics, limits, self.output)

    def _refuse(self, about: str, mend: str, options: Mapping[str, object]) -> None:
        """Refuse options that the other comparison has."""
        for name, value in options.items():
            if value is not None:
                raise UsageError(f"{name} {value} is about {about}", hint=mend)

    def _image(
        self, model: ModelSpec, backend: BackendOptions, noise: NoiseSpec, image: Mapping[str, Any]
    ) -> GenerateSpec:
        """What is made. Raises `UsageError` for a random seed: who fails wants to see it again."""
        backend.check()
        if self.seed == RANDOM_SEED:
            raise UsageError(
                f"verify takes no random seed, got {self.seed}", hint=f"use --seed {DEFAULT_VERIFY_SEED}, or another"
            )
        return _picture(self, model, backend, noise, {"seed": self.seed, **image})


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
        Path | None,
        Option("--output", "-o", metavar="FOLDER", help="write bench.json, bench.md and bench.png here (quality.…)"),
    ] = None
    overwrite: Annotated[bool, Option("--overwrite", help="replace such files of an earlier run")] = False
    no_build: NoBuild = False
    quality: Annotated[
        str | None,
        Option(
            metavar=f"{EVERYTHING}|NAME,KNOB=N+KNOB=N",
            help=f"time and judge these side by side: {', '.join(QUALITIES[1:])}, or single knobs: {', '.join(KNOBS)}",
        ),
    ] = None
    prompt: Annotated[
        list[str] | None, Option("--prompt", "-p", help="with --quality: what is made; give it again for more")
    ] = None
    negative_prompt: NegativePrompt = ""
    seed: Annotated[int | None, Option(help="with --quality: of the first image; else 0")] = None

    def quality_spec(
        self,
        model: ModelSpec,
        backend: BackendOptions,
        noise: NoiseSpec,
        metrics: MetricsSpec,
        shown: Mapping[str, Any],
    ) -> QualityBenchSpec:
        """The choices that are asked for. Raises `UsageError` for what is about other measurements.

        Args:
            shown: of `GenerateSpec`: ControlNets, pictures for IP-Adapters.
        """
        backend.check()
        assert self.quality is not None
        for option, given in (
            (f"--baselines {self.baselines}", self.baselines != "auto"),
            (f"--task {self.task}", self.task not in ("both", "txt2img")),
            ("--show-baselines", self.show_baselines),
        ):
            if given:
                raise UsageError(f"{option} has no effect beside --quality", hint="leave it out, or --quality")
        if self.seed == RANDOM_SEED:
            raise UsageError(
                "--quality takes no random seed, got -1", hint=f"use --seed {DEFAULT_VERIFY_SEED}, or another"
            )
        batches = _numbers("--batch-size", self.batch_size)
        if len(batches) > 1:
            raise UsageError(
                f"--quality takes one batch size, got {self.batch_size}", hint=f"use --batch-size {batches[0]}"
            )
        own = {"seed": self.seed or DEFAULT_VERIFY_SEED, "batch_size": batches[0], **shown}
        image = _picture(self, model, backend, noise, own)
        choices = parse_choices(self.quality)
        return QualityBenchSpec(image, choices, metrics, self.repeats, self.warmups, self.output, self.overwrite)

    def spec(
        self,
        model: ModelSpec,
        backend: BackendOptions,
        noise: NoiseSpec,
        savings: Savings = Savings(),
        controls: tuple[ControlSpec, ...] = (),
        adapters: tuple[AdapterSpec, ...] = (),
    ) -> BenchSpec:
        """The measurements that are asked for."""
        backend.check()
        about = {"--prompt": self.prompt, "--negative-prompt": self.negative_prompt or None, "--seed": self.seed}
        for option in (name for name, value in about.items() if value is not None):
            raise UsageError(f"{option} is about pictures that are judged", hint="add --quality all, or leave it out")
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
            savings=savings,
            controls=controls,
            adapters=adapters,
        )

    def _baselines(self) -> tuple[BaselineName, ...] | None:
        """`auto` → None, `all` and `none` → so many names, else those given."""
        if self.baselines == "auto":
            return None
        named = {"all": BASELINES, "none": ()}.get(self.baselines)
        if named is None:
            named = tuple(dict.fromkeys(self.baselines.replace(" ", "").split(",")))
        return cast("tuple[BaselineName, ...]", named)


def _picture(
    options: VerifyOptions | BenchOptions,
    model: ModelSpec,
    backend: BackendOptions,
    noise: NoiseSpec,
    more: Mapping[str, Any],
) -> GenerateSpec:
    """The picture that a report is about; `more` is what its options have of their own, of `GenerateSpec`."""
    return GenerateSpec(
        prompts=tuple(options.prompt or (SAMPLE_PROMPT,)),
        model=model,
        backend=backend.backend,
        precision=cast("Precision | None", backend.precision),
        negative_prompt=options.negative_prompt,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        height=options.height,
        width=options.width,
        scheduler=cast("SchedulerName | None", options.scheduler),
        allow_build=not options.no_build,
        noise=noise,
        **more,
    )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """`1,2,4` → (1, 2, 4)."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) <= MAX_DIGITS for word in words):
        raise UsageError(
            f"{option} must be a number, or several with commas, got {text!r}", hint=f"as in {option} 1,2,4"
        )
    return tuple(dict.fromkeys(int(word) for word in words))
