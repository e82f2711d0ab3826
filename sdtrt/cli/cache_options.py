"""The options of deep caching. What a UNet's deep features are is not known here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from typer import Option

from sdtrt.specs.savings import CACHE_SCHEDULES, CacheSchedule, DeepCaching

CacheInterval = Annotated[
    int,
    Option(metavar="N", help="deep caching: 1 step in N runs the whole UNet, the others its outermost layers"),
]
CacheDepth = Annotated[
    int | None,
    Option(metavar="D", help="how many layers those steps run on the way down and up; by default the model's own"),
]
CacheScheduleName = Annotated[
    str, Option(help=f"where the whole steps lie: {' or '.join(CACHE_SCHEDULES)}, closer in the run's middle")
]


@dataclass(frozen=True)
class CacheOptions:
    """These options say at which steps the whole UNet runs; the steps between them go on from its deep features."""

    cache_interval: CacheInterval = 1
    cache_depth: CacheDepth = None
    cache_schedule: CacheScheduleName = "uniform"

    def caching(self) -> DeepCaching:
        """The caching that is asked for."""
        return DeepCaching(self.cache_interval, self.cache_depth, cast(CacheSchedule, self.cache_schedule))
