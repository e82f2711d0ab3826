"""How many replicas `sdtrt serve --ray` has, and of which cluster. Knows no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sdtrt.common.errors import UsageError

MOST_REPLICAS = 1024  # more is a typo


@dataclass(frozen=True)
class RaySpec:
    """Replicas of a Ray cluster, each with a GPU of its own, or with a processor where there are no GPUs.

    Args:
        address: of a cluster that runs, as Ray takes it (`auto`, `HOST:PORT`); None for one that lives as long as the
            server, on this machine alone.
        fewest, most: replicas; Ray starts and ends those between, as there is work. None for as many as GPUs are there.
    """

    address: str | None = None
    fewest: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        fewest, most = self.fewest, self.most
        if fewest is None and most is None:
            return
        if fewest is None or most is None or not 1 <= fewest <= most <= MOST_REPLICAS:
            raise UsageError(f"there are no replicas from {fewest} to {most}", hint="use --replicas 2, or 1-4")

    @classmethod
    def of(cls, address: str | None, replicas: str | None) -> Self:
        """Read `N` or `FEWEST-MOST`. Raises `UsageError` for anything else."""
        if replicas is None:
            return cls(address)
        parts = [part.strip() for part in replicas.split("-")]
        if len(parts) > 2 or not all(part.isascii() and part.isdecimal() and len(part) <= 5 for part in parts):
            raise UsageError(f"--replicas takes one number or two, got {replicas!r}", hint="as in --replicas 2, or 1-4")
        return cls(address, int(parts[0]), int(parts[-1]))
