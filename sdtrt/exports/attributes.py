"""Another attribute of an object, for the time of a `with`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def attribute(target: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another attribute for the time of a `with`."""
    missing = object()
    before = target.__dict__.get(name, missing)
    object.__setattr__(target, name, value)
    try:
        yield
    finally:
        if before is missing:
            object.__delattr__(target, name)
        else:
            object.__setattr__(target, name, before)
