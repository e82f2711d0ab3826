"""The engine directory: key, find, publish, list, prune.

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
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import CacheError, SdtrtError, command_line, quote
from sdtrt.common.files import (
    EXHAUSTED,
    FULL,
    LIMITS,
    MODE,
    MORE_FILES,
    NO_LOCKS,
    delete,
    fsync,
    limit_hint,
    listing,
    make_folders,
    private_folder,
    read_small_file,
    sha256_file,
    status,
    write_atomically,
)
from sdtrt.common.interrupts import undoing
from sdtrt.engines.digests import MEMO_BYTES, identity
from sdtrt.engines.entry import (
    MALFORMED,
    SIDECAR,
    SIDECAR_BYTES,
    Entry,
    ForeignEntry,
    UnfitError,
    entry_name,
    entry_of,
    is_published,
    key_digest,
    read_sidecar,
    size_of,
)
from sdtrt.engines.failures import REFUSALS
from sdtrt.engines.locks import exclusively, in_use
from sdtrt.engines.publish import HOST, Make, replace, seal
from sdtrt.engines.trust import (
    UnsafeError,
    gives_away,
    is_anothers,
    mend_of,
    replacers,
    require_own,
    safe_command,
    writers,
)
from sdtrt.specs import PruneSpec

ENVIRONMENT_VARIABLE = "SDTRT_ENGINE_DIR"
FOREIGN_DRAFT_SECONDS = 2 * 86400  # older than any build: until then another machine's draft may be under way


_NAME = re.compile(r"([A-Za-z0-9._]+-){3}[0-9a-f]{16}")  # of an entry's folder
_LEFTOVER = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{8})?-[a-z0-9_]+(-old)?|trash-[0-9]+")  # the names made in `.building`

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


@dataclass(frozen=True)
class Checked:
    """What `EngineDirectory.check` found of one entry.

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
class _Seen:
    """An entry that was read, and the stamps of its folder and of what is in it, by which a change is noticed."""

    entry: Entry | ForeignEntry
    names: tuple[str, ...]
    stamps: tuple[object, ...]


_OUTSIDE = ("", SIDECAR)  # of what is seen of any entry: its folder, its sidecar


def _stamps(folder: Path, names: Iterable[str]) -> tuple[object, ...]:
    """What changes when files of a folder are written or replaced, or who may change them."""
    return tuple(_stamp(os.path.join(folder, name)) for name in names)  # noqa: PTH118 (`Path` takes a third of the time)


def _stamp(path: str) -> tuple[int, ...] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


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
        self._hashed: dict[str, Mapping[str, Any]] = {}
        self._seen: dict[str, _Seen] = {}
        self._looking = threading.Lock()
        with self._reading():
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
        self._check_trust()
        with self._reading():
            if status(folder, follow=False) is None:
                return None
        entry = self._read(folder)
        if entry is None or entry.digest != key_digest(kind, key):
            return None
        self.touch(entry)
        return entry

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All whole entries (of one kind), by name."""
        found = [seen for seen in self.all_entries() if isinstance(seen, Entry)]
        return [entry for entry in found if kind in (None, entry.kind)]

    def all_entries(self) -> list[Entry | ForeignEntry]:
        """All entries, those of other formats too, by name. Each sidecar is read once, whoever comes to look again."""
        folders = self._folders()
        with self._looking:
            found = [self._see(folder) for folder in folders]
            names = {folder.name for folder in folders}
            self._seen = {name: seen for name, seen in self._seen.items() if name in names}
        return [entry for entry in found if entry is not None]

    def likely(self, model: str, backend: str) -> list[Path]:
        """The large files of the engines that a request for a model will run in all likelihood, the largest first.

        They are those used last, one for each component. Which ones fit is known only once heavy libraries are there.

        Args:
            model: its name as it was given when the engines were built.
            backend: the engines'; any for `auto`.
        """
        latest = self.latest(model, lambda entry: backend in ("auto", entry.key.get("backend")))
        files = [(size, entry.path / name) for entry in latest.values() for name, size in entry.files.items()]
        return [path for size, path in sorted(files, reverse=True) if size >= MEMO_BYTES]

    def latest(self, model: str, fits: Callable[[Entry], bool]) -> dict[str, Entry]:
        """For each component the engine of a model that was used last, of those that fit."""
        latest: dict[str, Entry] = {}
        for entry in sorted(self.entries("engine"), key=lambda entry: entry.last_used):
            if entry.info.get("model") == model and fits(entry):
                latest[str(entry.key.get("component"))] = entry
        return latest

    def check(self) -> Iterator[Checked]:
        """Look at every entry, its files' contents included, and say what is wrong with it; changes nothing."""
        for folder in self._folders():
            if not _NAME.fullmatch(folder.name):
                continue  # somebody's own folder
            try:
                entry = self._examine(folder)
                for name in sorted(entry.files):
                    entry._verify(entry.path / name)
            except UnsafeError as reason:
                yield Checked(folder.name, "unsafe", str(reason), size_of(folder))
            except UnfitError as reason:
                yield Checked(folder.name, "foreign" if reason.foreign else "damaged", str(reason), size_of(folder))
            except CacheError as error:
                yield Checked(folder.name, "damaged", error.message, entry.size_bytes)
            else:
                yield Checked(folder.name, "ok", "", entry.size_bytes)

    def unsafe(self) -> dict[str, str]:
        """The entries that are passed over because other users can change them, each with the command that mends it."""
        found = {}
        for folder in self._folders():
            try:
                self._examine(folder)
            except UnsafeError as reason:
                found[folder.name] = reason.mend
            except UnfitError:
                continue
        return found

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

    def _folders(self) -> list[Path]:
        """What may be entries, by name."""
        self._check_trust()
        with self._reading():
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
        return self._only({path.name: path for path in self._folders() if _NAME.fullmatch(path.name)}, name)

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
        with self._writing(), self._locked(key_digest(kind, key), console) as exclusive:
            if not force and (entry := self.find(kind, key)) is not None:
                return entry
            if exclusive:  # what is there of this key is a dead builder's
                for path in self._drafts(key_digest(kind, key)):
                    with exclusively(path) as free:
                        if free:  # else it was replaced while a process used it
                            delete(path)
            if status(self.path / entry_name(kind, key), follow=False) is not None and not force:
                self.warn_of_unsafe(console)
            return self._publish(kind, key, make, force=force)

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
            self._discard(folder)

    def require_free(self, folder: Path) -> None:
        """Raise `EntryInUseError` where a process holds the entry in a folder."""
        if self.is_in_use(folder):
            raise in_use(folder)

    def is_in_use(self, folder: Path) -> bool:
        """Whether a process holds the entry in a folder."""
        with self._reading(), exclusively(folder) as free:
            return not free

    def stamps(self) -> dict[Path, tuple[object, ...]]:
        """The `stamp_of` every folder that may be an entry's."""
        return {folder: self.stamp_of(folder) for folder in self._folders()}

    def stamp_of(self, folder: Path) -> tuple[object, ...]:
        """What changes when an entry is used, made anew or removed."""
        return _stamps(folder, _OUTSIDE)

    def prunable(self, spec: PruneSpec, is_foreign: Callable[[Entry], bool]) -> list[Entry | ForeignEntry]:
        """The entries that `spec` names, least recently used first; `is_foreign` says which this machine can't load.

        Those of another format count and go like others, and as foreign in any case.
        """
        entries = sorted(self.all_entries(), key=lambda entry: entry.last_used)
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

    def abandoned(self) -> list[Path]:
        """What killed builds left behind: all that belongs to no process that still holds its lock. Changes nothing.

        Raises:
            CacheError: where the directory can't be read, or other users can change it.
        """
        self._check_trust()
        with self._reading():
            leftovers = [path for path in listing(self._inner(".building")) if _LEFTOVER.fullmatch(path.name)]
            return [path for path in leftovers if self._is_abandoned(path)]

    def _is_abandoned(self, path: Path) -> bool:
        """Whether no process can be at work on a draft. Another machine's lock may not be seen here, so age decides."""
        digest, *rest = path.name.split("-")
        found = status(path, follow=False)
        elsewhere = len(rest) > 1 and rest[0] != HOST
        if elsewhere and found is not None and time.time() - found.st_mtime < FOREIGN_DRAFT_SECONDS:
            return False
        with exclusively(path) as free:
            return free and not self._is_locked(digest)

    def sweep(self) -> int:
        """Delete what killed builds left behind; returns how many folders and files that were.

        Raises:
            CacheError: where the directory can't be read, or one of them can't be deleted.
        """
        leftovers = self.abandoned()
        for path in leftovers:
            try:
                delete(path)
            except OSError as error:
                raise self._refusal(error, "written") from error
        return len(leftovers)

    def timing_cache(self, name: str) -> Path:
        """Where a builder keeps its timing cache: one file for each TensorRT version and GPU.

        Raises:
            CacheError: where the directory can't be written, or other users can change it.
        """
        with self._writing():
            file = self._make_inner(".timing") / (re.sub(r"[^A-Za-z0-9.]+", "-", name) + ".cache")
            for path in (file, file.with_name(f"{file.name}.lock")):
                require_own(path, "file")
        return file

    def file_digest(self, path: Path) -> str:
        """sha256 of a file; that of a large one is remembered for as long as its path, size and times stay the same."""
        name, *stamp = identity(path.resolve())
        size_bytes = int(stamp[0])
        if size_bytes < MEMO_BYTES:
            return sha256_file(path)
        memo = self._read_digests() | self._hashed
        known = memo.get(name)
        if isinstance(known, dict) and known.get("stamp") == stamp and isinstance(known.get("sha256"), str):
            return str(known["sha256"])
        digest = sha256_file(path)
        if identity(path.resolve()) == (name, *stamp):  # else nobody knows which of two contents that is of
            self._remember(name, {"stamp": stamp, "sha256": digest})
        return digest

    def _remember(self, name: str, known: Mapping[str, Any]) -> None:
        """Write a file's digest into the memo; one that can't be written is this process's own."""
        self._hashed[name] = known
        with suppress(OSError):
            self._make_folder()
            write_atomically(self._digests, json.dumps(self._read_digests() | {name: known}))

    @property
    def _digests(self) -> Path:
        return self.path / ".digests.json"

    def _read_digests(self) -> dict[str, Any]:
        """The memo of file digests; empty where there is none, it can't be read as one, or others can change it."""
        with suppress(OSError, ValueError, RecursionError):
            if not self.trust_others and writers(self._digests, self._digests.lstat()):
                return {}
            memo = json.loads(read_small_file(self._digests, SIDECAR_BYTES, follow=False))
            if isinstance(memo, dict):
                return memo
        return {}

    def _read(self, folder: Path) -> Entry | None:
        """The entry in a folder; None unless everything in its sidecar fits and its files are there at full size."""
        found = self._see(folder)
        return found if isinstance(found, Entry) else None

    def _see(self, folder: Path) -> Entry | ForeignEntry | None:
        """What is in a folder, as it was seen before where neither the folder nor any file of it has changed since."""
        seen = self._seen.get(folder.name)
        if seen is not None and seen.stamps == _stamps(folder, seen.names):
            return seen.entry
        stamps = _stamps(folder, _OUTSIDE)
        entry = self._what_is(folder)
        if entry is not None:
            files = tuple(entry.files) if isinstance(entry, Entry) else ()
            self._seen[folder.name] = _Seen(entry, (*_OUTSIDE, *files), stamps + _stamps(folder, files))
        return entry

    def _what_is(self, folder: Path) -> Entry | ForeignEntry | None:
        """What is in a folder; None where it is damaged, can be changed by others, or is no entry's."""
        try:
            return self._examine(folder)
        except UnfitError as reason:  # a foreign one is safe: that is looked at before its sidecar is read
            return ForeignEntry(folder) if reason.foreign and _NAME.fullmatch(folder.name) else None

    def _examine(self, folder: Path) -> Entry:
        """The entry in a folder; its files' contents are not read. Raises `UnfitError`."""
        try:
            self._check_piece(folder, stat.S_ISDIR)
            self._check_piece(folder / SIDECAR, stat.S_ISREG)
            entry = entry_of(folder, read_sidecar(folder))
            for name in entry.files:
                self._check_piece(folder / name, stat.S_ISREG)
        except FileNotFoundError as error:
            raise UnfitError(f"{Path(error.filename).name} is missing") from error
        except OSError as error:
            if error.errno in LIMITS:  # that says nothing of the entry
                raise self._refusal(error, "read") from error
            raise UnfitError(f"it can't be read: {error.strerror}") from error
        except MALFORMED as error:
            raise UnfitError(f"{SIDECAR} is damaged") from error
        for name, size in entry.files.items():
            if (found := (folder / name).stat()).st_size != size:
                raise UnfitError(f"{name} has {found.st_size} of {size} bytes")
        return entry

    def _check_piece(self, path: Path, is_kind: Callable[[int], bool]) -> None:
        """Raise `UnfitError` for a link, for what is of another kind, and for what other users can change."""
        found = path.lstat()
        if not is_kind(found.st_mode):
            raise UnfitError(f"{path.name} is a link, or no {'folder' if is_kind is stat.S_ISDIR else 'file'}")
        if not self.trust_others and (who := writers(path, found)):
            raise UnsafeError(f"{path.name} can be changed by {who}", safe_command(self.path, found))

    def _check_trust(self) -> None:
        """Refuse a directory that others can change: engines run code, and whoever writes them chooses which."""
        if self.trust_others:
            return
        with self._reading():
            found = status(self.path)
            if found is not None:
                self._check_folder(Path(os.path.realpath(self.path)), found, "it")
            for place, other in replacers(self.path):
                # Another user's folder is not to be taken away from them for what lies in it.
                mend = "" if is_anothers(place.lstat()) else f"chmod go-w {quote(str(place))}, or "
                raise self._unsafe(other, str(place), mend)

    def _check_folder(self, folder: Path, found: os.stat_result, where: str) -> None:
        """Refuse a folder that others can change, or where they could change what is made in it."""
        if who := writers(folder, found):
            raise self._unsafe(who, where, f"{safe_command(self.path, found)}, or ")
        if gives_away(folder):
            mend = command_line("setfacl", "-R", "-k", str(self.path))
            raise self._unsafe("those whom its default access list names", f"what is made in {where}", f"{mend}, or ")

    def _inner(self, name: str) -> Path:
        """A folder of the directory's own, if it is there; else raises `CacheError` for what has its name.

        What others can change is refused, as the directory itself would be: what they put there would be ours.
        """
        folder = self.path / name
        found = require_own(folder, "folder")
        if found is not None and not self.trust_others:
            self._check_folder(folder, found, str(folder))
        return folder

    def _make_inner(self, name: str) -> Path:
        """A folder of the directory's own, made if it is not there. Raises `CacheError` for what has its name."""
        with suppress(FileExistsError):
            (self.path / name).mkdir(mode=MODE)
        return self._inner(name)

    def _unsafe(self, who: str, where: str, mend: str) -> CacheError:
        """The error for a directory that others can change."""
        return CacheError(
            f"the engine directory {self.path} is not safe: {who} can change {where}, and engines run code",
            hint=f"{mend}name another --engine-dir; --trust-engine-dir takes it as it is",
        )

    def _publish(self, kind: str, key: Mapping[str, Any], make: Make, *, force: bool) -> Entry:
        """Make an entry in a temporary folder, then rename it into place."""
        building = self._make_inner(".building")
        target = self.path / entry_name(kind, key)
        with private_folder(building, f"{key_digest(kind, key)}-{HOST}-") as draft:
            try:
                info = make(draft)
                seal(draft, kind, key, info)
            except SdtrtError as error:
                if status(draft) is None:  # other libraries say that in their own ways
                    raise self._vanished(draft) from error
                raise
            draft.chmod(stat.S_IMODE(self.path.stat().st_mode))  # as readable as the directory that it goes into
            if not force and (other := self._read(target)) is not None:  # without locks, another one was faster
                return other
            replace(target, draft)
            fsync(building)
            fsync(self.path)
        entry = self._read(target)
        if entry is None:
            raise CacheError(f"{target} vanished while it was published", hint="run the command again")
        return entry

    def _discard(self, folder: Path) -> None:
        """Rename a folder out of sight, then delete it; one that another process has removed is gone already."""
        trash = self._make_inner(".building") / f"trash-{time.time_ns()}"
        with undoing(partial(delete, trash)):
            with suppress(FileNotFoundError):
                folder.rename(trash)
            with suppress(OSError):  # it is out of the way: what is left of it is swept later
                delete(trash)

    def _drafts(self, digest: str) -> list[Path]:
        """What this machine's builders of one key have left, or are making."""
        found = [path for path in listing(self._inner(".building")) if path.name.startswith(f"{digest}-{HOST}-")]
        return [path for path in found if _LEFTOVER.fullmatch(path.name)]

    def _make_folder(self) -> None:
        """Make the directory if it isn't there, for this user alone to write; flushed, as what goes into it is.

        So are the folders above it: `mkdir(parents=True)` makes those as the umask has it, then they may be refused.
        """
        for folder in make_folders(self.path, MODE):
            fsync(folder.parent)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn failures to look into the directory into an error that says what to do."""
        try:
            yield
        except OSError as error:
            raise self._refusal(error, "read") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the directory refuses into an error that says what to do; other failures stay what they are."""
        try:
            self._make_folder()
        except OSError as error:
            raise self._refusal(error, "written") from error
        self._check_trust()
        try:
            yield
        except OSError as error:
            inside = Path(str(error.filename or self.path)).is_relative_to(self.path)
            if error.errno == errno.ENOENT and error.filename and inside:
                raise self._vanished(error.filename) from error
            if error.errno not in REFUSALS or not inside:
                raise
            raise self._refusal(error, "written") from error

    def _vanished(self, path: Path | str) -> CacheError:
        """The error for what is gone while it is being made."""
        return CacheError(
            f"{path} has vanished: something else removes from the engine directory {self.path}",
            hint="run the command again, and leave what is in .building to it until it ends",
        )

    def _refusal(self, error: OSError, wanted: str) -> CacheError:
        """The error for what the directory refuses: to be `read` or `written`."""
        if error.errno in EXHAUSTED:
            return CacheError(f"too many files are open to use the engine directory {self.path}", hint=MORE_FILES)
        space = "free some space there, or " if error.errno in FULL else ""
        elsewhere = f"{space}name another folder: --engine-dir FOLDER, or $SDTRT_ENGINE_DIR"
        return CacheError(
            f"the engine directory {self.path} can't be {wanted}: {error.strerror}",
            hint=limit_hint(error) or elsewhere,
        )

    @contextmanager
    def _locked(self, digest: str, console: Console) -> Iterator[bool]:
        """Hold the key's lock; if another process holds it, say so and wait. The system frees a dead holder's lock.

        Yields whether the lock keeps others out: some network file systems have none.
        """
        from filelock import FileLock, Timeout

        self._make_inner(".locks")
        file = self._lock_file(digest)
        lock = FileLock(file, timeout=0)
        waited = False
        try:
            lock.acquire()
        except Timeout:
            with console.activity("waiting for another process that is making the same entry"):
                lock.acquire(timeout=-1)
            waited = True
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            console.warn(f"{self.path} is on a file system without locks: other processes may make the same entry")
            yield False
            return
        try:
            if waited and not any(is_published(path, digest) for path in listing(self.path)):
                console.note("that process ended without it: making it here")
            yield True
        finally:
            lock.release()

    def _is_locked(self, digest: str) -> bool:
        """Whether some process is making the entry of this key. Creates nothing."""
        from filelock import FileLock

        file = self._lock_file(digest)
        if status(file, follow=False) is None:
            return False
        try:
            with FileLock(file, timeout=0):
                return False
        except (OSError, NotImplementedError):  # `Timeout` is one; a lock that may not even be tried may be held
            return True

    def _lock_file(self, digest: str) -> Path:
        """The file that is locked for a key. Raises `CacheError` where a link or a folder has its name."""
        file = self._inner(".locks") / f"{digest}.lock"
        require_own(file, "file")
        return file
