"""What a server and its workers tell each other: JSON with blobs of bytes behind it, through a pipe.

A frame is the length of its JSON (4 bytes, the highest first), the JSON, then the blobs, whose lengths the JSON has.
Knows bytes alone.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

LENGTH_BYTES = 4
MOST_JSON = 64 * 2**20


@dataclass(frozen=True)
class Frame:
    """One message: its kind, what it says, and files that come with it."""

    kind: str
    data: Mapping[str, Any]
    blobs: tuple[bytes, ...] = ()

    def encode(self) -> bytes:
        """The frame's bytes."""
        head = json.dumps({"kind": self.kind, "data": self.data, "blobs": list(map(len, self.blobs))}).encode()
        return b"".join((len(head).to_bytes(LENGTH_BYTES, "big"), head, *self.blobs))


def _sizes(head: bytes) -> tuple[str, Mapping[str, Any], Sequence[int]]:
    read = json.loads(head)
    return read["kind"], read["data"], read["blobs"]


def _length(data: bytes) -> int:
    length = int.from_bytes(data, "big")
    if length > MOST_JSON:
        raise ValueError(f"a frame of {length} bytes")
    return length


async def read_frame(stream: asyncio.StreamReader) -> Frame | None:
    """The next frame; None where the other side is gone, in the middle of one or between two."""
    try:
        head = await stream.readexactly(_length(await stream.readexactly(LENGTH_BYTES)))
        kind, data, sizes = _sizes(head)
        return Frame(kind, data, tuple([await stream.readexactly(size) for size in sizes]))
    except (asyncio.IncompleteReadError, ConnectionError, ValueError, KeyError):
        return None


class Pipe:
    """A worker's side: frames in, which one thread reads, and frames out, which any thread writes."""

    def __init__(self, reading: BinaryIO, writing: BinaryIO) -> None:
        self._reading, self._writing = reading, writing
        self._lock = threading.Lock()

    def read(self) -> Frame | None:
        """The next frame; None where the server is gone."""
        head = self._exactly(LENGTH_BYTES)
        body = None if head is None else self._exactly(_length(head))
        if body is None:
            return None
        kind, data, sizes = _sizes(body)
        blobs = [self._exactly(size) for size in sizes]
        return None if None in blobs else Frame(kind, data, tuple(one for one in blobs if one is not None))

    def write(self, kind: str, blobs: Sequence[bytes] = (), **data: Any) -> None:
        """Send a frame whole."""
        encoded = Frame(kind, data, tuple(blobs)).encode()
        with self._lock:
            self._writing.write(encoded)
            self._writing.flush()

    def _exactly(self, size: int) -> bytes | None:
        data = self._reading.read(size)
        return data if len(data) == size else None
