"""What a request saves of a run's work: guidance in a part of the steps, and deep features that are kept.

It knows these numbers, their limits and which steps they mean. It does not know what a pipeline does in these steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from sdtrt.common.errors import UsageError
from sdtrt.specs.choices import FEWEST_CACHED_STEPS, MOST_STEPS, check_choice

CacheSchedule = Literal["uniform", "middle"]

CACHE_SCHEDULES: tuple[str, ...] = get_args(CacheSchedule)

# Of the schedule `middle`: the place in a run where whole steps lie closest, and how much closer. The paper leaves both
# free; its authors' code begins at the power 1.2 and takes the centre as an argument (`sample_from_quad_center`).
CENTRE, POWER = 0.5, 1.2
ROUNDING = 1e-9  # below it, a number is meant that its powers have missed


@dataclass(frozen=True)
class GuidanceInterval:
    """The part of a run in which classifier-free guidance has an effect (https://arxiv.org/abs/2404.07724).

    Args:
        start, stop: fractions of the run, by the names of diffusers' guiders. Steps from `int(start * steps)` up to,
            but without, `int(stop * steps)` are guided; the others are made from the prompt alone.
    """

    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.stop) and 0 <= self.start < self.stop <= 1):
            raise UsageError(
                f"guidance-interval must go from a fraction of the run to a greater one, got {self}",
                hint="as in --guidance-interval 0.1:0.7; leave it out for guidance in all steps",
            )

    def __str__(self) -> str:
        return f"{self.start:g}:{self.stop:g}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `START:STOP`. Raises `UsageError` for anything else."""
        try:
            start, stop = (float(word) for word in text.split(":"))
        except ValueError:
            raise UsageError(
                f"guidance-interval takes two fractions of the run, got {text!r}",
                hint="as in --guidance-interval 0.1:0.7",
            ) from None
        return cls(start, stop)

    @property
    def is_whole(self) -> bool:
        """Whether all steps are guided."""
        return self.start == 0 and self.stop == 1

    def holds(self, step: int, steps: int) -> bool:
        """Whether a step (from 0) of so many is guided: the rule of diffusers' guiders."""
        return int(self.start * steps) <= step < int(self.stop * steps)


def few_steps(steps: int) -> str:
    """What is said of a run that is too short for deep caching."""
    return f"deep caching: off, as {steps} step{'s are' if steps > 1 else ' is'} fewer than {FEWEST_CACHED_STEPS}"


@dataclass(frozen=True)
class DeepCaching:
    """Deep features of a UNet that some steps compute and the steps between them take over.

    Source: https://arxiv.org/abs/2312.00858 (DeepCache). A step is an evaluation of the UNet: PNDM has one more than
    steps, Heun and DPM2 nearly twice as many.

    Args:
        interval: of so many steps one is whole; 1 computes every step whole.
        depth: of the outermost layers on the way down and on the way up so many are computed at every step, from 1 up
            (the paper's branch, counted from 0, and one more); None for the architecture's own.
        schedule: where the whole steps lie: `uniform`, or `middle`, closer to each other in the middle of the run.
    """

    interval: int = 1
    depth: int | None = None
    schedule: CacheSchedule = "uniform"

    def __post_init__(self) -> None:
        check_choice("cache-schedule", self.schedule, CACHE_SCHEDULES)
        if not 1 <= self.interval <= MOST_STEPS:
            raise UsageError(
                f"cache-interval must be from 1 to {MOST_STEPS}, got {self.interval}",
                hint="use --cache-interval 3, or 1 to compute every step whole",
            )
        if self.depth is not None and self.depth < 1:
            raise UsageError(f"cache-depth must be at least 1, got {self.depth}", hint="use --cache-depth 1")

    @property
    def is_off(self) -> bool:
        """Whether every step is computed whole."""
        return self.interval == 1

    def over(self, steps: int) -> DeepCaching:
        """What is left of it in a run of so many steps: nothing, where neighbours are too far apart."""
        return self if steps >= FEWEST_CACHED_STEPS else replace(self, interval=1)

    def describe(self, depth: int) -> str:
        """What it does, in words: `1 step in 3 is whole (uniform), depth 1`."""
        return f"1 step in {self.interval} is whole ({self.schedule}), depth {depth}"

    def whole_steps(self, steps: int) -> frozenset[int]:
        """The steps, from 0, of a run that are computed whole; the first always is.

        `middle` is the paper's non-uniform 1:N strategy: ceil(steps / N) numbers x lie evenly between the powers 1/p of
        the distances from the centre c to both ends, and the steps are x^p + c, each power with its number's sign.
        """
        if self.schedule == "uniform" or self.is_off:
            return frozenset(range(0, steps, self.interval))
        centre, count = CENTRE * steps, math.ceil(steps / self.interval)
        low, high = _signed_power(-centre, 1 / POWER), _signed_power(steps - centre, 1 / POWER)
        points = (low + (high - low) * index / count for index in range(count))
        return frozenset(max(0, math.floor(_signed_power(one, POWER) + centre + ROUNDING)) for one in points)


def _signed_power(number: float, power: float) -> float:
    return math.copysign(abs(number) ** power, number)


@dataclass(frozen=True)
class Savings:
    """All of it for one request; as it stands, nothing is saved."""

    guidance: GuidanceInterval = GuidanceInterval()
    caching: DeepCaching = DeepCaching()
