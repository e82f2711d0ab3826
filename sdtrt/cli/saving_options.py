"""The options about work that is left out of a run, and the presets that are names for some of their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, cast

from typer import Option

from sdtrt.cli.cache_options import CacheDepth, CacheInterval, CacheScheduleName
from sdtrt.specs import QUALITIES, GuidanceInterval, QualityName, Savings
from sdtrt.specs.presets import settle
from sdtrt.specs.savings import CacheSchedule


@dataclass(frozen=True)
class SavingOptions:
    """These options leave work out, for speed, and change the image."""

    guidance_interval: Annotated[
        str | None,
        Option(metavar="START:STOP", help="guide this part of the steps alone, as in 0.1:0.7; the others are cheaper"),
    ] = None

    cache_interval: CacheInterval = None
    cache_depth: CacheDepth = None
    cache_schedule: CacheScheduleName = None

    def spec(self, quality: str | None = None) -> Savings:
        """What is left out: what is said here, and what a preset says of the rest."""
        interval = self.guidance_interval
        return settle(
            quality,
            guidance_interval=None if interval is None else GuidanceInterval.parse(interval),
            cache_interval=self.cache_interval,
            cache_depth=self.cache_depth,
            cache_schedule=cast("CacheSchedule | None", self.cache_schedule),
        )

    @property
    def given(self) -> list[str]:
        """The options that were typed."""
        return [f"--{name.replace('_', '-')}" for name in self.__dataclass_fields__ if getattr(self, name) is not None]


@dataclass(frozen=True)
class PresetOptions:
    """A preset of what is left out."""

    quality: Annotated[
        str | None,
        Option(
            metavar="|".join(QUALITIES),
            help="a preset of guidance interval and deep caching, the faster the lossier; numbers given beside it win",
        ),
    ] = None

    @property
    def given(self) -> list[str]:
        """The option, where it was typed."""
        return [] if self.quality is None else ["--quality"]

    def fields(self, saving: SavingOptions) -> dict[str, Any]:
        """The fields of a `GenerateSpec` for what is left out; who takes all of a preset back has the exact one."""
        savings = saving.spec(self.quality)
        named = None if self.quality is None else "exact" if savings == Savings() else self.quality
        return {"savings": savings, "quality": cast("QualityName | None", named)}
