"""sha256 of files; of those that a command will soon ask for, in the background while it imports large libraries.

The engine directory remembers those of large files (`DigestMemo`). What the files are is not known here.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdtrt.common.errors import SdtrtError
from sdtrt.common.files import make_private_folder, read_small_file, sha256_file, write_atomically
from sdtrt.engines.rights import writers

MEMO_BYTES = 32 * 2**20  # files smaller than this are hashed anew each time: it takes milliseconds
MEMO_FILE_BYTES = 2**24  # at most, of the memo: far more than it needs
PATIENCE_S = 0.05
Identity = tuple[str, int, int, int, int]

# What was hashed ahead or will be. Each is good for one `digest_of`: who asks again later gets the file as it is then.
_AHEAD: dict[Identity, Future[str]] = {}
_BEGINNING = threading.Lock()


def hash_ahead(find: Callable[[], Iterable[Path]]) -> None:
    """Start to hash files one after the other in the background; `digest_of` then has less to wait for, or nothing.

    Args:
        find: says which, in the background too. Where it fails, the command itself meets the reason.
    """
    in_background(_hash_all, find, name="sdtrt-ahead", daemon=True)


def in_background(work: Callable[..., None], *arguments: Any, name: str, daemon: bool) -> bool:
    """Begin what only saves time in a thread; False where there is none to spare (limits of users and containers)."""
    try:
        threading.Thread(target=work, args=arguments, name=name, daemon=daemon).start()
    except (RuntimeError, MemoryError):
        return False
    return True


def digest_of(path: Path) -> str:
    """sha256 (hex) of a file, as it was hashed ahead if it has not been written since, else hashed now."""
    future = _AHEAD.pop(identity(path), None)
    if future is None or future.cancel():  # not begun with: no use in waiting for what comes before it
        return sha256_file(path)
    try:
        return future.result()
    except (OSError, MemoryError):  # which may be of that moment, or of that thread: what lasts is met here
        return sha256_file(path)


def hash_for_later(path: Path) -> None:
    """Hash a file in this thread; `digest_of` has its digest then, once."""
    _hash_into(_expected(path), path)


def digests_ahead(paths: Iterable[Path], wanted: Callable[[], bool]) -> Callable[[Path], str]:
    """How to have the digest of each of some files; it stays good for one `digest_of` after that.

    What nobody hashes yet is begun with in the background. It raises `CancelledError` where `digest_of` has come first,
    so that no file is hashed twice, and once `wanted` is false, so that nobody has to wait for it.
    """
    futures = {path: _expected(path) for path in paths}
    if not in_background(_hash_each, futures, name="sdtrt-ahead", daemon=True):
        _hash_each(futures)

    def digest(path: Path) -> str:
        while wanted():
            wait([futures[path]], PATIENCE_S)
            if futures[path].done():
                return futures[path].result()
        raise CancelledError

    return digest


def _hash_all(find: Callable[[], Iterable[Path]]) -> None:
    with suppress(OSError, SdtrtError):
        _hash_each({path: _expected(path) for path in find()})


def _hash_each(futures: Mapping[Path, Future[str]]) -> None:
    for path, future in futures.items():
        _hash_into(future, path)


def _expected(path: Path) -> Future[str]:
    return _AHEAD.setdefault(identity(path), Future())


def _hash_into(future: Future[str], path: Path) -> None:
    """Hash a file, unless another thread has begun with it, or whoever asked for it would not wait for that."""
    with _BEGINNING:
        begun = future.running() or future.done()
        if begun or not future.set_running_or_notify_cancel():
            return
    try:
        future.set_result(sha256_file(path))
    except BaseException as error:  # whoever waits for it must not wait forever
        future.set_exception(error)


def identity(path: Path) -> Identity:
    """What changes when a file is replaced or written, whoever puts its old time back. Raises `OSError`."""
    found = path.stat()
    return str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


class DigestMemo:
    """The digests of large files, remembered in the engine directory by path, size and times.

    Args:
        path: of the engine directory, which need not exist.
        trust_others: read the memo even if other users can change it.
    """

    def __init__(self, path: Path, *, trust_others: bool) -> None:
        self._folder = path
        self._file = path / ".digests.json"
        self._trust_others = trust_others
        self._own: dict[str, Mapping[str, Any]] = {}  # what this process has hashed

    def digest(self, path: Path) -> str:
        """sha256 (hex) of a file; that of a large one is remembered for as long as its size and times stay the same."""
        path = path.resolve()
        name, *stamp = identity(path)
        if int(stamp[0]) < MEMO_BYTES:
            return sha256_file(path)
        known = self._known(name, stamp)
        if known is not None:
            return known
        digest = digest_of(path)
        if identity(path) == (name, *stamp):  # else nobody knows which of two contents that is of
            self._remember(name, {"stamp": stamp, "sha256": digest})
        return digest

    def knows(self, path: Path) -> bool:
        """Whether `digest` has next to nothing to read of a file. Raises `OSError`."""
        name, *stamp = identity(path.resolve())
        return int(stamp[0]) < MEMO_BYTES or self._known(name, stamp) is not None

    def _known(self, name: str, stamp: list[Any]) -> str | None:
        """The digest that is remembered of a file, if it is as it was then."""
        known = (self.read() | self._own).get(name)
        if isinstance(known, dict) and known.get("stamp") == stamp and isinstance(known.get("sha256"), str):
            return str(known["sha256"])
        return None

    def _remember(self, name: str, known: Mapping[str, Any]) -> None:
        """Write a file's digest into the memo; one that can't be written is this process's own."""
        self._own[name] = known
        with suppress(OSError):
            make_private_folder(self._folder)
            write_atomically(self._file, json.dumps(self.read() | {name: known}))

    def read(self) -> dict[str, Any]:
        """What was written into the memo; nothing where it can't be read as one, or others can change it."""
        with suppress(OSError, ValueError, RecursionError):
            if not self._trust_others and writers(self._file, self._file.lstat()):
                return {}
            memo = json.loads(read_small_file(self._file, MEMO_FILE_BYTES, follow=False))
            if isinstance(memo, dict):
                return memo
        return {}
