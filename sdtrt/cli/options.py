"""The command line's options, each written once, in groups; a group becomes the part of a spec that it stands for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_type_hints

from typer import Option

from sdtrt.backends import registry
from sdtrt.backends.backend import Backend
from sdtrt.common.console import Console
from sdtrt.common.errors import UsageError
from sdtrt.engines.directory import EngineDirectory, default_directory, in_home
from sdtrt.specs import (
    AUTO,
    BASELINES,
    BENCH_TASKS,
    COMPONENTS,
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_MODEL,
    DEFAULT_OPSETS,
    DEFAULT_STEPS,
    DEFAULT_STRENGTH,
    DEFAULT_TOKENS,
    DEFAULT_VERIFY_SEED,
    EXPORTERS,
    MAX_DIGITS,
    PRECISIONS,
    PREDICTION_TYPES,
    RANDOM_SEED,
    SAMPLE_PROMPT,
    SCHEDULERS,
    TIMESTEP_SPACINGS,
    BaselineName,
    BenchSpec,
    BenchTask,
    BuildSpec,
    Component,
    Exporter,
    ExportSpec,
    GenerateSpec,
    ModelSpec,
    NoiseSpec,
    Precision,
    PredictionType,
    Profile,
    Range,
    SchedulerName,
    Sizes,
    Thresholds,
    TimestepSpacing,
    VerifySpec,
    bytes_of,
)

RANGE = "N or MIN:OPT:MAX"
OPSETS = " or ".join(str(opset) for opset in DEFAULT_OPSETS.values())

CommandT = TypeVar("CommandT", bound=Callable[..., None])


def grouped(command: CommandT) -> CommandT:
    """Let a command take dataclasses of options: typer sees their fields, the command gets the dataclasses."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        own = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += _field_parameters(groups[name]) if name in groups else [own]

    @wraps(command)
    def flat(**values: Any) -> None:
        values = {name: _in_home(name, value) if isinstance(value, Path) else value for name, value in values.items()}
        taken = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **taken)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return cast(CommandT, flat)


def _in_home(name: str, path: Path) -> Path:
    """A path that was typed. Shells leave the `~` of `--output=~/x` to us: it is a home directory, not a folder."""
    if name == "engine_dir":  # the directory's own error names all the ways to say it
        return path
    try:
        return path.expanduser()
    except RuntimeError as error:  # containers run users that the system doesn't know
        raise UsageError(
            f"--{name.replace('_', '-')} is {path}, and no home directory is known for {path.parts[0]}",
            hint=f"give the whole path, or ./{path} for a folder of that name",
        ) from error


def _field_parameters(group: Any) -> list[inspect.Parameter]:
    """One keyword parameter for each field of a group."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]


@dataclass(frozen=True)
class OutputOptions:
    """How a command speaks."""

    as_json: Annotated[bool, Option("--json", help="print one JSON document on stdout")] = False
    quiet: Annotated[bool, Option("--quiet", "-q", help="no progress, no notes")] = False
    verbose: Annotated[bool, Option("--verbose", help="more details on stderr")] = False

    def console(self) -> Console:
        """The console for stderr."""
        return Console(quiet=self.quiet, verbose=self.verbose)


@dataclass(frozen=True)
class DirectoryOptions:
    """Where engines are kept."""

    engine_dir: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="where engines are kept; else $SDTRT_ENGINE_DIR, ./engines, or the user's cache"),
    ] = None
    trust_engine_dir: Annotated[
        bool, Option("--trust-engine-dir", help="use it even if other users can change it (engines run code)")
    ] = False

    def directory(self) -> EngineDirectory:
        """The engine directory. Shells leave the `~` of `--engine-dir=~/x` to us: it is a home directory, too."""
        folder = default_directory() if self.engine_dir is None else in_home(self.engine_dir)
        return EngineDirectory(folder, trust_others=self.trust_engine_dir)


@dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    model: Annotated[
        str, Option("--model", "-m", help="tiny (built in), a diffusers folder, a hub id, or a .safetensors checkpoint")
    ] = DEFAULT_MODEL
    revision: Annotated[str | None, Option(help="hub revision: branch, tag or commit")] = None
    variant: Annotated[str | None, Option(help="weight variant, such as fp16")] = None
    config: Annotated[str | None, Option(help="folder or hub id with a single-file checkpoint's configuration")] = None
    allow_pickle: Annotated[
        str | None, Option(metavar="FILE", help="trust the pickle file of this name (reading it runs its code)")
    ] = None
    offline: Annotated[bool, Option("--offline", help="never ask the hub")] = False
    vae: Annotated[
        str | None,
        Option(metavar="FILE|FOLDER|ID", help="a VAE in the place of the model's own, full or tiny (such as TAESD)"),
    ] = None

    def spec(self) -> ModelSpec:
        """The model that is asked for."""
        named = (self.model, self.revision, self.variant, self.config, self.allow_pickle)
        return ModelSpec(*named, self.offline, self.vae)


@dataclass(frozen=True)
class BackendOptions:
    """What computes, and how finely."""

    backend: Annotated[str, Option("--backend", "-b", help=f"one of {', '.join(registry.names())}")] = AUTO
    precision: Annotated[
        str | None, Option(help=f"one of {', '.join(PRECISIONS)}; by default fp16 on a GPU, fp32 on a CPU")
    ] = None

    def check(self, components: Sequence[str] = ()) -> None:
        """Refuse what no backend does, before anything heavy is loaded."""
        registry.check_request(self.backend, self.precision, components)


@dataclass(frozen=True)
class ExporterOptions:
    """How the ONNX graph is written."""

    component: Annotated[
        list[str] | None, Option(help=f"one of {', '.join(COMPONENTS)}; give it again for more; by default all")
    ] = None
    exporter: Annotated[str, Option(help=f"PyTorch exporter: {' or '.join(EXPORTERS)}")] = "torchscript"
    opset: Annotated[
        int | None, Option(help=f"ONNX opset; by default {OPSETS}, by exporter; below 17 TensorRT 8.6 is slower")
    ] = None
    force: Annotated[bool, Option("--force", help="make it again even if it is there")] = False

    def spec(
        self,
        model: ModelSpec,
        precision: str,
        component: str = "unet",
        *,
        output: Path | None = None,
        overwrite: bool = False,
    ) -> ExportSpec:
        """The export of one component that is asked for."""
        return ExportSpec(
            model=model,
            component=cast(Component, component),
            precision=cast(Precision, precision),
            exporter=cast(Exporter, self.exporter),
            opset=self.opset,
            output=output,
            overwrite=overwrite,
            force=self.force,
        )


@dataclass(frozen=True)
class ProfileOptions:
    """The sizes that an engine accepts."""

    batch: Annotated[
        str, Option(help=f"UNet batch, {RANGE}; guidance makes it twice the images, so the other parts get half of it")
    ] = "2"
    height: Annotated[str | None, Option("--height", "-H", help=f"pixels, {RANGE}; by default the model's own")] = None
    width: Annotated[str | None, Option("--width", "-W", help=f"pixels, {RANGE}; by default the model's own")] = None
    tokens: Annotated[str, Option(help=f"prompt tokens, {RANGE}")] = str(DEFAULT_TOKENS)
    profile: Annotated[
        list[str] | None, Option(help="as batch=2,height=512,width=512:512:768; give it again for several profiles")
    ] = None

    def given(self) -> str:
        """The sizes that were given, as options; empty where none was."""
        default = ProfileOptions()
        return ", ".join(
            f"--{one.name}" for one in fields(self) if getattr(self, one.name) != getattr(default, one.name)
        )

    def profiles(self, native: Sizes) -> tuple[Profile, ...]:
        """The profiles that are asked for; `native` is the model's own size."""
        base = Profile(
            batch=Range.parse(self.batch, "--batch"),
            height=Range.parse(self.height or str(native.height), "--height"),
            width=Range.parse(self.width or str(native.width), "--width"),
            tokens=Range.parse(self.tokens, "--tokens"),
        )
        return tuple(Profile.parse(text, base) for text in self.profile or ()) or (base,)


# What several commands ask about an image.
NegativePrompt = Annotated[str, Option("--negative-prompt", "-n", help="what the image must not show")]
Steps = Annotated[int, Option("--steps", "--num-inference-steps", help="denoising steps")]
GuidanceScale = Annotated[
    float, Option("--guidance-scale", "--cfg-scale", help="how closely the prompt is followed; up to 1 is off")
]
Height = Annotated[int | None, Option("--height", "-H", help="pixels, a multiple of 8")]
Width = Annotated[int | None, Option("--width", "-W", help="pixels, a multiple of 8")]
Scheduler = Annotated[str | None, Option(help=f"one of {', '.join(SCHEDULERS)}; by default the model's own")]


@dataclass(frozen=True)
class NoiseOptions:
    """How noise is added and predicted, where the model does not say it, or wrongly."""

    prediction_type: Annotated[
        str | None, Option(help=f"{' or '.join(PREDICTION_TYPES)}; by default as the model says")
    ] = None
    timestep_spacing: Annotated[
        str | None, Option(help=f"{', '.join(TIMESTEP_SPACINGS)}; by default as the model says")
    ] = None
    zero_snr: Annotated[
        bool | None, Option(help="rescale the noise schedule to zero terminal SNR; by default as the model says")
    ] = None

    def spec(self) -> NoiseSpec:
        """What is asked for."""
        return NoiseSpec(
            cast("PredictionType | None", self.prediction_type),
            cast("TimestepSpacing | None", self.timestep_spacing),
            self.zero_snr,
        )


NoBuild = Annotated[bool, Option("--no-build", help="fail rather than build a missing engine")]


@dataclass(frozen=True)
class BuildOptions:
    """How TensorRT builds."""

    optimization_level: Annotated[
        int | None, Option(help="TensorRT's builder effort, 0 to 5; by default its own, on 8.6: 1")
    ] = None
    workspace_gib: Annotated[float | None, Option(help="cap on the builder's scratch memory")] = None
    compute_capability: Annotated[
        str | None, Option(metavar="X.Y", help="build ahead of time for this GPU (tensorrt-rtx)")
    ] = None
    version_compatible: Annotated[
        bool, Option("--version-compatible", help="a plan that later TensorRT versions can load too")
    ] = False
    norm_plugins: Annotated[
        bool,
        Option(help="TensorRT 8.6: normalise by its plugin, which is faster; without, results repeat to the bit"),
    ] = True
    split_attention: Annotated[
        int | None,
        Option(
            metavar="TOKENS",
            help="TensorRT 8.6, fixed size only: UNet self-attentions with at least TOKENS tokens run in PyTorch;"
            " 0: everything stays in TensorRT, the VAE's norms too (default 2048)",
        ),
    ] = None
    channels_last: Annotated[
        bool,
        Option(
            help="TensorRT 8.6: what an engine's pieces give to each other lies channels last: 2 % less time in the"
            " UNet's upper levels; no whole pipeline has been timed"
        ),
    ] = False

    def check(self) -> None:
        """Raise `UsageError` for a value that can't be read, before anything heavy is imported."""
        self._capability()

    def specs(
        self, exports: Sequence[ExportSpec], backend: Backend, profiles: Mapping[Component, tuple[Profile, ...]]
    ) -> list[BuildSpec]:
        """The engines that are asked for, of some components.

        Raises:
            UsageError: for an option that serves none of them, and for values that no build may have.
        """
        if self.split_attention and not any(export.component == "unet" for export in exports):
            raise UsageError(
                "only the UNet leaves attention to PyTorch", hint="add --component unet, or leave --split-attention out"
            )
        if self.channels_last and not any(backend.serves("channels-last", export) for export in exports):
            raise UsageError(
                "only TensorRT's engines of UNets and VAEs in fp16 are in pieces, which can be channels-last",
                hint="use --backend tensorrt --component unet --precision fp16, or leave --channels-last out",
            )
        return [
            BuildSpec(
                export=export,
                backend=backend.name,
                profiles=profiles[export.component],
                optimization_level=self.optimization_level,
                workspace_bytes=None if self.workspace_gib is None else bytes_of("--workspace-gib", self.workspace_gib),
                compute_capability=self._capability(),
                version_compatible=self.version_compatible,
                norm_plugins=self.norm_plugins,
                split_attention=self._split_attention(export.component),
                channels_last=self.channels_last and backend.serves("channels-last", export),
            )
            for export in exports
        ]

    def _split_attention(self, component: Component) -> int | None:
        """A number of tokens is for the UNet; 0 leaves nothing of any part to PyTorch."""
        return self.split_attention if component == "unet" or self.split_attention == 0 else None

    def _capability(self) -> tuple[int, int] | None:
        """`8.9` → (8, 9)."""
        text = self.compute_capability
        if text is None:
            return None
        major, dot, minor = text.partition(".")
        if not (dot and all(part.isdecimal() and len(part) <= MAX_DIGITS for part in (major, minor))):
            raise UsageError(f"--compute-capability must be X.Y, got {text!r}", hint="as in --compute-capability 8.9")
        return int(major), int(minor)


@dataclass(frozen=True)
class GenerateOptions:
    """What to generate."""

    prompt: Annotated[
        list[str] | None, Option("--prompt", "-p", help="what the image shows; give it again for more images")
    ] = None
    negative_prompt: NegativePrompt = ""
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
    output: Annotated[
        Path | None, Option("--output", "-o", help="file or folder (made if missing); by default this folder")
    ] = None
    overwrite: Annotated[bool, Option("--overwrite", help="replace an output file that exists")] = False
    no_build: NoBuild = False
    component: Annotated[
        list[str] | None,
        Option(help=f"a part that an engine runs ({', '.join(COMPONENTS)}); give it again for more"),
    ] = None

    def spec(self, model: ModelSpec, backend: BackendOptions, **image: Any) -> GenerateSpec:
        """The images that are asked for; `image` holds the noise, and what only img2img has."""
        backend.check(self.component or ())
        return GenerateSpec(
            prompts=tuple(self.prompt or ()),
            model=model,
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
            components=cast("tuple[Component, ...]", tuple(self.component or ())),
            **image,
        )


@dataclass(frozen=True)
class VerifyOptions:
    """What to hold an engine against, and how close it must be."""

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

    def spec(self, model: ModelSpec, backend: BackendOptions, noise: NoiseSpec) -> VerifySpec:
        """The comparison that is asked for. Raises `UsageError` for a random seed: who fails wants to see it again."""
        backend.check()
        if self.seed == RANDOM_SEED:
            raise UsageError(
                f"verify takes no random seed, got {self.seed}", hint=f"use --seed {DEFAULT_VERIFY_SEED}, or another"
            )
        image = GenerateSpec(
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
        )
        thresholds = Thresholds(
            self.min_cosine, self.max_noise_ratio, self.max_relative_l2, self.min_psnr, self.min_ssim
        )
        return VerifySpec(image, self.engine, self.timesteps, thresholds, self.output)


@dataclass(frozen=True)
class BenchOptions:
    """What to time, and beside what."""

    task: Annotated[str, Option(help=f"{', '.join(BENCH_TASKS)} or both")] = "both"
    baselines: Annotated[
        str,
        Option(
            metavar="auto|all|none|NAME,NAME",
            help=f"what to compare with: {', '.join(BASELINES)}; auto: what suits this machine without long tuning",
        ),
    ] = "auto"
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

    def spec(self, model: ModelSpec, backend: BackendOptions, noise: NoiseSpec) -> BenchSpec:
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
