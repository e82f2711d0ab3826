"""What a comparison of savings takes: the choices, what judges their pictures, and how much they may lose.

It knows words, numbers and their limits. It makes no picture and computes no metric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, cast, get_args

from sdtrt.common.errors import UsageError
from sdtrt.specs.choices import MAX_DIGITS, MIN_SSIM_PIXELS, PRECISIONS, Precision, check_choice, check_output
from sdtrt.specs.generate import GenerateSpec
from sdtrt.specs.presets import QUALITIES, QualityName, settle
from sdtrt.specs.savings import CacheSchedule, GuidanceInterval, Savings

MetricName = Literal["latents", "psnr", "ssim", "lpips", "clip"]

VerifyAgainst = Literal["fp32", "exact", "exact-fp32"]

METRICS: tuple[str, ...] = get_args(MetricName)

VERIFY_AGAINST: tuple[str, ...] = get_args(VerifyAgainst)

CLIP_EXAMPLE = "openai/clip-vit-large-patch14"  # the one that torchmetrics takes by itself

# Precisions that save at the price of quality: the exact request has the backend's default one in their place.
LOSSY_PRECISIONS = frozenset({"fp8", "int8"})

KNOBS = ("guidance-interval", "cache-interval", "cache-depth", "cache-schedule", "steps", "precision")

EVERYTHING = "all"  # of `bench --quality`: each preset

HOW = "as in --quality high,balanced or --quality guidance-interval=0:0.6,cache-interval=3+cache-depth=2"


def exact_of(image: GenerateSpec) -> GenerateSpec:
    """The same request without any saving."""
    precision = None if image.precision in LOSSY_PRECISIONS else image.precision
    return replace(image, savings=Savings(), quality=None, precision=precision)


@dataclass(frozen=True)
class Choice:
    """One way to make the same pictures for less.

    Args:
        text: as it is written: `high`, `cache-interval=3+cache-depth=2`, `high+steps=30`.
        quality: a preset; None for none.
        knobs: single numbers, by the names of their options; they win over the preset's.
    """

    text: str
    quality: str | None
    knobs: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a choice. Raises `UsageError` for an unknown preset or knob, and for a value that means nothing."""
        first, *rest = text.split("+")
        quality = None if "=" in first else first
        if quality is not None:
            check_choice("quality", quality, QUALITIES)
        knobs: dict[str, str] = {}
        for word in rest if quality is not None else (first, *rest):
            name, found, value = word.partition("=")
            check_choice("knob", name, KNOBS)
            if not found or name in knobs:
                raise UsageError(f"quality {text!r} says {word!r} where another KNOB=VALUE was looked for", hint=HOW)
            knobs[name] = value
        made = cls(text, quality, tuple(knobs.items()))
        made.savings()
        made.of(GenerateSpec(("",)))
        return made

    def savings(self) -> Savings:
        """What it saves of a run's steps."""
        knobs = dict(self.knobs)
        guidance = knobs.get("guidance-interval")
        return settle(
            self.quality,
            guidance_interval=None if guidance is None else GuidanceInterval.parse(guidance),
            cache_interval=self._number("cache-interval"),
            cache_depth=self._number("cache-depth"),
            cache_schedule=cast("CacheSchedule | None", knobs.get("cache-schedule")),
        )

    def of(self, exact: GenerateSpec) -> GenerateSpec:
        """The request that makes the pictures of an exact one in this way."""
        precision, steps = dict(self.knobs).get("precision"), self._number("steps")
        if precision is not None:
            check_choice("precision", precision, PRECISIONS)
        return replace(
            exact,
            savings=self.savings(),
            quality=cast("QualityName | None", self.quality),
            precision=exact.precision if precision is None else cast("Precision", precision),
            steps=exact.steps if steps is None else steps,
        )

    def _number(self, name: str) -> int | None:
        """A knob's whole number; None where it is not given."""
        value = dict(self.knobs).get(name)
        if value is None:
            return None
        if not (value.isdecimal() and len(value) <= MAX_DIGITS):
            raise UsageError(f"{name} of quality {self.text!r} must be a whole number, got {value!r}", hint=HOW)
        return int(value)


def parse_choices(text: str) -> tuple[Choice, ...]:
    """Read `high,balanced`, or `all` for each preset; what is exact is compared with, and is left out."""
    words = QUALITIES if text == EVERYTHING else text.replace(" ", "").split(",")
    found = [Choice.parse(word) for word in dict.fromkeys(words)]
    lossy = tuple(one for one in found if one.text != "exact")
    if not lossy:
        raise UsageError(f"quality {text} leaves nothing to compare with exact", hint=HOW)
    return lossy


@dataclass(frozen=True)
class MetricsSpec:
    """What judges pictures.

    Args:
        names: None for all that can be had here; a name that can't be had is an error.
        clip_model: of the CLIP score: a folder, or a hub id.
        lpips_weights: torchvision's AlexNet as a file; None for the one in PyTorch's own cache.
        offline: never ask the hub.
    """

    names: tuple[MetricName, ...] | None = None
    clip_model: str | None = None
    lpips_weights: Path | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        for name in self.names or ():
            check_choice("metric", name, METRICS)
        if self.names == ():
            raise UsageError("no metric was named", hint=f"use --metrics with some of {','.join(METRICS)}")
        given: tuple[tuple[MetricName, object, str], ...] = (
            ("clip", self.clip_model, "--clip-model"),
            ("lpips", self.lpips_weights, "--lpips-weights"),
        )
        for name, value, option in given:
            if value is not None and not self.wants(name):
                raise UsageError(
                    f"{option} {value} is about {name}, which --metrics leaves out", hint=f"add {name} to --metrics"
                )

    def wants(self, name: str) -> bool:
        """Whether a metric is looked at."""
        return self.names is None or name in self.names

    def names_it(self, name: str) -> bool:
        """Whether a metric was asked for by name, so that it must be had."""
        given = {"clip": self.clip_model, "lpips": self.lpips_weights}.get(name)
        return given is not None or (self.names is not None and name in self.names)


@dataclass(frozen=True)
class LossLimits:
    """How much savings may lose, in the mean over the prompts; None is no limit.

    The defaults catch savings that spoil a picture. They don't say that a picture is as good as the exact one.

    Args:
        min_cosine: of the latents at the end with the exact run's.
        max_relative_l2: of the latents at the end.
        min_psnr_db, min_ssim, max_lpips: of the pictures.
        max_clip_loss: how many points of 100 the CLIP score may fall.
    """

    min_cosine: float | None = None
    max_relative_l2: float | None = None
    min_psnr_db: float | None = 15.0
    min_ssim: float | None = 0.5
    max_lpips: float | None = 0.4
    max_clip_loss: float | None = 1.0

    def __post_init__(self) -> None:
        bounds = {"min_cosine": (-1, 1), "min_ssim": (-1, 1), "min_psnr_db": (-math.inf, math.inf)}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            lowest, highest = bounds.get(name, (0, math.inf))
            if value is not None and not (math.isfinite(value) and lowest <= value <= highest):
                option = f"--{name.removesuffix('_db').replace('_', '-')}"
                within = f" from {lowest} to {highest}" if highest == 1 else " from 0 up" if lowest == 0 else ""
                raise UsageError(f"{option} must be a number{within}, got {value}", hint="see sdtrt verify --help")


@dataclass(frozen=True)
class QualitySpec:
    """A request with its savings, to be held against the same one without any.

    Args:
        image: what makes the pictures: a picture for each of its prompts, with seeds that count up.
        in_fp32: whether plain PyTorch in fp32 makes the exact pictures, in the place of the same backend.
        output: the folder that the picture grid goes into; None for the current one.
    """

    image: GenerateSpec
    in_fp32: bool = False
    metrics: MetricsSpec = MetricsSpec()
    limits: LossLimits = LossLimits()
    output: Path | None = None

    def __post_init__(self) -> None:
        check_output(self.output)
        check_pictures(self.image)
        if not self.in_fp32 and exact_of(self.image) == replace(self.image, quality=None):
            raise UsageError(
                "the request saves nothing: it is the exact one itself",
                hint="add --quality balanced, --guidance-interval 0:0.6 or --cache-interval 2",
            )


@dataclass(frozen=True)
class QualityBenchSpec:
    """Choices to be timed, and judged against the request without any saving.

    Args:
        image: the exact request: a picture for each of its prompts, with seeds that count up.
        repeats, warmups: timed calls of each choice, and those before them.
        output: a folder for the report as JSON and Markdown, and a picture grid; None for no files.
        overwrite: replace such files of an earlier run.
    """

    image: GenerateSpec
    choices: tuple[Choice, ...]
    metrics: MetricsSpec = MetricsSpec()
    repeats: int = 5
    warmups: int = 2
    output: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_output(self.output)
        check_pictures(self.image)
        if self.repeats < 1 or self.warmups < 1:
            raise UsageError(
                f"repeats and warmups must be at least 1, got {self.repeats} and {self.warmups}",
                hint="use --repeats 5 --warmups 2",
            )


def check_pictures(image: GenerateSpec) -> None:
    """Refuse a request whose pictures can't be compared: started from the user's own picture, or too small."""
    if image.init_image is not None or image.num_images != 1:
        raise UsageError("savings are compared on one picture of each prompt, from text alone", hint="give --prompt")
    for name in ("height", "width"):
        pixels = getattr(image, name)
        if pixels is not None and pixels < MIN_SSIM_PIXELS:
            raise UsageError(
                f"pictures that are compared need a {name} of at least {MIN_SSIM_PIXELS}, got {pixels}",
                hint=f"use --{name} {MIN_SSIM_PIXELS}",
            )
