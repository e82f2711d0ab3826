"""Scratch memory on the GPU that engines take turns in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from sdtrt.backends.graph_pool import GraphPool


class Scratch:
    """Memory for the intermediate results of sessions that need not run at once, as those of one pipeline.

    Sessions of one scratch run one after the other, whatever streams and threads they are called from: each run waits,
    on the GPU, for the one before. It takes nothing before it is asked for memory, and serves one GPU. There are two
    kinds of it: a block, for engines that are told where to work, and a pool, for those that ask PyTorch for memory.

    Args:
        expected_bytes: what the pool takes at once, as of `GraphPool`.
    """

    def __init__(self, expected_bytes: int = 0) -> None:
        self.pool = GraphPool(expected_bytes)
        self._block: torch.Tensor | None = None
        self._device: torch.device | None = None
        self._done: Any = None  # where the last run ends; made with the first block, as it needs a GPU
        self._lock = threading.Lock()

    def block(self, size_bytes: int, device: torch.device) -> torch.Tensor:
        """Memory of at least this size: that which other sessions have, where it is large enough, else new one.

        A block never moves or grows (CUDA graphs have its address): open the session that needs the most first.
        """
        with self._lock:
            if self._done is None:
                self._done, self._device = torch.cuda.Event(), device
            assert self._device == device, "a scratch serves one GPU"
            if self._block is None or self._block.numel() < size_bytes:
                self._block = torch.empty(size_bytes, dtype=torch.uint8, device=device)
            return self._block

    @contextmanager
    def turn(self, stream: Any) -> Iterator[None]:
        """Have the memory to oneself for what a `with` puts on a stream, after all that others have put anywhere.

        A run that fails counts, too: what it has put on the stream before is still to come.
        """
        with self._lock:
            stream.wait_event(self._done)
            try:
                yield
            except BaseException:
                with suppress(RuntimeError):  # the GPU itself may have failed: the first error says more
                    self._done.record(stream)
                raise
            self._done.record(stream)

    def finish(self) -> None:
        """Wait until the GPU has done all runs so far."""
        self._done.synchronize()
