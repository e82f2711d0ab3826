"""The options of `verify --against exact` and `bench --quality`: what judges pictures, and how much they may lose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

from typer import Option

from sdtrt.specs import METRICS, MetricName, MetricsSpec
from sdtrt.specs.quality import CLIP_EXAMPLE


@dataclass(frozen=True)
class MetricsOptions:
    """These options say what judges the pictures of savings."""

    metrics: Annotated[
        str | None,
        Option(metavar="NAME,NAME", help=f"of savings: {', '.join(METRICS)}; by default all that can be had"),
    ] = None
    clip_model: Annotated[
        str | None, Option(metavar="FOLDER|ID", help=f"for the CLIP score of savings, such as {CLIP_EXAMPLE}")
    ] = None
    lpips_weights: Annotated[
        Path | None, Option(metavar="FILE", help="for LPIPS of savings: torchvision's AlexNet; else PyTorch's cache")
    ] = None

    def spec(self, *, offline: bool) -> MetricsSpec:
        """What judges."""
        words = None if self.metrics is None else tuple(dict.fromkeys(self.metrics.replace(" ", "").split(",")))
        return MetricsSpec(cast("tuple[MetricName, ...] | None", words), self.clip_model, self.lpips_weights, offline)

    @property
    def given(self) -> list[str]:
        """The options that were typed."""
        values = {
            "--metrics": self.metrics,
            "--clip-model": self.clip_model,
            "--lpips-weights": self.lpips_weights,
        }
        return [name for name, value in values.items() if value is not None]
