"""Plans that are loaded before a session asks for them: kept until the sessions share them, or somebody lets them go.

One thread loads, another one takes. Nothing is loaded unless `expect` was called, and nothing more once anything was
taken or let go: from then on the GPU's memory is the request's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sdtrt.backends import registry
from sdtrt.engines.entry import Entry

_WANTED = threading.Event()
_TURN = threading.Lock()  # held while plans are loaded: who takes them waits for one under way
_KEPT: dict[Path, tuple[object, IO[bytes]]] = {}  # entry's folder → what was loaded of it, and the hold on it


def expect() -> None:
    """Allow plans to be loaded ahead."""
    _WANTED.set()


def is_wanted() -> bool:
    """Whether more may be loaded: not where the process is about to end, either."""
    return _WANTED.is_set() and threading.main_thread().is_alive()


def load(entry: Entry, device: int) -> None:
    """Load an engine's plans onto the current GPU, once their content is proven, and keep them.

    Args:
        entry: of an engine that runs here, in a backend that loads ahead.
        device: index of the current GPU.

    Raises:
        CacheError, EngineError: as of `open_session`, and whatever else may go wrong: who runs the engine meets it too.
    """
    if not is_wanted():
        return
    hold = entry.hold()
    try:
        loader = registry.get(entry.engine_key.backend).loader(entry, is_wanted)
        with _TURN:
            if is_wanted():
                _KEPT[entry.path] = loader(device), hold
    finally:
        if entry.path not in _KEPT:
            hold.close()


@contextmanager
def taken(entries: Iterable[Entry]) -> Iterator[frozenset[Path]]:
    """Keep what was loaded of these entries for the time of a `with`, in which sessions come to share it.

    All else is let go. Yields the folders of those that are loaded.
    """
    _settle({entry.path for entry in entries})
    try:
        yield frozenset(_KEPT)
    finally:
        let_go()


def let_go() -> None:
    """Free what no session shares."""
    _settle(set())


def _settle(wanted: set[Path]) -> None:
    """Wait for a load under way, let none begin any more, and free what is not wanted."""
    _WANTED.clear()
    with _TURN:
        for path in _KEPT.keys() - wanted:
            plans, hold = _KEPT.pop(path)
            del plans
            with suppress(OSError):
                hold.close()
