"""Presets by the name of what they keep: which numbers of `Savings` each means, and why.

It knows names and numbers. It does not know how a step is saved, nor how much that gains on a machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from sdtrt.specs.choices import check_choice
from sdtrt.specs.savings import CacheSchedule, DeepCaching, GuidanceInterval, Savings

QualityName = Literal["exact", "high", "balanced", "fast"]

QUALITIES: tuple[str, ...] = get_args(QualityName)


@dataclass(frozen=True)
class Preset:
    """What one name means.

    Args:
        why: the reason for the numbers, for a table of docs/quality.md.
        eight_bits: whether engines in 8 bits are taken, where they are there and builds have measured that they gain.
    """

    savings: Savings
    why: str
    eight_bits: bool = False


# The numbers are chosen by the curve in docs/quality.md (benchmarks/quality_curve.py), on the built-in model: `high`
# loses at most 1 percentage point of any score there, `balanced` at most 3.
PRESETS: Mapping[QualityName, Preset] = {
    "exact": Preset(Savings(), "every step is whole and guided"),
    "high": Preset(Savings(GuidanceInterval(0.0, 0.5)), "late steps draw details, and hardly need guidance"),
    "balanced": Preset(
        Savings(GuidanceInterval(0.0, 0.5), DeepCaching(3)), "deep features change little from one step to the next"
    ),
    "fast": Preset(
        Savings(GuidanceInterval(0.0, 0.4), DeepCaching(5)), "as much of both as pictures bear; for drafts", True
    ),
}


def preset(name: str) -> Preset:
    """The preset of a name. Raises `UsageError` for another name."""
    check_choice("quality", name, QUALITIES)
    return PRESETS[name]  # type: ignore[index]


class SavingArguments(TypedDict, total=False):
    """What `accelerate` and `load` take of what calls leave out; None for what a preset says, or for nothing.

    Args:
        guidance_interval: the part of a run that is guided; in the other steps the UNet runs the prompt's rows alone.
        cache_interval: deep caching: 1 step in so many runs the whole UNet, the others its outermost layers, which go
            on from what it gave; 1 for none. Off in runs of fewer than 10 steps.
        cache_depth: how many layers those run on the way down and up; None for the architecture's own.
        cache_schedule: where the whole steps lie: `uniform`, or `middle`, closer to each other in the run's middle.
        quality: a preset of these four: `exact`, `high`, `balanced` or `fast`; what is given beside it wins.
    """

    guidance_interval: GuidanceInterval | None
    cache_interval: int | None
    cache_depth: int | None
    cache_schedule: CacheSchedule | None
    quality: QualityName | None


def settle(
    quality: str | None = None,
    guidance_interval: GuidanceInterval | None = None,
    cache_interval: int | None = None,
    cache_depth: int | None = None,
    cache_schedule: CacheSchedule | None = None,
    *,
    guided: bool = True,
) -> Savings:
    """A preset's savings, with the numbers that are given for themselves in the place of its own.

    Args:
        quality: None for no preset.
        guidance_interval, cache_interval, cache_depth, cache_schedule: None for the preset's.
        guided: whether there is any guidance; a preset says nothing of it where there is none.

    Raises:
        UsageError: for an unknown preset, and numbers that mean nothing.
    """
    found = Savings() if quality is None else preset(quality).savings
    own, interval = found.caching, found.guidance if guided else GuidanceInterval()
    caching = DeepCaching(
        own.interval if cache_interval is None else cache_interval,
        own.depth if cache_depth is None else cache_depth,
        cache_schedule or own.schedule,
    )
    return Savings(guidance_interval or interval, caching)


def told(quality: str, savings: Savings) -> str:
    """What is said of a preset: what it comes to, and which of its numbers gave way to those that were given."""
    own, text = preset(quality).savings, f"quality {quality}: {describe(savings)}"
    if savings == own:
        return text if savings != Savings() else f"quality {quality}: nothing is saved"
    return f"{text} (what was given beside it wins over its own: {describe(own)})"


def describe(savings: Savings) -> str:
    """What is saved, in a few words."""
    words = [] if savings.guidance.is_whole else [f"guidance in {savings.guidance} of the run"]
    caching = savings.caching
    if not caching.is_off:
        depth = "" if caching.depth is None else f", depth {caching.depth}"
        schedule = "" if caching.schedule == "uniform" else f", {caching.schedule}"
        words.append(f"1 step in {caching.interval} whole{depth}{schedule}")
    return "; ".join(words) or "nothing"
