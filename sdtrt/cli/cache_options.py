"""The options of deep caching. What a UNet's deep features are is not known here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from typer import Option

from sdtrt.specs.presets import settle
from sdtrt.specs.savings import CACHE_SCHEDULES, CacheSchedule, DeepCaching

# None where nobody says anything: then it is a preset's, or no caching at all.
CacheInterval = Annotated[
    int | None,
    Option(metavar="N", help="deep caching: 1 step in N runs the whole UNet, the others its outermost layers"),
]
CacheDepth = Annotated[
    int | None,
    Option(metavar="D", help="how many layers those steps run on the way down and up; by default the model's own"),
]
CacheScheduleName = Annotated[
    str | None,
    Option(help=f"where the whole steps lie: {' or '.join(CACHE_SCHEDULES)}, closer in the run's middle"),
]


@dataclass(frozen=True)
class CacheOptions:
    """These options say at which steps the whole UNet runs; the steps between them go on from its deep features."""

    cache_interval: CacheInterval = None
    cache_depth: CacheDepth = None
    cache_schedule: CacheScheduleName = None

    def caching(self) -> DeepCaching:
        """The caching that is asked for."""
        schedule = cast("CacheSchedule | None", self.cache_schedule)
        return settle(
            None, cache_interval=self.cache_interval, cache_depth=self.cache_depth, cache_schedule=schedule
        ).caching
