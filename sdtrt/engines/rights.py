"""Who but this user and root can change a file or folder, by its rights, its access list, or on the way to it.

It knows nothing of engine directories: what these refuse is said in `trust`.
Windows has rights of another kind, of which this says nothing; nor does it of NFSv4's access lists.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from sdtrt.common.errors import quote
from sdtrt.common.files import status

OTHERS = stat.S_IWGRP | stat.S_IWOTH
ACCESS_LIST, DEFAULT_LIST = "system.posix_acl_access", "system.posix_acl_default"  # attributes of POSIX ACLs
_LIST_HEAD, _LIST_LINE = 4, "<HHI"  # bytes; tag, rights, user or group (Linux, include/uapi/linux/posix_acl_xattr.h)
_USER, _GROUP, _MASK, _WRITE = 0x02, 0x08, 0x10, 0x02
_NO_LIST = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOSYS)
_MOST_LINKS = 40  # on one way, as in Linux


def writers(path: Path, found: os.stat_result) -> str | None:
    """Who but this user and root can change a file or folder; None for nobody.

    Args:
        path: of the file or folder itself, not of a link to it.
        found: what is known of it.
    """
    if os.name == "nt":
        return None
    if is_anothers(found):
        return f"its owner, {_user_name(found.st_uid)}"
    if found.st_mode & stat.S_IWOTH:
        return "everybody"
    if not found.st_mode & stat.S_IWGRP:
        return None
    if _access_list(path, ACCESS_LIST):  # these are not the group's rights, but the most that the list gives to anyone
        return "those whom its access list names"
    return None if _is_own_group(found.st_gid) else f"the group {_group_name(found.st_gid)}"


def gives_away(folder: Path) -> bool:
    """Whether a folder's default access list lets others write to what is made in it."""
    lines = list(struct.iter_unpack(_LIST_LINE, _access_list(folder, DEFAULT_LIST)[_LIST_HEAD:]))
    mask = next((rights for tag, rights, _ in lines if tag == _MASK), _WRITE)
    others = [rights for tag, rights, who in lines if tag == _GROUP or (tag == _USER and who not in (0, os.geteuid()))]
    return any(rights & mask & _WRITE for rights in others)


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
        return f"chmod -R go-w {quote(str(folder))}"
    # The number, for not every user of a container has a name; only root gives files away.
    return f"{'sudo ' * (os.geteuid() != 0)}chown -R $(id -u) {quote(str(folder))}"


def replacers(path: Path) -> Iterator[tuple[Path, str]]:
    """The folders and links on the way to a path that lets others put something else there, and who they are.

    They can where they may rename what is in a folder, or own a link. In a sticky folder such as `/tmp` only the owner
    of a thing renames it: the next step on the way tells who that is.
    """
    if os.name == "nt":
        return
    for place, found in _way(path):
        is_sticky = bool(found.st_mode & stat.S_ISVTX) and not is_anothers(found)
        if stat.S_ISLNK(found.st_mode):
            who = f"its owner, {_user_name(found.st_uid)}" if is_anothers(found) else None
        else:
            who = None if is_sticky else writers(place, found)
        if who:
            yield place, who


def _way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Each folder and link that the system goes through to a path, from the root on; it ends where nothing is."""
    place, ahead, links = Path(path.anchor), list(reversed(path.parts[1:])), 0
    while ahead:
        yield place, place.lstat()
        name = ahead.pop()
        step = place.parent if name == ".." else place / name
        found = status(step, follow=False)
        if found is None:
            return
        if not stat.S_ISLNK(found.st_mode):
            place = step
            continue
        yield step, found
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = step.readlink()
        place = Path(target.anchor) if target.anchor else place
        ahead += reversed(target.relative_to(target.anchor).parts)


def _access_list(path: Path, name: str) -> bytes:
    """One of the POSIX access lists of a file or folder; empty where there is none."""
    if not hasattr(os, "getxattr"):
        return b""
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LIST:
            raise
        return b""


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
