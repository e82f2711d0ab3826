"""Upkeep of the engine directory: what is damaged, what killed builds left behind, which entries go to make room.

Which engines this machine can run is for the caller to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import CacheError, EntryInUseError
from sdtrt.common.files import delete, listing, status
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry, ForeignEntry, UnfitError, is_entry_name, size_of
from sdtrt.engines.failures import reading, refusal
from sdtrt.engines.locks import exclusively, in_use, is_locked
from sdtrt.engines.publish import HOST, LEFTOVER
from sdtrt.engines.seen import stamp_of
from sdtrt.engines.trust import UnsafeError, check_trust, examine, inner
from sdtrt.specs import PruneSpec

FOREIGN_DRAFT_SECONDS = 2 * 86400  # older than any build: until then another machine's draft may be under way


@dataclass(frozen=True)
class Checked:
    """What `check` found of one entry.

    Args:
        name: of the entry.
        state: `ok`, `damaged`, `foreign` (of another format), or `unsafe` (other users can change it).
        problem: what is wrong with it.
        size_bytes: of all its files.
    """

    name: str
    state: str
    problem: str
    size_bytes: int


@dataclass(frozen=True)
class Pruned:
    """What pruning has removed (or would), what that freed, and how many killed builds' leftovers went with it."""

    removed: tuple[str, ...]
    freed_bytes: int
    leftovers: int
    dry_run: bool


def prune(
    directory: EngineDirectory, spec: PruneSpec, is_foreign: Callable[[Entry], bool], console: Console = QUIET
) -> Pruned:
    """Remove the entries that `spec` names, and what killed builds left behind.

    What is in use, or was used or made anew since it was looked at, stays, with a word.

    Args:
        is_foreign: whether this machine can't run an engine.
    """
    seen = {folder: stamp_of(folder) for folder in directory.folders()}
    leftovers = len(abandoned(directory)) if spec.dry_run else sweep(directory)
    chosen = {entry.path: entry.size_bytes for entry in prunable(directory, spec, is_foreign)}
    if spec.damaged:
        checked = (one for one in check(directory) if one.state == "damaged")
        chosen |= {directory.path / one.name: one.size_bytes for one in checked}
    removed = []
    for path in chosen:
        if stamp_of(path) != seen.get(path):
            console.note(f"{path.name} was used or made anew meanwhile: it stays")
            continue
        try:
            if spec.dry_run:
                require_free(directory, path)
            else:
                directory.remove(path)
        except EntryInUseError as error:
            console.note(f"{error.message}: it stays")
        else:
            removed.append(path)
    freed = sum(chosen[path] for path in removed)
    return Pruned(tuple(path.name for path in removed), freed, leftovers, spec.dry_run)


def require_free(directory: EngineDirectory, folder: Path) -> None:
    """Raise `EntryInUseError` where a process holds the entry in a folder."""
    if directory.is_in_use(folder):
        raise in_use(folder)


def prunable(
    directory: EngineDirectory, spec: PruneSpec, is_foreign: Callable[[Entry], bool]
) -> list[Entry | ForeignEntry]:
    """The entries that `spec` names, least recently used first; `is_foreign` says which this machine can't load.

    Those of another format count and go like others, and as foreign in any case.
    """
    entries = sorted(directory.all_entries(), key=lambda entry: entry.last_used)
    limit = time.time() - 86400 * spec.older_than_days if spec.older_than_days is not None else None
    excess = sum(entry.size_bytes for entry in entries) - spec.keep_bytes if spec.keep_bytes is not None else 0
    chosen = []
    for entry in entries:
        old = limit is not None and entry.last_used < limit
        foreign = spec.foreign and (isinstance(entry, ForeignEntry) or is_foreign(entry))
        if old or excess > 0 or foreign:
            chosen.append(entry)
            excess -= entry.size_bytes
    return chosen


def check(directory: EngineDirectory) -> Iterator[Checked]:
    """Look at every entry, its files' contents included, and say what is wrong with it; changes nothing."""
    for folder in directory.folders():
        if is_entry_name(folder.name):  # else it is somebody's own folder
            yield _checked(folder, trust_others=directory.trust_others)


def _checked(folder: Path, *, trust_others: bool) -> Checked:
    """What is found of the entry in a folder."""
    try:
        entry = examine(folder, trust_others=trust_others)
        for name in sorted(entry.files):
            entry.verify_file(entry.path / name)
    except UnsafeError as reason:
        return Checked(folder.name, "unsafe", str(reason), size_of(folder))
    except UnfitError as reason:
        return Checked(folder.name, "foreign" if reason.foreign else "damaged", str(reason), size_of(folder))
    except CacheError as error:
        return Checked(folder.name, "damaged", error.message, entry.size_bytes)
    return Checked(folder.name, "ok", "", entry.size_bytes)


def abandoned(directory: EngineDirectory) -> list[Path]:
    """What killed builds left behind: all that belongs to no process that still holds its lock. Changes nothing.

    Raises:
        CacheError: where the directory can't be read, or other users can change it.
    """
    path, trust_others = directory.path, directory.trust_others
    check_trust(path, trust_others=trust_others)
    with reading(path):
        building = inner(path, ".building", trust_others=trust_others)
        leftovers = [draft for draft in listing(building) if LEFTOVER.fullmatch(draft.name)]
        return [draft for draft in leftovers if _is_abandoned(directory, draft)]


def _is_abandoned(directory: EngineDirectory, draft: Path) -> bool:
    """Whether no process can be at work on a draft. Another machine's lock may not be seen here, so age decides."""
    digest, *rest = draft.name.split("-")
    found = status(draft, follow=False)
    elsewhere = len(rest) > 1 and rest[0] != HOST
    if elsewhere and found is not None and time.time() - found.st_mtime < FOREIGN_DRAFT_SECONDS:
        return False
    with exclusively(draft) as free:
        return free and not is_locked(directory.path, digest, trust_others=directory.trust_others)


def sweep(directory: EngineDirectory) -> int:
    """Delete what killed builds left behind; returns how many folders and files that were.

    Raises:
        CacheError: where the directory can't be read, or one of them can't be deleted.
    """
    leftovers = abandoned(directory)
    for path in leftovers:
        try:
            delete(path)
        except OSError as error:
            raise refusal(directory.path, error, "written") from error
    return len(leftovers)
