"""Locks of the engine directory: who uses an entry, and who makes one.

Whoever runs an engine holds a shared lock on its sidecar (`Entry.hold`); whoever removes it needs an exclusive one.
Whoever makes an entry holds the lock of its key. What is made or removed is not known here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sdtrt.common.console import Console
from sdtrt.common.errors import EntryInUseError
from sdtrt.common.files import LIMITS, NO_LOCKS, listing, lock, open_regular, status
from sdtrt.engines.entry import SIDECAR, is_published
from sdtrt.engines.trust import inner, make_inner, require_own


def in_use(folder: Path) -> EntryInUseError:
    """The error for an entry that a process uses."""
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


@contextmanager
def locked(path: Path, digest: str, console: Console, *, trust_others: bool) -> Iterator[bool]:
    """Hold a key's lock; if another process holds it, say so and wait. The system frees a dead holder's lock.

    Args:
        path: of the engine directory.
        digest: of the key.

    Yields whether the lock keeps others out: some network file systems have none.
    """
    from filelock import FileLock, Timeout

    make_inner(path, ".locks", trust_others=trust_others)
    key_lock = FileLock(_lock_file(path, digest, trust_others=trust_others), timeout=0)
    waited = False
    try:
        key_lock.acquire()
    except Timeout:
        with console.activity("waiting for another process that is making the same entry"):
            key_lock.acquire(timeout=-1)
        waited = True
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        console.warn(f"{path} is on a file system without locks: other processes may make the same entry")
        yield False
        return
    try:
        if waited and not any(is_published(folder, digest) for folder in listing(path)):
            console.note("that process ended without it: making it here")
        yield True
    finally:
        key_lock.release()


def is_locked(path: Path, digest: str, *, trust_others: bool) -> bool:
    """Whether some process is making the entry of a key. Creates nothing."""
    from filelock import FileLock

    file = _lock_file(path, digest, trust_others=trust_others)
    if status(file, follow=False) is None:
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except (OSError, NotImplementedError):  # `Timeout` is one; a lock that may not even be tried may be held
        return True


def _lock_file(path: Path, digest: str, *, trust_others: bool) -> Path:
    """The file that is locked for a key. Raises `CacheError` where a link or a folder has its name."""
    file = inner(path, ".locks", trust_others=trust_others) / f"{digest}.lock"
    require_own(file, "file")
    return file
