"""What savings lose of a picture: its latents and pixels beside the exact ones, by all metrics that can be had here.

It knows pictures and metrics. It makes no picture, and says nothing of what may be lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sdtrt.common.console import Console
from sdtrt.common.errors import SdtrtError, UsageError
from sdtrt.common.metrics import cosine, count_non_finite, relative_l2, require_ssim, ssim
from sdtrt.reports.clip_score import load_clip_score
from sdtrt.reports.lpips import LEAST_PIXELS, load_lpips
from sdtrt.reports.verify_report import picture_psnr
from sdtrt.specs.quality import CLIP_EXAMPLE, METRICS, MetricName, MetricsSpec

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Picture:
    """One picture that a pipeline made: its latents at the end `[C,H,W]`, and its pixels `[H,W,3]` in 0 to 1."""

    latents: Array
    pixels: Array


@dataclass(frozen=True)
class Loss:
    """How far a picture is from the exact one; None for what nobody computed.

    Args:
        relative_l2: `‖latents − exact‖₂ / ‖exact‖₂`, at the end of the run.
        cosine: of the same latents.
        psnr_db: of the pictures; `MAX_PSNR_DB` for equal ones.
        ssim, lpips: of the pictures; 1 and 0 for equal ones.
        clip, clip_exact: how well each of them fits the prompt, of 100.
    """

    relative_l2: float | None = None
    cosine: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    clip: float | None = None
    clip_exact: float | None = None

    @property
    def clip_loss(self) -> float | None:
        """How many points of 100 the CLIP score fell."""
        return None if self.clip is None or self.clip_exact is None else self.clip_exact - self.clip

    @property
    def is_finite(self) -> bool:
        """Whether no figure is NaN or infinite: a picture with such pixels has some."""
        return all(value is None or math.isfinite(value) for value in asdict(self).values())

    def to_json(self) -> dict[str, float | None]:
        """Plain data; a figure that is not finite is null, as one is that nobody computed."""
        figures = {**asdict(self), "clip_loss": self.clip_loss}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}


def mean_loss(losses: Sequence[Loss]) -> Loss:
    """The mean of each figure over the prompts; a figure that one of them lacks is lacking."""
    columns = {name: [getattr(loss, name) for loss in losses] for name in Loss.__dataclass_fields__}
    count = len(losses)
    return Loss(**{name: None if None in column else math.fsum(column) / count for name, column in columns.items()})


@dataclass(frozen=True)
class Judges:
    """The metrics that can be had.

    Args:
        names: the metrics, in the order of `METRICS`.
        lpips, clip: functions of two pictures' pixels, and of pixels and a text; None where they can't be had.
        left_out: why each of the others is left out.
    """

    names: tuple[str, ...]
    lpips: Callable[[Array, Array], float] | None
    clip: Callable[[Array, str], float] | None
    left_out: Mapping[str, str]

    def loss(self, own: Picture, exact: Picture | None, prompt: str) -> Loss:
        """How far a picture is from the exact one; None for a picture that is exact itself."""
        if exact is None:
            return Loss(clip=None if self.clip is None else self.clip(own.pixels, prompt))
        if count_non_finite(own.pixels):
            return Loss(psnr_db=math.nan)
        with np.errstate(invalid="ignore", over="ignore"):
            return Loss(
                relative_l2=relative_l2(own.latents, exact.latents) if "latents" in self.names else None,
                cosine=cosine(own.latents, exact.latents) if "latents" in self.names else None,
                psnr_db=picture_psnr(own.pixels, exact.pixels) if "psnr" in self.names else None,
                ssim=ssim(own.pixels, exact.pixels, data_range=1.0) if "ssim" in self.names else None,
                lpips=None if self.lpips is None else self.lpips(own.pixels, exact.pixels),
                clip=None if self.clip is None else self.clip(own.pixels, prompt),
                clip_exact=None if self.clip is None else self.clip(exact.pixels, prompt),
            )


def find_judges(spec: MetricsSpec, sides: tuple[int, int], console: Console) -> Judges:
    """Load what judges pictures, before the long part begins; say what is left out, and why.

    Args:
        sides: the pictures' height and width in pixels.

    Raises:
        SdtrtError: for a metric that was asked for by name and can't be had.
    """
    loaded: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    loads: dict[MetricName, Callable[[], Any]] = {
        "ssim": require_ssim,
        "lpips": lambda: _lpips(spec, sides),
        "clip": lambda: _clip(spec, console),
    }
    for name, load in loads.items():
        try:
            loaded |= {name: load()} if spec.wants(name) else {}
        except SdtrtError as error:
            if spec.names_it(name):
                raise
            left_out[name] = error.message
            console.note(f"{name} is left out: {error.message} ({error.hint})")
    names = tuple(name for name in METRICS if spec.wants(name) and (name in loaded or name not in loads))
    return Judges(names, loaded.get("lpips"), loaded.get("clip"), left_out)


def _lpips(spec: MetricsSpec, sides: tuple[int, int]) -> Callable[[Array, Array], float]:
    if min(sides) < LEAST_PIXELS:
        height, width = sides
        raise UsageError(
            f"LPIPS needs pictures of at least {LEAST_PIXELS} pixels a side, these are {width}x{height}",
            hint="use --height 64 --width 64, or more",
        )
    return load_lpips(spec.lpips_weights)


def _clip(spec: MetricsSpec, console: Console) -> Callable[[Array, str], float]:
    if spec.clip_model is None:
        raise UsageError("no CLIP model was named", hint=f"--clip-model {CLIP_EXAMPLE}, or a folder")
    return load_clip_score(spec.clip_model, console, offline=spec.offline)
