"""Read in the background, while Python imports, the files that a request's engines get their weights from.

Engines that hold their weights are hashed ahead (`digests`) or loaded ahead (`likely_engines`). For all others this is
the same: what the system has on the disk only is in its cache once it is asked for, and what nobody has hashed yet is
hashed, as a picture's settings tell the fingerprints of all parts. A package itself needs no more than that: to open
one takes milliseconds. Nothing here can fail a command: what goes wrong is met again where the file is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sdtrt.backends import registry
from sdtrt.common import host
from sdtrt.engines.digests import hash_for_later, in_background
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.models.origins import local_path
from sdtrt.models.resolve import resolve_model
from sdtrt.models.weights import WEIGHT_NAMES
from sdtrt.specs import AUTO, GenerateSpec

CHUNK_BYTES = 2**24
MOST_THREADS = 4
THREAD = "sdtrt-weights"


def read_ahead(spec: GenerateSpec, directory: EngineDirectory) -> None:
    """Begin to read a request's packages and weights, where its backend takes weights that are in no engine."""
    in_background(_find_and_read, spec, directory, name=THREAD, daemon=True)


def _find_and_read(spec: GenerateSpec, directory: EngineDirectory) -> None:
    with suppress(Exception):
        engines = directory.entries("engine")
        if not reads_weights(spec, engines):
            return
        for path in _packages(engines):
            read_file(path)
        files = iter(sorted(set(_weights(spec)), key=lambda path: path.stat().st_size, reverse=True))
        for _ in range(max(1, min(MOST_THREADS, host.cores() // 4))):
            in_background(_read_each, files, directory, name=THREAD, daemon=True)


def reads_weights(spec: GenerateSpec, engines: Iterable[Entry]) -> bool:
    """Whether a request reads weights when it runs: not those that are in its engines, nor before it builds some."""
    if spec.backend != AUTO:
        backend = registry.get(spec.backend)
        return backend.source is None or not backend.weights_inside
    return any(True for _ in _free_of_weights(engines))


def _free_of_weights(engines: Iterable[Entry]) -> Iterator[Entry]:
    """Those of some engines that hold no weights."""
    names = {one.name for one in registry.candidates(AUTO) if one.source and not one.weights_inside}
    return (entry for entry in engines if entry.key.get("backend") in names)


def _packages(engines: Iterable[Entry]) -> list[Path]:
    """The files of the engines without weights that were used last, one engine for each component."""
    by_use = sorted(_free_of_weights(engines), key=lambda entry: entry.last_used)
    latest = {str(entry.key.get("component")): entry for entry in by_use}
    return [entry.path / name for entry in latest.values() for name in entry.files]


def _weights(spec: GenerateSpec) -> Iterator[Path]:
    """A model's weight files that are on this machine; a checkpoint in one file is that one, and not looked into."""
    path = local_path(spec.model.name)
    if path is not None and path.is_file():
        yield path.resolve()
        return
    model = resolve_model(replace(spec.model, offline=True, loras=(), ip_adapters=()))  # which may not be here yet
    for part in WEIGHT_NAMES:
        if part in model.parts:
            yield from (file.resolve() for file in model.stored_weight_files(part))


def _read_each(files: Iterator[Path], directory: EngineDirectory) -> None:
    """Read the files that no other thread has taken."""
    for path in files:
        with suppress(OSError):
            if directory.knows_digest(path):
                read_file(path)
            else:
                hash_for_later(path)


def read_file(path: Path) -> None:
    """Read a file whole, and keep nothing: it is in the system's cache then. Python's lock is free meanwhile."""
    buffer = bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer):
            pass
