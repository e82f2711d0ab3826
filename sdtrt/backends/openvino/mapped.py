"""A compiled model's file, mapped into memory here and lent to OpenVINO, so that its pages can be given back.

OpenVINO lays weights out anew as it opens a model, and keeps the file that they came from mapped, though it hardly
looks at it again. Where OpenVINO maps it, those pages stay in memory beside the copies. They are only given back here,
where the mapping is sdtrt's own: what else a process keeps at an address would be lost.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sdtrt.backends.openvino import library
from sdtrt.engines.digests import in_background

EVERY_SECONDS = 0.05  # in which a disk or memory gives some hundred megabytes at most


class MappedModel:
    """The bytes of a file, mapped as long as this is there: OpenVINO does not hold on to what it is given.

    Args:
        file: of a compiled model. It must not be empty.
    """

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:  # copied on writing, as OpenVINO takes no memory that can't be written
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    @property
    def tensor(self) -> Any:
        """The bytes as OpenVINO takes them: the same memory."""
        return library.load().Tensor(np.frombuffer(self._map, dtype=np.uint8), shared_memory=True)

    def let_pages_go(self) -> None:
        """Give the system back the pages that were read; one that is read again comes from the file again.

        Nothing happens where Python can't say so (Windows), which keeps them as long as memory is there.
        """
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """Within, pages are given back as they come; also at the end."""
        ended = threading.Event()
        in_background(self._let_go_until, ended, name="sdtrt-mapped", daemon=True)
        try:
            yield
        finally:
            ended.set()
            self.let_pages_go()

    def _let_go_until(self, ended: threading.Event) -> None:
        while not ended.wait(EVERY_SECONDS):
            self.let_pages_go()
