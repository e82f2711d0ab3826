"""The engine directory: find, list, make and remove entries.

    ENGINE_DIR/
      unet-onnx-fp16-1f0c…/       an entry: its files and `entry.json`, which holds the key they were made for
      .building/                  entries being made; renamed into place when they are complete
      .locks/  .timing/           one lock a key; TensorRT's timing caches
      .digests.json               sha256 of large weight files, by path, size and time

An entry is found by its key alone, and only if everything in its sidecar fits; what is wrong, partial or foreign is
never loaded, and a file is loaded only if its content is what was published. An entry is made in `.building`, flushed
to disk, then renamed: readers see all of it or nothing. Whoever runs an engine holds a shared lock on its sidecar, and
nothing is removed without an exclusive one. Engines run code by nature, so a directory that other users can change is
refused unless this user says otherwise. Nothing inside it is reached through a link.

How that is done lies in modules of one task each: `entry, trust, locks, publish, digests`. Which engine fits a request
is known in `find`, what goes to make room in `upkeep`. No backend is known here.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import CacheError, command_line
from sdtrt.common.files import listing, make_private_folder, status
from sdtrt.engines.digests import DigestMemo
from sdtrt.engines.entry import SIDECAR, Entry, ForeignEntry, entry_name, is_entry_name, key_digest
from sdtrt.engines.failures import reading, refusal, writing
from sdtrt.engines.locks import exclusively, in_use, locked
from sdtrt.engines.publish import Make, delete_drafts, discard, publish
from sdtrt.engines.seen import SeenEntries
from sdtrt.engines.trust import check_trust, make_inner, mend_of, mends_of_unsafe, require_own

ENVIRONMENT_VARIABLE = "SDTRT_ENGINE_DIR"

T = TypeVar("T")


def default_directory() -> Path:
    """The engine directory when none is named: $SDTRT_ENGINE_DIR, `./engines` if it is there, the user's cache.

    Raises:
        CacheError: where that is in a home directory which isn't known.
    """
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return in_home(Path(named))
    if Path("engines").is_dir():
        return Path("engines")
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or in_home(Path("~", "AppData", "Local")))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or in_home(Path("~", ".cache")))
    return base / "sdtrt" / "engines"


def in_home(path: Path) -> Path:
    """A path with `~` or `~user` at its beginning as that home directory. Raises `CacheError` where there is none."""
    try:
        return path.expanduser()
    except RuntimeError as error:  # containers run users that the system doesn't know
        raise CacheError(
            f"the engine directory would be {path}, and no home directory is known for {path.parts[0]}",
            hint="name a folder: --engine-dir FOLDER, or $SDTRT_ENGINE_DIR",
        ) from error


class EngineDirectory:
    """The one directory that holds exports and engines. Nothing is created before something is published.

    Args:
        path: the folder, which need not exist.
        trust_others: use it even if other users can change what is in it.

    Raises:
        CacheError: when `path` is no directory, or can't be read or written where it must; when other users can change
            it (not before something of it is used).
    """

    def __init__(self, path: Path, *, trust_others: bool = False) -> None:
        self.path = path.absolute()
        self.trust_others = trust_others
        self._warned = False
        self._digests = DigestMemo(self.path, trust_others=trust_others)
        self._seen = SeenEntries(trust_others=trust_others)
        self._looking = threading.Lock()
        with reading(self.path):
            found = status(self.path)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise CacheError(
                f"the engine directory {path} is a file",
                hint="name a folder: --engine-dir FOLDER, or $SDTRT_ENGINE_DIR",
            )

    def find(self, kind: str, key: Mapping[str, Any]) -> Entry | None:
        """The entry of a key, or None. Marks it as used.

        Raises:
            CacheError: where the directory can't be read, or other users can change it.
        """
        folder = self.path / entry_name(kind, key)
        check_trust(self.path, trust_others=self.trust_others)
        with reading(self.path):
            if status(folder, follow=False) is None:
                return None
        entry = self._seen.look(folder)
        if not isinstance(entry, Entry) or entry.digest != key_digest(kind, key):
            return None
        self.touch(entry)
        return entry

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All whole entries (of one kind), by name."""
        found = [seen for seen in self.all_entries() if isinstance(seen, Entry)]
        return [entry for entry in found if kind in (None, entry.kind)]

    def all_entries(self) -> list[Entry | ForeignEntry]:
        """All entries, those of other formats too, by name. Each sidecar is read once, whoever comes to look again."""
        folders = self.folders()
        with self._looking:
            found = [self._seen.look(folder) for folder in folders]
            self._seen.keep_only({folder.name for folder in folders})
        return [entry for entry in found if entry is not None]

    def unsafe(self) -> dict[str, str]:
        """The entries that are passed over because other users can change them, each with the command that mends it."""
        return mends_of_unsafe(self.folders(), trust_others=self.trust_others)

    def warn_of_unsafe(self, console: Console) -> bool:
        """Say once that entries are passed over because other users can change them, and what mends that.

        Returns:
            Whether it was said just now.
        """
        unsafe = {} if self._warned else self.unsafe()
        if unsafe:
            self._warned = True
            console.warn(
                f"{len(unsafe)} of the entries of {self.path} are passed over, for other users can change them:"
                f" {mend_of(unsafe)} mends that, if nobody has"
            )
        return bool(unsafe)

    def folders(self) -> list[Path]:
        """What may be entries, by name."""
        check_trust(self.path, trust_others=self.trust_others)
        with reading(self.path):
            folders = [path for path in listing(self.path) if not path.name.startswith(".")]
            return [folder for folder in folders if status(folder, follow=False)]  # a refusal is no empty directory

    def named(self, name: str) -> Entry:
        """The entry with this name, or the only one whose name begins so. Raises `CacheError`."""
        found = self._only({entry.name: entry for entry in self.all_entries()}, name)
        if isinstance(found, Entry):
            return found
        raise CacheError(
            f"{found.name} was made by another version of sdtrt",
            hint="use that version for it; sdtrt build makes an engine for this one",
        )

    def folder_named(self, name: str) -> Path:
        """Like `named`, but damaged entries count, too: what to remove. Raises `CacheError`."""
        return self._only({path.name: path for path in self.folders() if is_entry_name(path.name)}, name)

    def _only(self, named: Mapping[str, T], name: str) -> T:
        """What has this name, or the only one whose name begins so."""
        found = [named[name]] if name in named else []
        if name and not found:
            found = [one for full, one in named.items() if full.startswith(name)]
        if len(found) == 1:
            return found[0]
        wrong = f"{len(found)} entries that begin with" if found else "no entry named"
        raise CacheError(
            f"{self.path} has {wrong} {name!r}",
            hint=f"{command_line('sdtrt', 'engines', 'list', '--engine-dir', str(self.path))} shows the names",
        )

    def obtain(
        self, kind: str, key: Mapping[str, Any], make: Make, console: Console = QUIET, *, force: bool = False
    ) -> Entry:
        """The entry of a key: the one there is, or a new one.

        Args:
            kind: `onnx` or `engine`.
            key: what identifies it (plain JSON data; it must have `component` and `precision`).
            make: fills the folder that it is given and returns the entry's `info`. If it fails, nothing is left.
            console: says so when another process is making the same entry.
            force: make it again even if it is there.

        Two processes that want one key: one makes it, the other waits, then finds it, or makes it if the first one
        died. Where the file system has no locks, both may make it; the first one's is kept.

        Raises:
            CacheError: where the directory can't be read or written, other users can change it, or it vanishes.
            Exception: whatever `make` raises.
        """
        if not force and (entry := self.find(kind, key)) is not None:
            return entry
        digest, trust = key_digest(kind, key), self.trust_others
        with self._writing(), locked(self.path, digest, console, trust_others=trust) as exclusive:
            if not force and (entry := self.find(kind, key)) is not None:
                return entry
            if exclusive:  # what is there of this key is a dead builder's
                delete_drafts(self.path, digest, trust_others=trust)
            if status(self.path / entry_name(kind, key), follow=False) is not None and not force:
                self.warn_of_unsafe(console)
            return publish(self.path, kind, key, make, force=force, trust_others=trust)

    def touch(self, entry: Entry) -> None:
        """Mark an entry as used now (pruning goes by it); a read-only directory stays as it is."""
        with suppress(OSError):
            os.utime(entry.path / SIDECAR, follow_symlinks=os.utime not in os.supports_follow_symlinks)

    def remove(self, entry: Entry | Path) -> None:
        """Delete an entry, if it is still there. It vanishes at once (renamed first), then its space is freed.

        Raises:
            EntryInUseError: when a process is using it.
        """
        folder = entry if isinstance(entry, Path) else entry.path
        with self._writing(), exclusively(folder) as free:
            if not free:
                raise in_use(folder)
            discard(self.path, folder, trust_others=self.trust_others)

    def is_in_use(self, folder: Path) -> bool:
        """Whether a process holds the entry in a folder."""
        with reading(self.path), exclusively(folder) as free:
            return not free

    def timing_cache(self, name: str) -> Path:
        """Where a builder keeps its timing cache: one file for each TensorRT version and GPU.

        Raises:
            CacheError: where the directory can't be written, or other users can change it.
        """
        with self._writing():
            folder = make_inner(self.path, ".timing", trust_others=self.trust_others)
            file = folder / (re.sub(r"[^A-Za-z0-9.]+", "-", name) + ".cache")
            for path in (file, file.with_name(f"{file.name}.lock")):
                require_own(path, "file")
        return file

    def file_digest(self, path: Path) -> str:
        """sha256 (hex) of a file; that of a large one is remembered here (`DigestMemo`)."""
        return self._digests.digest(path)

    def knows_digest(self, path: Path) -> bool:
        """Whether `file_digest` has next to nothing to read of a file. Raises `OSError`."""
        return self._digests.knows(path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Make the directory where it is missing, and turn what it refuses into an error that says what to do."""
        try:
            make_private_folder(self.path)
        except OSError as error:
            raise refusal(self.path, error, "written") from error
        check_trust(self.path, trust_others=self.trust_others)
        with writing(self.path):
            yield
