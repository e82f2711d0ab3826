"""The energy that a GPU uses meanwhile: by its own counter, else by its power, asked again and again.

Knows the driver's figures through `meters`. Nobody counts a CPU's: its own counters are root's alone on most systems.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from sdtrt.reports import meters

POWER_SECONDS = 0.02  # between two questions; drivers themselves average over as long, or longer
COUNTER, POWER = "counter", "power"


@dataclass
class EnergyMeter:
    """What all of a GPU has used within `watching`, idle power included.

    Args:
        device: that computes.
        joules: None where nobody counts, as on a CPU.
        source: `counter`, the GPU's own since the driver was loaded, or `power`, integrated over time; else None.
    """

    device: torch.device
    joules: float | None = None
    source: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count meanwhile."""
        uuid = meters.gpu_uuid(self.device)
        before = None if uuid is None else meters.energy_of(uuid)
        if uuid is None or (before is None and meters.power_of(uuid) is None):
            yield
        elif before is None:
            with PowerLog(uuid).watching() as log:
                yield
            self.joules, self.source = log.joules, POWER
        else:
            yield
            after = meters.energy_of(uuid)
            self.joules, self.source = (None, None) if after is None else (after - before, COUNTER)


@dataclass
class PowerLog:
    """The power of a GPU over time: moments in seconds, and watts at each."""

    uuid: str
    moments: list[tuple[float, float]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @contextmanager
    def watching(self) -> Iterator[PowerLog]:
        """Ask for the power meanwhile, first and last at both ends."""
        self._ask()
        thread = threading.Thread(target=self._poll, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
            self._ask()

    @property
    def joules(self) -> float:
        """The power integrated, linear between two moments."""
        return sum((late - early) * (one + other) / 2 for (early, one), (late, other) in pairwise(self.moments))

    def _poll(self) -> None:
        while not self._stop.wait(POWER_SECONDS):
            self._ask()

    def _ask(self) -> None:
        if (watts := meters.power_of(self.uuid)) is not None:
            self.moments.append((time.perf_counter(), watts))
