"""Locks of the engine directory: who uses an entry, and who makes one."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sdtrt.common.errors import EntryInUseError
from sdtrt.common.files import LIMITS, lock, open_regular
from sdtrt.engines.entry import SIDECAR


def in_use(folder: Path) -> EntryInUseError:
    return EntryInUseError(f"{folder.name} is in use", hint="end the process that uses it, or wait for it")


@contextmanager
def exclusively(folder: Path) -> Iterator[bool]:
    """Keep an entry from being taken into use inside the block; yields False where it is in use already.

    Raises:
        OSError: where that can't be told, as too many files are open.
    """
    try:
        file = _lockable(folder)
    except OSError as error:
        if error.errno in LIMITS:
            raise
        yield True  # not there, damaged or not to be read: nothing that could be in use
        return
    with file:
        yield lock(file, shared=False)


def _lockable(folder: Path) -> IO[bytes]:
    """The open sidecar of an entry, to be locked; through no link. Raises `OSError`."""
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(folder))
    path = folder / SIDECAR
    try:
        return open_regular(path, "rb+", follow=False)  # network file systems give exclusive locks to writers alone
    except PermissionError:
        return open_regular(path, follow=False)
