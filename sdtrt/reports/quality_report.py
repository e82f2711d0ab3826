"""What savings were found to lose: the figures of each prompt and their means, and whether these are small enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdtrt.common import host
from sdtrt.common.console import print_table
from sdtrt.common.errors import EngineError
from sdtrt.reports.losses import Loss, mean_loss
from sdtrt.specs import LossLimits


@dataclass(frozen=True)
class Figure:
    """A column of a table: what it is called, where it is found, and how it is written."""

    title: str
    of: Callable[[Loss], float | None]
    form: str


FIGURES = (
    Figure("latents' rel. L2", lambda loss: loss.relative_l2, ".4f"),
    Figure("cosine", lambda loss: loss.cosine, ".5f"),
    Figure("PSNR, dB", lambda loss: loss.psnr_db, ".2f"),
    Figure("SSIM", lambda loss: loss.ssim, ".4f"),
    Figure("LPIPS", lambda loss: loss.lpips, ".4f"),
    Figure("CLIP", lambda loss: loss.clip, ".2f"),
    Figure("CLIP lost", lambda loss: loss.clip_loss, "+.2f"),
)


def figures_of(loss: Loss) -> tuple[Figure, ...]:
    """The columns that somebody computed."""
    return tuple(figure for figure in FIGURES if figure.of(loss) is not None)


def cells_of(loss: Loss, figures: Sequence[Figure]) -> tuple[str, ...]:
    """The figures as a table has them."""
    values = ((figure.form, figure.of(loss)) for figure in figures)
    return tuple("–" if value is None else format(value, form) for form, value in values)


@dataclass(frozen=True)
class Compared:
    """One prompt's picture beside the exact one."""

    prompt: str
    seed: int
    loss: Loss

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"prompt": self.prompt, "seed": self.seed, **self.loss.to_json()}


@dataclass(frozen=True)
class QualityReport:
    """A request with its savings beside the exact one.

    Args:
        settings: what was run, as plain data.
        prompts: what came out, for each prompt.
        failures: what missed its limit, in words.
        left_out: why metrics are left out, by their names.
        files: the picture that was written.
        engines: name and digest of the engines' entries that the savings ran in.
    """

    settings: Mapping[str, Any]
    limits: LossLimits
    prompts: tuple[Compared, ...]
    failures: tuple[str, ...]
    left_out: Mapping[str, str]
    files: Mapping[str, Path]
    engines: Mapping[str, Mapping[str, str]]

    @property
    def mean(self) -> Loss:
        """Over the prompts."""
        return mean_loss([one.loss for one in self.prompts])

    @property
    def passed(self) -> bool:
        """Whether every limit was held."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Plain data; a figure that is not finite, or that nobody computed, is null."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "limits": asdict(self.limits),
            "mean": self.mean.to_json(),
            "prompts": [one.to_json() for one in self.prompts],
            "left_out": dict(self.left_out),
            "files": {name: str(path) for name, path in self.files.items()},
            **self.settings,
            "host": host.facts(),
            "engines": {name: dict(engine) for name, engine in self.engines.items()},
        }

    def print(self) -> None:
        """Print the table, the picture's path and the verdict on stdout."""
        figures = figures_of(self.mean)
        rows = [(one.prompt, str(one.seed), *cells_of(one.loss, figures)) for one in self.prompts]
        rows.append(("mean", "", *cells_of(self.mean, figures)))
        title = f"{self.settings['savings']['described']}, beside {self.settings['against']}"
        print_table(("prompt", "seed", *(figure.title for figure in figures)), rows, title)
        for path in self.files.values():
            print(path)
        print("passed" if self.passed else "\n".join(("failed:", *(f"  {text}" for text in self.failures))))

    def raise_on_failure(self) -> None:
        """Raise `EngineError` unless it passed."""
        if self.passed:
            return
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        raise EngineError(
            f"{self.settings['savings']['described']} loses too much: {self.failures[0]}{more}",
            hint="save less (--quality high, a longer --guidance-interval, a smaller --cache-interval), or allow more"
            " (sdtrt verify --help)",
        )


def judge_loss(limits: LossLimits, prompts: Sequence[Compared]) -> Iterator[str]:
    """What missed its limit, in words. A figure that nobody computed misses none; one that is NaN fails."""
    broken = [one for one in prompts if not one.loss.is_finite]
    if broken:
        yield f"{len(broken)} of {len(prompts)} pictures have values that are not finite, first {broken[0].prompt!r}"
        return
    mean = mean_loss([one.loss for one in prompts])
    for name, value, least in (
        ("cosine of the latents", mean.cosine, limits.min_cosine),
        ("PSNR", mean.psnr_db, limits.min_psnr_db),
        ("SSIM", mean.ssim, limits.min_ssim),
    ):
        if value is not None and least is not None and value < least:
            yield f"the mean {name} is {value:.4g}, below {least:g}"
    for name, value, most in (
        ("relative L2 error of the latents", mean.relative_l2, limits.max_relative_l2),
        ("LPIPS", mean.lpips, limits.max_lpips),
        ("loss of the CLIP score", mean.clip_loss, limits.max_clip_loss),
    ):
        if value is not None and most is not None and value > most:
            yield f"the mean {name} is {value:.4g}, above {most:g}"
