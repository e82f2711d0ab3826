"""How an entry comes to be and goes: made in a draft, sealed, renamed into place; renamed out of sight, deleted.

Who may do that, and when, is known in `directory` and `locks`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sdtrt.common.errors import CacheError, SdtrtError
from sdtrt.common.files import delete, fsync, listing, private_folder, sha256_file, status
from sdtrt.common.interrupts import held, undoing
from sdtrt.common.version import __version__
from sdtrt.engines.entry import FORMAT, SIDECAR, Entry, UnfitError, entry_name, key_digest, seal_of
from sdtrt.engines.failures import vanished
from sdtrt.engines.locks import exclusively
from sdtrt.engines.rights import OTHERS
from sdtrt.engines.trust import examine, inner, make_inner

HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]

LEFTOVER = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{8})?-[a-z0-9_]+(-old)?|trash-[0-9]+")  # the names made in `.building`

Make = Callable[[Path], Mapping[str, Any]]  # fills the folder that it is given; returns the entry's `info`


def publish(path: Path, kind: str, key: Mapping[str, Any], make: Make, *, force: bool, trust_others: bool) -> Entry:
    """Make an entry in a temporary folder, then rename it into place.

    Args:
        path: of the engine directory.
        force: put it in the place of one that is there.
    """
    building = make_inner(path, ".building", trust_others=trust_others)
    target = path / entry_name(kind, key)
    with private_folder(building, f"{key_digest(kind, key)}-{HOST}-") as draft:
        _fill(path, draft, kind, key, make)
        draft.chmod(stat.S_IMODE(path.stat().st_mode))  # as readable as the directory that it goes into
        if not force and (other := _published(target, trust_others)) is not None:
            return other  # without locks, another process was faster
        replace(target, draft)
        fsync(building)
        fsync(path)
    entry = _published(target, trust_others)
    if entry is None:
        raise CacheError(f"{target} vanished while it was published", hint="run the command again")
    return entry


def _fill(path: Path, draft: Path, kind: str, key: Mapping[str, Any], make: Make) -> None:
    """Make what an entry holds, and seal it."""
    try:
        info = make(draft)
        seal(draft, kind, key, info)
    except SdtrtError as error:
        if status(draft) is None:  # other libraries say that in their own ways
            raise vanished(path, draft) from error
        raise


def _published(folder: Path, trust_others: bool) -> Entry | None:
    """The whole entry in a folder, if there is one."""
    try:
        return examine(folder, trust_others=trust_others)
    except UnfitError:
        return None


def discard(path: Path, folder: Path, *, trust_others: bool) -> None:
    """Rename a folder out of sight, then delete it; one that another process has removed is gone already."""
    trash = make_inner(path, ".building", trust_others=trust_others) / f"trash-{time.time_ns()}"
    with undoing(partial(delete, trash)):
        with suppress(FileNotFoundError):
            folder.rename(trash)
        with suppress(OSError):  # it is out of the way: what is left of it is swept later
            delete(trash)


def _drafts(path: Path, digest: str, *, trust_others: bool) -> list[Path]:
    """What this machine's builders of one key have left, or are making."""
    building = inner(path, ".building", trust_others=trust_others)
    found = [draft for draft in listing(building) if draft.name.startswith(f"{digest}-{HOST}-")]
    return [draft for draft in found if LEFTOVER.fullmatch(draft.name)]


def delete_drafts(path: Path, digest: str, *, trust_others: bool) -> None:
    """Delete what dead builders of one key have left. The caller holds the key's lock."""
    for draft in _drafts(path, digest, trust_others=trust_others):
        with exclusively(draft) as free:
            if free:  # else it was replaced while a process used it
                delete(draft)


def replace(target: Path, draft: Path) -> None:
    """Rename a draft into place. What was there is moved aside first, and comes back if that fails."""
    old = draft.with_name(f"{draft.name}-old")  # its key's lock is held, so no other process takes it for a leftover
    remove = partial(_delete_unless_used, old)  # the new entry is in place: what is left of the old one is swept later
    with undoing(remove):
        with held():
            try:
                with suppress(FileNotFoundError):
                    target.rename(old)
                draft.rename(target)
            except BaseException:
                with suppress(OSError):  # nothing to put back; the first failure is the one to tell
                    old.rename(target)
                raise
        remove()


def _delete_unless_used(folder: Path) -> None:
    """Delete what was replaced, unless a process still uses it."""
    with suppress(OSError), exclusively(folder) as free:
        if free:
            delete(folder)


def seal(folder: Path, kind: str, key: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write the sidecar over what `folder` holds, and flush everything to the disk."""
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    sidecar = {"format": FORMAT, "kind": kind, "key": key, "info": info, "files": files}
    sidecar |= {"created": time.time(), "sdtrt": __version__}
    sidecar = json.loads(json.dumps(sidecar, allow_nan=False))  # as it will be read: keys as text, lists for tuples
    sidecar["seal"] = seal_of(sidecar)
    (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~OTHERS)
        fsync(path)
    fsync(folder)
