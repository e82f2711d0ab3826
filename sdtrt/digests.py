"""sha256 of files; of those that a command will soon ask for, in the background while it imports large libraries."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from sdtrt.errors import SdtrtError

CHUNK_BYTES = 2**24  # large: before each next one, a thread that imports keeps Python's lock for 5 ms
Identity = tuple[str, int, int, int, int]

# What `hash_ahead` has found or will find. Each is good for one use: who asks again later gets the file as it is then.
_AHEAD: dict[Identity, Future[str]] = {}


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(size, 1))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def hash_ahead(find: Callable[[], Iterable[Path]]) -> None:
    """Start to hash files one after the other in the background; `digest_of` then has less to wait for, or nothing.

    Args:
        find: says which, in the background too. Where it fails, the command itself meets the reason.
    """
    threading.Thread(target=_hash_all, args=(find,), name="sdtrt-ahead", daemon=True).start()


def digest_of(path: Path) -> str:
    """sha256 (hex) of a file, as it was hashed ahead if it has not been written since, else hashed now."""
    future = _AHEAD.pop(_identity(path), None)
    if future is None or future.cancel():  # not begun with: no use in waiting for what comes before it
        return sha256_file(path)
    return future.result()


def _hash_all(find: Callable[[], Iterable[Path]]) -> None:
    with suppress(OSError, SdtrtError):
        futures = [(path, _AHEAD.setdefault(_identity(path), Future())) for path in find()]
        for path, future in futures:
            if future.set_running_or_notify_cancel():
                _hash_into(future, path)


def _hash_into(future: Future[str], path: Path) -> None:
    try:
        future.set_result(sha256_file(path))
    except BaseException as error:  # whoever waits for it must not wait forever
        future.set_exception(error)


def _identity(path: Path) -> Identity:
    """What changes when a file is replaced or written."""
    found = path.stat()
    return str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
