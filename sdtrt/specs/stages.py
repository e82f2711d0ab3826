"""What a request adds to a picture's one pass: SDXL's size conditioning and its refiner, and a second, larger pass."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Self

from sdtrt.common.errors import UsageError
from sdtrt.specs.build import ModelSpec
from sdtrt.specs.choices import MAX_PIXELS, MOST_STEPS, SIZE_MULTIPLE

DEFAULT_REFINER_START = 0.8
DEFAULT_UPSCALE_STRENGTH = 0.7  # web UIs' own
MAX_UPSCALE = 8
LATENT, LANCZOS = "latent", "lanczos"  # upscalers that are no model's file


def parse_pair(option: str, text: str | None, example: str) -> tuple[int, int] | None:
    """Read two numbers with an `x` or a comma between them; None for none. Raises `UsageError` for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})[x,](\d{1,5})", text.strip())
    if match is None or max(int(match[1]), int(match[2])) > MAX_PIXELS:
        raise UsageError(
            f"--{option} takes two numbers from 0 to {MAX_PIXELS}, got {text!r}", hint=f"as in --{option} {example}"
        )
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class SizeConditioning:
    """What SDXL is told of a picture's size, as of those that it was trained on; None for the picture's own.

    Args:
        original: (width, height) that the picture had before it was scaled: small ones look blurred.
        crop: (left, top) of the part that was cut out of it; None for no cut.
        target: (width, height) that it is to look like.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target: tuple[int, int] | None = None

    @classmethod
    def parse(cls, original: str | None, crop: str | None, target: str | None) -> Self:
        """Read `WIDTHxHEIGHT`, `LEFT,TOP` and `WIDTHxHEIGHT`."""
        return cls(
            parse_pair("original-size", original, "1024x1024"),
            parse_pair("crop", crop, "0,256"),
            parse_pair("target-size", target, "1024x1024"),
        )

    @property
    def given(self) -> dict[str, tuple[int, int]]:
        """What is said, by the options' names in Python."""
        named = {"original_size": self.original, "crop": self.crop, "target_size": self.target}
        return {name: pair for name, pair in named.items() if pair is not None}


@dataclass(frozen=True)
class RefinerSpec:
    """A second model of SDXL for the last steps.

    Args:
        start: the share of the noise schedule after which it takes over, above 0 and below 1.
    """

    model: ModelSpec
    start: float = DEFAULT_REFINER_START

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and 0 < self.start < 1):
            raise UsageError(
                f"refiner-start must be above 0 and below 1, got {self.start}",
                hint=f"use --refiner-start {DEFAULT_REFINER_START}",
            )


def steps_of_pass(steps: int, strength: float) -> int:
    """How many steps a schedule has of which `steps` run at a strength, as web UIs count those of their hires fix."""
    return next(many for many in range(steps, MOST_STEPS + steps + 1) if int(many * strength) >= steps)


@dataclass(frozen=True)
class UpscaleSpec:
    """A second pass over a picture made larger, as web UIs' hires fix does it.

    Args:
        factor: of both sides; they are rounded down to multiples of 8.
        upscaler: `latent` (bilinear), `lanczos` (of pixels), or the file of a model that spandrel reads.
        steps: that run in the second pass; None for as many as the picture has.
        strength: how much of the enlarged picture is replaced, above 0 to 1.
    """

    factor: float
    upscaler: str = LATENT
    steps: int | None = None
    strength: float = DEFAULT_UPSCALE_STRENGTH

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and 1 < self.factor <= MAX_UPSCALE):
            raise UsageError(
                f"upscale must be above 1 and at most {MAX_UPSCALE}, got {self.factor}", hint="use --upscale 2"
            )
        if not (math.isfinite(self.strength) and 0.01 <= self.strength <= 1):
            raise UsageError(
                f"upscale-strength must be from 0.01 to 1, got {self.strength}",
                hint=f"use --upscale-strength {DEFAULT_UPSCALE_STRENGTH}",
            )
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise UsageError(
                f"upscale-steps must be from 1 to {MOST_STEPS}, got {self.steps}", hint="use --upscale-steps 20"
            )
        if not self.upscaler.strip():
            raise UsageError("an upscaler without a name was given", hint="use --upscaler latent, lanczos or FILE")

    @property
    def is_latent(self) -> bool:
        """Whether latents are enlarged, and no pixels between the passes."""
        return self.upscaler == LATENT

    def schedule(self, steps: int) -> int:
        """The steps of the second pass's noise schedule, of which its own run.

        Raises:
            UsageError: where no scheduler has so many.
        """
        run = self.steps or steps
        many = steps_of_pass(run, self.strength)
        if many > MOST_STEPS:
            raise UsageError(
                f"{run} steps at strength {self.strength} are of a schedule of {many}, more than {MOST_STEPS}",
                hint="use fewer --upscale-steps, or a higher --upscale-strength",
            )
        return many

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The second pass's (height, width)."""
        sides = [int(side * self.factor) // SIZE_MULTIPLE * SIZE_MULTIPLE for side in (height, width)]
        if max(sides) > MAX_PIXELS:
            raise UsageError(
                f"upscale {self.factor:g} of {width}x{height} is more than {MAX_PIXELS} pixels a side",
                hint="use a smaller --upscale",
            )
        return sides[0], sides[1]
