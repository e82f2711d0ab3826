"""Which call of a component is a picture's first, as far as its conditioning tells. Knows tensors, and no engine."""

from __future__ import annotations

import time
from weakref import ref

import torch

AGAIN_S = 1.0  # a call with the conditioning of the one before may be another picture's by then


class Steps:
    """Tells a picture's first step from its others: a pipeline passes all of them the same conditioning."""

    def __init__(self) -> None:
        self._last: ref[torch.Tensor] | None = None
        self._seen_at = 0.0

    def is_first(self, states: object) -> bool:
        """Whether a call has other conditioning than the one that was seen last; without any, each has."""
        return states is None or self._last is None or self._last() is not states

    def is_due(self, states: object) -> bool:
        """Whether a call is a first one, or may be by the time that has passed."""
        return self.is_first(states) or time.monotonic() - self._seen_at >= AGAIN_S

    def seen(self, states: object) -> None:
        """Remember by which conditioning the picture's next steps are known."""
        self._last = ref(states) if isinstance(states, torch.Tensor) else None
        self._seen_at = time.monotonic()

    def expect_another(self) -> None:
        """Take the next call to be due, whatever its conditioning is: a picture has ended."""
        self._seen_at = 0.0
