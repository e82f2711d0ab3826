"""The options about work that is left out of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from typer import Option

from sdtrt.cli.cache_options import CacheDepth, CacheInterval, CacheOptions, CacheScheduleName
from sdtrt.specs import GuidanceInterval, Savings


@dataclass(frozen=True)
class SavingOptions:
    """These options leave work out, for speed, and change the image."""

    guidance_interval: Annotated[
        str | None,
        Option(metavar="START:STOP", help="guide this part of the steps alone, as in 0.1:0.7; the others are cheaper"),
    ] = None

    cache_interval: CacheInterval = 1
    cache_depth: CacheDepth = None
    cache_schedule: CacheScheduleName = "uniform"

    def spec(self) -> Savings:
        """What is left out."""
        interval = self.guidance_interval
        return Savings(
            guidance=GuidanceInterval() if interval is None else GuidanceInterval.parse(interval),
            caching=CacheOptions(self.cache_interval, self.cache_depth, self.cache_schedule).caching(),
        )
