"""The ControlNets of a request: which they are, the picture that each goes by, and how much each counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

from sdtrt.common.errors import UsageError
from sdtrt.specs.choices import check_choice

Preprocessor = Literal["none", "canny"]
PREPROCESSORS: tuple[str, ...] = get_args(Preprocessor)
MOST_CONTROLNETS = 8  # of one request: more is a typo

T = TypeVar("T")


@dataclass(frozen=True)
class ControlSpec:
    """A ControlNet, and the picture that it goes by.

    Args:
        name: its folder, a hub id, or a file.
        image: the picture: a map (of edges, depth, a pose), or what the preprocessor makes one of.
        scale: what its residuals are multiplied by (diffusers' `controlnet_conditioning_scale`).
        start, end: the part of the steps in which it counts, from 0 to 1 (diffusers' `control_guidance_start`, `_end`).
        preprocessor: `canny` makes a map of edges of the picture; `none` takes it as it is, whatever it looks like.
            None takes it as it is, and refuses what is no map.
        mode: which of a union's ControlNets it is, counted from 0; None for a ControlNet that is no union.
    """

    name: str
    image: Path
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocessor: Preprocessor | None = None
    mode: int | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UsageError("a ControlNet without a name was given", hint="as in --controlnet owner/name:0.8")
        if not math.isfinite(self.scale):
            raise UsageError(f"the scale of {self.name} must be a number, got {self.scale}", hint="use 1, or 0.8")
        if not 0 <= self.start < self.end <= 1:
            raise UsageError(
                f"{self.name} must start before it ends, both from 0 to 1, got {self.start} and {self.end}",
                hint="use --control-start 0 --control-end 1, or leave them out",
            )
        if self.preprocessor is not None:
            check_choice("control-preprocessor", self.preprocessor, PREPROCESSORS)
        if self.mode is not None and self.mode < 0:
            raise UsageError(f"the mode of {self.name} must be 0 or more, got {self.mode}", hint="use --control-mode 0")

    @classmethod
    def parse_all(
        cls,
        names: Sequence[str],
        pictures: Sequence[Path],
        starts: Sequence[float] = (),
        ends: Sequence[float] = (),
        preprocessors: Sequence[str] = (),
        mode: int | None = None,
    ) -> tuple[ControlSpec, ...]:
        """Pair what options name, by their order: `NAME` or `NAME:SCALE` with a picture, a start and an end.

        Of starts, ends and preprocessors there may be one, which is every ControlNet's, or as many as ControlNets. A
        mode is every one's: a union is alone.

        Raises:
            UsageError: where their numbers differ.
        """
        _check_pairs(names, pictures)
        if len(names) > MOST_CONTROLNETS:
            raise UsageError(
                f"at most {MOST_CONTROLNETS} ControlNets work at once, got {len(names)}", hint="leave some out"
            )
        modes = () if mode is None else (mode,)
        for option, values in (("start", starts), ("end", ends), ("preprocessor", preprocessors), ("mode", modes)):
            if values and not names:
                raise UsageError(
                    f"--control-{option} is about a ControlNet, and there is none", hint="use --controlnet ID"
                )
        rows = zip(
            map(name_and_scale, names),
            pictures,
            _for_each("start", starts, len(names), 0.0),
            _for_each("end", ends, len(names), 1.0),
            _for_each("preprocessor", cast("Sequence[Preprocessor]", preprocessors), len(names), None),
            strict=True,
        )
        return tuple(
            cls(name, image, scale, start, end, preprocessor, mode)
            for (name, scale), image, start, end, preprocessor in rows
        )


def _check_pairs(names: Sequence[str], pictures: Sequence[Path]) -> None:
    """Raise `UsageError` unless there is a picture for each ControlNet, and no other."""
    if len(names) == len(pictures):
        return
    if not names:
        raise UsageError(
            f"control image {pictures[0]} is for a ControlNet, and there is none",
            hint="name it before, as in --controlnet owner/name --control-image FILE",
        )
    counts = (len(names), "ControlNet"), (len(pictures), "control image")
    raise UsageError(
        " and ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts) + " were given",
        hint="give one --control-image FILE for each --controlnet, in the same order",
    )


def name_and_scale(text: str) -> tuple[str, float]:
    """Read `NAME` or `NAME:SCALE`."""
    name, colon, scale = text.rpartition(":")
    try:
        return (name, float(scale)) if colon and name else (text, 1.0)
    except ValueError:
        return text, 1.0


def _for_each(option: str, values: Sequence[T], count: int, usual: T | None) -> Sequence[T]:
    """One value for each ControlNet. Raises `UsageError` where there are neither one nor as many."""
    if len(values) == count:
        return values
    if len(values) > 1:
        raise UsageError(
            f"--control-{option} was given {len(values)} times, for {count} ControlNets",
            hint="give it once, for all of them, or once for each --controlnet",
        )
    return [*values, usual][:1] * count  # type: ignore[return-value]  # `usual` is of the same kind


def controlnet_names(controls: Sequence[str]) -> tuple[str, ...]:
    """The ControlNets that options name, without their scales: an engine takes any."""
    return tuple(name_and_scale(one)[0] for one in controls)
