"""Every request, its defaults and its validation, once. All frozen: a spec says what is wanted and never changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from sdtrt.common.errors import UsageError

Component = Literal["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"]
Precision = Literal["fp32", "fp16", "bf16"]
Backend = Literal["tensorrt", "tensorrt-rtx", "onnxruntime", "torch"]
BackendChoice = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "torch"]
Exporter = Literal["torchscript", "dynamo"]
BenchTask = Literal["txt2img", "img2img"]
BaselineName = Literal[
    "torch-fp32",
    "torch-tf32",
    "torch-fp16",
    "torch-graph",
    "torch-compile",
    "torch-compile-max",
    "onnxruntime-cuda",
]
SchedulerName = Literal["pndm", "ddim", "euler", "euler-a", "dpm++", "unipc", "lcm", "heun"]
PredictionType = Literal["epsilon", "v_prediction"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]

COMPONENTS: tuple[str, ...] = get_args(Component)
PRECISIONS: tuple[str, ...] = get_args(Precision)
BACKENDS: tuple[str, ...] = get_args(BackendChoice)
EXPORTERS: tuple[str, ...] = get_args(Exporter)
SCHEDULERS: tuple[str, ...] = get_args(SchedulerName)
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
TIMESTEP_SPACINGS: tuple[str, ...] = get_args(TimestepSpacing)
BENCH_TASKS: tuple[str, ...] = get_args(BenchTask)
BASELINES: tuple[str, ...] = get_args(BaselineName)

DEFAULT_MODEL = "tiny"
DEFAULT_STEPS = 50
DEFAULT_GUIDANCE_SCALE = 7.5
DEFAULT_STRENGTH = 0.8
DEFAULT_TOKENS = 77
SAMPLE_PROMPT = "a red circle on a blue background"
SIZE_MULTIPLE = 8  # pixels per latent, and what diffusers' pipelines demand of both sides
MAX_PIXELS = 16384  # a side; beyond it sizes in bytes leave what libraries count with
MOST_STEPS = 999  # that schedulers run of a model's 1000 timesteps
MAX_SEED = 2**63 - 1
RANDOM_SEED = -1  # what web UIs call a random one
MAX_IMAGES = 100_000  # of one prompt in one run: days of work; more is a typo
MAX_BATCH = 10_000  # images made at once: prompts and random generators of more fill the memory before a GPU is full
MIN_SSIM_PIXELS = 16  # a side: structural similarity looks at 11x11 pixels at a time
DEFAULT_VERIFY_SEED = 0
MAX_DIGITS = 9  # of a number that is typed: more fit nothing here
GIB = 2**30

IN_PIECES: tuple[Component, ...] = ("unet", "vae_decoder", "vae_encoder")  # what 8.6 leaves some of to PyTorch
# The opset that each exporter writes by default. 17 is the newest that TensorRT 8.6 reads, and the first with layer
# normalisation as one operator: spelled out, it costs 8.6 a quarter of a step (benchmarks/tuning.md). The dynamo
# exporter starts at 18.
DEFAULT_OPSETS: dict[Exporter, int] = {"torchscript": 17, "dynamo": 18}


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `UsageError` unless `value` is one of `choices`; the hint names the closest one."""
    if value in choices:
        return
    from difflib import get_close_matches

    close = get_close_matches(value, choices, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(f"unknown {option}: {value!r}", hint=f"{hint}choose one of {', '.join(choices)}")


def check_output(output: Path | None) -> None:
    """Raise `UsageError` for `-`, which would be a folder of that name where people mean stdout."""
    if output == Path("-"):
        raise UsageError(
            "--output - would be a file or folder of that name: nothing but paths and JSON goes to stdout",
            hint="name a file or folder, as in --output out",
        )


def check_precision(backend: str, precision: str | None) -> None:
    """Raise `UsageError` for a precision that a backend never computes in."""
    if (backend, precision) == ("onnxruntime", "bf16"):
        raise UsageError(
            "ONNX Runtime's CPU provider does not compute in bf16", hint="use --precision fp32 with this backend"
        )


def bytes_of(option: str, gib: float) -> int:
    """GiB → bytes. Raises `UsageError` unless it is a finite number from 0 up."""
    if not (math.isfinite(gib * GIB) and gib >= 0):
        raise UsageError(f"{option} must be a number of GiB from 0 up, got {gib}", hint=f"as in {option} 8")
    return int(gib * GIB)


def check_size(name: str, pixels: int) -> None:
    """Raise `UsageError` unless `pixels` is a positive multiple of 8, and no more than any model can draw."""
    if pixels > MAX_PIXELS:
        raise UsageError(
            f"{name} must be at most {MAX_PIXELS}, got {pixels}", hint=f"use --{name} {MAX_PIXELS} or less"
        )
    if pixels > 0 and pixels % SIZE_MULTIPLE == 0:
        return
    nearest = max(SIZE_MULTIPLE, (pixels + SIZE_MULTIPLE // 2) // SIZE_MULTIPLE * SIZE_MULTIPLE)
    raise UsageError(f"{name} must be a multiple of {SIZE_MULTIPLE}, got {pixels}", hint=f"use --{name} {nearest}")


@dataclass(frozen=True)
class Range:
    """Bounds of one dimension, and the value that an engine is tuned for: `min <= opt <= max`, all at least 1."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(
                f"a range must satisfy 1 <= MIN <= OPT <= MAX, got {self.min}:{self.opt}:{self.max}",
                hint="write it as N or MIN:OPT:MAX, as in --height 512 or --height 384:512:768",
            )

    @classmethod
    def of(cls, value: int) -> Range:
        """The range of one value."""
        return cls(value, value, value)

    @classmethod
    def parse(cls, text: str, option: str) -> Range:
        """Read `N` or `MIN:OPT:MAX`; `option` names what is parsed in the error.

        Raises:
            UsageError: for a text of another form, and for bounds that are not in order or less than 1.
        """
        parts = [part.strip() for part in text.split(":")]  # more than `int` would strip: control characters too
        if len(parts) not in (1, 3) or not all(part.isdecimal() and len(part) <= MAX_DIGITS for part in parts):
            raise UsageError(f"{option} must be N or MIN:OPT:MAX, got {text!r}", hint=f"as in {option} 512:512:768")
        numbers = [int(part) for part in parts]
        return cls.of(numbers[0]) if len(numbers) == 1 else cls(*numbers)

    def scaled(self, factor: int) -> Range:
        """The range with every bound multiplied by `factor`."""
        return Range(self.min * factor, self.opt * factor, self.max * factor)

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max

    def __str__(self) -> str:
        return str(self.opt) if self.min == self.max else f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True)
class Sizes:
    """One concrete size of a UNet call: `batch` rows (with guidance: two an image), pixels, prompt tokens."""

    batch: int
    height: int
    width: int
    tokens: int = DEFAULT_TOKENS

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.width}x{self.height} pixels, {self.tokens} tokens"


@dataclass(frozen=True)
class Profile:
    """The sizes that an engine accepts: ranges of UNet batch rows, pixels and prompt tokens."""

    batch: Range
    height: Range
    width: Range
    tokens: Range = field(default_factory=lambda: Range.of(DEFAULT_TOKENS))

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            bounds: Range = getattr(self, name)
            for pixels in (bounds.min, bounds.opt, bounds.max):
                check_size(name, pixels)

    @classmethod
    def of(cls, sizes: Sizes) -> Profile:
        """The profile of exactly one size (the fastest engines are those)."""
        return cls(Range.of(sizes.batch), Range.of(sizes.height), Range.of(sizes.width), Range.of(sizes.tokens))

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, int]]) -> Profile:
        """The profile of an engine's key, where it is plain data (`dataclasses.asdict`)."""
        return cls(**{name: Range(**bounds) for name, bounds in data.items()})

    @classmethod
    def parse(cls, text: str, default: Profile) -> Profile:
        """Read `batch=2,height=512,width=512:512:768`; what is left out is taken from `default`.

        Raises:
            UsageError: for a name that is unknown or given twice, a range that can't be read, or sizes that no profile
                may have.
        """
        ranges = {"batch": default.batch, "height": default.height, "width": default.width, "tokens": default.tokens}
        given: set[str] = set()
        for item in text.split(","):
            name, equals, bounds = item.partition("=")
            if not equals or name.strip() not in ranges:
                raise UsageError(
                    f"--profile takes {', '.join(f'{known}=RANGE' for known in ranges)}; got {item!r}",
                    hint="as in --profile batch=2,height=512,width=512:512:768",
                )
            name = name.strip()
            if name in given:
                raise UsageError(
                    f"--profile has {name} twice: {text!r}",
                    hint="give it once; for several profiles give --profile several times",
                )
            given.add(name)
            ranges[name] = Range.parse(bounds, f"--profile {name}")
        return cls(**ranges)

    def __contains__(self, sizes: Sizes) -> bool:
        return (
            sizes.batch in self.batch
            and sizes.height in self.height
            and sizes.width in self.width
            and sizes.tokens in self.tokens
        )

    @property
    def minimum(self) -> Sizes:
        """The smallest size inside."""
        return Sizes(self.batch.min, self.height.min, self.width.min, self.tokens.min)

    @property
    def optimum(self) -> Sizes:
        """The size that an engine is tuned for."""
        return Sizes(self.batch.opt, self.height.opt, self.width.opt, self.tokens.opt)

    @property
    def maximum(self) -> Sizes:
        """The largest size inside."""
        return Sizes(self.batch.max, self.height.max, self.width.max, self.tokens.max)

    def __str__(self) -> str:
        return f"batch {self.batch}, height {self.height}, width {self.width}, tokens {self.tokens}"


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and what may be done to get it.

    Args:
        name: `tiny`, a diffusers folder, a hub id, or a single-file checkpoint.
        revision: hub revision (branch, tag or commit).
        variant: weight variant such as `fp16` (as in `diffusion_pytorch_model.fp16.safetensors`).
        config: diffusers folder or hub id that holds the configuration of a single-file checkpoint.
        allow_pickle: name of the pickle file that the user trusts (pickle runs code when it is read).
        offline: never ask the hub.
        vae: a VAE in the place of the model's own: its folder (or a model's), a hub id, or a file that holds one.
    """

    name: str = DEFAULT_MODEL
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    allow_pickle: str | None = None
    offline: bool = False
    vae: str | None = None


@dataclass(frozen=True)
class ExportSpec:
    """A component to be written as ONNX.

    Args:
        opset: None for the exporter's default (`DEFAULT_OPSETS`).
        output: a `.onnx` file to write instead of an entry in the engine directory.
        force: export again even if the engine directory has it.
    """

    model: ModelSpec = ModelSpec()
    component: Component = "unet"
    precision: Precision = "fp16"
    exporter: Exporter = "torchscript"
    opset: int | None = None
    output: Path | None = None
    overwrite: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        check_choice("component", self.component, COMPONENTS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("exporter", self.exporter, EXPORTERS)
        check_output(self.output)
        lowest, highest = {"torchscript": (14, 20), "dynamo": (18, 23)}[self.exporter]
        if not lowest <= self.resolved_opset <= highest:
            raise UsageError(
                f"the {self.exporter} exporter writes opsets {lowest} to {highest}, got {self.opset}",
                hint=f"use --opset {DEFAULT_OPSETS[self.exporter]}",
            )

    @property
    def resolved_opset(self) -> int:
        """The opset that is written."""
        return self.opset if self.opset is not None else DEFAULT_OPSETS[self.exporter]


def may_be_in_pieces(backend: Backend, export: ExportSpec) -> bool:
    """Whether engines of an export may be several plans, with PyTorch between them: in fp16, and for one size."""
    return backend == "tensorrt" and export.precision == "fp16" and export.component in IN_PIECES


@dataclass(frozen=True)
class BuildSpec:
    """An engine to be built.

    Args:
        export: what the engine is made from.
        backend: what runs it (`torch` has no engines).
        profiles: the sizes it accepts; one entry a profile. Empty for a backend that takes any size (ONNX Runtime).
        optimization_level: TensorRT's builder effort, 0 to 5; None for the version's own default (1 on 8.6).
        workspace_bytes: cap on the builder's scratch memory; None for no cap.
        compute_capability: the GPU to build for ahead of time, as (8, 9); TensorRT for RTX only. None for this GPU.
        version_compatible: a plan that later TensorRT versions (lean runtimes) can load too.
        norm_plugins: let TensorRT 8.6 normalise by its plugin (see `build.group_norm`); later versions don't need it.
        split_attention: from how many tokens on the UNet's self-attentions are left to PyTorch's kernels (see
            `build.splitting`), 0 for none, nor a VAE's large norms; None for what gained on an H200
            (`trt_api.building.split_tokens`).
        channels_last: what an engine's pieces give to each other lies channels last in memory (see
            `build.splitting.channels_last`).
        force: build again even if the engine directory has it.
    """

    export: ExportSpec
    backend: Backend
    profiles: tuple[Profile, ...] = ()
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    version_compatible: bool = False
    norm_plugins: bool = True
    split_attention: int | None = None
    channels_last: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, BACKENDS)
        if self.backend == "torch":
            raise UsageError("the torch backend has no engines to build", hint="use --backend onnxruntime or tensorrt")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(
                f"optimization level must be 0 to 5, got {self.optimization_level}", hint="use --optimization-level 3"
            )
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise UsageError("the workspace must be more than nothing", hint="use --workspace-gib 8")
        if self.compute_capability is not None and self.backend != "tensorrt-rtx":
            raise UsageError(
                f"{self.backend} builds for the GPU it runs on, not for a named compute capability",
                hint="use --backend tensorrt-rtx, or leave --compute-capability out",
            )
        check_precision(self.backend, self.export.precision)
        limited = self.optimization_level is not None or self.workspace_bytes is not None
        in_pieces = bool(self.split_attention) or self.channels_last
        changed = self.version_compatible or not self.norm_plugins or in_pieces
        if self.backend == "onnxruntime" and (limited or changed):
            raise UsageError(
                "ONNX Runtime engines have no optimization level, workspace, version compatibility, plugins or pieces",
                hint="leave those options out, or use --backend tensorrt",
            )
        if self.backend != "onnxruntime" and not self.profiles:
            raise UsageError(f"{self.backend} engines need a profile", hint="use --height 512 --width 512")
        if self.split_attention is not None and self.split_attention < 0:
            raise UsageError(
                f"self-attention has no {self.split_attention} tokens", hint="use --split-attention 2048, or 0 for none"
            )
        if self.split_attention and not self._is_splittable("unet"):
            raise UsageError(
                "only TensorRT UNets in fp16 that need not be version-compatible leave attention to PyTorch",
                hint="leave --split-attention out",
            )
        if self.split_attention and not self._is_of_one_size:
            raise UsageError(
                "an engine that leaves attention to PyTorch is for one fixed size",
                hint="use --batch 2 --height 512 --width 512, or leave --split-attention out",
            )
        if self.channels_last and (self.split_attention == 0 or not (self.can_split or self.can_split_norms)):
            raise UsageError(
                "only engines in pieces can be channels-last: TensorRT's of UNets and VAEs, in fp16 and of one size,"
                " that need not be version-compatible",
                hint="leave --channels-last out",
            )

    @property
    def can_split(self) -> bool:
        """Whether attention can be left to PyTorch at all."""
        return self._is_splittable("unet") and self._is_of_one_size

    @property
    def can_split_norms(self) -> bool:
        """Whether group normalisations can be left to PyTorch at all: those of either half of a VAE."""
        return self._is_splittable("vae_decoder", "vae_encoder") and self._is_of_one_size

    def _is_splittable(self, *components: Component) -> bool:
        fits = self.export.component in components and may_be_in_pieces(self.backend, self.export)
        return fits and not self.version_compatible

    @property
    def _is_of_one_size(self) -> bool:
        return [profile.minimum == profile.maximum for profile in self.profiles] == [True]


@dataclass(frozen=True)
class NoiseSpec:
    """Where a scheduler is not to go by its model's configuration; None leaves that as it is.

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
        """Who said a field's value."""
        no = "no-" if getattr(self, name) is False else ""
        return self.sources.get(name, f"--{no}{name.replace('_', '-')}")

    def describe(self) -> str:
        """What is said and by whom, for the reader; empty where nothing is."""
        snr = None if self.zero_snr is None else "zero terminal SNR" if self.zero_snr else "no zero terminal SNR"
        spacing = self.timestep_spacing and f"{self.timestep_spacing} timesteps"
        said = {"prediction_type": self.prediction_type, "zero_snr": snr, "timestep_spacing": spacing}
        words = [f"{what} ({self.source(name)})" for name, what in said.items() if what]
        if self.zero_snr and spacing is None:
            words.append("trailing timesteps (zero terminal SNR needs the last one)")
        return ", ".join(words)


@dataclass(frozen=True)
class GenerateSpec:
    """Images to be made from text, or from an image and text.

    Args:
        prompts: one or more prompts; each gives `num_images` images.
        precision: None for the backend's default (fp16 on a GPU, fp32 on a CPU).
        height, width: pixels; None for the init image's size, else the model's own.
        seed: of each prompt's first image (the next ones count up from it); None, or `RANDOM_SEED`, for a random one.
        batch_size: images made at once, with an engine for that batch; each is the image of its seed all the same.
        scheduler: None for the model's own.
        noise: what the scheduler is told, whatever the model's configuration and its checkpoint say.
        components: the parts that engines run, the others stay PyTorch's; none for the backend's default.
        init_image: start from this image instead of from noise (img2img).
        strength: how much of the init image is replaced, above 0 to 1; `strength * steps` steps run.
        output: a file, or a folder where every image gets a new name; None for the current folder.
        overwrite: replace the file `output`; in a folder nothing is ever replaced.
        allow_build: export and build a missing engine on the spot.
    """

    prompts: tuple[str, ...]
    model: ModelSpec = ModelSpec()
    backend: BackendChoice = "auto"
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
    output: Path | None = None
    overwrite: bool = False
    allow_build: bool = True
    components: tuple[Component, ...] = ()
    noise: NoiseSpec = NoiseSpec()

    def __post_init__(self) -> None:
        if self.seed == RANDOM_SEED:
            object.__setattr__(self, "seed", None)
        check_choice("backend", self.backend, BACKENDS)
        for component in self.components:
            check_choice("component", component, COMPONENTS)
        if self.backend == "torch" and self.components:
            raise UsageError("the torch backend has no engines", hint="leave --component out, or use another --backend")
        if self.precision is not None:
            check_choice("precision", self.precision, PRECISIONS)
            check_precision(self.backend, self.precision)
        if self.scheduler is not None:
            check_choice("scheduler", self.scheduler, SCHEDULERS)
        check_output(self.output)
        self._check_prompts()
        self._check_numbers()
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


@dataclass(frozen=True)
class BenchSpec:
    """What to time.

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
        noise: as of `GenerateSpec`.
    """

    model: ModelSpec = ModelSpec()
    backend: BackendChoice = "auto"
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

    def __post_init__(self) -> None:
        check_output(self.output)
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
        )

    def steps_run(self, task: BenchTask) -> int:
        """Denoising steps that run: img2img leaves the first ones out."""
        return self.steps if task == "txt2img" else min(int(self.steps * self.strength), self.steps)


@dataclass(frozen=True)
class Thresholds:
    """What `verify` asks of an engine; None asks nothing.

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


@dataclass(frozen=True)
class VerifySpec:
    """An engine to be held against the fp32 model, over the denoising of one image.

    Args:
        image: the image that is denoised: one prompt, one image, no init image.
        engine: an engine of the engine directory by name, whatever weights it was built from; it decides backend and
            precision. None for the one that would make the image.
        timesteps: how many of the run's timesteps are compared, spread evenly; None for all.
        output: the folder that the two pictures go into; None for the current one.
    """

    image: GenerateSpec
    engine: str | None = None
    timesteps: int | None = None
    thresholds: Thresholds = Thresholds()
    output: Path | None = None

    def __post_init__(self) -> None:
        check_output(self.output)
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


@dataclass(frozen=True)
class PruneSpec:
    """Which entries of the engine directory to remove.

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
