"""What a request saves of a run's work: guidance in a part of the steps, and deep features that are kept.

It knows these numbers, their limits and which steps they mean. It does not know what a pipeline does in these steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self, get_args

from sdtrt.common.errors import UsageError
from sdtrt.specs.choices import MOST_STEPS, check_choice

CacheSchedule = Literal["uniform", "quadratic"]

CACHE_SCHEDULES: tuple[str, ...] = get_args(CacheSchedule)


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


@dataclass(frozen=True)
class DeepCaching:
    """Deep features of a UNet that some steps compute and the steps between them take over.

    Source: https://arxiv.org/abs/2312.00858.

    Args:
        interval: steps from one whole step to the next; 1 computes every step whole.
        depth: how many outer blocks every step computes, from 1 up; None for the architecture's own.
        schedule: where the whole steps lie: `uniform`, or `quadratic`, closest where the run begins.
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


@dataclass(frozen=True)
class Savings:
    """All of it for one request; as it stands, nothing is saved."""

    guidance: GuidanceInterval = GuidanceInterval()
    caching: DeepCaching = DeepCaching()
