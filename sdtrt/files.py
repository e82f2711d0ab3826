"""Files and folders: written whole or not at all, flushed to the disk, locked while in use, and who may change them."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that have none
UNFLUSHABLE = (errno.EACCES, errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP)  # folders on Windows, FUSE and the like
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OTHERS = stat.S_IWGRP | stat.S_IWOTH


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


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def rename_to_free(temporary: Path, path: Path) -> None:
    """Rename a file, but raise `FileExistsError` where the name is taken, also if that happens right now."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: take the name first, then put the file in its place
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


def status(path: Path, *, follow: bool = True) -> os.stat_result | None:
    """What is known of a path, None if nothing is there. Raises where that can't be told (`Path.exists` may not)."""
    try:
        return path.stat(follow_symlinks=follow)
    except FileNotFoundError:
        return None


def listing(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing where there is no folder."""
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


def writers(found: os.stat_result) -> str | None:
    """Who but this user and root can change a file or folder; None for nobody. Says nothing on Windows."""
    if os.name == "nt":
        return None
    if is_anothers(found):
        return f"its owner, {_user_name(found.st_uid)}"
    if found.st_mode & stat.S_IWOTH:
        return "everybody"
    if found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid):
        return f"the group {_group_name(found.st_gid)}"
    return None


def is_anothers(found: os.stat_result) -> bool:
    """Whether a file or folder is neither this user's nor root's."""
    return found.st_uid not in (0, os.geteuid())


def safe_command(folder: Path, found: os.stat_result) -> str:
    """The command that leaves a folder, and all that is in it, to this user where `writers` names others.

    Args:
        folder: to be made safe.
        found: what is known of it, or of what is wrong in it.
    """
    if not is_anothers(found):
        return f"chmod -R go-w {shlex.quote(str(folder))}"
    # The number, for not every user of a container has a name; only root gives files away.
    return f"{'sudo ' * (os.geteuid() != 0)}chown -R $(id -u) {shlex.quote(str(folder))}"


def replacers(path: Path) -> Iterator[tuple[Path, str]]:
    """The folders above a path in which others may rename things, and who they are (a sticky `/tmp` is no such one)."""
    if os.name == "nt":
        return
    above = {*path.parents, *Path(os.path.realpath(path)).parents}
    for folder in sorted(above):
        found = status(folder)
        if found is None or (found.st_mode & stat.S_ISVTX and found.st_uid in (0, os.geteuid())):
            continue
        if who := writers(found):
            yield folder, who


def _is_own_group(gid: int) -> bool:
    """Whether a group has this user alone in it: many systems give every user such a one."""
    import grp
    import pwd

    try:
        user = pwd.getpwuid(os.geteuid())
        members = set(grp.getgrgid(gid).gr_mem)
    except KeyError:
        return False
    alone = all(other.pw_gid != gid for other in pwd.getpwall() if other.pw_uid != user.pw_uid)
    return alone and members <= {user.pw_name}


def _user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _group_name(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
