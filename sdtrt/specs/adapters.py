"""The T2I-Adapters of a request: which they are, the picture that each goes by, and how much each counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrt.common.errors import UsageError
from sdtrt.specs.control import name_and_scale

MOST_ADAPTERS = 8  # of one request: more is a typo


@dataclass(frozen=True)
class AdapterSpec:
    """A T2I-Adapter, and the picture that it goes by.

    Args:
        name: its folder or a hub id.
        image: a map (of edges, depth, a pose), a sketch or colours.
        scale: what it adds is multiplied by (diffusers' `adapter_conditioning_scale`).
    """

    name: str
    image: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UsageError("a T2I-Adapter without a name was given", hint="as in --t2i-adapter owner/name:0.8")
        if not math.isfinite(self.scale):
            raise UsageError(f"the scale of {self.name} must be a number, got {self.scale}", hint="use 1, or 0.8")

    @classmethod
    def parse_all(cls, names: Sequence[str], pictures: Sequence[Path]) -> tuple[AdapterSpec, ...]:
        """Pair `NAME` or `NAME:SCALE` with the pictures, by their order. Raises `UsageError` for unlike numbers."""
        if len(names) > MOST_ADAPTERS:
            raise UsageError(
                f"at most {MOST_ADAPTERS} T2I-Adapters work at once, got {len(names)}", hint="leave some out"
            )
        if len(names) != len(pictures):
            raise UsageError(
                f"{len(names)} T2I-Adapter{'s' * (len(names) != 1)} and {len(pictures)}"
                f" picture{'s' * (len(pictures) != 1)} for them were given",
                hint="give one --t2i-image FILE for each --t2i-adapter, in the same order",
            )
        pairs = zip(map(name_and_scale, names), pictures, strict=True)
        return tuple(cls(name, image, scale) for (name, scale), image in pairs)
