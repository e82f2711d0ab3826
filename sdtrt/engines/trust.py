"""What the engine directory refuses because others could change it, or because it is not of its own kind.

Engines run code, so whoever can write to them could run theirs. Who can write to a file is known in `rights`; what an
entry is, in `entry`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from sdtrt.common.errors import MALFORMED, CacheError, command_line, quote
from sdtrt.common.files import LIMITS, MODE, status
from sdtrt.engines.entry import SIDECAR, Entry, UnfitError, entry_of, read_sidecar
from sdtrt.engines.failures import reading, refusal
from sdtrt.engines.rights import gives_away, is_anothers, replacers, safe_command, writers


class UnsafeError(UnfitError):
    """An entry that other users can change; `mend` is the command after which they can't."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(reason)
        self.mend = mend


def check_trust(path: Path, *, trust_others: bool) -> None:
    """Refuse an engine directory that others can change: engines run code, and whoever writes them chooses which.

    Raises:
        CacheError: where others can change it, or it can't be read.
    """
    if trust_others:
        return
    with reading(path):
        found = status(path)
        if found is not None:
            _check_folder(path, Path(os.path.realpath(path)), found, "it")
        for place, other in replacers(path):
            # Another user's folder is not to be taken away from them for what lies in it.
            mend = "" if is_anothers(place.lstat()) else f"chmod go-w {quote(str(place))}, or "
            raise _unsafe(path, other, str(place), mend)


def _check_folder(path: Path, folder: Path, found: os.stat_result, where: str) -> None:
    """Refuse a folder that others can change, or where they could change what is made in it."""
    if who := writers(folder, found):
        raise _unsafe(path, who, where, f"{safe_command(path, found)}, or ")
    if gives_away(folder):
        mend = command_line("setfacl", "-R", "-k", str(path))
        raise _unsafe(path, "those whom its default access list names", f"what is made in {where}", f"{mend}, or ")


def _unsafe(path: Path, who: str, where: str, mend: str) -> CacheError:
    """The error for an engine directory that others can change."""
    return CacheError(
        f"the engine directory {path} is not safe: {who} can change {where}, and engines run code",
        hint=f"{mend}name another --engine-dir; --trust-engine-dir takes it as it is",
    )


def inner(path: Path, name: str, *, trust_others: bool) -> Path:
    """A folder of the engine directory's own, if it is there; else raises `CacheError` for what has its name.

    What others can change is refused, as the directory itself would be: what they put there would be ours.
    """
    folder = path / name
    found = require_own(folder, "folder")
    if found is not None and not trust_others:
        _check_folder(path, folder, found, str(folder))
    return folder


def make_inner(path: Path, name: str, *, trust_others: bool) -> Path:
    """Make a folder of the engine directory's own where it is not there. Raises `CacheError` for what has its name."""
    with suppress(FileExistsError):
        (path / name).mkdir(mode=MODE)
    return inner(path, name, trust_others=trust_others)


def require_own(path: Path, kind: str) -> os.stat_result | None:
    """What is known of a `folder` or `file` of sdtrt's own; None where nothing is.

    Raises:
        CacheError: where a link has its name, which is never followed, or anything else.
    """
    found = status(path, follow=False)
    if found is None or (stat.S_ISDIR if kind == "folder" else stat.S_ISREG)(found.st_mode):
        return found
    away = command_line("mv", str(path), f"{path}.old")
    raise CacheError(
        f"{path} is {_kind(found)}, where sdtrt has a {kind} of its own",
        hint=f"move it out of the way: {away}; or name another --engine-dir",
    )


def _kind(found: os.stat_result) -> str:
    """What something is, in words."""
    kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(found.st_mode), "neither file nor folder")


def examine(folder: Path, *, trust_others: bool) -> Entry:
    """Read the entry in a folder, but not the contents of its files.

    Raises:
        UnfitError: where it is damaged, foreign, or (`UnsafeError`) others can change it.
        CacheError: where the process has met a limit: that says nothing of the entry.
    """
    try:
        _check_piece(folder, stat.S_ISDIR, trust_others=trust_others)
        _check_piece(folder / SIDECAR, stat.S_ISREG, trust_others=trust_others)
        entry = entry_of(folder, read_sidecar(folder))
        for name in entry.files:
            _check_piece(folder / name, stat.S_ISREG, trust_others=trust_others)
    except FileNotFoundError as error:
        raise UnfitError(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        if error.errno in LIMITS:
            raise refusal(folder.parent, error, "read") from error
        raise UnfitError(f"it can't be read: {error.strerror}") from error
    except MALFORMED as error:
        raise UnfitError(f"{SIDECAR} is damaged") from error
    for name, size in entry.files.items():
        if (found := (folder / name).stat()).st_size != size:
            raise UnfitError(f"{name} has {found.st_size} of {size} bytes")
    return entry


def _check_piece(path: Path, is_kind: Callable[[int], bool], *, trust_others: bool) -> None:
    """Raise `UnfitError` for a link, for what is of another kind, and for what other users can change.

    Args:
        path: an entry's folder, or a file in it.
    """
    found, is_folder = path.lstat(), is_kind is stat.S_ISDIR
    if not is_kind(found.st_mode):
        raise UnfitError(f"{path.name} is a link, or no {'folder' if is_folder else 'file'}")
    if not trust_others and (who := writers(path, found)):
        directory = path.parent if is_folder else path.parent.parent
        raise UnsafeError(f"{path.name} can be changed by {who}", safe_command(directory, found))


def mends_of_unsafe(folders: Iterable[Path], *, trust_others: bool) -> dict[str, str]:
    """The names of the entries that other users can change, each with the command that mends it."""
    found = {}
    for folder in folders:
        try:
            examine(folder, trust_others=trust_others)
        except UnsafeError as reason:
            found[folder.name] = reason.mend
        except UnfitError:
            continue
    return found


def mend_of(unsafe: Mapping[str, str]) -> str:
    """The command after which other users can't change the entries that `EngineDirectory.unsafe` has found."""
    return " && ".join(sorted(set(unsafe.values())))
