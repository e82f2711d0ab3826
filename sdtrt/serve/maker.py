"""What makes pictures for a dispatcher: a process on this machine, or one of Ray's replicas. Knows frames alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from sdtrt.serve.frames import Frame


class Maker(Protocol):
    """Makes one batch at a time. All that waits for it raises `WorkerGone` where it is gone."""

    gone: asyncio.Event

    async def start(self) -> None:
        """Start it; returns before it is ready."""

    async def about_itself(self, patience_s: float) -> Frame:
        """What it says when it has started: `ready`, or what is wrong."""

    async def ask(
        self, kind: str, data: Mapping[str, Any], blobs: Sequence[bytes], patience_s: float
    ) -> AsyncIterable[Frame]:
        """Send a request, and get its answers, of which `done` is the last."""

    async def send(self, frame: Frame) -> None:
        """Send what has no answer."""

    async def end(self) -> None:
        """End it now."""


Place: TypeAlias = Callable[[], Maker]  # gives a maker that is not started, and another one where that one is gone
