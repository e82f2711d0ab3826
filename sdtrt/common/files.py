"""Files and folders: opened once, written whole or not at all, flushed to the disk, locked while in use.

Who may change them is not known here, but in `engines.rights`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import IO

from sdtrt.common.interrupts import held, undoing

CHUNK_BYTES = 2**24  # large: before each next one, a thread that imports keeps Python's lock for 5 ms
MODE = 0o755  # of all folders that are made, whatever the umask lets others do

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)  # of file systems without them
UNFLUSHABLE = (errno.EACCES, errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP)  # folders on Windows, FUSE and the like
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXHAUSTED = (errno.EMFILE, errno.ENFILE)  # says nothing of the file that could not be opened
MORE_FILES = "allow more open files: ulimit -n 4096; or end other programs"
LIMITS = (*EXHAUSTED, errno.ENOMEM, errno.EAGAIN)  # of the process or the system, not of a file
RAISE_LIMITS = "raise the limits on open files, processes and threads (ulimit -n, ulimit -u, a container's pids limit)"


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk. Folders that can't be opened or flushed are left to their file system."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in UNFLUSHABLE):
            raise


def open_regular(path: Path, mode: str = "rb", *, follow: bool = True) -> IO[bytes]:
    """Open a regular file that is there. Nothing else is waited for: a FIFO, a device or a folder is an `OSError`.

    Args:
        path: of the file.
        mode: `rb`, or `rb+` to read and write.
        follow: whether the last name of the path may be a link.
    """
    flags = os.O_RDWR if mode == "rb+" else os.O_RDONLY
    for name in ("O_BINARY", "O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK", *(() if follow else ("O_NOFOLLOW",))):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.fdopen(descriptor, mode)
    except BaseException:
        os.close(descriptor)
        raise


def read_small_file(path: Path, limit: int, *, follow: bool = True) -> bytes:
    """The content of a regular file of at most `limit` bytes; a larger one, or what is no file, is an `OSError`."""
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    if max(size, len(data)) > limit:  # it may have grown meanwhile
        raise OSError(errno.EINVAL, f"it is larger than {limit} bytes", str(path))
    return data


@contextmanager
def private_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder for this user alone, which is deleted at the end, also where a signal ends the process.

    To keep it, rename it.
    """
    folder = parent / f"{prefix}{secrets.token_hex(8)}"
    remove = partial(shutil.rmtree, folder, ignore_errors=True)
    with undoing(remove):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            remove()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A private folder where the system has its temporary files, for the time of a `with`.

    Raises:
        OSError: where there is none that can be written to.
    """
    with held():  # the first time, Python writes a file there to see whether it can
        parent = Path(tempfile.gettempdir())
    with private_folder(parent, "sdtrt-") as folder:
        yield folder


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace a small file in one step; a link is replaced itself."""
    temporary = path.with_name(f"{path.name}{secrets.token_hex(8)}")
    with undoing(partial(temporary.unlink, missing_ok=True)):
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def make_folders(path: Path, mode: int = 0o777) -> list[Path]:
    """Make a folder and those above it that are missing, however many; returns the new ones, the topmost first.

    Raises:
        OSError: where one can't be made, or something else has its name (`FileExistsError`).
    """
    missing = list(takewhile(lambda folder: status(folder) is None, (path, *path.parents)))[::-1]
    for folder in missing:
        folder.mkdir(mode, exist_ok=True)
    if not missing and not path.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    return missing


def make_private_folder(path: Path) -> None:
    """Make a folder if it isn't there, for this user alone to write; flushed, as what goes into it is.

    So are the folders above it: `mkdir(parents=True)` makes those as the umask has it, then they may be refused.
    """
    for folder in make_folders(path, MODE):
        fsync(folder.parent)


def rename_to_free(temporary: Path, path: Path) -> None:
    """Rename a file, but raise `FileExistsError` where the name is taken, also if that happens right now."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: take the name first, then put the file in its place
        with held():
            with path.open("xb"):
                pass
            temporary.replace(path)
    else:
        temporary.unlink()


def delete(path: Path) -> None:
    """Delete a file, or a folder with all that is in it."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:  # another process is deleting it, too
        shutil.rmtree(path, ignore_errors=True)


def limit_hint(error: OSError) -> str | None:
    """Return what helps where a limit of the process or the system was met; None where the error is the file's own."""
    if error.errno in EXHAUSTED:
        return MORE_FILES
    return RAISE_LIMITS if error.errno in LIMITS else None


def is_exhausted(error: BaseException | None) -> bool:
    """Whether an error comes of too many open files, whatever other libraries have made of that."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in EXHAUSTED:
            return True
        if os.strerror(errno.EMFILE) in str(error):  # shared libraries are opened by those who have no errno
            return True
        error = error.__cause__ or error.__context__
    return False


def status(path: Path, *, follow: bool = True) -> os.stat_result | None:
    """Return a path's status, None if nothing is there. Raises where that can't be told (`Path.exists` may not)."""
    try:
        return path.stat(follow_symlinks=follow)
    except FileNotFoundError:
        return None


def listing(folder: Path) -> list[Path]:
    """List what is in a folder, by name; nothing where there is no folder."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def lock(file: IO[bytes], *, shared: bool) -> bool:
    """Take the system's lock of an open file without waiting; it goes with the file, or with the process.

    Returns:
        False where another process holds one that excludes it. A file system without locks refuses nobody.
    """
    if os.name == "nt":  # Windows neither renames nor deletes what is open
        return True
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in NO_LOCKS
    return True


def same_file(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still what lies at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(size, 1))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
