"""A quick start: nine tenths of it are the imports of torch, transformers and diffusers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import large libraries without Python's search for reference cycles, which takes a third of the start.

    Modules make millions of objects that stay and hardly any garbage, and each search goes through all of them. What
    is there afterwards is frozen, so that later searches, between two denoising steps say, leave it out as well.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
