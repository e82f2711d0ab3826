"""What `sdtrt verify` has found: errors at each timestep and of the image, and whether they are small enough."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sdtrt.common import host
from sdtrt.common.console import print_table
from sdtrt.common.errors import EngineError
from sdtrt.common.metrics import cosine, count_non_finite, max_abs, psnr, relative_l2, ssim
from sdtrt.specs import Thresholds

MAX_PSNR_DB = 200.0  # reported for equal images, whose PSNR is infinite: beyond what two unequal float32 images have

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TimestepError:
    """How far the engine's output is from the fp32 reference's at one timestep: the worse of the two guidance rows.

    Args:
        relative_l2: `‖engine − reference‖₂ / ‖reference‖₂`.
        max_abs: largest absolute error, in the output's own unit (about 1: it is noise).
        non_finite: values that are NaN or infinite, of all rows.
        reference_relative_l2: the noise floor: relative L2 error of PyTorch's own UNet in half precision.
    """

    timestep: float
    cosine: float
    relative_l2: float
    max_abs: float
    non_finite: int
    reference_relative_l2: float

    @property
    def noise_ratio(self) -> float:
        """The engine's error as a multiple of the noise floor; NaN where PyTorch itself overflows."""
        floor = self.reference_relative_l2
        if floor == 0:
            return 0.0 if self.relative_l2 == 0 else math.inf
        return self.relative_l2 / floor


@dataclass(frozen=True)
class ImageError:
    """How alike the final images are: PSNR in dB (`MAX_PSNR_DB` for equal ones) and structural similarity."""

    psnr_db: float
    ssim: float


@dataclass(frozen=True)
class VerifyReport:
    """What was compared, and how it came out.

    Args:
        settings: what was run, as plain data.
        failures: what missed its threshold, in words.
        files: the pictures that were written.
        engines: name and digest of the engine's entry, for each component that an engine ran (also `controlnet_2`).
        same_weights: whether the UNet's engine was built from this model's weights; None where there is no engine.
        rebuild: the command that builds the other components' engines again; empty where there are none.
        removal: the command that removes the UNet's engine; empty where there is none.
    """

    settings: Mapping[str, Any]
    thresholds: Thresholds
    timesteps: tuple[TimestepError, ...]
    image: ImageError
    failures: tuple[str, ...]
    files: Mapping[str, Path]
    engines: Mapping[str, Mapping[str, str]]
    same_weights: bool | None
    rebuild: str
    removal: str

    @property
    def engine(self) -> Mapping[str, str] | None:
        """The UNet's engine; None where PyTorch ran it."""
        return self.engines.get("unet")

    @property
    def unet_passed(self) -> bool:
        """Whether every threshold was held at every timestep that was compared: what then fails is rather the work of
        other parts, or of errors that add up over the steps."""
        return not any(_misses(self.thresholds, self.timesteps))

    @property
    def passed(self) -> bool:
        """Whether every threshold was held."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Plain data; a figure that is not finite is null."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "thresholds": asdict(self.thresholds),
            "timesteps": [_finite(asdict(error)) for error in self.timesteps],
            "image": _finite(asdict(self.image)),
            "files": {name: str(path) for name, path in self.files.items()},
            **self.settings,
            "host": host.facts(),
            "engine": None if self.engine is None else {**self.engine, "same_weights": self.same_weights},
            "engines": {name: dict(engine) for name, engine in self.engines.items()},
        }

    def print(self) -> None:
        """Print the table, the image's figures, the pictures' paths and the verdict on stdout."""
        rows = [
            (
                f"{error.timestep:g}",
                f"{error.cosine:.7f}",
                f"{error.relative_l2:.2e}",
                f"{error.reference_relative_l2:.2e}",
                f"{error.max_abs:.2e}",
                str(error.non_finite),
            )
            for error in self.timesteps
        ]
        print_table(("timestep", "cosine", "relative L2", "PyTorch's own", "max abs", "non-finite"), rows)
        equal = " (equal)" if self.image.psnr_db == MAX_PSNR_DB else ""
        print(f"\nimage: PSNR {self.image.psnr_db:.2f} dB{equal}, SSIM {self.image.ssim:.5f}")
        for path in self.files.values():
            print(path)
        print("passed" if self.passed else "\n".join(("failed:", *(f"  {text}" for text in self.failures))))

    def raise_on_failure(self) -> None:
        """Raise `EngineError` unless it passed."""
        if self.passed:
            return
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        what = self.engine["name"] if self.engine is not None else f"{self.settings['backend']} itself"
        but = ""
        if self.unet_passed:
            what = f"the image of {self.settings['backend']} in {self.settings['precision']}"
            but = f", but the unet is faithful at each of the {len(self.timesteps)} timesteps compared"
        raise EngineError(f"{what} is not faithful: {self.failures[0]}{more}{but}", hint=self._mend())

    def _mend(self) -> str:
        """What to do about a failure."""
        if self.engine is not None and self.same_weights is False:
            name, model = self.engine["name"], self.settings["model"]
            return f"{name} was built from other weights than those of {model}: give the --model it is of"
        hints = ["use --precision fp32"] if self.settings["precision"] != "fp32" else []
        if self.unet_passed:
            return ", or ".join([*hints, *self._suspects()]) or "the model's weights may be damaged"
        if self.engine is not None:
            hints.append(f"build it again ({self.removal} drops it)")
        return ", or ".join(hints) or "the model's weights may be damaged"

    def _suspects(self) -> Iterator[str]:
        """What to do about the engines beside the UNet's, if there are any: no timestep shows what they do."""
        if others := [engine["name"] for name, engine in self.engines.items() if name != "unet"]:
            yield (
                f"suspect {' and '.join(others)}, which no timestep shows, or errors that add up:"
                f" build again with {self.rebuild}"
            )


def compare_call(timestep: float, actual: Array, expected: Array, floor: Array) -> TimestepError:
    """The errors at one timestep: the worse of the guidance rows. Arrays of `[B,C,H,W]`, `floor` being PyTorch's own.

    Rows are compared each for itself: together, a row that is right would hide half of the other's error.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        rows = list(zip(actual, expected, strict=True))
        return TimestepError(
            timestep,
            cosine=float(np.min([cosine(*row) for row in rows])),
            relative_l2=float(np.max([relative_l2(*row) for row in rows])),
            max_abs=float(np.max([max_abs(*row) for row in rows])),
            non_finite=count_non_finite(actual),
            reference_relative_l2=float(np.max([relative_l2(*row) for row in zip(floor, expected, strict=True)])),
        )


def compare_images(actual: Array, expected: Array) -> ImageError:
    """PSNR and SSIM of two images of 0 to 1."""
    return ImageError(picture_psnr(actual, expected), ssim(actual, expected, data_range=1.0))


def picture_psnr(actual: Array, expected: Array) -> float:
    """PSNR in dB of two images of 0 to 1, at most `MAX_PSNR_DB`; NaN for pixels that are not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = psnr(actual, expected, data_range=1.0)
    return ratio if math.isnan(ratio) else min(ratio, MAX_PSNR_DB)


def judge(thresholds: Thresholds, errors: Sequence[TimestepError], image: ImageError) -> tuple[str, ...]:
    """What missed its threshold, in words. A figure that is NaN misses every threshold."""
    failures = list(_misses(thresholds, errors))
    if math.isnan(image.psnr_db):
        return (*failures, "the image has pixels that are not finite")
    for name, value, least in (
        ("PSNR", image.psnr_db, thresholds.min_psnr_db),
        ("SSIM", image.ssim, thresholds.min_ssim),
    ):
        if least is not None and not value >= least:
            failures.append(f"the image's {name} is {value:.4g}, below {least:g}")
    return tuple(failures)


def _misses(thresholds: Thresholds, errors: Sequence[TimestepError]) -> Iterator[str]:
    """What missed its threshold at the timesteps: one line for each threshold, with the worst."""
    total = len(errors)
    if broken := [error for error in errors if error.non_finite]:
        count = sum(error.non_finite for error in broken)
        where = f"at {len(broken)} of {total} timesteps, first at {broken[0].timestep:g}"
        yield f"{count} values are NaN or infinite {where}"
    errors = [error for error in errors if not error.non_finite]
    least, most, ratio = thresholds.min_cosine, thresholds.max_relative_l2, thresholds.max_noise_ratio
    if least is not None and (bad := [error for error in errors if not error.cosine >= least]):
        worst = min(bad, key=lambda error: error.cosine)
        where = f"at {len(bad)} of {total} timesteps, worst at {worst.timestep:g}: {worst.cosine:.7f}"
        yield f"cosine is below {least:g} {where}"
    if most is not None and (bad := [error for error in errors if not error.relative_l2 <= most]):
        worst = max(bad, key=lambda error: error.relative_l2)
        where = f"at {len(bad)} of {total} timesteps, worst at {worst.timestep:g}: {worst.relative_l2:.2e}"
        yield f"relative L2 error is above {most:g} {where}"
    # The ratio is NaN where PyTorch itself overflows: then there is no floor to compare with.
    if ratio is not None and (bad := [error for error in errors if error.noise_ratio > ratio]):
        worst = max(bad, key=lambda error: error.noise_ratio)
        where = f"at {len(bad)} of {total} timesteps, worst at {worst.timestep:g}: {worst.noise_ratio:.1f} times"
        yield f"relative L2 error is above {ratio:g} times PyTorch's own in half precision {where}"


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {name: value if np.isfinite(value) else None for name, value in figures.items()}
