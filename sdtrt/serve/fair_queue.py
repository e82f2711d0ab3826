"""The pictures that wait: clients take turns, and who is taken brings along those that can share its call.

Knows pictures, their clients and keys. Knows no worker and makes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from itertools import chain

from sdtrt.serve.jobs import Picture


class QueueFull(Exception):  # noqa: N818 (no failure: the client comes again)
    """There is no room for so many pictures now."""


class FairQueue:
    """A bounded queue, which each client has a line of its own in.

    Args:
        most: pictures that wait at once.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._lines: OrderedDict[str, deque[Picture]] = OrderedDict()  # the client whose turn is next comes first
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Picture]:
        return chain.from_iterable(self._lines.values())

    def put(self, pictures: Sequence[Picture]) -> None:
        """Add a client's pictures, all or none. Raises `QueueFull`."""
        if len(self) + len(pictures) > self.most:
            raise QueueFull
        for picture in pictures:
            self._lines.setdefault(picture.job.client, deque()).append(picture)
        self._changed.set()

    def put_back(self, pictures: Sequence[Picture]) -> None:
        """Add pictures that were taken before, in front of all others of their clients."""
        for picture in reversed(pictures):
            self._lines.setdefault(picture.job.client, deque()).appendleft(picture)
        self._changed.set()

    def drop(self, picture: Picture) -> bool:
        """Take a picture out; whether it was there."""
        line = self._lines.get(picture.job.client, deque())
        if picture not in line:
            return False
        line.remove(picture)
        self._forget_empty()
        return True

    async def next_batch(self, most: int, wait_s: float) -> list[Picture]:
        """Take the next picture, with others that can share its call.

        Args:
            most: pictures.
            wait_s: how long it waits for company at most, from when it was put in.
        """
        while True:
            while not self._lines:
                self._changed.clear()
                await self._changed.wait()
            head = next(iter(self._lines.values()))[0]
            left = head.queued_at + wait_s - time.monotonic()
            if left <= 0 or sum(one.key == head.key for one in self) >= most:
                return self._take(most)
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                continue

    def _take(self, most: int) -> list[Picture]:
        """The picture whose turn it is, and those of its key, a picture of each client in turn."""
        client, line = next(iter(self._lines.items()))
        self._lines.move_to_end(client)
        batch = [line.popleft()]
        while len(batch) < most:
            found = [one for one in map(self._next_of, [batch[0].key] * len(self._lines), self._lines) if one]
            if not found:
                break
            for picture in found[: most - len(batch)]:
                self._lines[picture.job.client].remove(picture)
                batch.append(picture)
        self._forget_empty()
        return batch

    def _next_of(self, key: str, client: str) -> Picture | None:
        """The first picture of a key in a client's line."""
        return next((one for one in self._lines[client] if one.key == key), None)

    def _forget_empty(self) -> None:
        for client in [client for client, line in self._lines.items() if not line]:
            del self._lines[client]
