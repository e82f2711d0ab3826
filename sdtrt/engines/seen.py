"""The entries that were read, kept for as long as neither they nor their folders change on the disk."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from sdtrt.engines.entry import SIDECAR, Entry, ForeignEntry, UnfitError, is_entry_name
from sdtrt.engines.trust import examine

_OUTSIDE = ("", SIDECAR)  # of what is seen of any entry: its folder, its sidecar


@dataclass(frozen=True)
class _Seen:
    """An entry that was read, and the stamps of its folder and of what is in it, by which a change is noticed."""

    entry: Entry | ForeignEntry
    names: tuple[str, ...]
    stamps: tuple[object, ...]


class SeenEntries:
    """What is in the folders of an engine directory; each sidecar is read once.

    Args:
        trust_others: whether entries that other users can change count.
    """

    def __init__(self, *, trust_others: bool) -> None:
        self._trust_others = trust_others
        self._seen: dict[str, _Seen] = {}

    def look(self, folder: Path) -> Entry | ForeignEntry | None:
        """What is in a folder, as it was seen before where neither the folder nor any file of it has changed since.

        Returns:
            None where it is damaged, can be changed by others, or is no entry's.
        """
        seen = self._seen.get(folder.name)
        if seen is not None and seen.stamps == _stamps(folder, seen.names):
            return seen.entry
        stamps = stamp_of(folder)
        entry = self._what_is(folder)
        if entry is not None:
            files = tuple(entry.files) if isinstance(entry, Entry) else ()
            self._seen[folder.name] = _Seen(entry, (*_OUTSIDE, *files), stamps + _stamps(folder, files))
        return entry

    def keep_only(self, names: Collection[str]) -> None:
        """Forget all but the entries of these names."""
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}

    def _what_is(self, folder: Path) -> Entry | ForeignEntry | None:
        """What is in a folder, read anew."""
        try:
            return examine(folder, trust_others=self._trust_others)
        except UnfitError as reason:  # a foreign one is safe: that is looked at before its sidecar is read
            return ForeignEntry(folder) if reason.foreign and is_entry_name(folder.name) else None


def stamp_of(folder: Path) -> tuple[object, ...]:
    """What changes when an entry is used, made anew or removed."""
    return _stamps(folder, _OUTSIDE)


def _stamps(folder: Path, names: Iterable[str]) -> tuple[object, ...]:
    """What changes when files of a folder are written or replaced, or who may change them."""
    return tuple(_stamp(os.path.join(folder, name)) for name in names)  # noqa: PTH118 (`Path` takes a third of the time)


def _stamp(path: str) -> tuple[int, ...] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
